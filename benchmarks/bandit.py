"""
A bandit with four good actions of unequal value: does the policy keep all of them, in the right shares?

    python benchmarks/bandit.py

Trains DQS and SAC for the same steps at the same fixed temperature, draws 5,000 actions from each, prints the share of
every mode beside the exact one (``exp(r / ent_coef) / Z`` integrated on a grid), and saves a figure.
Takes about ten minutes on one core.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch as th
from bandit_env import BanditEnv, boltzmann_grid, mode_of
from stable_baselines3 import SAC

from sb3_dqs import DQS

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(actions: dict[str, np.ndarray], grid: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """Actions of each algorithm over the exact density."""
    figure, axes = plt.subplots(1, len(actions), figsize=(4 * len(actions), 4), sharey=True, layout="constrained")
    for ax, (name, drawn) in zip(axes, actions.items(), strict=True):
        ax.contourf(grid[..., 0], grid[..., 1], probabilities, levels=20, cmap="Greys")
        ax.plot(*drawn[:1000].T, ".", markersize=2, color="tab:blue" if name == "DQS" else "tab:orange")
        ax.set(title=f"{name}: 1,000 actions", xlabel="first action dimension", aspect="equal", xlim=(-1, 1), ylim=(-1, 1))
    axes[0].set_ylabel("second action dimension")
    figure.suptitle("grey: exact density exp(Q / ent_coef) / Z")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--ent-coef", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bandit.png"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)

    grid, probabilities = boltzmann_grid(args.ent_coef)
    exact = np.bincount(mode_of(grid).ravel(), probabilities.ravel())
    print("| | " + " | ".join(f"mode {mode}" for mode in range(4)) + " | largest error |\n|" + "---|" * 6)
    print("| exact | " + " | ".join(f"{share:.3f}" for share in exact) + " | |", flush=True)
    actions = {}
    for name, algorithm in (("DQS", DQS), ("SAC", SAC)):
        model = algorithm("MlpPolicy", BanditEnv(), ent_coef=args.ent_coef, seed=args.seed, device="cpu")
        model.learn(args.steps, log_interval=10**9)
        actions[name], _ = model.predict(np.zeros((5000, 1), np.float32), deterministic=False)
        shares = np.bincount(mode_of(actions[name]), minlength=4) / 5000
        error = np.abs(shares - exact).max()
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + f" | {error:.3f} |", flush=True)
    plot(actions, grid, probabilities, args.out)
    print("figure:", args.out)


if __name__ == "__main__":
    main()
