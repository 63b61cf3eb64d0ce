"""Estimators of ``E[u | x]`` for fidelity.py: those of the package, and peers from other papers as DenoiserTarget."""

import torch as th

from sb3_dqs.denoiser_targets import (
    BoltzmannDensity,
    DenoiserTarget,
    Draws,
    EnergyGradient,
    PosteriorMean,
    broad_proposal,
    effective_sample_size,
    value_and_gradient,
)
from sb3_dqs.solvers import MAX_UNSQUASHED

Estimate = tuple[th.Tensor, dict[str, th.Tensor]]


class ForwardOnly(DenoiserTarget):
    """
    Self-normalised importance sampling around x from values of Q alone (the noise expectation of Ma et al. 2025, "SDAC",
    https://arxiv.org/abs/2502.00361, and Dong et al. 2025, "MaxEntDP", https://arxiv.org/abs/2502.11612).

    :param n_samples: number of samples K per target
    :param prior_std: see :class:`sb3_dqs.denoiser_targets.PooledMean`
    """

    def __init__(self, n_samples: int, prior_std: float = 2.0):
        super().__init__()
        self.n_samples, self.prior_std = n_samples, prior_std

    def propose(self, draws: Draws) -> tuple[th.Tensor, th.Tensor]:
        """Samples, shape (n_states, n_draws, K, action_dim), and minus the log-density of their prior, up to a constant."""
        center, width = broad_proposal(draws.x, draws.sigma, self.prior_std)
        noise = th.randn(*draws.x.shape[:2], self.n_samples, draws.x.shape[2])
        samples = center.unsqueeze(2) + width.unsqueeze(2) * noise
        return samples, (samples / self.prior_std).pow(2).sum(dim=3) / 2

    def forward(self, density: BoltzmannDensity, draws: Draws) -> Estimate:
        samples, correction = self.propose(draws)
        log_weights = th.log_softmax(density(samples.flatten(1, 2)).reshape(correction.shape) + correction, dim=2)
        return weighted_mean(log_weights, samples).squeeze(2), {"ess": effective_sample_size(log_weights).mean()}


class ControlVariate(ForwardOnly):
    """
    :class:`ForwardOnly` plus a Stein term of zero mean, the gradient of log p(u|x), with the coefficient that fits best to
    the same samples (Li, Tang and Azizan 2026, "Reverse Flow Matching", https://arxiv.org/abs/2601.08136).
    """

    def forward(self, density: BoltzmannDensity, draws: Draws) -> Estimate:
        samples, correction = self.propose(draws)
        values, gradient = value_and_gradient(density, samples.flatten(1, 2))
        log_weights = th.log_softmax(values.reshape(correction.shape) + correction, dim=2)
        stein = gradient.reshape(samples.shape) - (samples - draws.x.unsqueeze(2)) / draws.sigma.unsqueeze(2) ** 2
        # Regression of the samples on the term; its intercept is the estimate
        mean_stein = weighted_mean(log_weights, stein)
        centered = stein - mean_stein
        variance = weighted_mean(log_weights, centered.pow(2)).clamp(min=1e-12)
        coefficient = weighted_mean(log_weights, samples * centered) / variance
        targets = (weighted_mean(log_weights, samples) - coefficient * mean_stein).squeeze(2)
        # With few effective samples the coefficient can be very large
        return targets.clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED), {"ess": effective_sample_size(log_weights).mean()}


class QScore(DenoiserTarget):
    """
    The score of the noisy policy is taken to be the gradient of Q at the noisy action, at every noise level: no samples
    (Psenka et al. 2024, "Q-score matching", https://arxiv.org/abs/2312.11752).
    """

    def forward(self, density: BoltzmannDensity, draws: Draws) -> Estimate:
        _, gradient = value_and_gradient(density, draws.x)
        return (draws.x + draws.sigma**2 * gradient).clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED), {}


class DrawsThemselves(DenoiserTarget):
    """Ordinary denoising: each draw u is the target of its own noisy copy."""

    def forward(self, density: BoltzmannDensity, draws: Draws) -> Estimate:
        return draws.u, {}


def weighted_mean(log_weights: th.Tensor, values: th.Tensor) -> th.Tensor:
    """
    Mean over the samples.

    :param log_weights: normalised, shape (n_states, n_draws, K)
    :param values: shape (n_states, n_draws, K, action_dim)
    :return: shape (n_states, n_draws, 1, action_dim)
    """
    return (log_weights.exp().unsqueeze(3) * values).sum(dim=2, keepdim=True)


ESTIMATORS: dict[str, DenoiserTarget] = {
    "posterior mean, K=12": PosteriorMean(12),
    "posterior mean, K=64": PosteriorMean(64),
    "energy gradient, K=64": EnergyGradient(64),
    "energy gradient, K=1000": EnergyGradient(1000),
    "forward only, K=64": ForwardOnly(64),
    "control variate, K=64": ControlVariate(64),
    "Q-score matching": QScore(),
}
