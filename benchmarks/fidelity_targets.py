"""Boltzmann distributions on the box [-1, 1]^d with exact samples and known entropy, for fidelity.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch as th
from common import minimise
from stable_baselines3.common.torch_layers import create_mlp
from torch import distributions, nn

from sb3_dqs.denoiser_targets import LogDensity
from sb3_dqs.diagnostics.metrics import box_grid, grid_entropy, sample_grid

SHARES = (0.1, 0.2, 0.3, 0.4)
# One sign vector per mode; they differ in 3 to 4 of 6 dimensions, and in 8 or 9 of 17
SIGNS_6 = ("++++++", "+++---", "---++-", "--++-+")
SIGNS_17 = ("+" * 17, "+-" * 8 + "+", "++--" * 4 + "-", "+--+" * 4 + "-")


@dataclass(frozen=True)
class Target:
    """
    :param dim: number of action dimensions d
    :param log_density: from actions (..., d) to (...), differentiable, up to a constant
    :param sample: draws n exact samples, shape (n, d)
    :param entropy: in nats
    :param modes: centres of the modes, shape (n_modes, d), where the target has modes
    """

    dim: int
    log_density: LogDensity
    sample: Callable[[int], th.Tensor]
    entropy: float
    modes: th.Tensor | None = None


def linear(slopes: tuple[float, ...]) -> Target:
    """Energy that falls towards one corner; by inversion of the distribution function, dimension by dimension."""
    slope = th.tensor(slopes)
    steep = slope.abs()

    def sample(n: int) -> th.Tensor:
        uniforms = th.rand(n, len(slopes))
        return slope.sign() * (1 + (uniforms + (1 - uniforms) * (-2 * steep).exp()).log() / steep).clamp(min=-1)

    entropy = (2 * steep.sinh() / steep).log() - steep * (1 / steep.tanh() - 1 / steep)
    return Target(len(slopes), lambda actions: (actions * slope).sum(dim=-1), sample, entropy.sum().item())


def flat(dim: int) -> Target:
    """The uniform distribution."""
    return Target(dim, lambda actions: 0 * actions.sum(dim=-1), lambda n: 2 * th.rand(n, dim) - 1, dim * math.log(2))


def gaussians(centers: th.Tensor, shares: th.Tensor, std: float) -> distributions.Distribution:
    """Mixture of isotropic Gaussians."""
    parts = distributions.Independent(distributions.Normal(centers, std), 1)
    return distributions.MixtureSameFamily(distributions.Categorical(shares), parts)


def on_grid(dim: int, log_density: LogDensity, modes: th.Tensor | None = None) -> Target:
    """One or two dimensions: samples (uniform within a cell) and entropy from a fine grid."""
    grid = box_grid(dim, 4000 if dim == 1 else 500)
    with th.no_grad():
        log_probs = log_density(grid).double().log_softmax(dim=0)
    entropy = grid_entropy(log_probs, dim).item()
    return Target(dim, log_density, lambda count: sample_grid(grid, log_probs, count), entropy, modes)


def mixture(centers: th.Tensor, shares: th.Tensor, std: float) -> Target:
    """Gaussians truncated to the box, in any dimension: samples by rejection, entropy as their mean (to 0.01 nats)."""
    whole = gaussians(centers, shares, std)

    def sample(count: int) -> th.Tensor:
        proposals = whole.sample((4 * count,))
        return proposals[(proposals.abs() <= 1).all(dim=1)][:count]

    in_box = (whole.sample((400_000,)).abs() <= 1).all(dim=1).double().mean()
    entropy = in_box.log() - whole.log_prob(sample(200_000)).double().mean()
    return Target(centers.shape[1], whole.log_prob, sample, entropy.item(), centers)


def by_rejection(log_density: LogDensity, centers: th.Tensor, std: float) -> Target:
    """
    Any energy whose modes are known: candidates from Gaussians around the modes, and uniform ones, thinned by
    rejection with the largest weight; the entropy from all candidates by self-normalised importance weights.
    """
    dim, n_candidates, uniform_share = centers.shape[1], 400_000, 0.1
    around = mixture(centers, th.ones(len(centers)), std)
    n_uniform = int(uniform_share * n_candidates)
    candidates = th.cat([around.sample(n_candidates - n_uniform), 2 * th.rand(n_uniform, dim) - 1])
    # The normalising constant of the Gaussians in the box from their entropy, the mean of -log q over their samples
    log_norm = around.entropy + around.log_density(around.sample(200_000)).mean()
    log_around = around.log_density(candidates) - log_norm + math.log(1 - uniform_share)
    log_uniform = th.full_like(log_around, math.log(uniform_share) - dim * math.log(2))
    with th.no_grad():
        log_values = th.cat([log_density(chunk) for chunk in candidates.split(10_000)])
    log_ratio = (log_values - th.logaddexp(log_around, log_uniform)).double()
    log_normaliser = th.logsumexp(log_ratio, dim=0) - math.log(n_candidates)
    entropy = log_normaliser - (log_ratio.softmax(dim=0) * log_values).sum()
    pool = candidates[th.rand(n_candidates).log() < log_ratio - log_ratio.max()]

    def sample(count: int) -> th.Tensor:
        return pool[th.randperm(len(pool))[:count]]

    return Target(dim, log_density, sample, entropy.item(), centers)


def critic(centers: th.Tensor, width: float, ent_coef: float) -> LogDensity:
    """Log-density of a trained critic over a temperature: a network fitted to bumps of unequal height."""
    n_modes, dim = centers.shape
    heights = th.linspace(0.9, 1.0, n_modes)
    q_net = nn.Sequential(*create_mlp(dim, 1, [64, 64]))

    def loss(step: int) -> th.Tensor:
        near = centers[th.randint(n_modes, (128,))] + width * th.randn(128, dim)
        actions = th.cat([near.clamp(-1, 1), 2 * th.rand(128, dim) - 1])
        values = (heights * (-th.cdist(actions, centers).pow(2) / (2 * width**2)).exp()).sum(dim=1)
        return (q_net(actions).squeeze(1) - values).pow(2).mean()

    minimise(th.optim.Adam(q_net.parameters(), lr=3e-3), 4000, loss)
    q_net.requires_grad_(False)
    return lambda actions: q_net(actions).squeeze(-1) / ent_coef


def signs(rows: tuple[str, ...]) -> th.Tensor:
    return th.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in rows])


def modes_1() -> Target:
    centers = th.tensor([[-0.5], [0.5]])
    return on_grid(1, gaussians(centers, th.tensor([0.3, 0.7]), 0.1).log_prob, centers)


def gaussians_2() -> Target:
    centers = 0.5 * signs(("--", "-+", "+-", "++"))
    return on_grid(2, gaussians(centers, th.tensor(SHARES), 0.1).log_prob, centers)


def ring() -> Target:
    return on_grid(2, lambda actions: -((actions.pow(2).sum(dim=-1) + 1e-12).sqrt() - 0.65).pow(2) / (2 * 0.07**2))


def moons() -> Target:
    """Two half circles that reach into each other, as Gaussians along the arcs."""
    angles = th.linspace(0, math.pi, 24)
    upper = th.stack([0.5 * angles.cos() - 0.25, 0.5 * angles.sin() - 0.12], dim=1)
    arcs = th.cat([upper, -upper])
    return on_grid(2, gaussians(arcs, th.ones(len(arcs)), 0.06).log_prob)


def critic_2() -> Target:
    centers = th.tensor([[-0.6, -0.6], [-0.5, 0.5], [0.0, -0.2], [0.4, 0.6], [0.7, -0.5]])
    return on_grid(2, critic(centers, width=0.25, ent_coef=0.15), centers)


def critic_6() -> Target:
    centers = 0.5 * signs(SIGNS_6)
    return by_rejection(critic(centers, width=0.5, ent_coef=0.07), centers, std=0.2)


TARGETS: dict[str, Callable[[], Target]] = {
    "flat 2-D": lambda: flat(2),
    "corner 2-D": lambda: linear((5.0, -5.0)),
    "two modes 1-D": modes_1,
    "four modes 2-D": gaussians_2,
    "ring 2-D": ring,
    "moons 2-D": moons,
    "critic 2-D": critic_2,
    "corner 6-D": lambda: linear((8.0, -8.0, 5.0, -5.0, 2.0, -2.0)),
    "four modes 6-D": lambda: mixture(0.5 * signs(SIGNS_6), th.tensor(SHARES), 0.15),
    "critic 6-D": critic_6,
    "four modes 17-D": lambda: mixture(0.5 * signs(SIGNS_17), th.tensor(SHARES), 0.25),
}


@lru_cache
def make_target(name: str) -> Target:
    """The target of this name, the same in every process."""
    with th.random.fork_rng():
        th.manual_seed(0)
        return TARGETS[name]()
