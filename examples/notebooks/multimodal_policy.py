# %% [markdown]
# # A policy with four modes, while it learns
#
# A bandit with one state, two action dimensions and four good actions of unequal value. The figure shows 1,000 actions of
# DQS at four moments of its training, over the exact density exp(r / ent_coef) / Z, and those of SAC at the end.
# 2,000 steps of both take about two minutes on one core; `STEPS=400 python multimodal_policy.py` is a quick look.

# %%
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from sb3_dqs import DQS

STEPS = int(os.environ.get("STEPS", "2000"))
OUT = Path(os.environ.get("OUT", "."))
ENT_COEF = 0.1
CENTERS = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
HEIGHTS = np.array([0.85, 0.9, 0.95, 1.0])
th.set_num_threads(1)  # networks this small are no faster with more


# %%
def reward(actions):
    """Four Gaussian bumps, from actions (..., 2) to (...)."""
    squared_distances = ((actions[..., None, :] - CENTERS) ** 2).sum(axis=-1)
    return (HEIGHTS * np.exp(-squared_distances / (2 * 0.2**2))).sum(axis=-1)


class Bandit(gym.Env):
    """One state, one step."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(reward(action)), True, False, {}


def draw(model):
    return model.predict(np.zeros((1000, 1), np.float32))[0]


class Pictures(BaseCallback):
    """Keeps 1,000 actions at four moments of the training."""

    def __init__(self):
        super().__init__()
        self.steps = [STEPS // 10, STEPS // 4, STEPS // 2, STEPS]
        self.actions = {}

    def _on_step(self):
        if self.num_timesteps in self.steps:
            self.actions[f"DQS, {self.num_timesteps:,} steps"] = draw(self.model)
        return True


# %% [markdown]
# ## Train both at the same temperature

# %%
pictures = Pictures()
DQS("MlpPolicy", Bandit(), ent_coef=ENT_COEF, seed=0, device="cpu").learn(STEPS, callback=pictures)
sac = SAC("MlpPolicy", Bandit(), ent_coef=ENT_COEF, seed=0, device="cpu").learn(STEPS)
panels = {**pictures.actions, f"SAC, {STEPS:,} steps": draw(sac)}

# %% [markdown]
# ## Shares of the modes

# %%
axis = np.linspace(-1, 1, 201)
grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
density = np.exp(reward(grid) / ENT_COEF)


def shares(actions, weights=None):
    quadrants = 2 * (actions[..., 0] > 0) + (actions[..., 1] > 0)
    counts = np.bincount(quadrants.ravel(), None if weights is None else weights.ravel(), minlength=4)
    return np.round(counts / counts.sum(), 2)


print("exact:", shares(grid, density))
for name, actions in panels.items():
    print(f"{name}: {shares(actions)}")

# %% [markdown]
# ## Picture

# %%
figure = Figure(figsize=(3 * len(panels), 3.3), layout="constrained")
for ax, (name, actions) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
    ax.contourf(axis, axis, density.T, levels=20, cmap="Greys")
    ax.plot(*actions.T, ".", markersize=2, color="tab:orange" if name.startswith("SAC") else "tab:blue")
    ax.set(
        title=name,
        xlabel="first action dimension",
        xticks=[-1, 0, 1],
        yticks=[-1, 0, 1],
        aspect="equal",
        xlim=(-1, 1),
        ylim=(-1, 1),
    )
figure.axes[0].set_ylabel("second action dimension")
figure.savefig(OUT / "multimodal_policy.png", dpi=120)
