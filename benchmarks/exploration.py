"""
Tasks where it matters to keep several good actions: does the policy keep them, and what is that worth?

    python benchmarks/exploration.py --tasks Keeper Fork --seeds 0 1 2 3 4 5 6 7 8 9

- ``Keeper``: reward of 400 shots after training, against a keeper who dives to the favourite corner; the best is 0.75.
- ``Fork``: three of the four openings are closed after training; share of the closings with a success in ten attempts. One
  route kept is worth 0.25, all four 1.
- ``DelayedBest``: mean return of 20 stochastic episodes at every 500 steps from 4,500 on: the better goal found early.
- ``Corridor``: pretraining on speed in whatever direction, then 1,000 steps in a hall whose goal is behind one of eight doors;
  mean over two opposite doors of the share of 50 stochastic episodes that find it.
- ``MountainCar``: return of five deterministic episodes after 8,000 steps of ``MountainCarContinuous-v0``; standing still
  is worth 0, the flag over 90. "Pink noise" is the argument ``exploration_noise`` of DQS, and the same noise in SAC. "Held
  from the start" holds the noise in the first 1,000 steps, too, which act by the policy instead of uniformly.

SAC and TQC have the learning rate of DQS, and all have 256x256. "SAC, equal entropy" tunes its temperature to the entropy that
DQS had, mean over seeds; the measured entropies of both are in the rows. Every run is a row of
``benchmarks/results/exploration.csv``; a run that is there is not run again. Prints interquartile means over seeds with
bootstrap intervals, and saves a figure. One to three minutes on one core per run.
"""

import argparse
import io
import itertools
from collections.abc import Callable
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
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
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_dqs import DQS  # registers the environments, too
from sb3_dqs.dqs_paper import PAPER
from sb3_dqs.exploration import PinkLatents

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = {"Keeper": 4_000, "Fork": 4_000, "DelayedBest": 7_000, "Corridor": 3_000, "MountainCar": 8_000}
ENV_IDS = {task: f"sb3_dqs/{task}-v0" for task in STEPS} | {"MountainCar": "MountainCarContinuous-v0"}
TASK_KWARGS: dict[str, dict[str, Any]] = {
    "Keeper": {},
    # Random moves find all openings. The temperature is that at which rewards are worth what entropy is
    "Fork": {"learning_starts": 1_000, "ent_coef": 1.0},
    # Random moves reach the far goal a few times
    "DelayedBest": {"learning_starts": 4_000},
    # Speed is worth more than entropy from the beginning on
    "Corridor": {"gamma": 0.9, "ent_coef": "auto_0.1"},
    "MountainCar": {},
}


