"""
A bandit with four good actions of unequal value: does the policy keep all of them, in the right shares?

    python benchmarks/bandit.py

Trains DQS and SAC for the same steps at the same fixed temperature, draws 5,000 actions from each, prints the share of
every mode beside the exact one (``exp(r / ent_coef) / Z`` integrated on a grid), and saves 1,000 actions of the last seed
(``benchmarks/results/bandit_actions.csv``) and a figure of them. Every run is a row of ``benchmarks/results/bandit.csv``.
``--report-only`` draws the figure from the file. About ten minutes on one core per seed.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from common import RESULTS, append_rows, print_provenance, print_table, use_one_thread
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3 import SAC

from sb3_dqs import DQS
from sb3_dqs.diagnostics.metrics import box_grid

CENTERS = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
HEIGHTS = np.array([0.85, 0.9, 0.95, 1.0])
WIDTH = 0.2
ACTIONS = RESULTS / "bandit_actions.csv"


def reward(actions: np.ndarray) -> np.ndarray:
    """Four Gaussian bumps of unequal height, from actions (..., 2) to (...)."""
    squared_distances = ((actions[..., None, :] - CENTERS) ** 2).sum(axis=-1)
    return (HEIGHTS * np.exp(-squared_distances / (2 * WIDTH**2))).sum(axis=-1)


def mode_of(actions: np.ndarray) -> np.ndarray:
    """Index of the quadrant, in the middle of which is a bump, from actions (..., 2) to (...)."""
    return 2 * (actions[..., 0] > 0) + (actions[..., 1] > 0)


def boltzmann_grid(ent_coef: float, n: int = 401) -> tuple[np.ndarray, np.ndarray]:
    """
    The exact policy ``exp(r / ent_coef) / Z`` on a grid.

    :param ent_coef: temperature
    :param n: points per dimension
    :return: grid of shape (n, n, 2) and probabilities of shape (n, n) that add up to 1
    """
    grid = box_grid(2, n, th.float64).numpy()
    probabilities = th.as_tensor(reward(grid) / ent_coef).softmax(dim=0)
    return grid.reshape(n, n, 2), probabilities.reshape(n, n).numpy()


class BanditEnv(gym.Env):
    """One state, one step, reward of :func:`reward`."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray):
        return np.zeros(1, np.float32), float(reward(action)), True, False, {}


def plot(actions: dict[str, np.ndarray], grid: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """Actions of each algorithm over the exact density."""
    figure = Figure(figsize=(4 * len(actions), 4), layout="constrained")
    axes = figure.subplots(1, len(actions), sharey=True)
    for ax, (name, drawn) in zip(axes, actions.items(), strict=True):
        ax.contourf(grid[..., 0], grid[..., 1], probabilities, levels=20, cmap="Greys")
        ax.plot(*drawn.T, ".", markersize=2, color="tab:blue" if name == "DQS" else "tab:orange")
        ax.set(title=f"{name}: 1,000 actions", xlabel="first action dimension", aspect="equal", xlim=(-1, 1), ylim=(-1, 1))
    axes[0].set_ylabel("second action dimension")
    figure.suptitle("grey: exact density exp(Q / ent_coef) / Z")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--ent-coef", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--report-only", action="store_true", help="draw the figure from the file")
    args = parser.parse_args()
    use_one_thread()
    print_provenance()

    grid, probabilities = boltzmann_grid(args.ent_coef)
    if not args.report_only:
        train(args, grid, probabilities)
    actions = {name: rows[["first", "second"]].to_numpy() for name, rows in pd.read_csv(ACTIONS).groupby("algorithm")}
    plot(actions, grid, probabilities, RESULTS / "bandit.png")
    print("figure:", RESULTS / "bandit.png")


def train(args: argparse.Namespace, grid: np.ndarray, probabilities: np.ndarray) -> None:
    """Train, and save shares and actions."""
    exact = np.bincount(mode_of(grid).ravel(), probabilities.ravel())
    modes = [f"mode_{mode}" for mode in range(4)]
    lines, actions = [["exact", "", *(f"{share:.3f}" for share in exact), ""]], {}
    for seed in args.seeds:
        for name, algorithm in (("DQS", DQS), ("SAC", SAC)):
            model = algorithm("MlpPolicy", BanditEnv(), ent_coef=args.ent_coef, seed=seed, device="cpu")
            model.learn(args.steps, log_interval=10**9)
            actions[name], _ = model.predict(np.zeros((5000, 1), np.float32), deterministic=False)
            shares = np.bincount(mode_of(actions[name]), minlength=4) / 5000
            cells = [f"{value:.3f}" for value in (*shares, np.abs(shares - exact).max())]
            row = {"algorithm": name, "steps": args.steps, "ent_coef": args.ent_coef, "seed": seed}
            append_rows(RESULTS / "bandit.csv", [row | dict(zip([*modes, "largest_error"], cells, strict=True))])
            lines.append([name, seed, *cells])
    print_table(["", "seed", *modes, "largest error"], lines)
    frames = [pd.DataFrame(drawn[:1000].round(3), columns=["first", "second"]) for drawn in actions.values()]
    pd.concat(frames, keys=actions, names=["algorithm", None]).droplevel(1).to_csv(ACTIONS, lineterminator="\n")


if __name__ == "__main__":
    main()
