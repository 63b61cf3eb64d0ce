"""Entropy and log-density from denoising errors, against closed forms: exact denoisers, no network."""

import math

import pytest
import torch as th

from sb3_dqs.boltzmann import truncated_normal_mean
from sb3_dqs.diffusion import training_levels
from sb3_dqs.entropy import entropies, log_density

TOLERANCE = 0.05  # nats per dimension
STD = 0.15
SLOPE = 3.0


def uniform(n, d):
    return 2 * th.rand(n, d) - 1


def exponential(n, d):
    return th.log(math.exp(-SLOPE) + th.rand(n, d) * (math.exp(SLOPE) - math.exp(-SLOPE))) / SLOPE


def gaussian(n, d):
    return 0.2 + STD * th.randn(n, d)


def gaussian_denoiser(x, sigma):
    return 0.2 + STD**2 / (STD**2 + sigma**2) * (x - 0.2)


MASS = (math.exp(SLOPE) - math.exp(-SLOPE)) / SLOPE  # of exp(slope * a) on the interval
EXPONENTIAL_MEAN = 1 / math.tanh(SLOPE) - 1 / SLOPE
# name: (draw, denoiser, log-density of one dimension, entropy of one dimension)
CASES = {
    "uniform": (uniform, lambda x, s: truncated_normal_mean(x, s), lambda a: -math.log(2) + 0 * a, math.log(2)),
    "exponential": (
        exponential,
        lambda x, s: truncated_normal_mean(x + s**2 * SLOPE, s),
        lambda a: SLOPE * a - math.log(MASS),
        math.log(MASS) - SLOPE * EXPONENTIAL_MEAN,
    ),
    "gaussian": (
        gaussian,
        gaussian_denoiser,
        lambda a: -((a - 0.2) ** 2) / (2 * STD**2) - math.log(STD * math.sqrt(2 * math.pi)),
        0.5 * math.log(2 * math.pi * math.e * STD**2),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("action_dim", [1, 3])
@pytest.mark.parametrize("policy_std", [0.02, 0.3, 1.0])  # a wrong one makes noise, no bias
def test_entropies_of_a_batch(case, action_dim, policy_std):
    draw, denoise, _, entropy = CASES[case]
    n = 100_000
    actions, sigma, noise = draw(n, action_dim), training_levels(n), th.randn(n, action_dim)
    errors = actions - denoise(actions + sigma * noise, sigma)
    estimate = entropies(errors, noise, sigma, th.full((action_dim,), policy_std)).mean()
    assert estimate.item() / action_dim == pytest.approx(entropy, abs=TOLERANCE)


@pytest.mark.parametrize("action_dim", [2, 6, 17])
def test_entropy_of_two_modes_in_opposite_corners(action_dim):
    """Correlated and far apart: the noisy policy at the highest level must still be Gaussian enough."""
    position, std = 0.8, 0.05

    def denoise(x, sigma):
        total_variance = std**2 + sigma**2
        weight = th.sigmoid(2 * position * x.sum(dim=-1, keepdim=True) / total_variance)  # of the mode at +position
        return std**2 / total_variance * x + (2 * weight - 1) * position * sigma**2 / total_variance

    signs = th.where(th.rand(20_000, 1) < 0.5, -1.0, 1.0)
    actions = signs * position + std * th.randn(20_000, action_dim)
    estimate = -log_density(denoise, actions, th.full((action_dim,), position), n_levels=16, n_noises=1).mean()
    entropy = math.log(2) + action_dim * 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert estimate.item() == pytest.approx(entropy, abs=TOLERANCE * action_dim)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("action_dim", [1, 3])
def test_mean_log_density_is_minus_the_entropy(case, action_dim):
    draw, denoise, _, entropy = CASES[case]
    estimate = -log_density(denoise, draw(4000, action_dim), th.full((action_dim,), 0.3), n_levels=16, n_noises=1).mean()
    assert estimate.item() / action_dim == pytest.approx(entropy, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_log_density_pointwise(case):
    _, denoise, exact, _ = CASES[case]
    # Away from the bounds of the box, where the density at sigma_min is that at 0
    actions = th.linspace(-0.3, 0.7, 11).unsqueeze(1)
    estimates = th.stack([log_density(denoise, actions, th.full((1,), 0.3), n_levels=64, n_noises=10) for _ in range(40)])
    standard_error = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert ((estimates.mean(dim=0) - exact(actions).squeeze(1)).abs() < 4 * standard_error + 0.01).all()


def test_few_noise_levels_are_unbiased():
    """The soft backup uses 4 levels: noisy, but right on average."""
    draw, denoise, _, entropy = CASES["gaussian"]
    for policy_std in (0.02, 0.15, 1.0):  # a wrong one does not matter
        estimates = -log_density(denoise, draw(40_000, 1), th.full((1,), policy_std), n_levels=4, n_noises=1)
        standard_error = estimates.std().item() / math.sqrt(len(estimates))
        assert estimates.mean().item() == pytest.approx(entropy, abs=4 * standard_error + 0.01)
