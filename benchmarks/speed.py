"""
What DQS costs beside SB3's SAC and TD3, and sb3-contrib's TQC and CrossQ, in the same run.

    python benchmarks/speed.py

Batch 256, 256x256 networks, one torch thread. The algorithms take turns, so that whatever else the machine does meets all of
them; process CPU time (on a GPU: wall-clock time, ``--device cuda``), median of the repeats. Prints, for the sizes of several
environments, the cost of a gradient step and of actions, steps per second of learning, end to end, and the peak of the
memory of a process that does the same; then how the cost of a gradient step of DQS grows. Saves both as a figure.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from tqdm import tqdm

from sb3_dqs import DQS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER: dict[str, Any] = {
    "score_target": "energy_gradient",
    "n_mc_samples": 1000,
    "policy_delay": 1,
    "backup": "hard",
    "ent_coef": "log_linear_1.0_0.01",
}
DEAR = "DQS, paper's setting"
# As on a processor without fast products of bfloat16
SINGLE = "DQS, single precision"
ALGORITHMS: dict[str, tuple[type[OffPolicyAlgorithm], dict[str, Any]]] = {
    "SAC": (SAC, {}),
    "TD3": (TD3, {}),
    "TQC": (TQC, {}),
    "CrossQ": (CrossQ, {}),
    "DQS": (DQS, {}),
    "DQS, compiled": (DQS, {"compile": True}),
    SINGLE: (DQS, {}),
    DEAR: (DQS, PAPER),
}
ENVS = ("Pendulum-v1", "HalfCheetah-v5", "Humanoid-v5")
BATCH_SIZE = 256
# Of one measurement of the learning, and of calls of train(1, 256): some algorithms update their actor every second or third
# step only
LEARN_STEPS, TRAIN_STEPS = 200, 6
MEASURES = (
    "train(1, 256)",
    "predict 1, stochastic",
    "predict 1, deterministic",
    "predict 16, stochastic",
    "predict 16, deterministic",
    "predict 256, stochastic",
    "predict 256, deterministic",
    "learn, 1 env",
    "learn, 8 envs",
)
# What grows, and how: arguments of DQS, or sizes of the environment
GROWTH = {
    "n_mc_samples": (4, 8, 16, 32),
    "diffusion_steps": (4, 8, 16, 32),
    "batch size": (64, 256, 1024),
    "action dimension": (2, 8, 32),
    "observation dimension": (16, 64, 256),
    "environments (predict)": (1, 8, 64),
}


class SizedEnv(gym.Env[np.ndarray, np.ndarray]):
    """Observations and actions of given sizes, and nothing else."""

    def __init__(self, observation_dim: int = 17, action_dim: int = 6):
        self.observation_space = spaces.Box(-1, 1, (observation_dim,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


def make_model(name: str, env: Any, device: str, **kwargs: Any) -> OffPolicyAlgorithm:
    """A model whose buffer has something in it, and whose logger is set up."""
    algorithm, defaults = ALGORITHMS[name]
    kwargs = {
        "policy_kwargs": {"net_arch": [256, 256]},
        "buffer_size": 10_000,
        "device": device,
        "seed": 0,
        **defaults,
        **kwargs,
    }
    model = algorithm("MlpPolicy", env, **kwargs)  # type: ignore[arg-type]
    if name == SINGLE:
        model.sampling_dtype = None
    return model.learn(100)


def train(model: OffPolicyAlgorithm, batch_size: int) -> None:
    for _ in range(TRAIN_STEPS):
        model.train(1, batch_size)


def clock(run: Callable[[], Any], device: str) -> float:
    """Seconds."""
    now = time.process_time if device == "cpu" else time.perf_counter
    start = now()
    run()
    if device != "cpu":
        th.cuda.synchronize()
    return now() - start


def measures_of(name: str, env_id: str, device: str) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    model = make_model(name, env_id, device)
    space = model.observation_space
    observations = {n: np.stack([space.sample() for _ in range(n)]).astype(np.float32) for n in (1, 16, 256)}
    observations[1] = observations[1][0]
    measures: dict[str, Callable[[], Any]] = {MEASURES[0]: partial(train, model, BATCH_SIZE)}
    for measure in MEASURES[1:7]:
        n, deterministic = int(measure.split()[1].strip(",")), measure.endswith("deterministic")
        measures[measure] = partial(model.predict, observations[n], deterministic=deterministic)
    if name != DEAR:
        for measure, n_envs in zip(MEASURES[7:], (1, 8), strict=True):
            learner = make_model(name, make_vec_env(env_id, n_envs), device)
            measures[measure] = partial(learner.learn, LEARN_STEPS, reset_num_timesteps=False)
    return measures


def time_in_turns(
    runs: dict[str, dict[str, Callable[[], Any]]], device: str, repeats: dict[str, int], progress: tqdm
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every run, by names and measures."""
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(-1, max(repeats.values())):  # the first is not counted
        for name, measures in runs.items():
            for measure, run in measures.items():
                # Learning takes as long as LEARN_STEPS gradient steps
                n_repeats = repeats[name] // 10 if measure.startswith("learn") else repeats[name]
                if repeat < max(n_repeats, 1):
                    seconds = clock(run, device)
                    if repeat >= 0:
                        n_runs = 1 if measure.startswith("learn") or "predict" in measure else TRAIN_STEPS
                        times.setdefault((name, measure), []).append(seconds / n_runs)
        progress.update()
    return times


def peak_memory(name: str, env_id: str, device: str) -> float:
    """MiB of a process that learns a little."""
    th.set_num_threads(1)
    make_model(name, env_id, device).train(5 if name != DEAR else 1, BATCH_SIZE)
    if device != "cpu":
        return th.cuda.max_memory_allocated() / 2**20
    # Not getrusage(), whose peak a process inherits from the one that started it
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


