"""
Does the policy keep up with exp(Q / ent_coef) of its own critic while it learns?

    python benchmarks/tracking.py --tasks reach-3 Pendulum-v1 --seeds 0 1 2

Trains DQS and SAC for the same steps. At every evaluation, at 64 replayed states, compares the policy's actions with
importance sampling of exp(Q / ent_coef): means (along the way to the goal for ``reach``, which has one), spreads, entropies.
Half of the candidates are uniform on the box, half come from kernels around the policy's actions. Rows go to
``benchmarks/results/tracking.csv`` with the commit of the package; a figure shows the means and the entropy gap.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from common import RESULTS, append_rows, print_provenance, print_table, provenance, read_rows, use_one_thread
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs import DQS
from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.observations import count

N_STATES, N_ACTIONS, N_CANDIDATES, N_KERNELS = 64, 256, 4096, 64
MIN_WIDTH = 0.03  # of a kernel
VARIANTS: dict[str, tuple[type[OffPolicyAlgorithm], dict[str, Any]]] = {
    "SAC": (SAC, {}),
    "DQS": (DQS, {}),
    "DQS, policy_delay=2": (DQS, {"policy_delay": 2}),
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


def repeat(obs: PyTorchObs, n: int) -> PyTorchObs:
    return {k: v.repeat_interleave(n, 0) for k, v in obs.items()} if isinstance(obs, dict) else obs.repeat_interleave(n, 0)


def policy_of(model: Any, obs: PyTorchObs) -> tuple[th.Tensor, float]:
    """The policy's actions at each state, shape (n_states, N_ACTIONS, d), and its mean entropy."""
    n_states = count(obs)
    if isinstance(model, DQS):
        embedding = model.actor.embed(obs).unsqueeze(1)
        u = model.actor.sample(embedding, th.randn(n_states, N_ACTIONS, model.actor.action_dim))
        return th.tanh(u), model.policy.entropy(obs).mean().item()
    actions, log_prob = model.actor.action_log_prob(repeat(obs, N_ACTIONS))
    return actions.reshape(n_states, N_ACTIONS, -1), -log_prob.mean().item()


def tempered_q(model: Any, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, float]:
    """Q / ent_coef for actions of shape (n_states, n, d), and ent_coef: what the actor of the algorithm is trained towards."""
    if isinstance(model, DQS):
        ent_coef = float(model.ent_coef_tensor)
        return model.critic.energy(obs)(actions) / ent_coef, ent_coef
    ent_coef = float(model.log_ent_coef.exp())
    pairs = repeat(obs, actions.shape[1]), actions.flatten(0, 1)
    return th.cat(model.critic(*pairs), dim=1).min(dim=1).values.reshape(actions.shape[:2]) / ent_coef, ent_coef


@th.no_grad()
def track(model: Any) -> dict[str, float]:
    """Policy against exp(Q / ent_coef): means of N_STATES states."""
    obs = model.replay_buffer.sample(N_STATES).observations
    model.policy.set_training_mode(False)
    actions, entropy = policy_of(model, obs)
    dim, half = actions.shape[2], N_CANDIDATES // 2
    kernels, width = actions[:, :N_KERNELS], actions.std(dim=1, keepdim=True).clamp(min=MIN_WIDTH)
    near = kernels[:, th.randint(N_KERNELS, (half,))] + width * th.randn(N_STATES, half, dim)
    candidates = th.cat([2 * th.rand(N_STATES, half, dim) - 1, near], dim=1)
    log_kernels = -((candidates.unsqueeze(2) - kernels.unsqueeze(1)) / width.unsqueeze(1)).pow(2).sum(dim=3) / 2
    log_kernels = log_kernels.logsumexp(dim=2) - math.log(N_KERNELS) - (width.log() + math.log(2 * math.pi) / 2).sum(dim=2)
    log_proposal = th.logaddexp(log_kernels, th.tensor(-dim * math.log(2))) - math.log(2)
    values, ent_coef = tempered_q(model, obs, candidates.clamp(-1, 1))
    log_ratios = (values - log_proposal).masked_fill((candidates.abs() > 1).any(dim=2), -math.inf)
    log_weights = log_ratios.log_softmax(dim=1)
    weights = log_weights.exp().unsqueeze(2)
    mean = (weights * candidates).sum(dim=1)
    exact_entropy = log_ratios.logsumexp(dim=1) - math.log(N_CANDIDATES) - (weights.squeeze(2) * values).sum(dim=1)
    if isinstance(obs, dict):
        goal = obs["desired_goal"] - obs["achieved_goal"]
    else:
        goal = mean  # without a goal, along the mean of exp(Q / ent_coef) itself
    goal = goal / goal.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return {
        "boltzmann_mean": (mean * goal).sum(dim=1).mean().item(),
        "policy_mean": (actions.mean(dim=1) * goal).sum(dim=1).mean().item(),
        "boltzmann_std": (weights * (candidates - mean.unsqueeze(1)).pow(2)).sum(dim=1).mean().sqrt().item(),
        "policy_std": actions.var(dim=1).mean().sqrt().item(),
        "entropy_gap": entropy - exact_entropy.mean().item(),
        "ess": effective_sample_size(log_weights).median().item(),
        "ent_coef": ent_coef,
    }


