"""Train DQS on Pendulum-v1 with a progress bar, print an evaluation, and picture it. A few minutes on one core."""

import matplotlib
import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dqs import DQS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

th.set_num_threads(1)  # networks this small are no faster with more
model = DQS("MlpPolicy", "Pendulum-v1", seed=0)
print("Training on Pendulum-v1 for 7,000 steps ...", flush=True)
model.learn(total_timesteps=7_000, progress_bar=True)

angles = []  # from upright, of every step of every episode


def note_angle(variables, _):
    cosine, sine, _ = variables["observations"][0]
    angles.append(np.degrees(np.arctan2(sine, cosine)))


mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=100, deterministic=True, callback=note_angle)
print(f"Pendulum-v1, 100 deterministic episodes after {model.num_timesteps} steps: {mean:.0f} +/- {std:.0f}")
print("(a random policy gets about -1200, a policy that swings the pendulum up and keeps it there about -150)")

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.plot(np.abs(np.reshape(angles, (100, -1))).T, color="tab:blue", alpha=0.2)
ax.set(xlabel="step of the episode", ylabel="degrees from upright", ylim=(0, 180), title="Pendulum-v1: 100 episodes of DQS")
figure.savefig("pendulum.png", dpi=100)
print("picture: pendulum.png")
