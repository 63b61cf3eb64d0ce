"""
Entropy and log-density of a diffusion policy from the errors of its denoiser, by the I-MMSE relation
(Guo, Shamai and Verdu 2005, https://arxiv.org/abs/cs/0412108) and its pointwise form
(Kong, Brekelmans and Ver Steeg 2023, https://arxiv.org/abs/2302.03792, equations (4) and (8)). With v = sigma^2,

    log pi(a) = E[log pi_broad(a + sigma_broad * eps)] + 1/2 * integral over log v of (d - E||a - D(x, sigma)||^2 / v)

from sigma_min to sigma_broad, where the noisy policy pi_broad is Gaussian to a good approximation; the entropy is the
mean of -log pi(a). Units: nats, for actions in [-1, 1]^d.
"""

import math
from collections.abc import Callable

import torch as th

from sb3_dqs.diffusion import SIGMA_BROAD, SIGMA_MAX, SIGMA_MIN

LOG_VARIANCE_RANGE = 2 * math.log(SIGMA_BROAD / SIGMA_MIN)
# Variance per dimension taken for pi_broad: that of the uniform policy under the noise. Another one changes the
# entropy only to second order, at most 0.002 nats per dimension.
BROAD_VARIANCE = SIGMA_BROAD**2 + 1 / 3


def broad_entropy(squared_distances: th.Tensor) -> th.Tensor:
    """
    ``-E[log pi_broad(a + sigma_broad * eps)]``, pi_broad Gaussian.

    :param squared_distances: of the actions to the mean of the policy, per dimension, shape (..., action_dim)
    :return: nats, shape (...)
    """
    quadratic = (SIGMA_BROAD**2 + squared_distances) / BROAD_VARIANCE
    return 0.5 * (math.log(2 * math.pi * BROAD_VARIANCE) + quadratic).sum(dim=-1)


def information_lost(errors: th.Tensor, noise: th.Tensor, sigma: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    The integrand ``d - ||a - D||^2 / v`` at one noise, with a control variate of zero mean: at low noise levels the
    error is the noise itself, whose mean square is known.

    :param errors: ``a - D(a + sigma * noise, sigma)``, shape (..., action_dim)
    :param noise: standard normal noise, shape (..., action_dim)
    :param sigma: noise levels, shape (..., 1)
    :param weight: weight of the control variate, from 0 to 1, any of the shape of ``sigma``
    :return: shape (...)
    """
    return ((1 - (errors / sigma).pow(2)) - weight * (1 - noise.pow(2))).sum(dim=-1)


def control_weight(policy_variance: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    The best weight of the control variate for a Gaussian policy.

    :param policy_variance: variance of the policy, shape (action_dim,)
    :param sigma: noise levels, shape (..., 1)
    :return: of the shape of ``sigma``
    """
    variance = policy_variance.mean()
    return (variance / (variance + sigma**2)) ** 2


def entropy_from_errors(errors: th.Tensor, noise: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    Entropy of the policy, averaged over the states of a batch: a by-product of the actor's loss.

    :param errors: ``a - D(a + sigma * noise, sigma)`` for actions a of the policy, shape (n, action_dim)
    :param noise: standard normal noise, shape (n, action_dim)
    :param sigma: noise levels as ``diffusion.training_levels`` draws them, shape (n, 1)
    :return: unbiased estimate in nats, scalar
    """
    # At the highest level the denoiser answers the mean of the policy, the others sample the integral
    at_max = (sigma >= SIGMA_MAX).to(errors.dtype)
    variance = (at_max * errors.pow(2)).sum(dim=0) / at_max.sum().clamp(min=1)
    lost = information_lost(errors, noise, sigma, control_weight(variance, sigma))
    mean_lost = ((1 - at_max.squeeze(1)) * lost).sum() / (1 - at_max).sum().clamp(min=1)
    return broad_entropy(variance) - 0.5 * LOG_VARIANCE_RANGE * mean_lost


def log_density(
    denoise: Callable[[th.Tensor, th.Tensor], th.Tensor],
    actions: th.Tensor,
    policy_std: th.Tensor,
    n_levels: int,
    n_noises: int,
) -> th.Tensor:
    """
    Log-density of the policy at given actions, a Monte Carlo estimate.

    :param denoise: the denoiser: from noisy actions (n, m, action_dim) and noise levels (n, m, 1) to (n, m, action_dim)
    :param actions: actions in [-1, 1], shape (n, action_dim)
    :param policy_std: standard deviation of the policy, shape (action_dim,); a wrong one makes the estimate
        noisier, not biased
    :param n_levels: number of noise levels of the integral
    :param n_noises: number of noises per level
    :return: unbiased estimate of the log-density in nats, shape (n,)
    """
    actions = actions.unsqueeze(1)
    max_level = actions.new_full((len(actions), n_noises, 1), SIGMA_MAX)
    noise = th.randn(len(actions), n_noises, actions.shape[2], device=actions.device)
    mean = denoise(actions + max_level * noise, max_level).mean(dim=1)

    # Stratified in log v
    strata = th.arange(n_levels, device=actions.device).repeat(n_noises)
    quantiles = (strata + th.rand(len(actions), n_levels * n_noises, device=actions.device)) / n_levels
    sigma = (SIGMA_MIN * (SIGMA_BROAD / SIGMA_MIN) ** quantiles).unsqueeze(2)
    noise = th.randn(*sigma.shape[:2], actions.shape[2], device=actions.device)
    errors = actions - denoise(actions + sigma * noise, sigma)
    mean_lost = information_lost(errors, noise, sigma, control_weight(policy_std.pow(2), sigma)).mean(dim=1)
    return 0.5 * LOG_VARIANCE_RANGE * mean_lost - broad_entropy((actions.squeeze(1) - mean).pow(2))
