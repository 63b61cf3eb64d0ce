"""
Estimators of the denoiser's regression target for fidelity.py: those of the package and peers from other papers.

All have one signature, ``(log_density, anchors, denoised, x, sigma, policy_std, n_samples) -> (target, log_weights)``,
that of :func:`sb3_dqs.boltzmann.posterior_mean`, whose docstring says what the arguments are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from sb3_dqs.boltzmann import LogDensity, energy_gradient, posterior_mean, sample_truncated_normal

EstimatorFn = Callable[[LogDensity, th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor, int], tuple[th.Tensor, th.Tensor]]


@dataclass(frozen=True)
class Estimator:
    """
    :param estimate: the function; ``None`` for what is trained in another way
    :param n_samples: its number of samples K
    """

    estimate: EstimatorFn | None = None
    n_samples: int = 0


def paper(
    log_density: LogDensity,
    anchors: th.Tensor,
    denoised: th.Tensor,
    x: th.Tensor,
    sigma: th.Tensor,
    policy_std: th.Tensor,
    n_samples: int,
) -> tuple[th.Tensor, th.Tensor]:
    """The paper's; see :func:`sb3_dqs.boltzmann.energy_gradient`."""
    return energy_gradient(log_density, x, sigma, n_samples)


def forward_only(
    log_density: LogDensity,
    anchors: th.Tensor,
    denoised: th.Tensor,
    x: th.Tensor,
    sigma: th.Tensor,
    policy_std: th.Tensor,
    n_samples: int,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Self-normalised importance sampling from N(x, sigma^2) truncated to the box, values of Q alone
    (the noise expectation of Ma et al. 2025, "SDAC", https://arxiv.org/abs/2502.00361, and
    Dong et al. 2025, "MaxEntDP", https://arxiv.org/abs/2502.11612).
    """
    uniforms = th.rand(x.shape[0], n_samples, x.shape[1])
    samples = sample_truncated_normal(x.unsqueeze(1), sigma.unsqueeze(1), uniforms)
    log_weights = th.log_softmax(log_density(samples), dim=1)
    return (log_weights.exp().unsqueeze(2) * samples).sum(dim=1), log_weights


def control_variate(
    log_density: LogDensity,
    anchors: th.Tensor,
    denoised: th.Tensor,
    x: th.Tensor,
    sigma: th.Tensor,
    policy_std: th.Tensor,
    n_samples: int,
) -> tuple[th.Tensor, th.Tensor]:
    """
    :func:`forward_only` plus a Stein term of zero mean, with the coefficient that fits best to the same samples
    (Li, Tang and Azizan 2026, "Reverse Flow Matching", https://arxiv.org/abs/2601.08136). The term vanishes at the bounds
    of the box: ``f_j(a) = (1 - a_j^2) d/da_j log p(a|x) - 2 a_j``.
    """
    uniforms = th.rand(x.shape[0], n_samples, x.shape[1])
    samples = sample_truncated_normal(x.unsqueeze(1), sigma.unsqueeze(1), uniforms)
    with th.enable_grad():
        samples.requires_grad_(True)
        values = log_density(samples)
        (gradient,) = th.autograd.grad(values.sum(), samples)
    samples = samples.detach()
    log_weights = th.log_softmax(values.detach(), dim=1)
    stein = (1 - samples.pow(2)) * (gradient - (samples - x.unsqueeze(1)) / sigma.unsqueeze(1) ** 2) - 2 * samples

    def mean(values: th.Tensor) -> th.Tensor:
        return (log_weights.exp().unsqueeze(2) * values).sum(dim=1, keepdim=True)

    # Regression of the samples on the term; its intercept is the estimate
    centered = stein - mean(stein)
    coefficient = mean(samples * centered) / mean(centered.pow(2)).clamp(min=1e-12)
    # With few effective samples the fit goes astray, but the mean lies in the box
    return (mean(samples) - coefficient * mean(stein)).squeeze(1).clamp(-1, 1), log_weights


def q_score(
    log_density: LogDensity,
    anchors: th.Tensor,
    denoised: th.Tensor,
    x: th.Tensor,
    sigma: th.Tensor,
    policy_std: th.Tensor,
    n_samples: int,
) -> tuple[th.Tensor, th.Tensor]:
    """
    The score of the noisy policy taken for the gradient of Q at the noisy action, at every noise level: no samples
    (Psenka et al. 2024, "Q-score matching", https://arxiv.org/abs/2312.11752).
    """
    with th.enable_grad():
        inside = x.clamp(-1, 1).requires_grad_(True)
        (gradient,) = th.autograd.grad(log_density(inside.unsqueeze(1)).sum(), inside)
    return (x + sigma**2 * gradient).clamp(-1, 1), th.zeros_like(sigma)


ESTIMATORS = {
    "posterior mean, K=8": Estimator(posterior_mean, 8),
    "posterior mean, K=16": Estimator(posterior_mean, 16),
    "posterior mean, K=64": Estimator(posterior_mean, 64),
    "energy gradient, K=64": Estimator(paper, 64),
    "energy gradient, K=1000": Estimator(paper, 1000),
    "forward only, K=16": Estimator(forward_only, 16),
    "forward only, K=64": Estimator(forward_only, 64),
    "control variate, K=64": Estimator(control_variate, 64),
    "Q-score matching": Estimator(q_score, 1),
    # Trained otherwise: SAC's policy, and the same denoiser on exact samples: the limit of network and solver
    "tanh Gaussian": Estimator(),
    "exact samples": Estimator(),
}
