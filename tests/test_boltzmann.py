"""The estimators of E[a | x], against closed forms and quadrature."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sb3_dqs.boltzmann import (
    effective_sample_size,
    energy_gradient,
    posterior_mean,
    sample_truncated_normal,
    truncated_normal_mean,
)

# A test with this many standard errors fails by chance once in 16,000 runs
N_STANDARD_ERRORS = 4


@pytest.mark.parametrize("mean", [-6.0, -1.0, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("std", [0.05, 0.5, 20.0])
def test_truncated_normal_against_scipy(mean, std):
    mean = max(-1 - 3 * std, min(mean, 1 + 3 * std))  # as far out as noisy actions commonly are
    means, stds = th.full((20_000, 1), mean), th.full((20_000, 1), std)
    samples = sample_truncated_normal(means, stds, th.rand(20_000, 1)).squeeze(1).numpy()
    exact = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, loc=mean, scale=std)
    assert stats.kstest(samples, exact.cdf).pvalue > 1e-4
    assert truncated_normal_mean(means[:1], stds[:1]).item() == pytest.approx(exact.mean(), abs=1e-3)


@given(st.floats(-100, 100), st.floats(0.001, 50), st.floats(0, 1))
def test_truncated_normal_stays_in_the_box(mean, std, uniform):
    for function, arguments in ((sample_truncated_normal, (th.tensor(uniform),)), (truncated_normal_mean, ())):
        value = function(th.tensor(mean), th.tensor(std), *arguments)
        assert value.isfinite() and -1 <= value <= 1


def linear(slope: float):
    """Energy whose Boltzmann distribution is a truncated exponential."""
    return lambda actions: slope * actions.sum(dim=2)


def sample_exponential(slope: float, shape: tuple[int, ...]) -> th.Tensor:
    uniforms = th.rand(shape)
    return th.log(math.exp(-slope) + uniforms * (math.exp(slope) - math.exp(-slope))) / slope


@pytest.mark.parametrize("n_samples", [2, 3, 16])
@pytest.mark.parametrize("denoised", ["exact", "zero", "far"])
@pytest.mark.parametrize("sigma", [0.05, 0.4, 2.0, 20.0])
def test_posterior_mean_is_unbiased_at_the_fixed_point(n_samples, denoised, sigma):
    """If the anchors come from pi, the target has no bias: for any K, and wherever the proposals are centred."""
    n, slope = 40_000, 2.0
    anchors = sample_exponential(slope, (n, 1))
    sigmas = th.full((n, 1), sigma)
    x = anchors + sigmas * th.randn(n, 1)
    # In double precision: at sigma = 20 the shifted mean is 40 sigma away from the box
    exact = truncated_normal_mean((x + sigma**2 * slope).double(), sigmas.double()).float()
    center = {"exact": exact, "zero": th.zeros_like(x), "far": -exact}[denoised]
    target, log_weights = posterior_mean(linear(slope), anchors, center, x, sigmas, th.full((1,), 0.5), n_samples)
    assert target.shape == (n, 1) and log_weights.shape == (n, n_samples)
    assert th.allclose(log_weights.exp().sum(dim=1), th.ones(n), atol=1e-5)
    # In three ranges of x apart, so that errors cannot cancel
    order = x.squeeze(1).argsort()
    for part in order.chunk(3):
        errors = (target - exact)[part]
        assert abs(errors.mean()) < N_STANDARD_ERRORS * errors.std() / math.sqrt(len(part)) + 1e-4


def test_posterior_mean_finds_the_better_mode_from_anywhere():
    """With many samples the anchor does not matter."""
    n = 2000

    def log_density(actions):
        return -((actions - 0.5) ** 2).sum(dim=2) / (2 * 0.2**2)

    anchors = 2 * th.rand(n, 2) - 1
    sigmas = th.full((n, 1), 0.3)
    x = anchors + sigmas * th.randn(n, 2)
    exact = (x / 0.3**2 + 0.5 / 0.2**2) / (1 / 0.3**2 + 1 / 0.2**2)
    inside = ((exact.abs() < 0.6) & (x.abs() < 1)).all(dim=1)
    target, _ = posterior_mean(log_density, anchors, th.zeros(n, 2), x, sigmas, th.full((2,), 0.5), 512)
    assert (target - exact)[inside].abs().mean() < 0.02


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0, 20.0])
def test_energy_gradient_of_a_flat_energy_is_exact(sigma):
    x, sigmas = 2 * th.randn(100, 3), th.full((100, 1), sigma)
    target, log_weights = energy_gradient(lambda a: 0 * a.sum(dim=2), x.clamp(-1 - 4 * sigma, 1 + 4 * sigma), sigmas, 4)
    expected = truncated_normal_mean(x.clamp(-1 - 4 * sigma, 1 + 4 * sigma), sigmas)
    assert th.allclose(target, expected, atol=1e-4)
    assert th.allclose(effective_sample_size(log_weights), th.full((100,), 4.0))


@pytest.mark.parametrize("slope", [1.0, -4.0])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_energy_gradient_of_a_linear_energy(slope, sigma):
    """E[a | x] of a truncated exponential is the mean of a truncated normal around x + sigma^2 slope."""
    x = th.linspace(-1.2, 1.2, 7).unsqueeze(1)
    sigmas = th.full_like(x, sigma)
    exact = truncated_normal_mean(x + sigma**2 * slope, sigmas)
    estimates = th.stack([energy_gradient(linear(slope), x, sigmas, 1000)[0] for _ in range(30)])
    standard_error = estimates.std(dim=0) / math.sqrt(30)
    # The logarithm of a mean has a bias of order 1/K
    assert ((estimates.mean(dim=0) - exact).abs() < N_STANDARD_ERRORS * standard_error + 5e-3).all()


def test_estimators_agree_on_a_curved_energy():
    """Both against quadrature, one dimension, two bumps."""
    grid = np.linspace(-1, 1, 4001)

    def energy(a):
        return 3 * np.exp(-((a - 0.6) ** 2) / 0.08) + 2 * np.exp(-((a + 0.4) ** 2) / 0.08)

    def log_density(actions):
        a = actions.squeeze(2)
        return 3 * th.exp(-((a - 0.6) ** 2) / 0.08) + 2 * th.exp(-((a + 0.4) ** 2) / 0.08)

    for x, sigma in ((0.1, 0.5), (-0.9, 0.2), (1.3, 0.6)):
        density = np.exp(energy(grid) - (grid - x) ** 2 / (2 * sigma**2))
        exact = (density * grid).sum() / density.sum()
        xs, sigmas = th.full((200, 1), x), th.full((200, 1), sigma)
        for target in (
            energy_gradient(log_density, xs, sigmas, 1000)[0],
            posterior_mean(log_density, xs.clamp(-1, 1), xs.clamp(-1, 1), xs, sigmas, th.full((1,), 0.6), 1000)[0],
        ):
            assert target.mean().item() == pytest.approx(exact, abs=0.02)


@given(st.integers(2, 50))
def test_effective_sample_size_between_one_and_all(n):
    assert effective_sample_size(th.full((3, n), -math.log(n))) == pytest.approx([n] * 3, rel=1e-4)
    one_hot = th.log_softmax(th.eye(n)[:1] * 1e4, dim=1)
    assert effective_sample_size(one_hot) == pytest.approx([1.0], rel=1e-4)
