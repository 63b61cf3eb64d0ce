"""The estimators of E[u | x], against closed forms and quadrature."""

import math

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from quadrature import ENERGIES, denoise, log_density_of, sample, sample_posterior

from sb3_dqs.denoiser_targets import (
    COMMON_STEP,
    ENOUGH_SAMPLES,
    MAX_STEP,
    N_ANCHORS,
    PRIOR_STD,
    TOO_FEW_SAMPLES,
    WEIGHED_SHARE,
    count_pooled,
    effective_sample_size,
    energy_gradient,
    gradient_step,
    log_normal,
    pooled_mean,
    posterior_mean,
    value_and_gradient,
)
from sb3_dqs.noise import training_levels

# A test with this many standard errors fails by chance once in 16,000 runs
N_STANDARD_ERRORS = 4
SLOPE = 1.5


def gaussian(mean: float, std: float):
    return lambda u: -((u - mean) ** 2).sum(dim=2) / (2 * std**2)


def gradient_of(log_density, u):
    return value_and_gradient(log_density, u)[1]


def draw_at_the_fixed_point(energy, sigma, n):
    """Three x, low, middling and high, n times each; exact posterior means, anchors and x, all (3 * n, 1, 1)."""
    sigmas = th.full((3,), sigma)
    x = math.hypot(0.9, sigma) * th.tensor([-1.5, 0.2, 1.5])
    anchors = sample_posterior(energy, x, sigmas, n)
    exact = denoise(energy, x, sigmas)
    return (values.reshape(-1, 1, 1) for values in (exact.repeat_interleave(n), anchors, x.repeat_interleave(n)))


def assert_zero_mean(errors, floor):
    errors = errors.reshape(3, -1)
    assert (errors.mean(dim=1).abs() < N_STANDARD_ERRORS * errors.std(dim=1) / math.sqrt(errors.shape[1]) + floor).all()


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("sigma", [0.05, 0.4, 2.0, 20.0])
@pytest.mark.parametrize("n_samples", [2, 3, 16])
def test_pooled_mean_of_one_anchor_is_unbiased_at_the_fixed_point(energy, sigma, n_samples):
    """If the anchor comes from pi, the target has no bias: at every x, for any K, wherever the proposals are."""
    exact, anchors, x = draw_at_the_fixed_point(energy, sigma, 8000)
    target, log_weights = pooled_mean(log_density_of(energy), anchors, x, th.full_like(x, sigma), n_samples)
    assert log_weights.shape == (24_000, 1, n_samples)
    assert_zero_mean(target - exact, floor=1e-4)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize(("n_samples", "rms_bound", "bound"), [(2, 0.03, 0.1), (3, 0.025, 0.08), (16, 0.015, 0.05)])
def test_pooled_mean_of_several_anchors_is_nearly_unbiased_at_the_fixed_point(energy, n_samples, rms_bound, bound):
    """
    That every component of the mixture gives its share costs some bias. Measured with 20,000 draws, in standard
    deviations of p(u|x): root mean square 0.012 to 0.017 with K = 2 and below 0.004 with K = 16; 0.05 and 0.013 at most.
    The bounds leave room for the noise of so few draws, about 0.01.
    """
    n, n_sets = 3000 if n_samples < 16 else 1000, 12
    sigma = training_levels(n_sets, N_ANCHORS).flatten()
    x = sample(energy, len(sigma)) + sigma * th.randn_like(sigma)
    anchors = sample_posterior(energy, x, sigma, n)
    # From n repetitions of each x to n repetitions of each set of N_ANCHORS
    columns = anchors.reshape(n_sets, N_ANCHORS, n).transpose(1, 2).reshape(-1, N_ANCHORS, 1)
    xs, sigmas = (values.reshape(n_sets, 1, N_ANCHORS, 1).expand(-1, n, -1, -1).flatten(0, 1) for values in (x, sigma))
    target, _ = pooled_mean(log_density_of(energy), columns, xs, sigmas, n_samples)
    bias = target.reshape(n_sets, n, N_ANCHORS).mean(dim=1).flatten() - denoise(energy, x, sigma)
    bias = bias / anchors.std(dim=1)
    assert bias.pow(2).mean().sqrt() < rms_bound and bias.abs().max() < bound


@pytest.mark.parametrize("n_anchors", [1, 4])
def test_with_many_samples_the_anchor_does_not_matter(n_anchors):
    """Two modes, where the anchors know of one; and two dimensions."""
    sigma = th.tensor([0.3, 0.6, 1.0, 4.0])[:n_anchors].reshape(1, -1, 1).expand(30, -1, -1)
    x = 0.4 + 0.3 * sigma * th.randn(30, n_anchors, 1)
    for anchor in (-0.5, 0.7):
        target, _ = pooled_mean(log_density_of("two modes"), th.full_like(x, anchor), x, sigma, 4000)
        assert (target - denoise("two modes", x, sigma)).abs().mean() < 0.02
    x = th.cat([x, -x], dim=2)
    target, _ = pooled_mean(log_density_of("linear"), th.full_like(x, 3.0), x, sigma, 4000)
    assert (target - denoise("linear", x, sigma)).abs().mean() < 0.03


