# %% [markdown]
# # First steps
#
# Train DQS on Pendulum-v1, save it, load it, evaluate it, and look at its policy. 3,000 steps take about two minutes on one
# core; `STEPS=300 python first_steps.py` is a quick look.

# %%
import os
from pathlib import Path

import gymnasium as gym
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dqs import DQS, diagnose, plot_policy

STEPS = int(os.environ.get("STEPS", "3000"))
OUT = Path(os.environ.get("OUT", "."))
th.set_num_threads(1)  # networks this small are no faster with more

# %% [markdown]
# ## Train
#
# The arguments are those of SAC. `verbose=1` prints the metrics.

# %%
model = DQS("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
model.learn(total_timesteps=STEPS)
mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=5)
print(f"Return of 5 episodes with deterministic actions: {mean:.0f} +/- {std:.0f} (a random policy: about -1200)")

# %% [markdown]
# ## Save and load

# %%
model.save(OUT / "first_steps")
model = DQS.load(OUT / "first_steps", env=gym.make("Pendulum-v1"), device="cpu")

# %% [markdown]
# ## Act
#
# Without `deterministic=True` an action is drawn from the policy.

# %%
obs = model.get_env().reset()
print("drawn:        ", [round(float(model.predict(obs)[0][0, 0]), 2) for _ in range(5)])
print("deterministic:", round(float(model.predict(obs, deterministic=True)[0][0, 0]), 2))

# %% [markdown]
# ## Is the policy where it should be?
#
# `diagnose` compares it with exp(Q / ent_coef) / Z: a `distance` of 1 is indistinguishable.

# %%
print(diagnose(model, obs))
plot_policy(model, obs).savefig(OUT / "first_steps.png", dpi=120)
