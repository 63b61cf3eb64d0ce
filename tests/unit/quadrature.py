"""Boltzmann distributions of independent dimensions, Gaussians and pairs of these, and the exact denoiser of each."""

import math
from collections.abc import Callable

import torch as th

from sb3_dqs.density import log_det_tanh
from sb3_dqs.solvers import Denoiser

# Nodes are placed in widths of p(u|x) of a policy that is broader than all of these. Integrands are smooth, so that 97 nodes
# are enough for integrals; draws are uniform between nodes and need more
BROAD_STD, N_WIDTHS = 2.0, 6
N_NODES, N_NODES_OF_DRAWS = 97, 801
# Grid of unsquashed actions, for the policy itself
GRID = th.linspace(-12, 12, 4801, dtype=th.float64)
SPACING = float(GRID[1] - GRID[0])

# Energies Q / ent_coef of squashed actions, per dimension
ENERGIES: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "flat": lambda a: 0 * a,
    "linear": lambda a: 3 * a,
    "two modes": lambda a: th.logaddexp(-((a - 0.6) ** 2) / 0.045, -((a + 0.5) ** 2) / 0.045 - 0.7),
}


def log_density_of(energy: str) -> Callable[[th.Tensor], th.Tensor]:
    """Log-density of unsquashed actions (..., action_dim), up to a constant."""
    return lambda u: ENERGIES[energy](th.tanh(u)).sum(dim=-1) + log_det_tanh(u)


def posterior(energy: str, x: th.Tensor, sigma: th.Tensor, n_nodes: int) -> tuple[th.Tensor, th.Tensor]:
    """Nodes and their probabilities under p(u|x), shape (n, n_nodes), for x and sigma of shape (n,)."""
    x, sigma = x.double().unsqueeze(1), sigma.double().unsqueeze(1)
    shrinkage = BROAD_STD**2 / (BROAD_STD**2 + sigma**2)
    nodes = x * shrinkage + sigma * shrinkage.sqrt() * th.linspace(-N_WIDTHS, N_WIDTHS, n_nodes, dtype=th.float64)
    log_posterior = log_density_of(energy)(nodes.unsqueeze(2)) - ((nodes - x) / sigma) ** 2 / 2
    return nodes, th.softmax(log_posterior, dim=1)


def denoise(energy: str, x: th.Tensor, sigma: th.Tensor | float) -> th.Tensor:
    """``E[u | x]``, of the shape and type of x; sigma of a shape that broadcasts."""
    nodes, probabilities = posterior(energy, x.flatten(), th.as_tensor(sigma).expand_as(x).flatten(), N_NODES)
    return (nodes * probabilities).sum(dim=1).to(x.dtype).reshape(x.shape)


def sample_posterior(energy: str, x: th.Tensor, sigma: th.Tensor, n: int) -> th.Tensor:
    """Draws from p(u|x), shape (n_x, n), for x and sigma of shape (n_x,)."""
    nodes, probabilities = posterior(energy, x, sigma, N_NODES_OF_DRAWS)
    spacing = nodes[:, 1:2] - nodes[:, :1]
    draws = nodes.gather(1, th.multinomial(probabilities, n, replacement=True))
    return (draws + spacing * (th.rand_like(draws) - 0.5)).to(x.dtype)


def gaussian(mean: float, std: float) -> Denoiser:
    """The denoiser of a Gaussian."""
    return lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean)


def two_gaussians(share: float, center: th.Tensor, std: float) -> Denoiser:
    """Of mean ``-center`` (with this share) and ``center``, a vector."""

    def denoise(x, sigma):
        variance = std**2 + sigma**2
        side = th.tanh((x @ center).unsqueeze(-1) / variance + math.atanh(1 - 2 * share))
        return (sigma**2 * side * center + std**2 * x) / variance

    return denoise


def exact(energy: str) -> Denoiser:
    return lambda x, sigma: denoise(energy, x, sigma)


def even_latents(n: int) -> th.Tensor:
    """Quantiles of the normal distribution, shape (n, 1): no sampling noise."""
    return th.special.ndtri((th.arange(n, dtype=th.float64) + 0.5) / n).unsqueeze(1)


def log_prob(energy: str, u: th.Tensor) -> th.Tensor:
    """Normalised log-density of unsquashed actions (..., action_dim)."""
    log_norm = th.logsumexp(log_density_of(energy)(GRID.unsqueeze(1)), dim=0) + math.log(SPACING)
    return log_density_of(energy)(u) - u.shape[-1] * log_norm


def entropy(energy: str) -> float:
    """Entropy of one unsquashed dimension, in nats."""
    log_density = log_prob(energy, GRID.unsqueeze(1))
    return -float((log_density.exp() * log_density).sum()) * SPACING


def sample(energy: str, *shape: int) -> th.Tensor:
    """Draws from the policy."""
    draws = GRID[th.multinomial(log_prob(energy, GRID.unsqueeze(1)).exp(), math.prod(shape), replacement=True)]
    return (draws + SPACING * (th.rand_like(draws) - 0.5)).reshape(shape).float()
