"""
Returns of DQS and its peers while they learn.

    python benchmarks/returns.py --env HalfCheetah-v5 Hopper-v5 --steps 100000 --seeds 0 1 2 --algos SAC TQC CrossQ DQS

One process per core. Each run appends a row per evaluation to a CSV file of its own below ``benchmarks/results/returns`` and
saves the model and its buffer beside ``--checkpoints``, from where a stopped run goes on. A run whose file has all rows is
not run again. Prints the returns of the finished runs, after all steps and at the CPU time of the fastest, as interquartile
means over seeds with bootstrap intervals, and saves the learning curves.
"""

import argparse
import json
import time
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import sb3_contrib
import stable_baselines3
from common import (
    RESULTS,
    OneTraining,
    append_rows,
    bootstrap_interval,
    fresh_processes,
    iqm,
    print_provenance,
    print_table,
    read_rows,
    use_one_thread,
)
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_dqs.averaging import RunningAverage
from sb3_dqs.dqs_paper import PAPER

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# SAC at a million steps, with wide networks: what returns are divided by
PUBLISHED_SAC = {"HalfCheetah-v5": 11321, "Hopper-v5": 2786, "Walker2d-v5": 4537, "Ant-v5": 5732, "Humanoid-v5": 4824}


class AveragedSAC(SAC):
    """SAC whose deterministic actions come from the same running average of the actor as those of DQS."""

    def _setup_model(self) -> None:
        super()._setup_model()
        # The actor of DQS learns at every second gradient step
        self.actor_average = RunningAverage(self.actor, 0.0005)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        super().train(gradient_steps, batch_size)
        self.actor_average.update(self.actor)

    def predict(self, *args: Any, deterministic: bool = False, **kwargs: Any) -> Any:
        if deterministic:
            self.policy.actor = self.actor_average.stand_in(self.actor)
        try:
            return super().predict(*args, deterministic=deterministic, **kwargs)
        finally:
            self.policy.actor = self.actor

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor_average"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, tensors = super()._get_torch_save_params()
        return [*names, "actor_average"], tensors


# Name: class and arguments. All networks are 256x256, and gradient steps one per step, so that differences are the algorithm's
WIDE = {"policy_kwargs": {"net_arch": [256, 256]}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SAC": ("SAC", WIDE),
    "SAC-1e-3": ("SAC", {**WIDE, "learning_rate": 1e-3}),
    "SAC-1e-3-averaged": ("AveragedSAC", {**WIDE, "learning_rate": 1e-3}),
    "TQC": ("TQC", WIDE),
    "CrossQ": ("CrossQ", WIDE),
    "DQS": ("DQS", WIDE),
    "DQS-actor": ("DQS", {"policy_kwargs": {"net_arch": [256, 256], "actor_averaging_rate": 1}}),
    "DQS-3e-4": ("DQS", {**WIDE, "learning_rate": 3e-4}),
    "DQS-paper": ("DQS", {**PAPER, "learning_rate": 3e-4, "policy_kwargs": {"net_arch": [256, 256], "critic_class": "mlp"}}),
    "DQS-mlp": ("DQS", {"policy_kwargs": {"net_arch": [256, 256], "critic_class": "mlp"}}),
}
SCALARS = ("ent_coef", "entropy", "ess")


def find_algorithm(name: str) -> type[OffPolicyAlgorithm]:
    if name == "DQS":
        from sb3_dqs import DQS  # the peers do not need it

        return DQS
    if name == "AveragedSAC":
        return AveragedSAC
    return getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)


