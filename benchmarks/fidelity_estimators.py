"""
Estimators of the denoiser's regression target for fidelity.py: those of the package and peers from other papers.

In ``ESTIMATORS`` all have the signature of :func:`sb3_dqs.boltzmann.posterior_mean`, whose docstring says what the
arguments are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from sb3_dqs.denoiser_targets import PRIOR_STD, LogDensity, broad_proposal, energy_gradient, posterior_mean, value_and_gradient
from sb3_dqs.solvers import MAX_UNSQUASHED

EstimatorFn = Callable[..., tuple[th.Tensor, th.Tensor]]


@dataclass(frozen=True)
class Estimator:
    """
    :param estimate: the function; ``None`` for what is trained in another way
    :param n_samples: its number of samples K
    """

    estimate: EstimatorFn | None = None
    n_samples: int = 0


def of_noisy_actions(estimate: Callable[[LogDensity, th.Tensor, th.Tensor, int], tuple[th.Tensor, th.Tensor]]) -> EstimatorFn:
    """The common signature for an estimator that needs ``(log_density, x, sigma, n_samples)`` alone."""
    return lambda log_density_of, anchors, denoised, x, sigma, policy_std, n_samples, n_pooled: estimate(
        log_density_of(slice(None)), x, sigma, n_samples
    )


def propose(x: th.Tensor, sigma: th.Tensor, n_samples: int) -> tuple[th.Tensor, th.Tensor]:
    """
    Samples from :func:`sb3_dqs.boltzmann.broad_proposal`, of shape (n_states, n_anchors, n_samples, action_dim), and what its
    prior adds to their log-weights.
    """
    center, width = broad_proposal(x, sigma)
    noise = th.randn(*x.shape[:2], n_samples, x.shape[2])
    samples = center.unsqueeze(2) + width.unsqueeze(2) * noise
    return samples, (samples / PRIOR_STD).pow(2).sum(dim=3) / 2


def forward_only(log_density: LogDensity, x: th.Tensor, sigma: th.Tensor, n_samples: int) -> tuple[th.Tensor, th.Tensor]:
    """
    Self-normalised importance sampling around x, values of Q alone
    (the noise expectation of Ma et al. 2025, "SDAC", https://arxiv.org/abs/2502.00361, and
    Dong et al. 2025, "MaxEntDP", https://arxiv.org/abs/2502.11612).
    """
    samples, correction = propose(x, sigma, n_samples)
    values = log_density(samples.flatten(1, 2)).reshape(correction.shape)
    log_weights = th.log_softmax(values + correction, dim=2)
    return (log_weights.exp().unsqueeze(3) * samples).sum(dim=2), log_weights


def control_variate(log_density: LogDensity, x: th.Tensor, sigma: th.Tensor, n_samples: int) -> tuple[th.Tensor, th.Tensor]:
    """
    :func:`forward_only` plus a Stein term of zero mean, the gradient of log p(u|x), with the coefficient that fits best to
    the same samples (Li, Tang and Azizan 2026, "Reverse Flow Matching", https://arxiv.org/abs/2601.08136).
    """
    samples, correction = propose(x, sigma, n_samples)
    with th.enable_grad():
        samples.requires_grad_(True)
        values = log_density(samples.flatten(1, 2)).reshape(correction.shape)
        (gradient,) = th.autograd.grad(values.sum(), samples)
    samples = samples.detach()
    log_weights = th.log_softmax(values.detach() + correction, dim=2)
    stein = gradient - (samples - x.unsqueeze(2)) / sigma.unsqueeze(2) ** 2

    def mean(values: th.Tensor) -> th.Tensor:
        return (log_weights.exp().unsqueeze(3) * values).sum(dim=2, keepdim=True)

    # Regression of the samples on the term; its intercept is the estimate
    centered = stein - mean(stein)
    coefficient = mean(samples * centered) / mean(centered.pow(2)).clamp(min=1e-12)
    # With few effective samples the fit goes astray
    return (mean(samples) - coefficient * mean(stein)).squeeze(2).clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED), log_weights


def q_score(log_density: LogDensity, x: th.Tensor, sigma: th.Tensor, n_samples: int) -> tuple[th.Tensor, th.Tensor]:
    """
    The score of the noisy policy taken for the gradient of Q at the noisy action, at every noise level: no samples
    (Psenka et al. 2024, "Q-score matching", https://arxiv.org/abs/2312.11752).
    """
    _, gradient = value_and_gradient(log_density, x)
    return (x + sigma**2 * gradient).clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED), th.zeros_like(sigma)


ESTIMATORS = {
    "posterior mean, K=12": Estimator(posterior_mean, 12),
    "posterior mean, K=64": Estimator(posterior_mean, 64),
    "energy gradient, K=64": Estimator(of_noisy_actions(energy_gradient), 64),
    "energy gradient, K=1000": Estimator(of_noisy_actions(energy_gradient), 1000),
    "forward only, K=64": Estimator(of_noisy_actions(forward_only), 64),
    "control variate, K=64": Estimator(of_noisy_actions(control_variate), 64),
    "Q-score matching": Estimator(of_noisy_actions(q_score), 1),
    # Trained otherwise: SAC's policy, and the same denoiser on exact samples: the limit of network and solver
    "tanh Gaussian": Estimator(),
    "exact samples": Estimator(),
}
