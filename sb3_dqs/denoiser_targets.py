"""
Estimators of the denoiser's regression target under the Boltzmann distribution of the critic,
``pi(a|s) = exp(Q(s, a) / ent_coef) / Z(s)`` on the box [-1, 1]^d: the posterior mean ``E[u | x]`` of an unsquashed action
u (``a = tanh(u)``) given its noisy copy ``x = u + sigma * eps``, that is the mean of ``p(u|x) ~ pi(u|s) N(u; x, sigma^2)``.

Pure functions of tensors: the critic comes in as ``log_density(u) = Q(s, tanh(u)) / ent_coef + log det d tanh(u)/du``,
from (n_states, n_actions, action_dim) to (n_states, n_actions).
"""

import math
from collections.abc import Callable

import torch as th

from sb3_dqs.solvers import MAX_UNSQUASHED

LogDensity = Callable[[th.Tensor], th.Tensor]

# Actions of the policy per state: their noisy copies share the candidates
N_ANCHORS = 4
# Spread of unsquashed actions, for proposals where the noise tells nothing. That of uniform actions is 0.91; twice that
# reaches the corners of the box
PRIOR_STD = 2.0
# Effective sample sizes from which on the candidates are used in all states, and below which in none. (At most 4 K - 3
# candidates have weight.)
ENOUGH_SAMPLES = 4.0
TOO_FEW_SAMPLES = 3.5
# Share of the states in which candidates are weighed in any case, to know the effective sample size
WEIGHED_SHARE = 1 / 8
# Lengths in widths of p(u|x): a step is shortened by the factor that would bring the gradients at the other anchors to the
# first on average, and then, if it is longer still, to the second
COMMON_STEP = 3.0
MAX_STEP = 12.0


def posterior_mean(
    log_density_of: Callable[[slice], LogDensity],
    anchors: th.Tensor,
    denoised: th.Tensor,
    x: th.Tensor,
    sigma: th.Tensor,
    policy_std: th.Tensor,
    n_samples: int,
    n_pooled: int,
) -> tuple[th.Tensor, th.Tensor]:
    """
    ``E[u | x]`` by :func:`pooled_mean` in the first states, and in the others by :func:`gradient_step`. Both are right at the
    Boltzmann distribution, so that their mixture hardly moves it; and which of the two does not depend on the mode.

    :param log_density_of: some of the states -> log-density of u in these up to a constant, differentiable
    :param anchors: unsquashed actions u drawn from the policy, shape (n_states, n_anchors, action_dim)
    :param denoised: the denoiser's answers D(x, sigma), shape (n_states, n_anchors, action_dim)
    :param x: noisy actions ``u + sigma * eps``, shape (n_states, n_anchors, action_dim)
    :param sigma: noise levels, shape (n_states, n_anchors, 1)
    :param policy_std: standard deviation of the policy, shape (action_dim,)
    :param n_samples: number of values of the log-density per target of the first kind, at least 2
    :param n_pooled: how many states are the first; see :func:`count_pooled`
    :return: targets of shape (n_states, n_anchors, action_dim), and normalised log-weights of the candidates in the first
        states, but of an eighth of all at least, of shape (..., n_anchors, n_anchors * n_samples)
    """
    n_weighed = max(n_pooled, math.ceil(WEIGHED_SHARE * len(x)))
    first, others = slice(n_weighed), slice(n_pooled, None)
    target, log_weights = pooled_mean(log_density_of(first), anchors[first], x[first], sigma[first], n_samples)
    if n_pooled < len(x):
        _, gradient = value_and_gradient(log_density_of(others), anchors[others])
        step = gradient_step(gradient, anchors[others], denoised[others], x[others], sigma[others], policy_std)
        target = th.cat([target[:n_pooled], step])
    return target, log_weights


def count_pooled(mean_ess: float, n_states: int) -> int:
    """
    In how many states to use :func:`pooled_mean`: in all while enough candidates have weight, and in none while too few
    have. :func:`gradient_step` sharpens the modes and leaves their shares as they are; too few candidates do not: the
    largest mode, which has most of them, takes all.

    :param mean_ess: mean of the effective sample size over the last updates
    :param n_states: number of states
    :return: number of states
    """
    share = (mean_ess - TOO_FEW_SAMPLES) / (ENOUGH_SAMPLES - TOO_FEW_SAMPLES)
    return round(n_states * min(max(share, 0), 1))