def train(variant: str, kwargs: dict[str, Any], env_id: str, seed: int, args: argparse.Namespace, path: Path) -> None:
    """One run, from its last checkpoint on."""
    use_one_thread()
    algorithm, arguments = VARIANTS[variant]
    rows = read_rows(path)
    checkpoint = args.checkpoints / path.relative_to(args.out).with_suffix("")
    cls = find_algorithm(algorithm)
    train_env = make_vec_env(env_id, args.n_envs)
    if rows and checkpoint.with_suffix(".zip").exists():
        model = cls.load(checkpoint, env=train_env, device="cpu")
        model.load_replay_buffer(checkpoint.with_suffix(".pkl"))
        cpu_seconds = float(rows[-1]["cpu_seconds"])
    else:
        path.unlink(missing_ok=True)
        model = cls("MlpPolicy", train_env, buffer_size=args.steps, seed=seed, device="cpu", **{**arguments, **kwargs})
        cpu_seconds = 0.0
    env = Monitor(gym.make(env_id))
    env.reset(seed=10_000 + seed)
    while model.num_timesteps < args.until:
        start = time.process_time()
        n_steps = min(args.eval_freq, args.until - model.num_timesteps)
        model.learn(n_steps, OneTraining(args.steps), log_interval=10**9, reset_num_timesteps=model.num_timesteps == 0)
        cpu_seconds += time.process_time() - start
        returns, _ = evaluate_policy(model, env, args.episodes, return_episode_rewards=True)
        recent = [episode["r"] for episode in model.ep_info_buffer or []][-5:]
        scalars = {name: model.logger.name_to_value.get(f"train/{name}", np.nan) for name in SCALARS}
        row = {
            "variant": variant,
            "kwargs": json.dumps(kwargs),
            "env": env_id,
            "seed": seed,
            "step": model.num_timesteps,
            "return": round(float(np.mean(returns)), 2),
            "std": round(float(np.std(returns)), 2),
            "training_return": round(float(np.mean(recent)), 2) if recent else "",
            "cpu_seconds": round(cpu_seconds, 1),
            **{name: f"{value:.4g}" for name, value in scalars.items()},
        }
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        model.save(checkpoint)
        model.save_replay_buffer(checkpoint.with_suffix(".pkl"))
        append_rows(path, [row])
    if args.until == args.steps:
        checkpoint.with_suffix(".pkl").unlink(missing_ok=True)


def curves_of(variant: str, env_id: str, paths: list[Path]) -> list[np.ndarray]:
    """Per seed an array of (step, CPU seconds, return), one row per evaluation."""
    curves = [read_rows(path) for path in paths]
    return [np.array([[float(row[k]) for k in ("step", "cpu_seconds", "return")] for row in rows]) for rows in curves if rows]


def summary(values: list[float]) -> str:
    """Interquartile mean over seeds, and from two seeds on its interval."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.0f}"
    low, high = bootstrap_interval(np.array(values))
    return f"{iqm(np.array(values)):.0f} ({low:.0f} to {high:.0f})"


def finished_of(curves: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """The curves of runs that have made all steps."""
    return [curve for curve in curves if curve[-1, 0] >= steps]


def table_row(curves: list[np.ndarray], steps: int, cpu_seconds: float) -> list[str]:
    """Returns of the finished runs, and the last evaluation of the others."""
    finished = finished_of(curves, steps)
    return [
        str(len(finished)),
        summary([curve[-1, 2] for curve in finished]),
        summary([curve[-10:, 2].mean() for curve in finished]),
        "; ".join(f"{curve[-10:, 2].mean():.0f}, {curve[-10:, 2].min():.0f}" for curve in finished),
        summary([curve[curve[:, 1] <= cpu_seconds, 2][-1] for curve in finished if curve[0, 1] <= cpu_seconds]),
        "; ".join(f"{curve[-1, 2]:.0f} at {curve[-1, 0]:.0f}" for curve in curves if curve[-1, 0] < steps),
    ]


def plot_curves(ax: Axes, curves: list[np.ndarray], steps: int, color: str, label: str) -> None:
    """A thin line per run; a thick one and its interval for the interquartile mean of the finished runs."""
    for curve in curves:
        ax.plot(curve[:, 0], curve[:, 2], color=color, alpha=0.4, linewidth=0.7)
    finished = finished_of(curves, steps)
    ax.plot([], [], color=color, label=f"{label} (finished runs: {len(finished)})")
    if finished:
        returns = np.array([curve[:, 2] for curve in finished])
        ax.plot(finished[0][:, 0], iqm(returns.T), color=color)
    if len(finished) > 1:
        intervals = np.array([bootstrap_interval(column) for column in returns.T])
        ax.fill_between(finished[0][:, 0], *intervals.T, color=color, alpha=0.2, linewidth=0)


def mean_over_published(variants: dict[str, list[np.ndarray]], steps: int) -> str:
    """Mean over environments of the mean return of the finished runs, over SAC's published return at a million steps."""
    ratios = []
    for env_id, curves in variants.items():
        finished = finished_of(curves, steps)
        if not finished or env_id not in PUBLISHED_SAC:
            return ""
        ratios.append(np.mean([[curve[-1, 2], curve[-10:, 2].mean()] for curve in finished], axis=0) / PUBLISHED_SAC[env_id])
    last, last_ten = np.mean(ratios, axis=0)
    return f"{last:.2f} after {steps} steps, {last_ten:.2f} over the last ten evaluations"


