"""
A moving picture of what DQS and SAC have learned in Fork: which of the four openings do they know?

    python benchmarks/fork_episodes.py

Trains both as ``exploration.py`` does (temperature 1, 4,000 steps) and lets each play 40 stochastic episodes, whose positions
are the rows of ``benchmarks/results/fork_episodes.csv``. ``--report-only`` draws ``fork.gif`` from the file. Two minutes on
one core.
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
from common import RESULTS, append_rows, print_provenance, print_table, read_rows, use_one_thread
from exploration import ENV_IDS, STEPS, TASK_KWARGS, VARIANTS

from sb3_dqs.envs.fork import ANGLES, GOAL_RADIUS, HALF_WIDTH, INNER_RADIUS, OUTER_RADIUS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.patches import Circle, Wedge

ALGORITHMS = ("DQS", "SAC")
FRAMES_PER_STEP = 6
HOLD = 12  # frames at the end


def play(algorithm: str, seed: int, n_episodes: int) -> list[dict[str, Any]]:
    """Train, then play: a row per position."""
    cls, kwargs = VARIANTS[algorithm]
    model = cls("MlpPolicy", ENV_IDS["Fork"], seed=seed, device="cpu", **{**TASK_KWARGS["Fork"], **kwargs})
    model.learn(STEPS["Fork"], log_interval=10**9)
    env = gym.make(ENV_IDS["Fork"])
    rows = []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        positions, done, info = [obs], False, {}
        while not done:
            obs, _, terminated, truncated, info = env.step(model.predict(obs)[0])
            positions.append(obs)
            done = terminated or truncated
        rows += [
            {
                "algorithm": algorithm,
                "seed": seed,
                "episode": episode,
                "step": step,
                "x": x,
                "y": y,
                "route": info.get("route", ""),
            }
            for step, (x, y) in enumerate(np.round(positions, 4))
        ]
    return rows


def paths_of(rows: list[dict[str, str]], algorithm: str) -> list[tuple[np.ndarray, bool]]:
    """Positions of every episode, shape (n, 2), and whether it ended at the goal."""
    episodes: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["algorithm"] == algorithm:
            episodes.setdefault(row["episode"], []).append(row)
    return [(np.array([[float(r["x"]), float(r["y"])] for r in part]), part[0]["route"] != "") for part in episodes.values()]


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """The episodes of both, all at once."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.7), layout="constrained")
    parts = []
    for ax, algorithm in zip(axes, ALGORITHMS, strict=True):
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
        ax.add_patch(Circle((0, 0), GOAL_RADIUS, fill=False, color="tab:green", linestyle="--"))
        for i, angle in enumerate(np.rad2deg(ANGLES)):
            half, following = np.rad2deg(HALF_WIDTH), np.rad2deg(ANGLES[(i + 1) % len(ANGLES)])
            ends = (angle + half, (following - half - angle) % 360 + angle)
            ax.add_patch(Wedge((0, 0), OUTER_RADIUS, *ends, width=OUTER_RADIUS - INNER_RADIUS, color="0.6"))
        paths = paths_of(rows, algorithm)
        ax.set_title(f"{algorithm}: {sum(success for _, success in paths)} of {len(paths)} episodes leave the ring")
        for path_, success in paths:
            color = "tab:blue" if success else "tab:red"
            (line,) = ax.plot([], [], color=color, alpha=0.5, linewidth=1)
            (point,) = ax.plot([], [], "o", color=color, alpha=0.7, markersize=4)
            parts.append((path_, line, point))

    def update(frame: int) -> list[Any]:
        for positions, line, point in parts:
            time = np.linspace(0, min(frame / FRAMES_PER_STEP, len(positions) - 1), 40)
            x, y = (np.interp(time, np.arange(len(positions)), positions[:, i]) for i in range(2))
            line.set_data(x, y)
            point.set_data(x[-1:], y[-1:])
        return []

    n_steps = max(len(positions) for positions, _, _ in parts) - 1
    frames = [*range(n_steps * FRAMES_PER_STEP + 1), *[n_steps * FRAMES_PER_STEP] * HOLD]
    FuncAnimation(figure, update, frames=frames).save(path, PillowWriter(fps=15), dpi=80)
    print("figure:", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "fork_episodes.csv")
    parser.add_argument("--report-only", action="store_true", help="draw what the file has")
    args = parser.parse_args()
    print_provenance()
    use_one_thread()
    if not args.report_only:
        args.out.unlink(missing_ok=True)
        for algorithm in ALGORITHMS:
            append_rows(args.out, play(algorithm, args.seed, args.episodes))
    rows = read_rows(args.out)
    routes = {name: [row["route"] for row in rows if row["algorithm"] == name and row["step"] == "0"] for name in ALGORITHMS}
    print_table(
        ["algorithm", "episodes", *(f"route {i}" for i in range(4)), "at the wall, or too long"],
        [[name, len(taken), *(taken.count(str(i)) for i in range(4)), taken.count("")] for name, taken in routes.items()],
    )
    draw(rows, args.out.with_name("fork.gif"))


if __name__ == "__main__":
    main()
