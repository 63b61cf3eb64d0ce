"""
What DQS costs beside SB3's SAC and TD3, and sb3-contrib's TQC and CrossQ, in the same run.

    python benchmarks/speed.py

Batch 256, 256x256 networks, one torch thread. The algorithms take turns, so that what else the machine does affects all of
them; process CPU time (on a GPU: wall-clock time, ``--device cuda``), median of the repeats. Prints, for the sizes of several
environments, the cost of a gradient step and of actions, the time of learning, and the peak of the memory of a process that
does the same; then how the cost of a gradient step of DQS grows. Every figure is a row of ``benchmarks/results/speed.csv``;
``speed.png`` beside it shows the last rows of each environment and of the growth, ``--report-only`` without measuring.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from common import RESULTS, SizedEnv, append_rows, fresh_processes, print_provenance, print_table, read_rows, use_one_thread
from matplotlib.figure import Figure
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from tqdm import trange

from sb3_dqs import DQS
from sb3_dqs.dqs_paper import PAPER

# A gradient step takes seconds
SLOW = "DQS, paper's setting"
# As on a processor without fast products of bfloat16
SINGLE = "DQS, single precision"
ALGORITHMS: dict[str, tuple[type[OffPolicyAlgorithm], dict[str, Any]]] = {
    "SAC": (SAC, {}),
    "TD3": (TD3, {}),
    "TQC": (TQC, {}),
    "CrossQ": (CrossQ, {}),
    "DQS": (DQS, {}),
    "DQS, plain critic": (DQS, {"policy_kwargs": {"critic_class": "mlp"}}),
    "DQS, compiled": (DQS, {"compile": True}),
    SINGLE: (DQS, {}),
    SLOW: (DQS, {**PAPER, "policy_kwargs": {"critic_class": "mlp"}}),
}
ENVS = ("Pendulum-v1", "HalfCheetah-v5", "Humanoid-v5")
BATCH_SIZE = 256
# Of one measurement of the learning, and of calls of train(1, 256): some algorithms update their actor every second or third
# step only
# A full cycle of the defaults: the actor draws actions of its own at every 16th step
LEARN_STEPS, TRAIN_STEPS = 200, 48
TRAIN = "train(1, 256)"
MODES = {"stochastic": False, "deterministic": True}
PREDICT = {f"predict {n}, {mode}": (n, MODES[mode]) for n in (1, 16, 256) for mode in MODES}
LEARN = {"learn, 1 env": 1, "learn, 8 envs": 8}
MEMORY = "memory"
MEASURES = (TRAIN, *PREDICT, *LEARN, MEMORY)
# What grows, and how: arguments of DQS, or sizes of the environment
GROWTH = {
    "n_mc_samples": (4, 8, 16, 32),
    "diffusion_steps": (4, 8, 16, 32),
    "batch size": (64, 256, 1024),
    "action dimension": (2, 8, 32),
    "observation dimension": (16, 64, 256),
    "environments (predict)": (1, 8, 64),
}

# By name of the variant and of the measure
Runs = dict[tuple[str, str], Callable[[], Any]]
Times = dict[tuple[str, str], list[float]]


def make_model(name: str, env: Any, device: str, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A model whose buffer has something in it, and whose logger is set up."""
    algorithm, defaults = ALGORITHMS[name]
    policy_kwargs = {"net_arch": [256, 256], **(policy_kwargs or {})}
    kwargs = {"buffer_size": 10_000, "device": device, "seed": 0, "policy_kwargs": policy_kwargs, **defaults, **kwargs}
    model: Any = algorithm("MlpPolicy", env, **kwargs)
    if name == SINGLE:
        model.actor.training_dtype = model.critic.training_dtype = None
    return model.learn(100)


def train(model: OffPolicyAlgorithm, batch_size: int) -> None:
    for _ in range(TRAIN_STEPS):
        model.train(1, batch_size)


def predict(model: OffPolicyAlgorithm, n: int, deterministic: bool = False) -> Callable[[], Any]:
    observations = np.stack([model.observation_space.sample() for _ in range(n)]).astype(np.float32)
    return partial(model.predict, observations if n > 1 else observations[0], deterministic=deterministic)


def clock(run: Callable[[], Any], device: str) -> float:
    """Seconds."""
    now = time.process_time if device == "cpu" else time.perf_counter
    start = now()
    run()
    if device != "cpu":
        th.cuda.synchronize()
    return now() - start


