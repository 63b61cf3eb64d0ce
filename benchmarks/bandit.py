"""
A bandit with four good actions of unequal value: does the policy keep all of them, in the right shares?

    python benchmarks/bandit.py

Trains DQS and SAC for the same steps at the same fixed temperature, draws 5,000 actions from each, prints the share of
every mode beside the exact one (``exp(r / ent_coef) / Z`` integrated on a grid), and saves a figure of the last seed. Every
run is a row of ``benchmarks/results/bandit.csv``. About ten minutes on one core per seed.
"""

import argparse
from pathlib import Path

import numpy as np
from bandit_env import BanditEnv, boltzmann_grid, mode_of
from common import RESULTS, append_rows, print_provenance, print_table, use_one_thread
from matplotlib.figure import Figure
from stable_baselines3 import SAC

from sb3_dqs import DQS


def plot(actions: dict[str, np.ndarray], grid: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """Actions of each algorithm over the exact density."""
    figure = Figure(figsize=(4 * len(actions), 4), layout="constrained")
    axes = figure.subplots(1, len(actions), sharey=True)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    use_one_thread()
    print_provenance()

    grid, probabilities = boltzmann_grid(args.ent_coef)
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
    plot(actions, grid, probabilities, RESULTS / "bandit.png")
    print("figure:", RESULTS / "bandit.png")


if __name__ == "__main__":
    main()