def pooled_mean(
    log_density: LogDensity, anchors: th.Tensor, x: th.Tensor, sigma: th.Tensor, n_samples: int
) -> tuple[th.Tensor, th.Tensor]:
    """
    ``E[u | x]`` by iterated sampling-importance-resampling (i-SIR; Andrieu, Lee and Vihola 2018,
    https://arxiv.org/abs/1312.6432) with one pool of candidates per state: the mean of candidates weighted by
    ``p(u|x) / q(u)``. Every noisy copy proposes some, from :func:`broad_proposal`, and all copies of the state use them
    all: with noise levels that differ, some of the pool are close to what the policy has and others find what it has
    lost. q is the mixture of these distributions (the balance heuristic of Veach and Guibas 1995,
    https://doi.org/10.1145/218380.218498). One more candidate is the action that x was made from (the anchor).

    If the anchors are distributed as pi, then the anchor is a draw from p(u|x), and few samples hardly move the fixed
    point (not at all, if candidates were drawn independently from the mixture; here each component gives its share).

    :param log_density: log-density of u up to a constant
    :param anchors: unsquashed actions u drawn from the policy, shape (n_states, n_anchors, action_dim)
    :param x: noisy actions ``u + sigma * eps``, shape (n_states, n_anchors, action_dim)
    :param sigma: noise levels, shape (n_states, n_anchors, 1)
    :param n_samples: number of values of ``log_density`` per target: one anchor, and the others proposed
    :return: targets of shape (n_states, n_anchors, action_dim), and normalised log-weights of the candidates, of shape
        (n_states, n_anchors, n_anchors * n_samples), those of the other anchors minus infinity
    """
    n_states, n_anchors, action_dim = x.shape
    center, width = broad_proposal(x, sigma)
    noise = th.randn(n_states, n_anchors, n_samples - 1, action_dim, device=x.device)
    proposals = center.unsqueeze(2) + width.unsqueeze(2) * noise
    candidates = th.cat([anchors, proposals.flatten(1, 2)], dim=1)

    log_proposal = th.logsumexp(log_normal(candidates, center, width) - action_dim * width.log(), dim=1)
    log_weights = (log_density(candidates) - log_proposal).unsqueeze(1) + log_normal(candidates, x, sigma)
    # Of the anchors only that of x itself is a draw from p(u|x)
    is_foreign = ~th.eye(n_anchors, dtype=th.bool, device=x.device)
    log_weights[:, :, :n_anchors].masked_fill_(is_foreign, -math.inf)
    log_weights = th.log_softmax(log_weights, dim=2)
    return log_weights.exp() @ candidates, log_weights


def gradient_step(
    gradient: th.Tensor,
    anchors: th.Tensor,
    denoised: th.Tensor,
    x: th.Tensor,
    sigma: th.Tensor,
    policy_std: th.Tensor,
) -> th.Tensor:
    """
    The denoiser's answer D, moved along the gradient of the energy at one action of the policy: ``D + r^2 g`` with

        g = grad log pi(u) + (x - D) / sigma^2 + precision * (u - D),   u ~ p(u|x) of the policy,

    r being the width that p(u|x) would have for a Gaussian policy. If the policy is the Boltzmann distribution, the mean
    of g given x is zero for any number of modes: the first two terms by Stein's identity (target score matching;
    De Bortoli et al. 2024, https://arxiv.org/abs/2402.08667), the third because D is the mean of u, and there it serves as
    a control variate that removes the noise of the first for a Gaussian policy.

    Averaged over states that a network cannot tell apart, means of p(u|x) make a policy as broad as all of them together;
    averaged gradients make it narrow, as in SAC.

    :param gradient: of log pi at the anchors, shape (n_states, n_anchors, action_dim)
    :param anchors: unsquashed actions u drawn from the policy, shape (n_states, n_anchors, action_dim)
    :param denoised: the denoiser's answers D(x, sigma), shape (n_states, n_anchors, action_dim)
    :param x: noisy actions ``u + sigma * eps``, shape (n_states, n_anchors, action_dim)
    :param sigma: noise levels, shape (n_states, n_anchors, 1)
    :param policy_std: standard deviation of the policy, shape (action_dim,)
    :return: targets of shape (n_states, n_anchors, action_dim)
    """
    width = sigma * policy_std / (sigma**2 + policy_std**2).sqrt()
    # The policy is one Gaussian, if ever, only as seen through noise below its own width
    precision = (sigma < policy_std) / policy_std**2
    step = width * (gradient + (x - denoised) / sigma**2 + precision * (anchors - denoised))
    # Steep energies throw the policy about, hence a limit. A limit of each step by its own length would move their mean from
    # zero; the gradients at the other anchors, given x, know nothing of this one
    squares = gradient.clamp(-1e15, 1e15).pow(2)  # finite
    others = (squares.sum(dim=1, keepdim=True) - squares) / max(x.shape[1] - 1, 1)
    step = step * (COMMON_STEP / (width**2 * others).sum(dim=2, keepdim=True).sqrt()).clamp(max=1)
    return denoised + width * step * (MAX_STEP / step.norm(dim=2, keepdim=True)).clamp(max=1)