def run(variant: str, task: str, seed: int, steps: int, eval_freq: int, path: Path) -> None:
    """One training, a row per evaluation."""
    cls, kwargs = VARIANTS[variant]
    if task.startswith("reach"):
        kwargs = {
            "learning_rate": 1e-3,
            "gamma": 0.95,
            "learning_starts": 500,
            "replay_buffer_class": HerReplayBuffer,
            **kwargs,
        }
    policy = "MultiInputPolicy" if task.startswith("reach") else "MlpPolicy"
    model = cls(policy, task, seed=seed, device="cpu", **kwargs)  # type: ignore[arg-type]
    env, seconds = Monitor(gym.make(task)), 0.0
    env.reset(seed=10_000 + seed)
    for step in range(eval_freq, steps + 1, eval_freq):
        start = time.process_time()
        model.learn(eval_freq, reset_num_timesteps=step == eval_freq, log_interval=10**9)
        seconds += time.process_time() - start
        mean_return, _ = evaluate_policy(model, env, 10)
        row = {"variant": variant, "task": task, "seed": seed, "step": step, "return": mean_return, "cpu_seconds": seconds}
        row |= track(model)
        append_rows(path, [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}])
        print(
            ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()),
            flush=True,
        )


def report(rows: list[dict[str, str]], path: Path) -> None:
    """Figure of the means and the entropy gap, and a table of the last rows."""
    for row in rows:
        row["variant"] += f" at {row['commit']}" if row["variant"].startswith("DQS") else ""
    tasks, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "variant"))
    figure = Figure(figsize=(5 * len(tasks), 6), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    table = []
    for (upper, lower), task in zip(axes.T, tasks, strict=True):
        for color, variant in enumerate(variants):
            chosen = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            steps = sorted({int(row["step"]) for row in chosen})

            def mean(key: str, chosen: list[dict[str, str]] = chosen, steps: list[int] = steps) -> list[float]:
                return [float(np.mean([float(row[key]) for row in chosen if int(row["step"]) == step])) for step in steps]

            if not chosen:
                continue
            upper.plot(steps, mean("policy_mean"), color=f"C{color}", label=variant)
            upper.plot(steps, mean("boltzmann_mean"), "--", color=f"C{color}")
            lower.plot(steps, mean("entropy_gap"), color=f"C{color}")
            keys = ("boltzmann_mean", "policy_mean", "entropy_gap", "ent_coef", "return")
            seeds = len({row["seed"] for row in chosen})
            table.append([task, variant, seeds, steps[-1], *(f"{mean(key)[-1]:.2f}" for key in keys)])
        upper.set(title=task, ylabel="mean action (dashed: exp(Q / ent_coef))")
        upper.legend(fontsize="small")
        lower.set(xlabel="environment steps", ylabel="entropy gap in nats")
        lower.axhline(0, color="black", linewidth=0.5)
    print_table(
        ["task", "algorithm", "seeds", "step", "exp(Q / ent_coef)", "policy", "entropy gap", "ent_coef", "return"], table
    )
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
