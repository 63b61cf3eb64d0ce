"""
Solvers of the probability-flow ODE: functions of a denoiser, a noisy action and falling noise levels.

The diffusion is that of unsquashed actions u (``a = tanh(u)``), with variance exploding: ``x = u + sigma * eps``. A denoiser
``D(x, sigma)`` estimates ``E[u | x]``; the score of x is ``(D - x) / sigma^2`` (Tweedie's formula).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch as th
from torch.nn import functional as F

# From noisy actions x (..., action_dim) and their noise level to the shape of x
Denoiser = Callable[[th.Tensor, float], th.Tensor]
# Called once per step with (step, x, sigma, denoised)
Callback = Callable[[int, th.Tensor, float, th.Tensor], None]
# From (denoise, x, sigmas, callback) to unsquashed actions of the shape of x; x is noise of the first of the levels
Solver = Callable[[Denoiser, th.Tensor, list[float], Callback | None], th.Tensor]

# tanh(8) differs from 1 by 2e-7: further out, single precision does not tell actions apart
MAX_UNSQUASHED = 8.0


def dpm_solver_2m(denoise: Denoiser, x: th.Tensor, sigmas: list[float], callback: Callback | None = None) -> th.Tensor:
    """
    DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2; here alpha_t = 1, sigma_t = sigma), from
    noise to unsquashed actions.

    :param denoise: the denoiser
    :param x: noise, ``sigmas[0]`` times standard normal numbers, shape (..., action_dim)
    :param sigmas: noise levels, falling, at least 2
    :param callback: called at every level
    :return: unsquashed actions of the shape of x, within ``MAX_UNSQUASHED``; NaN where the denoiser is not finite
    """
    return _extrapolate(*_descend(denoise, x, sigmas, callback), sigmas)


def find_mode(denoise: Denoiser, x: th.Tensor, sigmas: list[float], sigma_mode: float = 0.25, n_shifts: int = 3) -> th.Tensor:
    """
    A mode of the policy: along the ODE down to ``sigma_mode``, mean shifts at this level, and along the ODE to no noise.
    The mean shift ``u <- D(u, sigma) = E[u' | u]`` (Cheng 1995, https://doi.org/10.1109/34.400568), with a Gaussian kernel
    of that width, climbs the density of u that the kernel blurs. It leaves the middle between two narrow modes at once, and
    slowly, or not at all, if much of the policy lies between them. The rest of the ODE is that of the stochastic actions: what
    the policy does at low noise only, as one that was fitted to demonstrations through the sampler, is kept.

    :param denoise: the denoiser
    :param x: where to start, shape (..., action_dim); see :func:`mode_latent`
    :param sigmas: noise levels, falling
    :param sigma_mode: width of the kernel: finer structure is averaged. A level of the solver that is less than a tenth below
        is taken instead
    :param n_shifts: number of mean shifts
    :return: unsquashed actions of the shape of x; NaN where the denoiser is not finite
    """
    levels = [sigma for sigma in sigmas if sigma > sigma_mode]
    # The level of the solver that is next, where it is near: it costs less
    lower = sigmas[len(levels)] if len(levels) < len(sigmas) else 0.0
    last = lower if lower > 0.9 * sigma_mode else sigma_mode
    mode, _ = _descend(denoise, x, [*levels, last])
    for _ in range(n_shifts):
        mode = _bounded(denoise(mode, last))
    rest = [last, *(sigma for sigma in sigmas if sigma < last)]
    return mode if len(rest) == 1 else _extrapolate(*_descend(denoise, mode, rest, starts_at_noise=False), rest)


def mode_latent(action_dim: int, length: float = 0.1) -> th.Tensor:
    """
    Where :func:`find_mode` starts: always the same latent, near the middle of the policy (of a policy of one mode, the mean),
    but not in it, where for a symmetric policy D(x, sigma) = x, so that the iteration stays.

    :param action_dim: d
    :param length: distance from the middle
    :return: shape (action_dim,)
    """
    sides, sizes = th.quasirandom.SobolEngine(action_dim, scramble=True, seed=0).draw(2)
    # Sizes that differ, because of symmetries between dimensions
    direction = (sides - 0.5).sign() * (0.75 + 0.5 * sizes)
    return length * F.normalize(direction, dim=0)


def invert(denoise: Denoiser, u: th.Tensor, sigmas: list[float], callback: Callback | None = None) -> th.Tensor:
    """
    The latents from which :func:`dpm_solver_2m` draws given actions, up to the errors of both solvers.

    :param denoise: the denoiser
    :param u: unsquashed actions, shape (..., action_dim)
    :param sigmas: noise levels, falling
    :param callback: called at every level but the first
    :return: standard normal numbers, if u are actions of the policy, of the shape of u
    """
    last = len(sigmas) - 1
    # For small sigma, x moves away from u by half of -sigma^2 times the score
    x = u + (u - denoise(u, sigmas[last])) / 2
    previous_denoised, previous_log_step = x, math.inf
    for step in range(last, 0, -1):
        denoised = denoise(x, sigmas[step])
        if callback is not None:
            callback(step, x, sigmas[step], denoised)
        if step == 1:
            break
        log_step = math.log(sigmas[step - 1] / sigmas[step])
        middle = denoised.lerp(previous_denoised, -log_step / (2 * previous_log_step))
        x = middle.lerp(x, sigmas[step - 1] / sigmas[step])
        previous_denoised, previous_log_step = denoised, log_step
    # Above sigmas[1] the denoiser answers the mean
    mean = denoise(sigmas[0] / sigmas[1] * (x - denoised), sigmas[0])
    return (x - mean) / sigmas[1]


def _descend(
    denoise: Denoiser, x: th.Tensor, sigmas: list[float], callback: Callback | None = None, starts_at_noise: bool = True
) -> tuple[th.Tensor, th.Tensor]:
    """The solver down to the last of the levels; the denoised actions there and at the level before."""
    previous_denoised, previous_log_step = x, math.inf
    for step, (sigma, next_sigma) in enumerate(pairwise([*sigmas, 0.0])):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(step, x, sigma, denoised)
        denoised = _bounded(denoised)
        if next_sigma == 0:
            break
        if step == 0 and starts_at_noise:
            x = x + denoised  # at the highest level the noise is centred on the mean
        log_step = math.log(sigma / next_sigma)
        # Second order: extrapolate the denoised action to the middle of the step (not at the first step)
        middle = denoised if step == 0 else denoised.lerp(previous_denoised, -log_step / (2 * previous_log_step))
        x = middle.lerp(x, next_sigma / sigma)
        previous_denoised, previous_log_step = denoised, log_step
    return denoised, previous_denoised


def _extrapolate(denoised: th.Tensor, previous_denoised: th.Tensor, sigmas: list[float]) -> th.Tensor:
    """From the last two levels to no noise: for small sigma the denoised action is linear in sigma^2."""
    # With levels that are close to each other it would amplify the errors of the denoiser, hence at most 1
    weight = min(1 / ((sigmas[-2] / sigmas[-1]) ** 2 - 1), 1)
    return _bounded(denoised.lerp(previous_denoised, -weight))


def _bounded(u: th.Tensor) -> th.Tensor:
    return u.clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED).add(u, alpha=0)  # infinity becomes NaN