def energy_gradient(log_density: LogDensity, x: th.Tensor, sigma: th.Tensor, n_samples: int) -> tuple[th.Tensor, th.Tensor]:
    """
    ``E[u | x]`` as in the paper: by Tweedie's formula from the gradient of a Monte Carlo estimate of the noised density,
    ``x + sigma^2 * grad_x log mean_k pi(u_k)`` with ``u_k ~ N(x, sigma^2)``
    (Akhound-Sadegh et al. 2024, https://arxiv.org/abs/2402.06121, equation (8); Jain et al. 2025,
    https://arxiv.org/abs/2410.01312). Here of unsquashed actions, with the log-determinant of the squashing, which the
    public code of the paper leaves out; and with the samples drawn from the product of N(x, sigma^2) and a broad normal
    prior, by which they are divided again, because at high noise few of the former would be near the policy.

    :param log_density: log-density of u up to a constant, differentiable
    :param x: noisy actions, shape (n_states, n_anchors, action_dim)
    :param sigma: noise levels, shape (n_states, n_anchors, 1)
    :param n_samples: number of Monte Carlo samples K
    :return: targets of shape (n_states, n_anchors, action_dim), and normalised log-weights of the samples, of shape
        (n_states, n_anchors, n_samples)
    """
    noise = th.randn(*x.shape[:2], n_samples, x.shape[2], device=x.device)
    with th.enable_grad():
        x = x.detach().requires_grad_(True)
        center, width = broad_proposal(x, sigma)
        samples = center.unsqueeze(2) + width.unsqueeze(2) * noise
        log_weights = log_density(samples.flatten(1, 2)).reshape(noise.shape[:3])
        log_weights = log_weights + (samples / PRIOR_STD).pow(2).sum(dim=3) / 2
        (score,) = th.autograd.grad(th.logsumexp(log_weights, dim=2).sum(), x)
    x = x.detach()
    # The noised prior, N(0, prior_std^2 + sigma^2), in front of the mean
    score = score - x / (PRIOR_STD**2 + sigma**2)
    target = (x + sigma**2 * score).clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED)
    return target, th.log_softmax(log_weights.detach(), dim=2)


def broad_proposal(x: th.Tensor, sigma: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Product of the noise N(x, sigma^2) and of a broad prior N(0, prior_std^2): a normal distribution that is near the policy
    also at high noise, where x itself lies far outside.

    :param x: noisy actions, shape (..., action_dim)
    :param sigma: noise levels, shape (..., 1)
    :return: its mean, shape (..., action_dim), and its standard deviation, shape (..., 1)
    """
    shrinkage = PRIOR_STD**2 / (PRIOR_STD**2 + sigma**2)
    return x * shrinkage, sigma * shrinkage.sqrt()


def value_and_gradient(log_density: LogDensity, u: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Log-density and its gradient.

    :param log_density: log-density of u up to a constant, differentiable
    :param u: points, shape (n_states, n_actions, action_dim)
    :return: shapes (n_states, n_actions) and (n_states, n_actions, action_dim)
    """
    with th.enable_grad():
        points = u.clone().requires_grad_(True)
        values = log_density(points)
        (gradient,) = th.autograd.grad(values.sum(), points)
    return values.detach(), gradient


def log_normal(u: th.Tensor, means: th.Tensor, stds: th.Tensor) -> th.Tensor:
    """
    Log-densities of normal distributions up to their normalisation, which does not depend on u.

    :param u: points, shape (n_states, n_points, action_dim)
    :param means: means, shape (n_states, n_means, action_dim)
    :param stds: standard deviations, shape (n_states, n_means, 1)
    :return: shape (n_states, n_means, n_points)
    """
    # Not by a matrix product, which loses the digits of small distances
    distances = th.cdist(means, u, compute_mode="donot_use_mm_for_euclid_dist")
    return -(distances / stds).pow(2) / 2


def effective_sample_size(log_weights: th.Tensor) -> th.Tensor:
    """
    ``1 / sum_k w_k^2``, from 1 (one candidate has all the weight) to the number of candidates (Kish 1965, "Survey
    Sampling").

    :param log_weights: normalised log-weights, shape (..., n_candidates)
    :return: shape (...)
    """
    return th.exp(-th.logsumexp(2 * log_weights, dim=-1))
