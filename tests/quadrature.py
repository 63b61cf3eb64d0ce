"""Boltzmann distributions of independent dimensions, and the exact denoiser of each, by quadrature."""

from collections.abc import Callable

import torch as th

from sb3_dqs.diffusion import log_det_tanh

# Nodes in widths of the posterior of a policy that is broader than all of these
NODES = th.linspace(-8, 8, 513, dtype=th.float64)
BROAD_STD = 2.0

# Energies of squashed actions, per dimension
ENERGIES: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "flat": lambda a: 0 * a,
    "linear": lambda a: 3 * a,
    "two modes": lambda a: th.logaddexp(-((a - 0.6) ** 2) / 0.045, -((a + 0.5) ** 2) / 0.045 - 0.7),
}


def log_density_of(energy: str) -> Callable[[th.Tensor], th.Tensor]:
    """Log-density of unsquashed actions (..., action_dim), up to a constant."""
    return lambda u: ENERGIES[energy](th.tanh(u)).sum(dim=-1) + log_det_tanh(u)


def posterior(energy: str, x: th.Tensor, sigma: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Nodes and their probabilities under p(u|x), shape (n, n_nodes), for x and sigma of shape (n,)."""
    x, sigma = x.double().unsqueeze(1), sigma.double().unsqueeze(1)
    shrinkage = BROAD_STD**2 / (BROAD_STD**2 + sigma**2)
    nodes = x * shrinkage + sigma * shrinkage.sqrt() * NODES
    log_posterior = log_density_of(energy)(nodes.unsqueeze(2)) - ((nodes - x) / sigma) ** 2 / 2
    return nodes, th.softmax(log_posterior, dim=1)


def denoise(energy: str, x: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """``E[u | x]``, of the shape and type of x; sigma of a shape that broadcasts."""
    nodes, probabilities = posterior(energy, x.flatten(), sigma.expand_as(x).flatten())
    return (nodes * probabilities).sum(dim=1).to(x.dtype).reshape(x.shape)


def sample_posterior(energy: str, x: th.Tensor, sigma: th.Tensor, n: int) -> th.Tensor:
    """Draws from p(u|x), shape (n_x, n), for x and sigma of shape (n_x,)."""
    nodes, probabilities = posterior(energy, x, sigma)
    spacing = nodes[:, 1:2] - nodes[:, :1]
    draws = nodes.gather(1, th.multinomial(probabilities, n, replacement=True))
    return (draws + spacing * (th.rand_like(draws) - 0.5)).to(x.dtype)


def sample(energy: str, n: int) -> th.Tensor:
    """Draws from the policy itself, shape (n,): at such noise x tells nothing."""
    return sample_posterior(energy, th.zeros(1), th.full((1,), 1e4), n).squeeze(0)
