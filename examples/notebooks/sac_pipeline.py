# %% [markdown]
# # DQS in a pipeline made for SAC
#
# Vectorised environments, normalisation, an evaluation and a checkpoint callback: one name is exchanged. 2,000 steps of both
# take about two minutes on one core; `STEPS=400 python sac_pipeline.py` is a quick look.

# %%
import os
from pathlib import Path

import numpy as np
import torch as th
from matplotlib.figure import Figure
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dqs import DQS

STEPS = int(os.environ.get("STEPS", "2000"))
OUT = Path(os.environ.get("OUT", "."))
th.set_num_threads(1)  # networks this small are no faster with more


# %%
def train(algorithm, name):
    """The pipeline: nothing in it is of one algorithm."""
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0), norm_reward=False)
    eval_env = VecNormalize(make_vec_env("Pendulum-v1", seed=1), norm_reward=False, training=False)
    every = max(STEPS // 6, 200) // env.num_envs
    evaluation = EvalCallback(eval_env, eval_freq=every, n_eval_episodes=3, log_path=str(OUT / name), verbose=0)
    checkpoints = CheckpointCallback(every, str(OUT / name), save_vecnormalize=True)
    model = algorithm("MlpPolicy", env, train_freq=1, gradient_steps=-1, seed=0, device="cpu")
    model.learn(STEPS, callback=[evaluation, checkpoints])
    results = np.load(OUT / name / "evaluations.npz")
    return results["timesteps"], results["results"]


# %%
figure = Figure(figsize=(5, 3.4), layout="constrained")
ax = figure.subplots()
for algorithm, color in ((SAC, "tab:orange"), (DQS, "tab:blue")):
    steps, returns = train(algorithm, algorithm.__name__)
    print(algorithm.__name__, dict(zip(steps.tolist(), returns.mean(axis=1).round().tolist(), strict=True)))
    ax.plot(steps, returns.mean(axis=1), marker=".", color=color, label=algorithm.__name__)
    ax.fill_between(steps, returns.min(axis=1), returns.max(axis=1), color=color, alpha=0.2, linewidth=0)
ax.set(title="Pendulum-v1, one seed", xlabel="steps", ylabel="return: mean and range of 3 episodes")
ax.legend(loc="lower right")
figure.savefig(OUT / "sac_pipeline.png", dpi=120)
