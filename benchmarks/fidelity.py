"""
How true is the learned policy to exp(Q / ent_coef) / Z, beside the estimators of other papers and SAC's Gaussian?

    python benchmarks/fidelity.py

For distributions with exact samples and known entropy, trains the actor by the actor's part of ``DQS.train()``, once
per estimator of the regression target, with the same steps. Prints the sliced Wasserstein-1 distance of its actions to
exact samples over that between two exact sets (1 is perfect), the errors of the mode shares and the entropy, and the
cost. The row "exact samples" is ordinary denoising of such samples: the limit of network and solver. Then prints what
the solver alone does with an exact denoiser, and saves a figure. Each result is written to ``--out`` as it ends and not
computed again (remove the folder after a change of the code). Some twenty seconds of one core per estimator and target.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch as th
from fidelity_estimators import ESTIMATORS, Estimator
from fidelity_targets import TARGETS, Target, box_grid, make_target
from gymnasium import spaces
from nearest_neighbours import nearest_neighbour_entropy
from stable_baselines3.common.distributions import TanhBijector
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch.nn import functional as F

from sb3_dqs.actor import Actor
from sb3_dqs.denoiser_targets import ENOUGH_SAMPLES, N_ANCHORS, LogDensity, count_pooled, effective_sample_size
from sb3_dqs.density import log_det_tanh
from sb3_dqs.dqs import ESS_UPDATE_RATE
from sb3_dqs.fast import has_fast_bfloat16
from sb3_dqs.noise import edm_scalings, sampling_levels, training_levels
from sb3_dqs.solvers import MAX_UNSQUASHED, solve_reverse_ode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Half as wide as the default, to save time; the learning rate falls to zero
NET_ARCH, BATCH_SIZE, LEARNING_RATE = [128, 128], 256, 2e-3
# The temperature falls from here to 1 in the first part of the training
INITIAL_ENT_COEF, ANNEALED = 20.0, 0.5
# The Gaussian has two parameters per dimension and needs larger steps than a network
GAUSSIAN_LEARNING_RATE = 2e-2
# The distance of finite sets is itself noisy: medians of a few
N_ACTIONS, N_REPEATS = 5000, 5
DEFAULT, PAPER = "posterior mean, K=12", "energy gradient, K=64"
# Takes minutes per target: only where it is cheapest, unless asked for by name
DEAR, DEAR_TARGETS = "energy gradient, K=1000", ("two modes 1-D", "four modes 2-D")
STEP_COUNTS = (4, 6, 8, 10, 16)

Policy = Callable[[int], th.Tensor]
Denoiser = Callable[[th.Tensor, float], th.Tensor]
Solver = Callable[[Denoiser, th.Tensor, int], th.Tensor]


# Training


class Counted:
    """A log-density that counts its values, and those differentiated."""

    def __init__(self, log_density: LogDensity):
        self.log_density, self.forward, self.backward = log_density, 0, 0

    def __call__(self, actions: th.Tensor) -> th.Tensor:
        values = self.log_density(actions)
        self.forward += values.numel()
        if values.requires_grad:
            values.register_hook(self._count_backward)
        return values

    def _count_backward(self, gradient: th.Tensor) -> None:
        self.backward += gradient.numel()


def train_actor(target: Target, log_density: LogDensity, estimator: Estimator, steps: int) -> tuple[Policy, float, float]:
    """
    The actor's part of ``DQS.train()``, for one state.

    :return: the policy, its own estimate of its entropy, and the mean effective sample size in the last quarter
    """
    observation_space = spaces.Box(-1, 1, (1,))
    actor = Actor(
        observation_space, spaces.Box(-1, 1, (target.dim,)), NET_ARCH, FlattenExtractor(observation_space), features_dim=1
    )
    optimizer = th.optim.Adam(actor.parameters(), lr=LEARNING_RATE)
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    obs, effective = th.zeros(1, 1), []
    n_states = BATCH_SIZE // N_ANCHORS
    mean_ess = ENOUGH_SAMPLES
    dtype = th.bfloat16 if has_fast_bfloat16(actor.device) else None
    for step in range(steps):
        # As ent_coef="auto" does, from the uniform policy down
        ent_coef = max(INITIAL_ENT_COEF ** (1 - step / (ANNEALED * steps)), 1.0)

        def unsquashed_log_density(u: th.Tensor, ent_coef: float = ent_coef) -> th.Tensor:
            return log_density(u.tanh()) / ent_coef + log_det_tanh(u)

        embedding = actor.embed(obs)
        with th.no_grad():
            if estimator.estimate is None:
                anchors = TanhBijector.inverse(target.sample(BATCH_SIZE)).reshape(n_states, N_ANCHORS, -1)
            else:
                latents = th.randn(n_states, N_ANCHORS, target.dim)
                anchors = actor.sample_unsquashed(embedding, latents, dtype)
        sigma = training_levels(n_states, N_ANCHORS)
        x = anchors + sigma * th.randn_like(anchors)
        denoised = actor.denoise(embedding, x, sigma)
        regression_target, log_weights = anchors, th.zeros_like(sigma)
        if estimator.estimate is not None:
            with th.no_grad():
                regression_target, log_weights = estimator.estimate(
                    lambda states, density=unsquashed_log_density: density,
                    anchors,
                    denoised,
                    x,
                    sigma,
                    actor.get_std(),
                    estimator.n_samples,
                    count_pooled(mean_ess, n_states),
                )
        ess = effective_sample_size(log_weights).mean().item()
        mean_ess += ESS_UPDATE_RATE * (ess - mean_ess)
        effective.append(ess)
        c_out = edm_scalings(sigma)[1]
        loss = F.mse_loss(denoised / c_out, regression_target / c_out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        actor.update_std(anchors - denoised.detach(), sigma)

    @th.no_grad()
    def policy(n: int) -> th.Tensor:
        return actor.sample(actor.embed(obs), th.randn(n, target.dim))

    return policy, own_entropy(actor), float(np.mean(effective[-steps // 4 :]))


@th.no_grad()
def own_entropy(actor: Actor) -> float:
    """What the policy says of its entropy, as ``DQSPolicy.entropy()``."""
    latents = th.randn(2048, actor.action_dim)
    embedding = actor.embed(th.zeros(1, 1)).expand(len(latents), -1)
    return -actor.sample_with_log_prob(embedding, latents, range(1, len(actor.levels)))[1].mean().item()


def train_gaussian(target: Target, log_density: LogDensity, steps: int) -> tuple[Policy, float, float]:
    """SAC's policy, and its objective: tanh of a diagonal Gaussian that maximises ``E[Q] / ent_coef`` plus entropy."""
    mean = th.zeros(target.dim, requires_grad=True)
    log_std = th.zeros(target.dim, requires_grad=True)
    optimizer = th.optim.Adam([mean, log_std], lr=GAUSSIAN_LEARNING_RATE)
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def draw(n: int) -> tuple[th.Tensor, th.Tensor]:
        noise = th.randn(n, target.dim)
        raw = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.pow(2) - log_std - 0.5 * np.log(2 * np.pi)
        return raw.tanh(), log_normal.sum(dim=1) - log_det_tanh(raw)

    for _ in range(steps):
        actions, log_prob = draw(BATCH_SIZE)
        loss = (log_prob - log_density(actions)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return lambda n: draw(n)[0].detach(), -draw(N_ACTIONS)[1].mean().item(), 1.0


# Metrics


def sliced_wasserstein(first: th.Tensor, second: th.Tensor, n_projections: int = 128) -> float:
    """Sliced Wasserstein-1 distance between two sets of as many points, shape (n, d)."""
    directions = th.randn(n_projections if first.shape[1] > 1 else 1, first.shape[1])
    directions = directions / directions.norm(dim=1, keepdim=True)
    gaps = (directions @ first.T).sort(dim=1).values - (directions @ second.T).sort(dim=1).values
    return gaps.abs().mean().item()


def mode_shares(actions: th.Tensor, modes: th.Tensor) -> th.Tensor:
    """Shares of the modes, by the nearest centre."""
    return th.cdist(actions, modes).argmin(dim=1).bincount(minlength=len(modes)) / len(actions)


@lru_cache
def floors(name: str) -> tuple[float, float]:
    """Distance between two sets of exact samples (median), and their nearest-neighbour entropy."""
    target = make_target(name)
    with th.random.fork_rng():
        th.manual_seed(0)
        pairs = [target.sample(2 * N_ACTIONS).chunk(2) for _ in range(15)]
        distance = float(np.median([sliced_wasserstein(first, second) for first, second in pairs]))
        return distance, float(np.mean([nearest_neighbour_entropy(first) for first, _ in pairs[:3]]))


def distance_over_floor(name: str, sets: list[th.Tensor]) -> float:
    """Sliced Wasserstein distance of sets of actions to exact samples over that between exact sets; medians."""
    target = make_target(name)
    distances = [sliced_wasserstein(actions, target.sample(N_ACTIONS)) for actions in sets]
    return float(np.median(distances)) / floors(name)[0]


def share_error(target: Target, actions: th.Tensor) -> float:
    """Total variation between the mode shares of the actions and the exact ones; NaN where there are no modes."""
    if target.modes is None:
        return float("nan")
    exact = mode_shares(target.sample(4 * N_ACTIONS), target.modes)
    return 0.5 * (mode_shares(actions, target.modes) - exact).abs().sum().item()


def run_training(name: str, estimator: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one policy and measure it."""
    th.set_num_threads(1)
    target = make_target(name)
    exact_entropy = floors(name)[1]
    th.manual_seed(seed)
    log_density = Counted(target.log_density)
    start = time.process_time()
    if estimator == "tanh Gaussian":
        policy, entropy, effective = train_gaussian(target, log_density, steps)
    else:
        policy, entropy, effective = train_actor(target, log_density, ESTIMATORS[estimator], steps)
    seconds = time.process_time() - start
    sets = [policy(N_ACTIONS) for _ in range(N_REPEATS)]
    return {
        "target": name,
        "estimator": estimator,
        "distance": distance_over_floor(name, sets),
        "shares": share_error(target, th.cat(sets)),
        "entropy_error": (nearest_neighbour_entropy(sets[0]) - exact_entropy) / target.dim,
        "own_entropy_error": (entropy - target.entropy) / target.dim,
        "ess": effective,
        "forward": log_density.forward / (steps * BATCH_SIZE),
        "backward": log_density.backward / (steps * BATCH_SIZE),
        "microseconds": 1e6 * seconds / (steps * BATCH_SIZE),
        "samples": sets[0][:1000].numpy().round(3).tolist() if target.dim <= 2 else [],
    }


# The solver alone, with an exact denoiser


def exact_denoiser(target: Target, n_cells: int = 400) -> Denoiser:
    """``E[u | x]`` in one or two dimensions, by quadrature."""
    axis = MAX_UNSQUASHED * box_grid(1, n_cells).squeeze(1).double()
    grid = MAX_UNSQUASHED * box_grid(target.dim, n_cells).double()
    log_mass = target.log_density(grid.tanh().float()).double() + log_det_tanh(grid)
    mass = (log_mass - log_mass.max()).exp().reshape([n_cells] * target.dim)

    def denoise(x: th.Tensor, sigma: float) -> th.Tensor:
        likelihoods = [(-((axis - part) ** 2) / (2 * sigma**2)).softmax(dim=1) for part in x.split(1, dim=1)]
        if target.dim == 1:
            marginals = [likelihoods[0] * mass]
        else:
            first, second = likelihoods
            marginals = [first * (second @ mass.T), second * (first @ mass)]
        return th.stack([marginal @ axis / marginal.sum(dim=1) for marginal in marginals], dim=1)

    return denoise


def solve_ode(denoise: Denoiser, latents: th.Tensor, levels: list[float]) -> th.Tensor:
    """The package's solver."""
    return solve_reverse_ode(lambda x, step: denoise(x, levels[step]), latents, levels)


def solve_ancestral(denoise: Denoiser, latents: th.Tensor, levels: list[float]) -> th.Tensor:
    """Draws each noisy action from its posterior given the denoised one (Ho et al. 2020, equations (6) and (7))."""
    x = levels[0] * latents
    for sigma, next_sigma in pairwise(levels):
        ratio = (next_sigma / sigma) ** 2
        x = (1 - ratio) * denoise(x, sigma) + ratio * x + next_sigma * (1 - ratio) ** 0.5 * th.randn_like(x)
    return denoise(x, levels[-1])


SOLVERS: dict[str, Solver] = {
    "ODE": lambda denoise, latents, n: solve_ode(denoise, latents, sampling_levels(n)),
    "ancestral": lambda denoise, latents, n: solve_ancestral(denoise, latents, sampling_levels(n)),
}


def run_solvers(name: str, estimator: str, steps: int, seed: int) -> dict[str, Any]:
    """Distance over floor and share error of every solver and number of steps; the other arguments as run_training()'s."""
    th.set_num_threads(1)
    target = make_target(name)
    denoise = exact_denoiser(target)
    th.manual_seed(seed)
    cells = {}
    for solver, solve in SOLVERS.items():
        for n in STEP_COUNTS:
            sets = [solve(denoise, th.randn(N_ACTIONS, target.dim).double(), n).tanh().float() for _ in range(3)]
            cells[f"{solver} {n}"] = [distance_over_floor(name, sets), share_error(target, th.cat(sets))]
    return {"target": name, "cells": cells}


# Tables and figure


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def number(value: float, digits: int = 2) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def print_results(results: list[dict[str, Any]]) -> None:
    """One table of the distances, and one of everything."""
    targets = list(dict.fromkeys(result["target"] for result in results))
    cells = {(result["estimator"], result["target"]): number(result["distance"], 1) for result in results}
    print("Sliced Wasserstein distance to exact samples, over that between exact sets:\n")
    estimators = [name for name in ESTIMATORS if any(name == estimator for estimator, _ in cells)]
    print_table(["", *targets], [[name, *(cells.get((name, target), "") for target in targets)] for name in estimators])
    print("Q: evaluations forward / backward per regression target; entropy errors in nats per dimension:\n")
    header = ["target", "estimator", "distance", "share error", "entropy error", "of its own estimate", "ESS", "Q", "CPU µs"]
    rows = [
        [
            result["target"],
            result["estimator"],
            number(result["distance"], 1),
            number(result["shares"], 3),
            number(result["entropy_error"]),
            number(result["own_entropy_error"]),
            number(result["ess"], 1),
            f"{result['forward']:.0f} / {result['backward']:.0f}",
            number(result["microseconds"], 0),
        ]
        for result in results
    ]
    print_table(header, rows)


def print_solvers(results: list[dict[str, Any]]) -> None:
    print("The solver with an exact denoiser: distance over floor (share error), by number of steps:\n")
    rows = []
    for result in results:
        for solver in SOLVERS:
            pairs = [result["cells"][f"{solver} {n}"] for n in STEP_COUNTS]
            shown = [number(distance, 1) + ("" if np.isnan(share) else f" ({share:.3f})") for distance, share in pairs]
            rows.append([result["target"], solver, *shown])
    print_table(["target", "solver", *map(str, STEP_COUNTS)], rows)


def draw_samples(ax: plt.Axes, target: Target, samples: np.ndarray, color: str) -> None:
    """Samples over the density."""
    if target.dim == 1:
        grid = box_grid(1, 400)
        mass = target.log_density(grid).softmax(dim=0) * 200
        ax.hist(samples[:, 0], bins=60, range=(-1, 1), density=True, color=color, alpha=0.6)
        ax.plot(grid[:, 0], mass, color="black", linewidth=0.8)
    else:
        grid = target.log_density(box_grid(2, 200)).softmax(dim=0).reshape(200, 200)
        ax.imshow(
            grid.T, origin="lower", extent=(-1, 1, -1, 1), cmap="Greys", aspect="equal", vmin=0, vmax=1.5 * grid.max().item()
        )
        ax.plot(*samples.T, ".", markersize=1.5, color=color)
        ax.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03))


