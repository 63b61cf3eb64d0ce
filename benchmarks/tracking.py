"""
Does the policy keep up with exp(Q / ent_coef) of its own critic while it learns?

    python benchmarks/tracking.py --tasks reach-3 Pendulum-v1 --seeds 0 1 2

Trains DQS and SAC for the same steps. At every evaluation, at 64 replayed states, compares the policy's actions with
exp(Q / ent_coef) as ``sb3_dqs.diagnose`` does: means (along the way to the goal for ``reach``, which has one, else along the
mean of exp(Q / ent_coef)), their standard error, spreads, entropies. Rows go to ``benchmarks/results/tracking.csv`` with the
commit of the package; a figure shows the means and the entropy gap, and a table whether the policy's mean is within 10 % of
that of exp(Q / ent_coef) where this is known to 3 %.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from bandit import BanditEnv
from common import RESULTS, append_rows, print_provenance, print_table, provenance, read_rows, use_one_thread
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.distributions import TanhBijector
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs import DQS, Diagnosis, diagnose
from sb3_dqs.diagnostics import compare
from sb3_dqs.observations import select

N_ACTIONS = 256
COLUMNS = (
    "boltzmann_mean", "boltzmann_mean_error", "policy_mean", "boltzmann_std", "policy_std", "distance", "mean_gap",
    "spread_ratio", "entropy_gap", "ess", "ent_coef",
)  # fmt: skip
REACH = {"learning_rate": 1e-3, "gamma": 0.95, "learning_starts": 500, "replay_buffer_class": HerReplayBuffer}
VARIANTS: dict[str, tuple[type[OffPolicyAlgorithm], dict[str, Any]]] = {
    "SAC": (SAC, {}),
    "DQS": (DQS, {}),
    "DQS, policy_delay=1": (DQS, {"policy_delay": 1}),
    "DQS, plain critic": (DQS, {"policy_kwargs": {"critic_class": "mlp"}}),
}


class Reach(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """
    A point that must reach a random goal: steps of 0.1 times the action, 50 steps, reward 0 within 0.1 of the goal and -1
    elsewhere.

    :param dim: number of dimensions
    """

    def __init__(self, dim: int):
        self.action_space = spaces.Box(-1, 1, (dim,), np.float32)
        keys = ("observation", "achieved_goal", "desired_goal")
        self.observation_space = spaces.Dict({key: spaces.Box(-1, 1, (dim,), np.float32) for key in keys})

    def _observe(self) -> dict[str, np.ndarray]:
        position, goal = self.position.astype(np.float32), self.goal.astype(np.float32)
        return {"observation": position, "achieved_goal": position, "desired_goal": goal}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, *self.action_space.shape))
        return self._observe(), {}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, info: Any) -> np.ndarray:
        return -(np.linalg.norm(achieved - desired, axis=-1) > 0.1).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        self.position = (self.position + 0.1 * action).clip(-1, 1)
        return self._observe(), float(self.compute_reward(self.position, self.goal, {})), False, False, {}


for n in (3, 6):
    gym.register(f"reach-{n}", lambda dim=n: Reach(dim), max_episode_steps=50)


class DriftingBandit(BanditEnv):
    """The bandit with four good actions, which turn around the middle by a right angle in 5,000 steps."""

    n_steps = 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        angle = math.pi / 2 * self.n_steps / 5_000
        self.n_steps += 1
        return super().step(action @ np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))


gym.register("drifting-bandit", DriftingBandit, max_episode_steps=1)
TASKS: dict[str, dict[str, Any]] = {
    "reach-3": REACH,
    "reach-6": REACH,
    # The buffer is as short as a fifth of the right angle, so that the critic follows
    "drifting-bandit": {"learning_rate": 1e-3, "ent_coef": 0.1, "learning_starts": 500, "buffer_size": 1_000},
}


def ent_coef_of(model: Any) -> float:
    return float(model.ent_coef_tensor if model.log_ent_coef is None else model.log_ent_coef.exp())


def compare_sac(model: SAC, state: PyTorchObs) -> dict[str, th.Tensor]:
    """SAC at one state, beside exp(Q / ent_coef) of what its actor is trained towards, the minimum of the twin critics."""
    ent_coef = ent_coef_of(model)

    def repeat(n: int) -> PyTorchObs:
        return select(state, th.zeros(n, dtype=th.long))

    def tempered_q(actions: th.Tensor) -> th.Tensor:
        values = th.cat(model.critic(repeat(len(actions)), actions.float()), dim=1)
        return values.min(dim=1).values.double() / ent_coef

    actions, log_prob = model.actor.action_log_prob(repeat(N_ACTIONS))
    return compare(tempered_q, TanhBijector.inverse(actions).double(), -log_prob.mean())


@th.no_grad()
def track(model: Any, n_states: int) -> dict[str, Any]:
    """Policy beside exp(Q / ent_coef) at replayed states, and ent_coef; a column that the task does not have is empty."""
    obs = model.replay_buffer.sample(n_states).observations
    model.policy.set_training_mode(False)
    if isinstance(model, DQS):
        diagnosis = diagnose(model, obs, N_ACTIONS)
    else:
        diagnosis = Diagnosis.of([compare_sac(model, select(obs, slice(i, i + 1))) for i in range(n_states)])
    goal = (obs["desired_goal"] - obs["achieved_goal"]).numpy() if isinstance(obs, dict) else None
    return dict.fromkeys(COLUMNS, "") | diagnosis.scalars(goal) | {"ent_coef": ent_coef_of(model)}


def run(variant: str, task: str, seed: int, steps: int, eval_freq: int, path: Path) -> None:
    """One training, a row per evaluation."""
    cls, kwargs = VARIANTS[variant]
    policy = "MultiInputPolicy" if task.startswith("reach") else "MlpPolicy"
    kwargs = {**TASKS.get(task, {}), **kwargs}
    model = cls(policy, task, seed=seed, device="cpu", **kwargs)  # type: ignore[arg-type]
    env, seconds = Monitor(gym.make(task)), 0.0
    env.reset(seed=10_000 + seed)
    for step in range(eval_freq, steps + 1, eval_freq):
        start = time.process_time()
        model.learn(eval_freq, reset_num_timesteps=step == eval_freq, log_interval=10**9)
        seconds += time.process_time() - start
        if isinstance(env.unwrapped, DriftingBandit):
            env.unwrapped.n_steps = step
        mean_return, _ = evaluate_policy(model, env, 10)
        row = {"variant": variant, "task": task, "seed": seed, "step": step, "return": mean_return, "cpu_seconds": seconds}
        row |= track(model, 16 if isinstance(env.unwrapped, DriftingBandit) else 64)  # the bandit has one state
        append_rows(path, [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}])
        texts = (f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items())
        print(", ".join(filter(None, texts)), flush=True)


def is_known(row: dict[str, str]) -> bool:
    """Whether the mean of exp(Q / ent_coef) is estimated to 3 %; an error from fewer than 1 % of the candidates is not."""
    has_error = row["boltzmann_mean_error"] != "" and float(row["ess"] or 1) >= 0.01
    return has_error and float(row["boltzmann_mean_error"]) <= 0.03 * abs(float(row["boltzmann_mean"]))


def is_kept(row: dict[str, str]) -> bool:
    """Whether the mean of the policy is within 10 % of that of exp(Q / ent_coef)."""
    exact = float(row["boltzmann_mean"])
    return abs(float(row["policy_mean"]) - exact) <= 0.1 * abs(exact)


def report(rows: list[dict[str, str]], path: Path) -> None:
    """Figure of the means and the entropy gap, for the latest commit of each task, and a table of the last rows of all."""
    latest = {(row["task"], row["variant"]): row["commit"] for row in rows}
    colors = {variant: f"C{i}" for i, variant in enumerate(VARIANTS)}
    for row in rows:
        row["label"] = row["variant"]
        row["in_figure"] = not row["variant"].startswith("DQS") or row["commit"] == latest[row["task"], row["variant"]]
        row["variant"] += f" at {row['commit']}" if row["variant"].startswith("DQS") else ""
    tasks, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "variant"))
    figure = Figure(figsize=(5 * len(tasks), 6), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    table = []
    for (upper, lower), task in zip(axes.T, tasks, strict=True):
        for variant in variants:
            chosen = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            steps = sorted({int(row["step"]) for row in chosen})

            def mean(key: str, chosen: list[dict[str, str]] = chosen, steps: list[int] = steps) -> list[float]:
                return [float(np.mean([float(row[key]) for row in chosen if int(row["step"]) == step])) for step in steps]

            if not chosen:
                continue
            if chosen[0]["in_figure"]:  # the commit is part of the variant
                label = chosen[0]["label"]
                upper.plot(steps, mean("policy_mean"), color=colors[label], label=label)
                upper.plot(steps, mean("boltzmann_mean"), "--", color=colors[label])
                lower.plot(steps, mean("entropy_gap"), color=colors[label])
            keys = ("boltzmann_mean", "policy_mean", "entropy_gap", "ent_coef", "return")
            seeds = len({row["seed"] for row in chosen})
            known = [row for row in chosen if is_known(row)]
            kept = f"{sum(map(is_kept, known))} of {len(known)}" if known else ""
            table.append([task, variant, seeds, steps[-1], *(f"{mean(key)[-1]:.2f}" for key in keys), kept])
        upper.set(title=task, ylabel="mean action\n(dashed: exp(Q / ent_coef))")
        upper.legend(fontsize="small")
        lower.set(xlabel="environment steps", ylabel="entropy gap in nats")
        lower.axhline(0, color="black", linewidth=0.5)
    header = ["task", "algorithm", "seeds", "step", "exp(Q / ent_coef)", "policy", "entropy gap", "ent_coef", "return"]
    print_table([*header, "policy within 10 %, of the rows known to 3 %"], table)
    figure.savefig(path, dpi=120)
    print("figure:", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["reach-3"])
    parser.add_argument("--variants", nargs="+", default=["SAC", "DQS"], choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--eval-freq", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS / "tracking.csv")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    use_one_thread()
    print_provenance()
    # Runs of DQS are repeated for every commit, those of its peers are not
    commit = provenance()["commit"]
    done = {(row["variant"], row["task"], int(row["seed"])) for row in read_rows(args.out)
            if row["commit"] == commit or not row["variant"].startswith("DQS")}  # fmt: skip
    for task in args.tasks:
        for seed in args.seeds:
            for variant in args.variants:
                if not args.report_only and (variant, task, seed) not in done:
                    run(variant, task, seed, args.steps, args.eval_freq, args.out)
    report(read_rows(args.out), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