def measure_memory(names: list[str], env_id: str, device: str) -> dict[str, float]:
    """Each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in names:
        with ProcessPoolExecutor(1, context) as pool:
            peaks[name] = pool.submit(peak_memory, name, env_id, device).result()
    return peaks


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def print_costs(env_id: str, names: list[str], times: dict[tuple[str, str], list[float]], peaks: dict[str, float]) -> None:
    """Ratios to SAC, and what SAC's are; the quartiles as the spread of the gradient step."""
    rows = []
    for name in names:
        row = [name]
        for measure in MEASURES:
            if (name, measure) not in times:
                row.append("")
                continue
            median, base = np.median(times[name, measure]), np.median(times["SAC", measure])
            if measure.startswith("learn"):
                row.append(f"{LEARN_STEPS / median:.0f} steps/s ({base / median:.2f})")
            else:
                low, high = np.percentile(times[name, measure], [25, 75])
                spread = f"; {1e3 * low:.2f}-{1e3 * high:.2f}" if measure == MEASURES[0] else ""
                row.append(f"**{median / base:.2f}** ({1e3 * median:.2f} ms{spread})")
        rows.append([*row, f"{peaks[name]:.0f} MiB ({peaks[name] / peaks['SAC']:.2f})"])
    print(f"{env_id}, in units of SAC's cost (and absolute; spread: quartiles):\n")
    print_table(["", *MEASURES, "memory"], rows)


def growth_runs(quantity: str, device: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """DQS with each value of one quantity, the others being those of HalfCheetah-v5."""
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    for value in GROWTH[quantity]:
        env, kwargs, batch_size = SizedEnv(), {}, BATCH_SIZE
        if quantity == "action dimension":
            env = SizedEnv(action_dim=value)
        elif quantity == "observation dimension":
            env = SizedEnv(observation_dim=value)
        elif quantity == "batch size":
            batch_size = value
        elif quantity != "environments (predict)":
            kwargs = {quantity: value}
        model = make_model("DQS", env, device, **kwargs)
        run: Callable[[], Any] = partial(train, model, batch_size)
        if "predict" in quantity:
            run = partial(model.predict, np.stack([env.observation_space.sample() for _ in range(value)]))
        runs[str(value)] = {quantity: run}
    return runs


def plot(costs: dict[str, dict[str, float]], growth: dict[str, list[float]], path: Path) -> None:
    """Bars of the gradient step in units of SAC's, a panel per environment; and the growth, on logarithmic axes."""
    figure, axes = plt.subplots(1, len(costs) + 1, figsize=(3.6 * (len(costs) + 1), 3.4), layout="constrained", squeeze=False)
    for ax, (env_id, ratios) in zip(axes[0], costs.items(), strict=False):
        bars = ax.barh(
            list(ratios), list(ratios.values()), color=["tab:blue" if "DQS" in name else "silver" for name in ratios]
        )
        ax.bar_label(bars, fmt=" %.3g", fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", title=env_id, xlabel="cost of train(1, 256), SAC = 1")
        ax.set_xlim(min(ratios.values()) / 1.5, 2.5 * max(ratios.values()))
        ax.tick_params(labelsize=8)
    ax = axes[0][-1]
    for quantity, medians in growth.items():
        values = np.array(GROWTH[quantity])
        ax.plot(values / values[0], np.array(medians) / medians[0], marker=".", label=quantity)
    ends = np.array([1, max(values[-1] / values[0] for values in GROWTH.values())])
    ax.plot(ends, ends, color="black", linewidth=0.8, linestyle=":", label="linear")
    ax.set(xscale="log", yscale="log", xlabel="times as much", ylabel="times as dear", title="DQS")
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=list(ENVS))
    parser.add_argument("--algos", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS), help="besides SAC")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--paper-repeats", type=int, default=1, help="each takes seconds")
    parser.add_argument("--no-growth", action="store_true", help="leave the second table out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.png"))
    args = parser.parse_args()
    if args.device == "cuda" and not th.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave the option out.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)

    names = [name for name in ALGORITHMS if name in {"SAC", *args.algos}]
    quantities = [] if args.no_growth else list(GROWTH)
    repeats = {name: args.paper_repeats if name == DEAR else args.repeats for name in names}
    costs: dict[str, dict[str, float]] = {}
    growth: dict[str, list[float]] = {}
    with tqdm(total=(args.repeats + 1) * (len(args.envs) + len(quantities))) as progress:
        for env_id in args.envs:
            runs = {name: measures_of(name, env_id, args.device) for name in names}
            times = time_in_turns(runs, args.device, repeats, progress)
            print_costs(env_id, names, times, measure_memory(names, env_id, args.device))
            base = np.median(times["SAC", MEASURES[0]])
            costs[env_id] = {name: float(np.median(times[name, MEASURES[0]]) / base) for name in names}
        for quantity in quantities:
            runs = growth_runs(quantity, args.device)
            times = time_in_turns(runs, args.device, dict.fromkeys(runs, args.repeats), progress)
            growth[quantity] = [float(np.median(times[value, quantity])) for value in runs]
    if growth:
        print("How the cost of DQS grows (a gradient step, or predict of as many observations), in units of the first:\n")
        rows = []
        for quantity, medians in growth.items():
            cells = [f"{value}: {median / medians[0]:.2f}" for value, median in zip(GROWTH[quantity], medians, strict=True)]
            rows.append([quantity, ", ".join(cells), f"{GROWTH[quantity][-1] / GROWTH[quantity][0]:.0f}"])
        print_table(["", "cost", "linear would be"], rows)
    plot(costs, growth, args.out)
    print("figure:", args.out)


if __name__ == "__main__":
    main()
