"""
Estimators of the denoiser's regression target under the Boltzmann distribution of the critic,
``pi(a|s) = exp(Q(s, a) / ent_coef) / Z(s)`` on the box [-1, 1]^d: the posterior mean ``E[a | x]`` of an action
given its noisy copy ``x = a + sigma * eps``, that is the mean of ``p(a|x) ~ exp(Q(s, a)/ent_coef) N(a; x, sigma^2)``.

Pure functions of tensors: the critic comes in as ``log_density(actions) = Q(s, actions) / ent_coef``,
from (n_states, n_actions, action_dim) to (n_states, n_actions).
"""

import math
from collections.abc import Callable

import torch as th

LogDensity = Callable[[th.Tensor], th.Tensor]

# Share of the states whose proposals are as wide as the noise
WIDE_FRACTION = 0.5


def sample_truncated_normal(mean: th.Tensor, std: th.Tensor, uniforms: th.Tensor) -> th.Tensor:
    """
    Normal numbers truncated to [-1, 1], by inversion of the distribution function.

    :param mean: means before truncation (they may lie outside the box)
    :param std: standard deviations before truncation
    :param uniforms: uniform numbers in [0, 1] of the shape of the result
    :return: samples in [-1, 1], differentiable in ``mean`` and ``std``
    """
    # Mirror, so that the box lies in the lower tail, where the distribution function keeps its relative precision
    sign = th.where(mean > 0, 1.0, -1.0)
    center = sign * mean
    low, high = th.special.ndtr((-1 - center) / std), th.special.ndtr((1 - center) / std)
    quantiles = (low + uniforms * (high - low)).clamp(min=1e-30, max=1 - 1e-7)
    return (sign * (center + std * th.special.ndtri(quantiles))).clamp(-1, 1)