def report(results: dict[str, dict[str, list[np.ndarray]]], steps: int, path: Path) -> None:
    """A table of the returns and the figure of the curves."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.8), squeeze=False, layout="constrained")
    rows, limits = [], []
    for ax, (env_id, variants) in zip(axes[0], results.items(), strict=True):
        cpu_seconds = min((c[-1, 1] for curves in variants.values() for c in finished_of(curves, steps)), default=0.0)
        limits.append(f"{cpu_seconds:.0f} s on {env_id}")
        for color, (variant, curves) in enumerate(variants.items()):
            if curves:
                rows.append([env_id, variant, *table_row(curves, steps, cpu_seconds)])
                plot_curves(ax, curves, steps, f"C{color}", variant)
        ax.set(title=env_id, xlabel="environment steps", ylabel="return (IQM over seeds)")
        ax.legend(fontsize="small")
    header = ["env", "algorithm", "runs", f"after {steps} steps, IQM (95 %)", "last ten evaluations, IQM (95 %)"]
    print_table([*header, "mean and least of the ten, per seed", "at equal CPU time, IQM (95 %)", "unfinished runs"], rows)
    print("equal CPU time:", ", ".join(limits))
    for variant in next(iter(results.values())):
        ratio = mean_over_published({env_id: variants[variant] for env_id, variants in results.items()}, steps)
        if ratio:
            print(f"{variant} over SAC's published returns, mean over the environments: {ratio}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print("curves:", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["Pendulum-v1"])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--until", type=int, help="stop each run after so many of the steps, to go on another time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algos", nargs="+", default=["SAC", "DQS"], choices=list(VARIANTS))
    parser.add_argument("--kwargs", type=json.loads, default={}, help="more arguments of all, as JSON: '{\"gamma\": 0.95}'")
    parser.add_argument("--tag", default="", help="name of these arguments in file names and tables")
    parser.add_argument("--n-envs", type=int, default=1, help="environments per run; a gradient step after a step of each")
    parser.add_argument("--eval-freq", type=int, default=5_000)
    parser.add_argument("--episodes", type=int, default=5, help="deterministic episodes per evaluation")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "returns")
    parser.add_argument("--checkpoints", type=Path, default=Path("logs/checkpoints"))
    parser.add_argument("--report-only", action="store_true", help="print what the files have")
    args = parser.parse_args()
    args.until = min(args.until or args.steps, args.steps)
    print_provenance()

    def path_of(variant: str, env_id: str, seed: int) -> Path:
        return args.out / env_id / f"{variant}{args.tag}_{args.steps}_{seed}.csv"

    jobs = [(variant, env_id, seed) for seed in args.seeds for env_id in args.env for variant in args.algos]
    if not args.report_only:
        with fresh_processes(args.processes) as pool:
            futures = {}
            for variant, env_id, seed in jobs:
                rows = read_rows(path := path_of(variant, env_id, seed))
                if not rows or int(rows[-1]["step"]) < args.until:
                    futures[pool.submit(train, variant, args.kwargs, env_id, seed, args, path)] = path
            for i, future in enumerate(as_completed(futures), start=1):
                future.result()
                print(f"done {i}/{len(futures)}: {futures[future].stem}", flush=True)
    results = {
        env_id: {
            variant + args.tag: curves_of(variant, env_id, [path_of(variant, env_id, seed) for seed in args.seeds])
            for variant in args.algos
        }
        for env_id in args.env
    }
    report(results, args.steps, args.out / f"curves_{'_'.join(args.env)}{args.tag}_{args.steps}.png")


if __name__ == "__main__":
    main()
