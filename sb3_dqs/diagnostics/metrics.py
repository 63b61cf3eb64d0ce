"""Grids on the box [-1, 1]^d, moments of weighted points, and distances between sets of points: functions of tensors."""

import math

import torch as th


def box_grid(dim: int, n: int, dtype: th.dtype | None = None, device: th.device | str | None = None) -> th.Tensor:
    """
    Midpoints of the cells of a regular grid on [-1, 1]^dim, the first dimension slowest.

    :param dim: number of dimensions
    :param n: number of cells per dimension
    :param dtype: type of the result; by default torch's
    :param device: device of the result
    :return: shape (n**dim, dim)
    """
    axis = (2 * th.arange(n, dtype=th.float64, device=device) + 1) / n - 1
    return th.cartesian_prod(*[axis.to(dtype or th.get_default_dtype())] * dim).reshape(-1, dim)


def sample_grid(grid: th.Tensor, log_probs: th.Tensor, n_samples: int) -> th.Tensor:
    """
    Draws from the density that is constant on each cell.

    :param grid: what ``box_grid()`` returned, shape (n_cells, dim)
    :param log_probs: log-probabilities of the cells, shape (n_cells,)
    :param n_samples: number of draws
    :return: shape (n_samples, dim)
    """
    midpoints = grid[th.multinomial(log_probs.exp(), n_samples, replacement=True)]
    return midpoints + (2 * th.rand_like(midpoints) - 1) / len(grid) ** (1 / grid.shape[1])


def grid_entropy(log_probs: th.Tensor, dim: int) -> th.Tensor:
    """
    Differential entropy of a density on [-1, 1]^dim, by the midpoint rule.

    :param log_probs: log-probabilities of the cells of ``box_grid()``, shape (n_cells,)
    :param dim: number of dimensions
    :return: nats, 0-d
    """
    return -(log_probs.exp() * log_probs).sum() + dim * math.log(2) - math.log(len(log_probs))


def weighted_moments(points: th.Tensor, log_weights: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Mean and standard deviation per dimension, and the standard error of the mean if the weights are those of self-normalised
    importance sampling, ``sqrt(sum_k w_k^2 (x_k - mean)^2)`` (Owen 2013, "Monte Carlo theory, methods and examples", section
    9.2); too small where few points have most of the weight.

    :param points: shape (n, dim)
    :param log_weights: normalised log-weights, shape (n,)
    :return: three of shape (dim,)
    """
    weights = log_weights.exp()
    mean = weights @ points
    squares = (points - mean) ** 2
    return mean, (weights @ squares).sqrt(), (weights**2 @ squares).sqrt()


def sliced_wasserstein(first: th.Tensor, second: th.Tensor, n_directions: int = 128) -> th.Tensor:
    """
    Sliced Wasserstein-1 distance between two sets of equal size: the mean over directions of the distance between the
    projections, which is that of the sorted ones (Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of
    measures").

    :param first: shape (..., n, dim)
    :param second: shape (..., n, dim)
    :param n_directions: number of directions; one in one dimension, evenly spaced in two, in more random and always the same
    :return: in units of the points, shape (...)
    """
    dim = first.shape[-1]
    if dim == 1:
        directions = th.ones(1, 1)
    elif dim == 2:
        angles = (th.arange(n_directions) + 0.5) * math.pi / n_directions
        directions = th.stack([angles.cos(), angles.sin()])
    else:
        directions = th.randn(dim, n_directions, generator=th.Generator().manual_seed(0))
        directions = directions / directions.norm(dim=0)
    directions = directions.to(first)
    gaps = (first @ directions).sort(dim=-2).values - (second @ directions).sort(dim=-2).values
    return gaps.abs().mean(dim=(-2, -1))


def distance_ratio(actions: th.Tensor, exact: th.Tensor, n_directions: int = 16) -> th.Tensor:
    """
    Mean sliced Wasserstein distance from the actions to sets of exact draws, divided by that between such sets.

    :param actions: shape (n, dim)
    :param exact: at least two sets of draws, shape (n_sets, n, dim)
    :param n_directions: see :func:`sliced_wasserstein`
    :return: 0-d, 1 on average (up to the scatter of the denominator) if all come from one distribution
    """
    floor = sliced_wasserstein(exact, exact.roll(1, dims=0), n_directions).mean()
    return sliced_wasserstein(actions.expand_as(exact), exact, n_directions).mean() / floor
