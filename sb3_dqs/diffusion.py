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

# Below SIGMA_MIN a noisy action is taken for clean; above SIGMA_MAX it is taken for pure noise around the mean. From
# SIGMA_MAX, where the denoiser can only answer the mean, the sampler jumps to SIGMA_BROAD, where the modes are still
# hidden in noise.
SIGMA_MIN = 0.03
SIGMA_BROAD = 3.0
SIGMA_MAX = 20.0
# Noise through which the modes of the policy are looked for, by the first level that is not above: finer structure is averaged
SIGMA_MODE = 0.25
# How often that noise is taken away, and how far from the middle of the policy the search begins: far enough to leave it on a
# ring or between two modes, and near enough for the mean of one broad mode
N_SHIFTS = 5
MODE_LATENT = 0.1
# How much longer than the mean step the first one from SIGMA_BROAD is, and how much shorter the last one
LEVEL_CURVATURE = 0.2
# Standard deviation of u = atanh(a) for a uniform action, pi / sqrt(12) = 0.91 (sigma_data of Karras et al. 2022)
SIGMA_DATA = 0.91
# tanh(8) differs from 1 by 2e-7: further out, single precision does not tell actions apart
MAX_UNSQUASHED = 8.0


def sampling_levels(n_levels: int) -> list[float]:
    """
    Noise levels of the reverse process, from the highest down.

    The first step jumps from ``SIGMA_MAX``, where the denoiser answers the mean, to ``SIGMA_BROAD``; the others go from
    there to ``SIGMA_MIN``, in steps of log sigma that shrink evenly, because the curves of the ODE are bent at the end.

    :param n_levels: number of levels, and of denoiser calls per action, at least 3
    :return: the levels
    """
    times = [i / (n_levels - 2) for i in range(n_levels - 1)]
    bent = [time + LEVEL_CURVATURE * time * (1 - time) for time in times]
    return [SIGMA_MAX] + [SIGMA_BROAD * (SIGMA_MIN / SIGMA_BROAD) ** time for time in bent]


def training_levels(n_states: int, n_levels: int, device: th.device | str = "cpu") -> th.Tensor:
    """
    Noise levels for the regression: log-uniform, stratified over the levels of a state and shuffled.

    :param n_states: number of states
    :param n_levels: number of levels per state
    :param device: where to put them
    :return: levels from ``SIGMA_MIN`` to ``SIGMA_MAX``, shape (n_states, n_levels, 1)
    """
    strata = th.rand(n_states, n_levels, device=device).argsort(dim=1)
    return log_uniform_levels((strata + th.rand(n_states, n_levels, device=device)) / n_levels).unsqueeze(2)


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


def log_det_tanh(unsquashed: th.Tensor) -> th.Tensor:
    """
    Log-determinant of the Jacobian of ``a = tanh(u)``, as in SAC (appendix C of Haarnoja et al. 2018,
    https://arxiv.org/abs/1801.01290), in a form that does not underflow:
    ``log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))``.

    :param unsquashed: u, shape (..., action_dim)
    :return: its sum over the dimensions of the action, shape (...)
    """
    return 2 * (math.log(2) - unsquashed - F.softplus(-2 * unsquashed)).sum(dim=-1)