def runs_of(name: str, env_id: str, device: str) -> Runs:
    """What is timed of one algorithm."""
    model = make_model(name, env_id, device)
    runs: Runs = {(name, TRAIN): partial(train, model, BATCH_SIZE)}
    runs |= {(name, measure): predict(model, *arguments) for measure, arguments in PREDICT.items()}
    if name != SLOW:
        for measure, n_envs in LEARN.items():
            learner = make_model(name, make_vec_env(env_id, n_envs), device)
            runs[name, measure] = partial(learner.learn, LEARN_STEPS, reset_num_timesteps=False)
    return runs


def growth_runs(quantity: str, device: str) -> Runs:
    """DQS with each value of one quantity, the others being those of HalfCheetah-v5."""
    runs: Runs = {}
    for value in GROWTH[quantity]:
        env = {"action dimension": SizedEnv(action_dim=value), "observation dimension": SizedEnv(observation_dim=value)}
        kwargs: dict[str, dict[str, Any]] = {
            "n_mc_samples": {"n_mc_samples": value},
            "diffusion_steps": {"policy_kwargs": {"diffusion_steps": value}},
        }
        model = make_model("DQS", env.get(quantity, SizedEnv()), device, **kwargs.get(quantity, {}))
        run = partial(train, model, value if quantity == "batch size" else BATCH_SIZE)
        runs[str(value), quantity] = predict(model, value) if "predict" in quantity else run
    return runs


