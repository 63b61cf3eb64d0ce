"""Noise levels of the diffusion of unsquashed actions, and the scalings of a denoiser."""

import torch as th

# Below SIGMA_MIN a noisy action is taken for clean; above SIGMA_MAX it is taken for pure noise around the mean. From
# SIGMA_MAX, where the denoiser can only answer the mean, the sampler jumps to SIGMA_BROAD, where the modes are still
# hidden in noise.
SIGMA_MIN = 0.03
SIGMA_BROAD = 3.0
SIGMA_MAX = 20.0
# How much longer than the mean step the first one from SIGMA_BROAD is, and how much shorter the last one
LEVEL_CURVATURE = 0.2
# Standard deviation of u = atanh(a) for a uniform action, pi / sqrt(12) = 0.91 (sigma_data of Karras et al. 2022)
SIGMA_DATA = 0.91


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
