"""
Returns of DQS beside SAC, both with their defaults, in the same run.

    python benchmarks/returns.py --env Pendulum-v1 --steps 10000 --seeds 0 1 2

Each training writes its result to ``--out`` as it ends, and one that has a result there is not run again
(remove the folder after a change of the code or of --episodes).
Prints a table of the final deterministic returns and of the scalars of the last 500 steps, and saves the learning curves.
"""

import argparse
import json
import math
import multiprocessing
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dqs import DQS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALGORITHMS = {"DQS": DQS, "SAC": SAC}
WINDOW = 500
SCALARS = ("train/ent_coef", "train/entropy", "train/ess")


class Recorder(BaseCallback):
    """Keeps the returns of the training episodes and the logged scalars, as means of ``WINDOW`` steps."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[tuple[int, float]] = []
        self.scalars: list[dict[str, float]] = []
        self.window: dict[str, list[float]] = defaultdict(list)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes.append((self.num_timesteps, float(info["episode"]["r"])))
        return True

    def _on_rollout_end(self) -> None:
        for key in SCALARS:
            if key in self.logger.name_to_value:
                self.window[key].append(float(self.logger.name_to_value[key]))
        if self.num_timesteps % WINDOW == 0:
            self.scalars.append({"step": self.num_timesteps} | {key: float(np.mean(v)) for key, v in self.window.items()})
            self.window.clear()


def train(
    algorithm: str, env_id: str, steps: int, seed: int, n_eval_episodes: int, kwargs: dict[str, Any], path: Path
) -> dict[str, Any]:
    """One training and its evaluation; the model is saved beside the result."""
    th.set_num_threads(1)
    recorder = Recorder()
    model = ALGORITHMS[algorithm]("MlpPolicy", env_id, seed=seed, device="cpu", **(kwargs if algorithm == "DQS" else {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        model.learn(steps, callback=recorder, log_interval=10**9)
        seconds = time.process_time() - start
    model.save(path.with_suffix(".zip"))
    env = Monitor(gym.make(env_id))
    env.reset(seed=10_000 + seed)
    returns, _ = evaluate_policy(model, env, n_eval_episodes, deterministic=True, return_episode_rewards=True)
    return {
        "algorithm": algorithm,
        "env": env_id,
        "steps": steps,
        "seed": seed,
        "kwargs": kwargs,
        "returns": returns,
        "episodes": recorder.episodes,
        "scalars": recorder.scalars,
        "finite": all(math.isfinite(value) for row in recorder.scalars for value in row.values()),
        "warnings": [str(warning.message) for warning in caught],
        "cpu_seconds": seconds,
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Returns of the training episodes against steps, a panel per environment."""
    envs = sorted({result["env"] for result in results})
    figure, axes = plt.subplots(1, len(envs), figsize=(5 * len(envs), 3.6), squeeze=False, layout="constrained")
    for ax, env_id in zip(axes[0], envs, strict=True):
        for result in results:
            if result["env"] == env_id and result["episodes"]:
                color, label = ("tab:blue", "DQS") if result["algorithm"] == "DQS" else ("tab:orange", "SAC")
                steps, returns = np.array(result["episodes"]).T
                window = min(10, len(returns))
                smooth = np.convolve(returns, np.ones(window) / window, mode="valid")
                ax.plot(steps[window - 1 :], smooth, color=color, alpha=0.8, label=label)
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(handles.values(), handles.keys())
        ax.set(title=env_id, xlabel="environment steps", ylabel="training return (mean of 10 episodes)")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["Pendulum-v1"])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=20, help="deterministic evaluation episodes")
    parser.add_argument("--dqs", type=json.loads, default={}, help='other arguments of DQS, as JSON: \'{"backup": "hard"}\'')
    parser.add_argument("--algos", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/returns"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    tag = "".join(f"_{key}={value}" for key, value in args.dqs.items())
    jobs = {
        args.out / f"{algo}{tag if algo == 'DQS' else ''}_{env_id}_{args.steps}_{seed}.json": (algo, env_id, args.steps, seed)
        for env_id in args.env
        for seed in args.seeds
        for algo in args.algos
    }
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(train, *job, args.episodes, args.dqs, path): path for path, job in jobs.items() if not path.exists()
        }
        for future in as_completed(futures):
            futures[future].write_text(json.dumps(future.result()))
            print("done:", futures[future].name, flush=True)

    results = [json.loads(path.read_text()) for path in jobs]
    header = ("env", "algorithm", "seed", "return", "std", "ent_coef", "entropy", "ess", "finite", "warnings", "CPU s")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for result in results:
        last = result["scalars"][-1] if result["scalars"] else {}
        scalars = [f"{last[key]:.3g}" if key in last else "" for key in SCALARS]
        mean, std = np.mean(result["returns"]), np.std(result["returns"])
        row = [result["env"], result["algorithm"], result["seed"], f"{mean:.0f}", f"{std:.0f}", *scalars]
        row += [result["finite"], len(result["warnings"]), f"{result['cpu_seconds']:.0f}"]
        print("| " + " | ".join(map(str, row)) + " |")
    path = args.out / f"curves{tag}_{'_'.join(args.env)}_{args.steps}.png"
    plot(results, path)
    print("curves:", path)


if __name__ == "__main__":
    main()
