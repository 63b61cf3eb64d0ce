"""
Log-density of a diffusion policy along the probability-flow ODE of its sampler, by the instantaneous change of variables
(Song et al. 2021, https://arxiv.org/abs/2011.13456, equation (39)). With the denoiser D and the latent z of u,

    log p(u) = log N(z; 0, 1) - d log sigma_max + integral over log sigma of (d - tr dD(x, sigma)/dx)

from 0 to sigma_max, along the path of the sampler from z to u. It is the density of what the sampler draws, whether or not
the denoiser is exact. The entropy is the mean of -log p(u). Units: nats, for unsquashed actions u.
"""

import math
from collections.abc import Callable, Collection
from itertools import pairwise

import torch as th
from torch.nn import functional as F

from sb3_dqs.noise import SIGMA_MAX

# Step of the finite differences, in noise levels
TRACE_STEP = 0.1


def trace_steps(n_levels: int) -> list[int]:
    """
    Steps of the sampler at which the trace is taken: every second one from ``SIGMA_BROAD`` on, and the last. The integrand
    is smooth between them.

    :param n_levels: number of levels of the sampler, at least 3
    :return: indices of levels, in the order of the sampler
    """
    return sorted({*range(1, n_levels, 2), n_levels - 1})


def random_signs(like: th.Tensor) -> th.Tensor:
    """
    Directions for :func:`with_traces`: 1 or -1, at random.

    :param like: a tensor of the wanted shape, type and device
    :return: signs of the shape of ``like``
    """
    return th.randint_like(like, 2) * 2 - 1


def with_traces(
    denoise: Callable[[th.Tensor, int], th.Tensor], signs: th.Tensor, levels: list[float], steps: Collection[int]
) -> tuple[Callable[[th.Tensor, int], th.Tensor], dict[int, th.Tensor]]:
    """
    A denoiser that in passing estimates the trace of its derivative: ``v^T (dD/dx) v`` has it for its mean over random signs
    v (Hutchinson 1990, https://doi.org/10.1080/03610919008812866; for densities Grathwohl et al. 2019, "FFJORD",
    https://arxiv.org/abs/1810.01367). By finite differences: twice the price, and no derivative.

    :param denoise: the denoiser: from noisy actions x and the index of their noise level to the shape of x; where traces are
        wanted it is given more rows, the second time those of the signs
    :param signs: v, of the shape of x or of its first rows: the trace is that of as many
    :param levels: noise levels
    :param steps: indices of those at which the trace is wanted
    :return: the same denoiser, and where it puts the traces, by index, of shape (...) for signs of shape (..., action_dim)
    """
    traces: dict[int, th.Tensor] = {}
    n_traced = len(signs)

    def denoise_and_trace(x: th.Tensor, step: int) -> th.Tensor:
        if step not in steps:
            return denoise(x, step)
        shift = TRACE_STEP * levels[step]
        denoised, moved = denoise(th.cat([x, x[:n_traced] + shift * signs]), step).split([len(x), n_traced])
        traces[step] = (signs * (moved - denoised[:n_traced])).sum(dim=-1) / shift
        return denoised

    return denoise_and_trace, traces


def flow_log_density(latents: th.Tensor, traces: dict[int, th.Tensor], levels: list[float]) -> th.Tensor:
    """
    Log-density of unsquashed actions, by the trapezoidal rule between the levels whose traces are given. Above the highest of
    them the trace falls as ``1 / sigma^2`` (as of a Gaussian policy), below the lowest ``d - trace`` rises as
    ``sigma^2`` (as of a smooth density).

    :param latents: standard normal numbers z, shape (..., action_dim)
    :param traces: what :func:`with_traces` found on the path from z to u, of shape (...) each
    :param levels: noise levels of the sampler, falling
    :return: nats, shape (...)
    """
    action_dim = latents.shape[-1]
    steps = sorted(traces)
    highest = levels[steps[0]]
    log_density = -(latents.pow(2).sum(dim=-1) + action_dim * math.log(2 * math.pi)) / 2 - action_dim * math.log(highest)
    log_density = log_density - traces[steps[0]] * (1 - (highest / SIGMA_MAX) ** 2) / 2
    for step, next_step in pairwise(steps):
        mean_trace = (traces[step] + traces[next_step]) / 2
        log_density = log_density + (action_dim - mean_trace) * math.log(levels[step] / levels[next_step])
    return log_density + (action_dim - traces[steps[-1]]) / 2


def log_det_tanh(unsquashed: th.Tensor) -> th.Tensor:
    """
    Log-determinant of the Jacobian of ``a = tanh(u)``, as in SAC (appendix C of Haarnoja et al. 2018,
    https://arxiv.org/abs/1801.01290), in a form that does not underflow:
    ``log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))``.

    :param unsquashed: u, shape (..., action_dim)
    :return: its sum over the dimensions of the action, shape (...)
    """
    return 2 * (math.log(2) - unsquashed - F.softplus(-2 * unsquashed)).sum(dim=-1)
