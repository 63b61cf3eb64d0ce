"""
Variance-exploding diffusion of unsquashed actions: noise levels, denoiser scalings and the reverse solver.

Pure functions of tensors. An action of the box is ``a = tanh(u)``, as in SAC; the diffusion is that of the unsquashed
action u, whose density has no edges. A noisy one is ``x = u + sigma * eps``; the denoiser ``D(x, sigma)`` estimates
``E[u | x]`` and the score is ``(D - x) / sigma^2`` (Tweedie's formula).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch as th
from torch.nn import functional as F

# Noise through which the modes of the policy are looked for, by the first level that is not above: finer structure is averaged
SIGMA_MODE = 0.25
# How often that noise is taken away, and how far from the middle of the policy the search begins: far enough to leave it on a
# ring or between two modes, and near enough for the mean of one broad mode
N_SHIFTS = 5
MODE_LATENT = 0.1
# tanh(8) differs from 1 by 2e-7: further out, single precision does not tell actions apart
MAX_UNSQUASHED = 8.0


def solve_reverse_ode(denoise: Callable[[th.Tensor, int], th.Tensor], latents: th.Tensor, levels: list[float]) -> th.Tensor:
    """
    Turn standard normal latents into unsquashed actions along the probability-flow ODE, by DPM-Solver++(2M)
    (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2; here with alpha_t = 1, sigma_t = sigma).

    :param denoise: the denoiser: from noisy actions x and the index of their noise level to the shape of x
    :param latents: standard normal numbers, shape (..., action_dim)
    :param levels: noise levels, falling
    :return: unsquashed actions of the shape of ``latents``; finite even where the denoiser is not
    """
    denoised, previous_denoised = _descend(denoise, latents, levels)
    # Extrapolate from the last two levels to none: for small sigma the denoised action is linear in sigma^2. With levels that
    # are close to each other it would amplify the errors of the denoiser
    weight = min(1 / ((levels[-2] / levels[-1]) ** 2 - 1), 1)
    return _bounded(denoised.lerp(previous_denoised, -weight).nan_to_num())


def mode_latent(action_dim: int) -> th.Tensor:
    """
    Where to look for a mode from: always the same latent, near the middle of the policy (of a policy of one mode, the mean),
    but not in it, where a symmetric policy has no reason to take either of two sides.

    :param action_dim: d
    :return: shape (action_dim,), of length ``MODE_LATENT``
    """
    sides, sizes = th.quasirandom.SobolEngine(action_dim, scramble=True, seed=0).draw(2)
    # Sizes that differ, for the sake of symmetries between dimensions
    direction = (sides - 0.5).sign() * (0.75 + 0.5 * sizes)
    return MODE_LATENT * F.normalize(direction, dim=0)


def find_mode(denoise: Callable[[th.Tensor, int], th.Tensor], latents: th.Tensor, levels: list[float]) -> th.Tensor:
    """
    Turn latents into modes of the policy: along the probability-flow ODE down to ``SIGMA_MODE``, and from there, instead of
    less noise, the same level again and again. ``u <- D(u, sigma) = E[u' | u]`` is the mean shift (Cheng 1995,
    https://doi.org/10.1109/34.400568) with a Gaussian kernel of that width, which climbs the density of u that the kernel
    blurs. It leaves the middle between two modes at once if they are narrow, and slowly, or not at all, if much of the policy
    lies between them.

    :param denoise: the denoiser: from noisy actions x and the index of their noise level to the shape of x
    :param latents: where to start, shape (..., action_dim); see :func:`mode_latent`
    :param levels: noise levels, falling
    :return: unsquashed actions of the shape of ``latents``; finite even where the denoiser is not
    """
    last = next(step for step, sigma in enumerate(levels) if sigma <= SIGMA_MODE)
    mode, _ = _descend(denoise, latents, levels[: last + 1])
    for _ in range(N_SHIFTS):
        mode = _bounded(denoise(mode, last))
    return mode.nan_to_num()


def _descend(
    denoise: Callable[[th.Tensor, int], th.Tensor], latents: th.Tensor, levels: list[float]
) -> tuple[th.Tensor, th.Tensor]:
    """The solver down to the last of the levels; the denoised actions there and at the level before."""
    x = previous_denoised = levels[0] * latents
    previous_log_step = math.inf
    for step, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = _bounded(denoise(x, step))
        if step == 0:
            x = x + denoised  # at the highest level the noise is centred on the mean
        log_step = math.log(sigma / next_sigma)
        # Second order: extrapolate the denoised action to the middle of the step (not at the first step)
        middle = denoised if step == 0 else denoised.lerp(previous_denoised, -log_step / (2 * previous_log_step))
        x = middle.lerp(x, next_sigma / sigma)
        previous_denoised, previous_log_step = denoised, log_step
    return _bounded(denoise(x, len(levels) - 1)), previous_denoised


def _bounded(unsquashed: th.Tensor) -> th.Tensor:
    return unsquashed.clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED)


def solve_forward_ode(denoise: Callable[[th.Tensor, int], th.Tensor], unsquashed: th.Tensor, levels: list[float]) -> th.Tensor:
    """
    The latents from which :func:`solve_reverse_ode` draws given actions, up to the errors of both solvers.

    :param denoise: the denoiser: from noisy actions x and the index of their noise level to the shape of x
    :param unsquashed: unsquashed actions u, shape (..., action_dim)
    :param levels: noise levels, falling
    :return: latents of the shape of ``unsquashed``
    """
    last = len(levels) - 1
    # For small sigma, x moves away from u by half of -sigma^2 times the score
    x = unsquashed + (unsquashed - denoise(unsquashed, last)) / 2
    previous_denoised, previous_log_step = x, math.inf
    for step in range(last, 1, -1):
        denoised = denoise(x, step)
        log_step = math.log(levels[step - 1] / levels[step])
        middle = denoised.lerp(previous_denoised, -log_step / (2 * previous_log_step))
        x = middle.lerp(x, levels[step - 1] / levels[step])
        previous_denoised, previous_log_step = denoised, log_step
    # Above SIGMA_BROAD the denoiser answers the mean
    mean = denoise(levels[0] / levels[1] * (x - denoise(x, 1)), 0)
    return (x - mean) / levels[1]