def plot_samples(figure: Any, names: list[str], by_job: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Exact samples, the default's and the paper's, a column per target."""
    rows = {"exact": "tab:green", DEFAULT: "tab:blue", PAPER: "tab:orange"}
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for column, name in zip(axes.T, names, strict=True):
        target = make_target(name)
        column[0].set_title(name, fontsize=10)
        for ax, (row, color) in zip(column, rows.items(), strict=True):
            ax.set_box_aspect(1)
            ax.set(xticks=[], yticks=[])
            if row == "exact":
                draw_samples(ax, target, target.sample(1000).numpy(), color)
            elif (name, row) in by_job:
                draw_samples(ax, target, np.array(by_job[name, row]["samples"]), color)
                ax.set_xlabel(f"distance {by_job[name, row]['distance']:.1f}", fontsize=9)
    for ax, row in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(row, fontsize=9)
    figure.suptitle("1,000 samples on the exact density (grey); distance over its floor", fontsize=11)


def plot_bars(figure: Any, names: list[str], by_job: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Distance over its floor per estimator, a panel per target."""
    shown = [estimator for estimator in reversed(ESTIMATORS) if any((name, estimator) in by_job for name in names)]
    colors = [{DEFAULT: "tab:blue", PAPER: "tab:orange"}.get(estimator, "silver") for estimator in shown]
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        distances = [by_job.get((name, estimator), {}).get("distance", np.nan) for estimator in shown]
        ax.barh(shown, distances, color=colors)
        for y, distance in enumerate(distances):
            ax.text(np.nan_to_num(distance), y, " " + (number(distance, 1) or "not run"), va="center", fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set_title(name, fontsize=10)
        ax.tick_params(labelsize=8)
        ax.set_xlim(0, 1.2 * np.nanmax([*distances, 1]))
    figure.suptitle("Sliced Wasserstein distance to exact samples, over that between exact sets (dotted: 1)", fontsize=11)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Samples in one and two dimensions, bars above."""
    by_job = {(result["target"], result["estimator"]): result for result in results}
    names = list(dict.fromkeys(name for name, _ in by_job))
    low = [name for name in names if make_target(name).dim <= 2]
    high = [name for name in names if make_target(name).dim > 2]
    panels = [(plot_samples, low, 7.6)] * bool(low) + [(plot_bars, high, 3.6)] * bool(high)
    heights = [height for _, _, height in panels]
    width = 2.2 * max(len(low), 1.5 * len(high), 3) + 0.5
    figure = plt.figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)
    for part, (draw, shown, _) in zip(parts[:, 0], panels, strict=True):
        draw(part, shown, by_job)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS), metavar="ESTIMATOR")
    parser.add_argument("--steps", type=int, default=1500, help="gradient steps, each on 256 regression targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)

    all_estimators = set(args.estimators) == set(ESTIMATORS)
    jobs: dict[Path, tuple[Callable[[str, str, int, int], dict[str, Any]], str, str]] = {
        args.out / f"{target}_{estimator}_{args.steps}_{args.seed}.json".replace(" ", "-"): (run_training, target, estimator)
        for target in args.targets
        for estimator in args.estimators
        if estimator != DEAR or target in DEAR_TARGETS or not all_estimators
    }
    runs = list(jobs)
    low = [target for target in args.targets if make_target(target).dim <= 2]
    jobs |= {
        args.out / f"{target}_solvers_{args.seed}.json".replace(" ", "-"): (run_solvers, target, "solvers") for target in low
    }
    missing = sorted((path for path in jobs if not path.exists()), key=lambda path: jobs[path][2] != DEAR)  # the longest first
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        futures = {}
        for path in missing:
            function, target, estimator = jobs[path]
            futures[pool.submit(function, target, estimator, args.steps, args.seed)] = path
        for i, future in enumerate(as_completed(futures), start=1):
            futures[future].write_text(json.dumps(future.result()))
            print(f"done {i}/{len(missing)}: {futures[future].stem}", flush=True)

    results = {path: json.loads(path.read_text()) for path in jobs}
    print()
    print_results([results[path] for path in runs])
    if low:
        print_solvers([results[path] for path in jobs if path not in runs])
    path = args.out / "fidelity.png"
    plot([results[path] for path in runs], path)
    print("figure:", path)


if __name__ == "__main__":
    main()