def test_pool_is_that_of_the_state():
    """Shapes; targets are means of the candidates; nothing comes from other states, nor from anchors of other copies."""
    n_states, n_anchors, n_samples, action_dim = 5, 3, 6, 2
    anchors = th.randn(n_states, n_anchors, action_dim)
    sigma = training_levels(n_states, n_anchors)
    x = anchors + sigma * th.randn_like(anchors)
    th.manual_seed(1)
    target, log_weights = pooled_mean(log_density_of("linear"), anchors, x, sigma, n_samples)
    assert target.shape == x.shape and log_weights.shape == (n_states, n_anchors, n_anchors * n_samples)
    assert th.allclose(log_weights.exp().sum(dim=2), th.ones(n_states, n_anchors), atol=1e-5)
    assert th.equal(log_weights[:, :, :n_anchors].isfinite(), th.eye(n_anchors, dtype=th.bool).expand(n_states, -1, -1))
    assert log_weights[:, :, n_anchors:].isfinite().all()
    th.manual_seed(1)
    other = x + th.arange(n_states).reshape(-1, 1, 1)  # the first state's are as before
    assert th.equal(pooled_mean(log_density_of("linear"), anchors, other, sigma, n_samples)[0][0], target[0])


def test_densities_of_candidates_are_exact_far_from_the_middle():
    """Where the noise is small beside the action: as many points as a matrix product would be taken for."""
    means = 6 + 0.03 * th.randn(5, 4, 6, dtype=th.float64)
    points, stds = 6 + 0.03 * th.randn(5, 48, 6, dtype=th.float64), th.full((5, 4, 1), 0.03, dtype=th.float64)
    exact = -((points.unsqueeze(1) - means.unsqueeze(2)) / 0.03).pow(2).sum(dim=3) / 2
    assert th.allclose(log_normal(points, means, stds), exact)
    points, means = points.float(), means.float()
    exact = -((points.double().unsqueeze(1) - means.double().unsqueeze(2)) / 0.03).pow(2).sum(dim=3) / 2
    assert (log_normal(points, means, stds.float()) - exact).abs().max() < 1e-3


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("sigma", [0.02, 0.2, 0.8, 2.0, 20.0])
@pytest.mark.parametrize("policy_std", [0.3, 1.0])
def test_gradient_step_has_zero_mean_at_the_fixed_point(energy, sigma, policy_std, monkeypatch):
    """Stein's identity: at every x, for any number of modes and any ``policy_std``, with steps shortened in common."""
    monkeypatch.setattr("sb3_dqs.denoiser_targets.MAX_STEP", math.inf)
    exact, anchors, x = (each.reshape(-1, 4, 1) for each in draw_at_the_fixed_point(energy, sigma, 8000))
    arguments = anchors, exact, x, th.full_like(x, sigma), th.full((1,), policy_std)
    # In units of the posterior's width, and up to what single precision leaves of (x - D) / sigma^2
    width = sigma * policy_std / math.hypot(sigma, policy_std)
    assert_zero_mean((gradient_step(gradient_of(log_density_of(energy), anchors), *arguments) - exact) / width, floor=1e-3)


@pytest.mark.parametrize("energy", ["flat", "linear"])
@pytest.mark.parametrize("sigma", [0.02, 0.8, 20.0])
def test_limit_of_the_gradient_step_does_not_bind_for_gentle_energies(energy, sigma, monkeypatch):
    exact, anchors, x = draw_at_the_fixed_point(energy, sigma, 1000)
    arguments = gradient_of(log_density_of(energy), anchors), anchors, exact, x, th.full_like(x, sigma), th.full((1,), 0.8)
    limited = gradient_step(*arguments)
    monkeypatch.setattr("sb3_dqs.denoiser_targets.MAX_STEP", math.inf)
    assert th.equal(limited, gradient_step(*arguments))


def test_gradient_step_of_a_gaussian_is_exact():
    """Below the policy's width one step from anywhere reaches the posterior mean, without noise."""
    mean, std, sigma = 0.3, 0.5, th.full((1000, 2, 1), 0.2)
    anchors, denoised = 0.3 * th.randn(1000, 2, 3), 0.2 * th.randn(1000, 2, 3)
    x = denoised + 0.1 * th.randn(1000, 2, 3)
    target = gradient_step(gradient_of(gaussian(mean, std), anchors), anchors, denoised, x, sigma, th.full((3,), std))
    expected = (mean / std**2 + x / 0.2**2) / (1 / std**2 + 1 / 0.2**2)
    assert th.allclose(target, expected, atol=1e-5)