class PinkSAC(SAC):
    """SAC with the pink noise of DQS in rollouts."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.pink_latents = PinkLatents(get_action_dim(self.action_space))

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        obs, _ = self.policy.obs_to_tensor(self._last_obs)
        with th.no_grad():
            mean, log_std, _ = self.actor.get_action_dist_params(obs)
            actions = th.tanh(mean + log_std.exp() * self.pink_latents(n_envs)).numpy()
        return self.policy.unscale_action(actions), actions


EQUAL_ENTROPY = "SAC, equal entropy"
# Whose entropy it gets, if not that of "DQS"
ENTROPY_OF = {"MountainCar": "DQS, held from the start"}
# From 1 on the temperature would not fall as far in these steps
START_OF_EQUAL_ENTROPY = {"Keeper": "auto_0.05", "DelayedBest": "auto_0.05"}
HELD = {"use_sde": True, "train_freq": 32, "gradient_steps": 32}
HELD_WARM_UP = {"use_sde_at_warmup": True, "learning_starts": 1_000}
VARIANTS: dict[str, tuple[type[OffPolicyAlgorithm], dict[str, Any]]] = {
    "DQS": (DQS, {}),
    "DQS, critic of SAC": (DQS, {"policy_kwargs": {"critic_class": "mlp"}}),
    # Its thousand candidates per target allow no larger batch in this time
    "DQS, paper's setting, batch of 64": (
        DQS,
        {**PAPER, "learning_rate": 3e-4, "batch_size": 64, "policy_kwargs": {"critic_class": "mlp"}},
    ),
    "DQS, batch of 64": (DQS, {"batch_size": 64}),
    "DQS, pink noise": (DQS, {"exploration_noise": "pink"}),
    "DQS, held for 32 steps": (DQS, HELD),
    "DQS, held from the start": (DQS, {**HELD, **HELD_WARM_UP}),
    "SAC": (SAC, {"learning_rate": 1e-3}),
    "SAC, pink noise": (PinkSAC, {"learning_rate": 1e-3}),
    "SAC, gSDE held for 32 steps": (SAC, {"learning_rate": 1e-3, **HELD}),
    # With the default of log_std_init, -3, gSDE begins with actions near 0
    "SAC, gSDE held from the start": (
        SAC,
        {"learning_rate": 1e-3, **HELD, **HELD_WARM_UP, "policy_kwargs": {"log_std_init": 0.0}},
    ),
    EQUAL_ENTROPY: (SAC, {"learning_rate": 1e-3}),
    "SAC, default learning rate": (SAC, {}),
    "TQC": (TQC, {"learning_rate": 1e-3}),
    "CrossQ": (CrossQ, {"policy_kwargs": {"net_arch": [256, 256]}}),
}


def run_episode(model: OffPolicyAlgorithm, env: gym.Env, seed: int | None = None) -> tuple[float, dict[str, Any]]:
    """Return of a stochastic episode, and its last info."""
    obs, _ = env.reset(seed=seed)
    total, done, info = 0.0, False, {}
    while not done:
        action, _ = model.predict(obs, deterministic=False)
        obs, reward, terminated, truncated, info = env.step(action)
        total, done = total + float(reward), terminated or truncated
    return total, info


def mean_return(model: OffPolicyAlgorithm, task: str, n_episodes: int) -> float:
    env = gym.make(ENV_IDS[task])
    return float(np.mean([run_episode(model, env, seed=0 if i == 0 else None)[0] for i in range(n_episodes)]))


def success_when_closed(model: OffPolicyAlgorithm) -> float:
    """Share of the closings of three openings of Fork in which one of ten attempts, at least, reaches the goal."""
    successes = []
    for closed in itertools.combinations(range(4), 3):
        env = gym.make("sb3_dqs/Fork-v0", closed=closed)
        # 25: the standard error of a run's score is at most 0.05
        for repeat in range(25):
            attempts = (run_episode(model, env, seed=0 if i == repeat == 0 else None) for i in range(10))
            successes.append(any("route" in info for _, info in attempts))
    return float(np.mean(successes))


def success_after_fine_tuning(model: OffPolicyAlgorithm, n_steps: int = 1_000) -> float:
    """Share of stochastic episodes that find the goal behind a door, after so many steps in that hall with an empty buffer."""
    shares = []
    for door in (int(model.seed or 0) % 8, (int(model.seed or 0) + 4) % 8):
        env = gym.make("sb3_dqs/Corridor-v0", door=door)
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        tuned = type(model).load(file, env=env, device="cpu")
        gradient_steps, tuned.gradient_steps = tuned.gradient_steps, 0  # first a batch of experience
        tuned.learn(100, reset_num_timesteps=False, log_interval=10**9)
        tuned.gradient_steps = gradient_steps
        tuned.learn(n_steps - 100, reset_num_timesteps=False, log_interval=10**9)
        shares.append(np.mean([run_episode(tuned, env)[1]["is_success"] for _ in range(50)]))
    return float(np.mean(shares))


SCORES: dict[str, Callable[[OffPolicyAlgorithm], float]] = {
    "Keeper": partial(mean_return, task="Keeper", n_episodes=400),
    "Fork": success_when_closed,
    "DelayedBest": partial(mean_return, task="DelayedBest", n_episodes=20),
    "Corridor": success_after_fine_tuning,
    "MountainCar": lambda model: evaluate_policy(model, model.get_env(), n_eval_episodes=5)[0],
}


def measured_entropy(model: Any) -> float:
    """Mean over 256 replayed states of ``-log pi(a|s)`` of one action each."""
    obs = model.replay_buffer.sample(256).observations
    model.policy.set_training_mode(False)
    with th.no_grad():
        return -float(model.actor.action_log_prob(obs)[1].mean())


def run(task: str, variant: str, seed: int, target_entropy: float | None) -> dict[str, Any]:
    """Row of one training."""
    use_one_thread()
    cls, kwargs = VARIANTS[variant]
    kwargs = {**TASK_KWARGS[task], **kwargs}
    if target_entropy is not None:
        kwargs |= {"target_entropy": target_entropy, "ent_coef": START_OF_EQUAL_ENTROPY.get(task, "auto")}
    model = cls("MlpPolicy", ENV_IDS[task], seed=seed, device="cpu", **kwargs)
    scores = []
    for step in range(500, STEPS[task] + 1, 500):
        model.learn(500, OneTraining(STEPS[task]), reset_num_timesteps=step == 500, log_interval=10**9)
        if step == STEPS[task] or (task == "DelayedBest" and step >= 4_500):
            scores.append(SCORES[task](model))
    values = {
        "score": np.mean(scores),
        "return": mean_return(model, task, 100 if task != "MountainCar" else 5),
        "entropy": measured_entropy(model),
    }
    row: dict[str, Any] = {"task": task, "variant": variant, "seed": seed, "steps": model.num_timesteps}
    return row | {name: round(float(value), 4) for name, value in values.items()}


def entropy_of_dqs(task: str, path: Path) -> float:
    """Mean over the rows of DQS."""
    variant = ENTROPY_OF.get(task, "DQS")
    entropies = [float(row["entropy"]) for row in read_rows(path) if (row["task"], row["variant"]) == (task, variant)]
    if not entropies:
        raise ValueError(f'--variants: "{EQUAL_ENTROPY}" needs rows of "{variant}" on {task} in {path}; run that first.')
    return float(np.mean(entropies))


def run_all(jobs: list[tuple[str, str, int]], n_processes: int, path: Path) -> None:
    """Those that need the entropy of DQS come last."""
    for is_last in (False, True):
        with fresh_processes(n_processes) as pool:
            futures = [
                pool.submit(run, task, variant, seed, entropy_of_dqs(task, path) if is_last else None)
                for task, variant, seed in jobs
                if (variant == EQUAL_ENTROPY) == is_last
            ]
            for i, future in enumerate(as_completed(futures), start=1):
                append_rows(path, [future.result()])
                print(f"done {i}/{len(futures)}: {future.result()}", flush=True)


def report(rows: list[dict[str, str]], path: Path) -> None:
    """Table and figure of the scores."""
    tasks, variants = ([name for name in names if any(name == row[key] for row in rows)]
                       for key, names in (("task", STEPS), ("variant", VARIANTS)))  # fmt: skip
    figure, axes = plt.subplots(1, len(tasks), figsize=(1.6 + 2.8 * len(tasks), 3.4), squeeze=False, layout="constrained")
    table = []
    for ax, task in zip(axes[0], tasks, strict=True):
        for i, variant in enumerate(variants):
            chosen = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            if not chosen:
                continue
            scores = np.array([float(row["score"]) for row in chosen])
            mean, (low, high) = iqm(scores), bootstrap_interval(scores)
            means = [f"{np.mean([float(row[key]) for row in chosen]):.2f}" for key in ("return", "entropy")]
            table.append([task, variant, len(chosen), f"{mean:.2f} ({low:.2f} to {high:.2f})", *means])
            color = "C0" if variant.startswith("DQS") else "C1"
            ax.barh(i, mean, color=color, alpha=0.5)
            ax.plot([low, high], [i, i], color="black")
            ax.plot(scores, np.full(len(scores), i), ".", color=color)
        ax.set_yticks(range(len(variants)), variants if ax is axes[0, 0] else [""] * len(variants))
        ax.set(title=task, ylim=(len(variants) - 0.4, -0.6), xlabel="score")
    figure.suptitle("bar: interquartile mean, line: its 95 % interval, points: seeds", fontsize="small")
    print_table(["task", "algorithm", "seeds", "score: IQM (95 % interval)", "return", "entropy"], table)
    figure.savefig(path, dpi=120)
    print("figure:", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["Keeper", "Fork"], choices=list(STEPS))
    parser.add_argument("--variants", nargs="+", default=["DQS", "SAC", "SAC, equal entropy"], choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "exploration.csv")
    parser.add_argument("--report-only", action="store_true", help="print what the file has")
    args = parser.parse_args()
    print_provenance()
    done = {(row["task"], row["variant"], int(row["seed"])) for row in read_rows(args.out)}
    if not args.report_only:
        jobs = [(task, variant, seed) for task in args.tasks for seed in args.seeds for variant in args.variants]
        run_all([job for job in jobs if job not in done], args.processes, args.out)
    report([row for row in read_rows(args.out) if int(row["seed"]) in args.seeds], args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
