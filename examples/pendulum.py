"""Train DQS on Pendulum-v1 with a progress bar, and print an evaluation. A few minutes on one core."""

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dqs import DQS

th.set_num_threads(1)  # networks this small are no faster with more
model = DQS("MlpPolicy", "Pendulum-v1", seed=0)
print("Training on Pendulum-v1 for 5,000 steps ...", flush=True)
model.learn(total_timesteps=5_000, progress_bar=True)

mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=20, deterministic=True)
print(f"Pendulum-v1, 20 deterministic episodes after {model.num_timesteps} steps: {mean:.0f} +/- {std:.0f}")
print("(a random policy gets about -1200, a policy that swings the pendulum up and keeps it there about -150)")
