"""
A point and four goals at equal reward: does the policy reach all of them?

    python benchmarks/multigoal.py

Trains DQS and SAC for the same steps at the same fixed temperature, runs 200 stochastic episodes of each, prints the
success rate and the entropy of the goals reached divided by ln 4 (1: all goals equally often), and saves a plot of the
trajectories over the critic's value of the best action. Every run is a row of ``benchmarks/results/multigoal.csv``. About
fifteen minutes on one core for one seed.
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from common import RESULTS, append_rows, print_provenance, print_table, use_one_thread
from matplotlib.figure import Figure
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_dqs import DQS
from sb3_dqs.envs.multigoal import draw_goals

# Random steps before learning starts: they find all goals
LEARNING_STARTS = 2000
N_EPISODES = 200
ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {"DQS": DQS, "SAC": SAC}


def run_episodes(model: OffPolicyAlgorithm, n_episodes: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Trajectories of stochastic episodes, and how many of them reached each goal."""
    env = gym.make("sb3_dqs/MultiGoal-v0")
    trajectories, counts = [], np.zeros(4)
    for episode in range(n_episodes):
        obs, info = env.reset(seed=episode)
        positions, done = [obs], False
        while not done:
            action, _ = model.predict(obs, deterministic=False)
            obs, _, terminated, truncated, info = env.step(action)
            positions.append(obs)
            done = terminated or truncated
        if "goal" in info:
            counts[info["goal"]] += 1
        trajectories.append(np.array(positions))
    return trajectories, counts


def normalized_entropy(counts: np.ndarray) -> float:
    """Entropy of the goals reached, divided by that of the uniform distribution."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


def plot(results: dict[str, Any], path: Path) -> None:
    """Trajectories of each algorithm over ``max_a Q(s, a)``."""
    figure = Figure(figsize=(5 * len(results), 4.4), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)
    axis = np.linspace(-7, 7, 57, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    candidates = th.as_tensor(np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2), axis=-1).reshape(-1, 2), dtype=th.float32)
    for ax, (name, (model, trajectories)) in zip(axes[0], results.items(), strict=True):
        states = th.as_tensor(grid.reshape(-1, 2))
        with th.no_grad():
            pairs = states.repeat_interleave(len(candidates), 0), candidates.repeat(len(states), 1)
            q_values = th.cat(model.critic(*pairs), dim=1).min(dim=1).values.reshape(len(states), -1).max(dim=1).values
        contours = ax.contourf(axis, axis, q_values.reshape(grid.shape[:2]), levels=20, cmap="viridis")
        figure.colorbar(contours, ax=ax, label="largest Q of the state")
        draw_goals(ax)
        for trajectory in trajectories[:100]:
            ax.plot(*trajectory.T, color="white", linewidth=0.6, alpha=0.7)
        ax.set(title=name, aspect="equal", xlim=(-7, 7), ylim=(-7, 7))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ent-coef", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algos", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    args = parser.parse_args()
    use_one_thread()
    print_provenance()

    rows = []
    for seed in args.seeds:
        results = {}
        for name in args.algos:
            kwargs = {"ent_coef": args.ent_coef, "learning_starts": LEARNING_STARTS, "seed": seed, "device": "cpu"}
            model = ALGORITHMS[name]("MlpPolicy", "sb3_dqs/MultiGoal-v0", **kwargs)
            model.learn(args.steps, log_interval=10**9)
            trajectories, counts = run_episodes(model, N_EPISODES)
            results[name] = (model, trajectories)
            row = {"algorithm": name, "steps": args.steps, "ent_coef": args.ent_coef, "seed": seed}
            row |= {"success": f"{counts.sum() / N_EPISODES:.3f}", "goal_entropy": f"{normalized_entropy(counts):.3f}"}
            rows.append({**row, "goals": " ".join(f"{count:.0f}" for count in counts)})
            append_rows(RESULTS / "multigoal.csv", rows[-1:])
        plot(results, RESULTS / f"multigoal_{seed}.png")
    print_table(rows[0], [row.values() for row in rows])


if __name__ == "__main__":
    main()
