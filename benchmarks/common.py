"""
What the benchmarks share: provenance of a figure, CSV files of results, tables, means and their spread, processes, an
environment.
"""

import importlib.metadata
import multiprocessing
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "stable_baselines3", "sb3_contrib", "gymnasium", "mujoco")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@cache
def provenance() -> dict[str, str]:
    """Commit, versions, processor, and whether the processor multiplies bfloat16 matrices in hardware."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    is_changed = subprocess.run([*git, "status", "--porcelain", "--", "../sb3_dqs"], capture_output=True, text=True).stdout
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "commit": (commit or "unknown") + ("+" if is_changed else ""),
        "versions": " ".join(f"{name} {version_of(name)}" for name in PACKAGES),
        "python": platform.python_version(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "bfloat16": str(any(flag in cpuinfo for flag in ("amx_bf16", "avx512_bf16"))),
    }


class OneTraining(BaseCallback):
    """
    Schedules run over the whole training, of which a call of ``learn()`` is a part.

    :param total_timesteps: of the whole training
    """

    def __init__(self, total_timesteps: int):
        super().__init__()
        self.total_timesteps = total_timesteps

    def _on_training_start(self) -> None:
        self.model._total_timesteps = self.total_timesteps

    def _on_step(self) -> bool:
        return True


def print_provenance() -> None:
    print(", ".join(f"{name}: {value}" for name, value in provenance().items()), flush=True)


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """
    Append rows, with their provenance, to a CSV file that is created with its first row.

    :param path: the file
    :param rows: all with the same keys, in the order of the columns
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame([{**row, **provenance()} for row in rows])
    if path.exists() and list(pd.read_csv(path, nrows=0)) != list(frame):
        raise ValueError(f"{path} has other columns than {list(frame)}: move it away.")
    frame.to_csv(path, mode="a", header=not path.exists(), index=False, lineterminator="\n")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no such file."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.exists() else []


def print_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table in Markdown."""
    header = list(header)
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of two or more values, their standard deviation; empty if there is no value or one is NaN."""
    if len(values) == 0 or np.isnan(values).any():
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def iqm(values: np.ndarray) -> np.ndarray:
    """
    Interquartile mean over the last axis (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264): the mean of the middle
    half, in which values at its edge count in part.

    :param values: shape (..., n)
    :return: shape (...)
    """
    ordered, n = np.sort(values, axis=-1), values.shape[-1]
    left = np.arange(n) / n
    weights = (np.minimum(left + 1 / n, 0.75) - np.maximum(left, 0.25)).clip(0)
    return (ordered * weights).sum(axis=-1) / weights.sum()


def bootstrap_interval(values: np.ndarray, n_resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """
    Percentile bootstrap interval of the interquartile mean, from resampled seeds.

    :param values: one per seed, shape (n,)
    :param n_resamples: number of resamples
    :param level: probability
    :return: lower and upper end
    """
    rng = np.random.default_rng(0)
    means = iqm(values[rng.integers(len(values), size=(n_resamples, len(values)))])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def nearest_neighbour_entropy(samples: th.Tensor) -> float:
    """Entropy of samples, shape (n, dim), from distances to their third neighbours (Kozachenko and Leonenko 1987)."""
    n, dim = samples.shape
    samples = samples.double() + 1e-4 * th.randn(n, dim)  # clipped actions are equal
    distances = [th.cdist(part, samples).topk(4, largest=False).values[:, -1] for part in samples.split(1000)]
    log_ball = dim / 2 * np.log(np.pi) - th.lgamma(th.tensor(dim / 2 + 1)).item()
    digammas = th.digamma(th.tensor([float(n), 3.0]))
    return dim * th.cat(distances).log().mean().item() + (digammas[0] - digammas[1]).item() + log_ball


def minimise(optimizer: th.optim.Optimizer, n_steps: int, loss: Callable[[int], th.Tensor]) -> None:
    """Gradient steps on a function of their number, with a learning rate that falls to zero."""
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for step in range(n_steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()


def fresh_processes(n: int) -> ProcessPoolExecutor:
    """Spawned, one run per process: a run's memory and threads end with it. Needs Python 3.11."""
    return ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def use_one_thread() -> None:
    th.set_num_threads(1)


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
