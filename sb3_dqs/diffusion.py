"""
Variance-exploding diffusion on the action box: noise levels, denoiser scalings and the reverse solver.

Pure functions of tensors. A noisy action is ``x = a + sigma * eps`` with ``a`` in ``[-1, 1]^d``; the denoiser
``D(x, sigma)`` estimates ``E[a | x]`` and the score is ``(D - x) / sigma^2`` (Tweedie's formula).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch as th

# Below SIGMA_MIN a noisy action is taken for clean; above SIGMA_MAX it is taken for pure noise. From SIGMA_MAX, where the
# denoiser can only answer the mean, the sampler jumps to SIGMA_BROAD, where the box is still hidden in noise.
SIGMA_MIN = 0.01
SIGMA_BROAD = 2.0
SIGMA_MAX = 20.0
# Typical standard deviation of an action in the box (sigma_data of Karras et al. 2022)
SIGMA_DATA = 0.5


def sampling_levels(n_levels: int, rho: float = 7.0) -> list[float]:
    """
    Noise levels of the reverse process, from the highest down.

    The first step jumps from ``SIGMA_MAX``, where the denoiser answers the mean, to ``SIGMA_BROAD``;
    the others follow the spacing of Karras et al. (2022, https://arxiv.org/abs/2206.00364), equation (5).

    :param n_levels: number of levels, and of denoiser calls per action, at least 3
    :return: the levels
    """
    low, high = SIGMA_MIN ** (1 / rho), SIGMA_BROAD ** (1 / rho)
    return [SIGMA_MAX] + [(high + i / (n_levels - 2) * (low - high)) ** rho for i in range(n_levels - 1)]


def training_levels(n_samples: int, device: th.device | str = "cpu") -> th.Tensor:
    """
    Noise levels for the regression: log-uniform, stratified over the batch and shuffled.

    :param n_samples: how many levels
    :param device: where to put them
    :return: levels from ``SIGMA_MIN`` to ``SIGMA_MAX``, shape (n_samples, 1)
    """
    quantiles = (th.randperm(n_samples, device=device) + th.rand(n_samples, device=device)) / n_samples
    return log_uniform_levels(quantiles).unsqueeze(1)


def log_uniform_levels(quantiles: th.Tensor) -> th.Tensor:
    """
    Noise levels at quantiles of the log-uniform distribution from ``SIGMA_MIN`` to ``SIGMA_MAX``.

    :param quantiles: numbers in [0, 1]
    :return: levels, of the shape of ``quantiles``
    """
    return SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** quantiles


def edm_scalings(sigma: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """
    Scalings that make a network a denoiser: ``D(x, sigma) = c_skip * x + c_out * F(c_in * x, c_noise)``
    (Karras et al. 2022, Table 1).

    :param sigma: noise levels
    :return: c_skip, c_out, c_in and c_noise, each of the shape of ``sigma``
    """
    total_variance = sigma**2 + SIGMA_DATA**2
    c_skip = SIGMA_DATA**2 / total_variance
    c_out = sigma * SIGMA_DATA / total_variance.sqrt()
    c_in = 1 / total_variance.sqrt()
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


def solve_reverse_ode(denoise: Callable[[th.Tensor, int], th.Tensor], latents: th.Tensor, levels: list[float]) -> th.Tensor:
    """
    Turn standard normal latents into actions along the probability-flow ODE, by DPM-Solver++(2M)
    (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2; here with alpha_t = 1, sigma_t = sigma).

    :param denoise: the denoiser: from noisy actions x and the index of their noise level to the shape of x
    :param latents: standard normal numbers, shape (..., action_dim)
    :param levels: noise levels, falling
    :return: actions in [-1, 1], of the shape of ``latents``; finite even where the denoiser is not
    """
    x = levels[0] * latents
    previous_denoised, previous_log_step = latents, math.inf
    for step, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = th.nan_to_num(denoise(x, step)).clamp(-1, 1)
        log_step = math.log(sigma / next_sigma)
        # Second order: extrapolate the denoised action to the middle of the step (zero weight at the first step)
        middle = denoised + (denoised - previous_denoised) * (log_step / (2 * previous_log_step))
        x = middle + (next_sigma / sigma) * (x - middle)
        previous_denoised, previous_log_step = denoised, log_step
    return th.nan_to_num(denoise(x, len(levels) - 1)).clamp(-1, 1)