def time_in_turns(runs: Runs, device: str, repeats: int, slow_repeats: int) -> Times:
    """Seconds per gradient step, call of predict(), or LEARN_STEPS steps of learning."""
    times: Times = defaultdict(list)
    for repeat in trange(-1, repeats, leave=False):  # the first is not counted
        for (name, measure), run in runs.items():
            n_repeats = slow_repeats if name == SLOW else repeats
            # Learning takes as long as LEARN_STEPS gradient steps
            if repeat < (max(n_repeats // 10, 1) if measure in LEARN else n_repeats):
                seconds = clock(run, device)
                if repeat >= 0:
                    times[name, measure].append(seconds if measure in LEARN or "predict" in measure else seconds / TRAIN_STEPS)
    return times


def peak_memory(name: str, env_id: str, device: str) -> float:
    """MiB of a process that learns a little."""
    use_one_thread()
    make_model(name, env_id, device).train(5 if name != SLOW else 1, BATCH_SIZE)
    if device != "cpu":
        return th.cuda.max_memory_allocated() / 2**20
    # Not getrusage(), whose peak a process inherits from the one that started it
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


def measure_memory(names: list[str], env_id: str, device: str) -> Times:
    """Each in a process of its own."""
    with fresh_processes(1) as pool:
        return {(name, MEMORY): [pool.submit(peak_memory, name, env_id, device).result()] for name in names}


def save(subject: str, times: Times, device: str) -> None:
    """Medians and quartiles, to the CSV file."""
    rows = []
    for (variant, measure), numbers in times.items():
        unit = "MiB" if measure == MEMORY else f"s per {LEARN_STEPS} steps" if measure in LEARN else "s"
        low, median, high = (f"{number:.4g}" for number in np.percentile(numbers, [25, 50, 75]))
        row = {"subject": subject, "variant": variant, "measure": measure, "unit": unit, "median": median, "low": low}
        rows.append({**row, "high": high, "repeats": len(numbers), "device": device})
    append_rows(RESULTS / "speed.csv", rows)


def cost(name: str, measure: str, times: Times) -> str:
    """Ratio to SAC, and the absolute figure; with the quartiles of the gradient step."""
    if (name, measure) not in times:
        return ""
    low, median, high = np.percentile(times[name, measure], [25, 50, 75])
    ratio = median / np.median(times["SAC", measure])
    if measure == MEMORY:
        return f"{median:.0f} MiB ({ratio:.2f})"
    if measure in LEARN:
        return f"{LEARN_STEPS / median:.0f} steps/s ({1 / ratio:.2f})"
    spread = f"; {1e3 * low:.2f}-{1e3 * high:.2f}" if measure == TRAIN else ""
    return f"**{ratio:.2f}** ({1e3 * median:.2f} ms{spread})"


def read_costs() -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """What :func:`plot` draws, from the CSV file: of each environment the rows of its last commit, and the last growth."""
    rows = [row for row in read_rows(RESULTS / "speed.csv") if row["device"] == "cpu"]
    seconds: dict[str, dict[str, float]] = {}
    for env_id in ENVS:
        chosen = [row for row in rows if (row["subject"], row["measure"]) == (env_id, TRAIN)]
        if chosen:
            last = [row for row in chosen if row["commit"] == chosen[-1]["commit"]]
            seconds[env_id] = {row["variant"]: float(row["median"]) for row in last}
    costs = {env_id: {name: s / times["SAC"] for name, s in times.items()} for env_id, times in seconds.items()}
    growth = {}
    for quantity, values in GROWTH.items():
        last_of = {row["variant"]: float(row["median"]) for row in rows if row["measure"] == quantity}
        if last_of:
            growth[quantity] = np.array([last_of[str(value)] for value in values]) / last_of[str(values[0])]
    return costs, growth


def plot(costs: dict[str, dict[str, float]], growth: dict[str, np.ndarray], path: Path) -> None:
    """Bars of the gradient step in units of SAC's, a panel per environment; and the growth, on logarithmic axes."""
    n_panels = len(costs) + bool(growth)
    figure = Figure(figsize=(3.6 * n_panels + 1.2, 3.0), layout="constrained")
    axes = figure.subplots(1, n_panels, squeeze=False)
    for ax, (env_id, ratios) in zip(axes[0], costs.items(), strict=False):
        colors = ["tab:blue" if "DQS" in name else "silver" for name in ratios]
        bars = ax.barh(list(ratios), list(ratios.values()), color=colors)
        ax.bar_label(bars, fmt=" %.2f", fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set(title=env_id, xlabel="cost of train(1, 256), SAC = 1")
        if max(ratios.values()) > 10:  # the paper's setting
            ax.set(xscale="log", xlim=(min(ratios.values()) / 1.5, 2.5 * max(ratios.values())))
        else:
            ax.set_xlim(0, 1.2 * max(ratios.values()))
        ax.tick_params(labelsize=8)
    if growth:
        ax = axes[0][-1]
        for quantity, ratios in growth.items():
            values = np.array(GROWTH[quantity])
            ax.plot(values / values[0], ratios, marker=".", label=quantity)
        ends = np.array([1, max(values[-1] / values[0] for values in GROWTH.values())])
        ax.plot(ends, ends, color="black", linewidth=0.8, linestyle=":", label="linear")
        ax.set(xscale="log", yscale="log", xlabel="times as much", ylabel="times the cost", title="DQS")
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
    parser.add_argument("--report-only", action="store_true", help="draw the figure from the file")
    args = parser.parse_args()
    if args.device == "cuda" and not th.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave the option out.")
    device_name = "cpu" if args.device == "cpu" else th.cuda.get_device_name()
    use_one_thread()
    print_provenance()
    if not args.report_only:
        measure(args, device_name)
    plot(*read_costs(), RESULTS / "speed.png")
    print("figure:", RESULTS / "speed.png")


def measure(args: argparse.Namespace, device_name: str) -> None:
    """Measure, print the tables, and save every figure."""
    names = [name for name in ALGORITHMS if name in {"SAC", *args.algos}]
    growth: dict[str, np.ndarray] = {}
    for env_id in args.envs:
        runs = {key: run for name in names for key, run in runs_of(name, env_id, args.device).items()}
        times = time_in_turns(runs, args.device, args.repeats, args.paper_repeats)
        times |= measure_memory(names, env_id, args.device)
        save(env_id, times, device_name)
        print(f"{env_id}, in units of SAC's cost (and absolute; spread: quartiles):\n")
        print_table(["", *MEASURES], [[name, *(cost(name, measure, times) for measure in MEASURES)] for name in names])
    for quantity in [] if args.no_growth else GROWTH:
        times = time_in_turns(growth_runs(quantity, args.device), args.device, args.repeats, args.repeats)
        save("growth", times, device_name)
        medians = np.array([np.median(seconds) for seconds in times.values()])
        growth[quantity] = medians / medians[0]
    if growth:
        print("How the cost of DQS grows (a gradient step, or predict of as many observations), in units of the first:\n")
        rows = []
        for quantity, ratios in growth.items():
            values = GROWTH[quantity]
            cells = [f"{value}: {ratio:.2f}" for value, ratio in zip(values, ratios, strict=True)]
            rows.append([quantity, ", ".join(cells), f"{values[-1] / values[0]:.0f}"])
        print_table(["", "cost", "linear would be"], rows)


if __name__ == "__main__":
    main()