@pytest.mark.parametrize("slope", [1e3, -1e10, 1e30])
def test_targets_of_steep_energies_are_finite(slope):
    anchors, sigma = th.randn(50, 4, 3).clamp(-2, 2), training_levels(50, 4)
    x, policy_std = anchors + sigma * th.randn_like(anchors), th.tensor([0.02, 0.5, 2.0])

    def log_density(u):
        return slope * th.tanh(u).sum(dim=2)

    step = gradient_step(gradient_of(log_density, anchors), anchors, anchors, x, sigma, policy_std) - anchors
    width = sigma * policy_std / (sigma**2 + policy_std**2).sqrt()
    lengths = (step / width).norm(dim=2)
    assert lengths.isfinite().all() and lengths.max() < MAX_STEP + 1e-2  # what rounding adds to small steps
    if slope == -1e10:  # uphill; with 1e3 the noise has a say, and 1e30 is cut before the steps are shortened
        assert (step < 1e-3).all() and lengths.median() == pytest.approx(COMMON_STEP, rel=0.5)
    for target, _ in (
        pooled_mean(log_density, anchors, x, sigma, 4),
        energy_gradient(log_density, x, sigma, 4),
        posterior_mean(lambda states: log_density, anchors, anchors, x, sigma, policy_std, 4, 25),
    ):
        assert target.isfinite().all()


class TestPosteriorMean:
    """Which of the two estimators gives the targets."""

    @pytest.mark.parametrize("n_pooled", [0, 1, 30, 40])
    def test_pool_in_the_first_states_and_gradient_in_the_others(self, n_pooled):
        anchors, sigma = th.randn(40, 4, 2).clamp(-2, 2), training_levels(40, 4)
        x, denoised, std = anchors + sigma * th.randn_like(anchors), th.zeros_like(anchors), th.full((2,), 0.9)
        slopes = th.linspace(1, 3, 40).reshape(-1, 1)  # each state has its own energy

        def log_density_of(states):
            return lambda u: slopes[states] * u.sum(dim=2)

        th.manual_seed(1)
        target, log_weights = posterior_mean(log_density_of, anchors, denoised, x, sigma, std, 5, n_pooled)
        weighed = max(n_pooled, 40 * WEIGHED_SHARE)
        first = slice(int(weighed))
        th.manual_seed(1)
        pooled, expected_log_weights = pooled_mean(log_density_of(first), anchors[first], x[first], sigma[first], 5)
        step = gradient_step(gradient_of(log_density_of(slice(None)), anchors), anchors, denoised, x, sigma, std)
        assert th.equal(log_weights, expected_log_weights)
        assert th.equal(target[:n_pooled], pooled[:n_pooled]) and th.equal(target[n_pooled:], step[n_pooled:])

    @given(st.floats(1, 1000), st.integers(1, 1000))
    def test_number_of_states(self, mean_ess, n_states):
        n_pooled = count_pooled(mean_ess, n_states)
        assert isinstance(n_pooled, int) and 0 <= n_pooled <= n_states
        assert n_pooled == n_states or mean_ess < ENOUGH_SAMPLES
        assert n_pooled == 0 or mean_ess > TOO_FEW_SAMPLES
        assert count_pooled((ENOUGH_SAMPLES + TOO_FEW_SAMPLES) / 2, 2 * n_states) == n_states


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0])
def test_energy_gradient_of_a_broad_gaussian_is_exact(sigma):
    """Of the width of the prior, and anywhere: with any number of samples."""
    x, sigmas = th.randn(20, 3, 2), th.full((20, 3, 1), sigma)
    for mean in (0.0, 1.5):
        target, log_weights = energy_gradient(gaussian(mean, PRIOR_STD), x, sigmas, 4)
        expected = mean + PRIOR_STD**2 / (PRIOR_STD**2 + sigma**2) * (x - mean)
        assert th.allclose(target, expected, atol=1e-5)
        assert mean != 0 or th.allclose(effective_sample_size(log_weights), th.full((20, 3), 4.0))


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_energy_gradient_against_quadrature(energy, sigma):
    x = th.linspace(-1.5, 1.5, 6).reshape(3, 2, 1)
    sigmas = th.full_like(x, sigma)
    estimates = th.stack([energy_gradient(log_density_of(energy), x, sigmas, 1000)[0] for _ in range(30)])
    standard_error = estimates.std(dim=0) / math.sqrt(30)
    # The logarithm of a mean has a bias of order 1/K
    error = (estimates.mean(dim=0) - denoise(energy, x, sigmas)).abs()
    assert (error < N_STANDARD_ERRORS * standard_error + 5e-3).all()


@given(st.integers(2, 50), st.integers(1, 4), st.integers(0, 1000))
def test_effective_sample_size_between_one_and_all(n, n_anchors, seed):
    generator = th.Generator().manual_seed(seed)
    log_weights = th.log_softmax(5 * th.randn(3, n_anchors, n, generator=generator), dim=2)
    ess = effective_sample_size(log_weights)
    assert ess.shape == (3, n_anchors) and (ess > 1 - 1e-4).all() and (ess < n + 1e-2).all()
    assert th.allclose(effective_sample_size(th.full((3, n_anchors, n), -math.log(n))), th.tensor(float(n)), rtol=1e-4)
    one_hot = th.log_softmax(th.eye(n)[:1] * 1e4, dim=1)
    assert effective_sample_size(one_hot) == pytest.approx([1.0], rel=1e-4)
    log_weights[:, :, 0] = -math.inf  # foreign anchors have no weight
    assert (effective_sample_size(th.log_softmax(log_weights, dim=2)) < n - 1 + 1e-2).all()