def truncated_normal_mean(mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Mean of a normal distribution truncated to [-1, 1]: ``E[a | x]`` of the uniform policy.

    :param mean: means before truncation
    :param std: standard deviations before truncation
    :return: means after truncation
    """
    sign = th.where(mean > 0, 1.0, -1.0)
    center = sign * mean
    low, high = (-1 - center) / std, (1 - center) / std
    log_mass = th.special.log_ndtr(high) + th.log1p(-th.exp(th.special.log_ndtr(low) - th.special.log_ndtr(high)))
    density_gap = th.exp(-(low**2) / 2 - log_mass) - th.exp(-(high**2) / 2 - log_mass)
    return sign * (center + std * density_gap / math.sqrt(2 * math.pi)).clamp(-1, 1)


def posterior_mean(
    log_density: LogDensity,
    anchors: th.Tensor,
    denoised: th.Tensor,
    x: th.Tensor,
    sigma: th.Tensor,
    policy_std: th.Tensor,
    n_samples: int,
) -> tuple[th.Tensor, th.Tensor]:
    """
    ``E[a | x]`` by iterated sampling-importance-resampling (i-SIR; Andrieu, Lee and Vihola 2018,
    https://arxiv.org/abs/1312.6432): the mean of K candidates weighted by ``p(a|x) / q(a|x)``. One candidate is the
    action that x was made from (the anchor). The others are drawn from q, a normal distribution truncated to the box,
    whose centre is moved one step uphill on log p(a|x). For some states, drawn at random, it is as wide as the noise and
    centred on x: it finds modes that the policy has lost. For the others it is centred on the denoiser's present
    answer, and as wide as p(a|x) would be if the policy were Gaussian: it sharpens what the policy has.

    If the anchors are distributed as pi, then the anchor is a draw from p(a|x), and the estimate is unbiased for any
    K >= 2 and any such q: few samples slow the policy down but do not move its fixed point.

    :param log_density: Q / ent_coef, differentiable
    :param anchors: actions a drawn from the policy, shape (n_states, action_dim)
    :param denoised: the denoiser's answers D(x, sigma), shape (n_states, action_dim)
    :param x: noisy actions ``a + sigma * eps``, shape (n_states, action_dim)
    :param sigma: noise levels, shape (n_states, 1)
    :param policy_std: standard deviation of the policy, shape (action_dim,)
    :param n_samples: number of candidates K, the anchor included
    :return: target of shape (n_states, action_dim), and normalised log-weights of shape (n_states, n_samples)
    """

    def log_posterior(candidates: th.Tensor) -> th.Tensor:
        return log_density(candidates) - ((candidates - x.unsqueeze(1)) / sigma.unsqueeze(1)).pow(2).sum(dim=2) / 2

    wide = th.rand_like(sigma) < WIDE_FRACTION
    width = th.where(wide, sigma, sigma * policy_std / (sigma**2 + policy_std**2).sqrt())
    with th.enable_grad():
        start = th.where(wide, x, denoised).clamp(-1, 1).detach().requires_grad_(True)
        (gradient,) = th.autograd.grad(log_posterior(start.unsqueeze(1)).sum(), start)
    # The step is at most one width in each dimension, however steep the energy
    center = start.detach() + width * th.tanh(width * gradient)

    uniforms = th.rand(x.shape[0], n_samples - 1, x.shape[1], device=x.device)
    proposals = sample_truncated_normal(center.unsqueeze(1), width.unsqueeze(1), uniforms)
    candidates = th.cat([anchors.unsqueeze(1), proposals], dim=1)
    log_proposal = -((candidates - center.unsqueeze(1)) / width.unsqueeze(1)).pow(2).sum(dim=2) / 2
    log_weights = th.log_softmax(log_posterior(candidates) - log_proposal, dim=1)
    return (log_weights.exp().unsqueeze(2) * candidates).sum(dim=1), log_weights


def energy_gradient(log_density: LogDensity, x: th.Tensor, sigma: th.Tensor, n_samples: int) -> tuple[th.Tensor, th.Tensor]:
    """
    ``E[a | x]`` as in the paper: by Tweedie's formula from the gradient of a Monte Carlo estimate of the noised density,
    ``x + sigma^2 * grad_x log mean_k exp(Q(s, a_k) / ent_coef)`` with ``a_k ~ N(x, sigma^2)``
    (Akhound-Sadegh et al. 2024, https://arxiv.org/abs/2402.06121, equation (8); Jain et al. 2025,
    https://arxiv.org/abs/2410.01312). Here the a_k are truncated to the box, outside which the density is zero;
    that adds the gradient of the log of the mass that N(x, sigma^2) has in the box.

    :param log_density: Q / ent_coef, differentiable
    :param x: noisy actions, shape (n_states, action_dim)
    :param sigma: noise levels, shape (n_states, 1)
    :param n_samples: number of Monte Carlo samples K
    :return: target of shape (n_states, action_dim), and normalised log-weights of shape (n_states, n_samples)
    """
    uniforms = th.rand(x.shape[0], n_samples, x.shape[1], device=x.device)
    with th.enable_grad():
        x = x.detach().requires_grad_(True)
        log_weights = log_density(sample_truncated_normal(x.unsqueeze(1), sigma.unsqueeze(1), uniforms))
        (score,) = th.autograd.grad(th.logsumexp(log_weights, dim=1).sum(), x)
    target = truncated_normal_mean(x.detach(), sigma) + sigma**2 * score
    # The mean of a distribution on the box lies in the box, its noisy estimate may not
    return target.clamp(-1, 1), th.log_softmax(log_weights.detach(), dim=1)


def effective_sample_size(log_weights: th.Tensor) -> th.Tensor:
    """
    ``1 / sum_k w_k^2``, from 1 (one candidate has all the weight) to n_samples (Kish 1965, "Survey Sampling").

    :param log_weights: normalised log-weights, shape (n_states, n_samples)
    :return: shape (n_states,)
    """
    return th.exp(-th.logsumexp(2 * log_weights, dim=1))
