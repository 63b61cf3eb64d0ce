"""
Log-density of a diffusion policy along the path of its sampler, by the instantaneous change of variables (Song et al. 2021,
https://arxiv.org/abs/2011.13456, equation (39)). With the denoiser D and the latent z of u,

    log p(u) = log N(z; 0, 1) - d log sigma_max + integral over log sigma of (d - tr dD(x, sigma)/dx)

from 0 to sigma_max, along the path from z to u. It is the density of what the sampler draws, whether or not the denoiser is
exact. The entropy is the mean of -log p(u). Units: nats, for unsquashed actions u.
"""

import math
from collections.abc import Collection
from itertools import pairwise

import torch as th
from torch.nn import functional as F

from sb3_dqs.solvers import Denoiser


class PathDensity:
    """
    Callback of a solver that estimates the trace of dD/dx at some levels of the path, and from these the log-density.

    ``v^T (dD/dx) v`` has the trace for its mean over random signs v (Hutchinson 1990,
    https://doi.org/10.1080/03610919008812866; for densities Grathwohl et al. 2019, "FFJORD",
    https://arxiv.org/abs/1810.01367), here by a finite difference: one more call of the denoiser, and no derivative.

    :param denoise: the denoiser
    :param like: a tensor of the shape, type and device of the actions
    :param sigmas: noise levels of the solver, falling
    :param steps: levels at which the trace is taken, at least the last; by default all but the first. See :func:`trace_steps`
    :param shift: step of the finite difference, in noise levels: a tenth of it changes traces by less than 0.05 on average
    """

    def __init__(
        self,
        denoise: Denoiser,
        like: th.Tensor,
        sigmas: list[float],
        steps: Collection[int] | None = None,
        shift: float = 0.1,
    ):
        self.denoise = denoise
        self.sigmas = sigmas
        self.steps = sorted(steps or range(1, len(sigmas)))
        self.shift = shift
        self.signs = th.randint_like(like, 2) * 2 - 1
        self.traces: dict[int, th.Tensor] = {}

    def __call__(self, step: int, x: th.Tensor, sigma: float, denoised: th.Tensor) -> None:
        if step in self.steps:
            moved = self.denoise(x + self.shift * sigma * self.signs, sigma)
            self.traces[step] = (self.signs * (moved - denoised)).sum(dim=-1) / (self.shift * sigma)

    def log_density(self, latents: th.Tensor) -> th.Tensor:
        """
        Log-density of the unsquashed actions at the end of the path, by the trapezoidal rule between the levels of the traces.
        Above the highest of them the trace falls as ``1 / sigma^2`` (as of a Gaussian policy), below the lowest ``d - trace``
        rises as ``sigma^2`` (as of a smooth density).

        :param latents: standard normal numbers z at the beginning of the path, shape (..., action_dim)
        :return: nats, shape (...)
        """
        sigmas, traces = self.sigmas, self.traces
        action_dim, first, last = latents.shape[-1], self.steps[0], self.steps[-1]
        log_density = -(latents.pow(2).sum(dim=-1) + action_dim * math.log(2 * math.pi)) / 2
        log_density = log_density - action_dim * math.log(sigmas[first])
        log_density = log_density - traces[first] * (1 - (sigmas[first] / sigmas[0]) ** 2) / 2
        for step, next_step in pairwise(self.steps):
            mean_trace = (traces[step] + traces[next_step]) / 2
            log_density = log_density + (action_dim - mean_trace) * math.log(sigmas[step] / sigmas[next_step])
        return log_density + (action_dim - traces[last]) / 2


def trace_steps(n_steps: int) -> list[int]:
    """
    Steps of the sampler at which training takes the trace: every second one after the first, and the last. Levels 1, 3 and 6
    of 8 alone make the entropy 0.1 nats per dimension too low on closed forms, these 0.02.

    :param n_steps: number of levels of the sampler, at least 3
    :return: indices of levels, in the order of the sampler
    """
    return sorted({*range(1, n_steps, 2), n_steps - 1})


def log_det_tanh(u: th.Tensor) -> th.Tensor:
    """
    Log-determinant of the Jacobian of ``a = tanh(u)``, as in SAC (appendix C of Haarnoja et al. 2018,
    https://arxiv.org/abs/1801.01290), in a form that does not underflow:
    ``log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))``.

    :param u: unsquashed actions, shape (..., action_dim)
    :return: its sum over the dimensions of the action, shape (...)
    """
    return 2 * (math.log(2) - u - F.softplus(-2 * u)).sum(dim=-1)
