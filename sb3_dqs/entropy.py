"""
Entropy of a diffusion policy from the Jacobian of its sampler (:func:`jacobian_entropies`), and its entropy and log-density
from the errors of its denoiser, by the I-MMSE relation
(Guo, Shamai and Verdu 2005, https://arxiv.org/abs/cs/0412108) and its pointwise form
(Kong, Brekelmans and Ver Steeg 2023, https://arxiv.org/abs/2302.03792). With v = sigma^2,

    log pi(u) = E[log pi_max(u + sigma_max * eps)] + 1/2 * integral over log v of (d - E||u - D(x, sigma)||^2 / v)

from sigma_min to sigma_max, where the noisy policy pi_max is Gaussian to a good approximation; the entropy is the mean
of -log pi(u). Units: nats, for unsquashed actions u.

For an exact denoiser the estimates are unbiased, up to what sigma_min hides; the errors of a real one are larger, and
its entropy estimates too high.
"""

import math
from collections.abc import Callable

import torch as th

from sb3_dqs.diffusion import SIGMA_MAX, SIGMA_MIN, log_det_tanh, log_uniform_levels

LOG_VARIANCE_RANGE = 2 * math.log(SIGMA_MAX / SIGMA_MIN)
# Cross-entropy of the noisy policy at sigma_max with a Gaussian of that width, per dimension. A policy of standard deviation
# s adds about s^2 / (2 sigma_max^2) nats per dimension: 0.001 for uniform actions, at most 0.08.
MAX_LEVEL_ENTROPY = 0.5 * math.log(2 * math.pi * math.e * SIGMA_MAX**2)


def immse_entropies(errors: th.Tensor, noise: th.Tensor, sigma: th.Tensor, policy_std: th.Tensor) -> th.Tensor:
    """
    Estimates of ``-log pi(u)`` from one noise level each; their mean over actions of the policy is the entropy.

    The control variate has zero mean: at low noise levels the error is the noise itself, whose mean square is known.
    Its weight is the best one for a Gaussian policy.

    :param errors: ``u - D(u + sigma * noise, sigma)``, shape (..., action_dim)
    :param noise: standard normal noise, shape (..., action_dim)
    :param sigma: noise levels, log-uniform from sigma_min to sigma_max, shape (..., 1)
    :param policy_std: standard deviation of the policy, shape (action_dim,); a wrong one makes the estimates
        noisier, not biased
    :return: nats, shape (...)
    """
    weight = (policy_std**2 / (policy_std**2 + sigma**2)) ** 2
    integrand = ((1 - (errors / sigma).pow(2)) - weight * (1 - noise.pow(2))).sum(dim=-1)
    return MAX_LEVEL_ENTROPY * errors.shape[-1] - 0.5 * LOG_VARIANCE_RANGE * integrand


def log_density(
    denoise: Callable[[th.Tensor, th.Tensor], th.Tensor],
    unsquashed: th.Tensor,
    policy_std: th.Tensor,
    n_levels: int,
    n_noises: int,
) -> th.Tensor:
    """
    Log-density of the policy at given actions, a Monte Carlo estimate from ``n_levels * n_noises`` denoiser calls.

    :param denoise: the denoiser: from noisy actions (n, m, action_dim) and noise levels (n, m, 1) to (n, m, action_dim)
    :param unsquashed: u, shape (n, action_dim)
    :param policy_std: standard deviation of the policy, shape (action_dim,); see :func:`immse_entropies`
    :param n_levels: number of noise levels of the integral
    :param n_noises: number of noises per level
    :return: log-density in nats, shape (n,)
    """
    strata = th.arange(n_levels, device=unsquashed.device).repeat(n_noises)
    quantiles = (strata + th.rand(len(unsquashed), n_levels * n_noises, device=unsquashed.device)) / n_levels
    sigma = log_uniform_levels(quantiles).unsqueeze(2)
    noise = th.randn(*sigma.shape[:2], unsquashed.shape[1], device=unsquashed.device)
    errors = unsquashed.unsqueeze(1) - denoise(unsquashed.unsqueeze(1) + sigma * noise, sigma)
    return -immse_entropies(errors, noise, sigma, policy_std).mean(dim=1)


def jacobian_entropies(unsquashed: th.Tensor, jacobian: th.Tensor) -> th.Tensor:
    """
    Numbers whose mean is the entropy of the policy: for actions ``a = tanh(u)`` of the sampler, u a deterministic function of
    standard normal latents z, by the change of variables (as in normalizing flows; Rezende and Mohamed 2015,
    https://arxiv.org/abs/1505.05770, equation (5)),

        H(a) = d/2 log(2 pi e) + E[1/2 log det(J J^T) + log det d tanh(u)/du],  J = du/dz

    It holds for any network, whether or not it is an exact denoiser, and wherever the sampler is one to one; where it
    folds, the estimate is too high. Scales below ``SIGMA_MIN`` count as that wide: the estimate is finite.

    :param unsquashed: u, shape (..., action_dim)
    :param jacobian: derivatives ``d u_j / d z_i``, shape (..., action_dim (i), action_dim (j))
    :return: nats, shape (...)
    """
    action_dim = unsquashed.shape[-1]
    gram = jacobian @ jacobian.transpose(-1, -2) + SIGMA_MIN**2 * th.eye(action_dim, device=jacobian.device)
    half_log_det = 0.5 * th.linalg.slogdet(gram).logabsdet
    return action_dim / 2 * math.log(2 * math.pi * math.e) + half_log_det + log_det_tanh(unsquashed)


def jacobian_log_prob(entropies: th.Tensor, latents: th.Tensor) -> th.Tensor:
    """
    Log-density of actions of the sampler, from what :func:`jacobian_entropies` gave: there ``|z|^2`` is replaced by its
    mean, d.

    :param entropies: of :func:`jacobian_entropies`, shape (...)
    :param latents: z, shape (..., action_dim)
    :return: log-density of ``a = tanh(u)``, in nats, shape (...)
    """
    return (latents.shape[-1] - latents.pow(2).sum(dim=-1)) / 2 - entropies
