"""The estimators of E[u | x], against closed forms and quadrature."""

import math

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from quadrature import ENERGIES, denoise, log_density_of, sample, sample_posterior

from sb3_dqs.boltzmann import (
    COMMON_STEP,
    ENOUGH_SAMPLES,
    MAX_STEP,
    N_ANCHORS,
    PRIOR_STD,
    TOO_FEW_SAMPLES,
    effective_sample_size,
    energy_gradient,
    gradient_step,
    pooled_mean,
    posterior_mean,
    reweighted_mean,
    value_and_gradient,
)
from sb3_dqs.diffusion import training_levels

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


@pytest.mark.parametrize("sigma", [0.05, 0.9, 2.0, 20.0])
def test_reweighted_mean_is_unbiased_at_the_fixed_point(sigma):
    """The other anchors come from another policy than pi; with its density, that does not matter."""
    exact, anchors, x = draw_at_the_fixed_point("two modes", sigma, 8000)
    policy = th.distributions.Normal(0.3, 0.8)
    anchors = th.cat([anchors, policy.sample((len(anchors), 3, 1))], dim=1)
    log_ratio = log_density_of("two modes")(anchors) - policy.log_prob(anchors).squeeze(2)
    xs = x.expand(-1, 4, -1)  # the target of the first alone is looked at
    target = reweighted_mean(log_ratio, anchors, xs, th.full_like(xs, sigma))
    assert target.shape == xs.shape
    assert_zero_mean(target[:, :1] - exact, floor=1e-4)


def test_reweighted_mean_restores_the_shares_of_modes():
    """Anchors of a policy whose modes have the wrong shares: at high noise the mean is the right one, up to 1 / n."""
    shares, right, n = th.tensor([0.9, 0.1]), th.tensor([0.3, 0.7]), 4000
    modes = th.distributions.Categorical(shares).sample((1, n))
    anchors = (2.0 * modes - 1).unsqueeze(2)
    sigma = th.full((1, n, 1), 20.0)
    target = reweighted_mean((right / shares).log()[modes], anchors, anchors + sigma * th.randn(1, n, 1), sigma)
    assert target.mean().item() == pytest.approx(0.4, abs=N_STANDARD_ERRORS * 2 / math.sqrt(0.1 * n))


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("sigma", [0.02, 0.2, 0.8, 2.0, 20.0])
@pytest.mark.parametrize("policy_std", [0.3, 1.0])
def test_gradient_step_has_zero_mean_at_the_fixed_point(energy, sigma, policy_std, monkeypatch):
    """Stein's identity: at every x, for any number of modes and any ``policy_std``, with steps shortened in common."""
    monkeypatch.setattr("sb3_dqs.boltzmann.MAX_STEP", math.inf)
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
    monkeypatch.setattr("sb3_dqs.boltzmann.MAX_STEP", math.inf)
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
        posterior_mean(log_density, anchors, th.zeros(50, 4), anchors, x, sigma, policy_std, 4),
    ):
        assert target.isfinite().all()


class TestPosteriorMean:
    """Which of the two estimators gives the targets."""

    def targets(self, log_density, n_samples, n_states=50):
        """
        All, those of the pool from the same random numbers, those of the gradient (above the policy's width, and of the
        first three states: those reweighted), and the effective sample size.
        """
        anchors, sigma = th.randn(n_states, 4, 2).clamp(-2, 2), training_levels(n_states, 4)
        x, denoised, std = anchors + sigma * th.randn_like(anchors), th.zeros_like(anchors), th.full((2,), 0.9)
        log_prob = th.randn(3, 4)
        th.manual_seed(1)
        target, log_weights = posterior_mean(log_density, anchors, log_prob, denoised, x, sigma, std, n_samples)
        th.manual_seed(1)
        pooled, expected_log_weights = pooled_mean(log_density, anchors, x, sigma, n_samples)
        assert th.equal(log_weights, expected_log_weights)
        values, gradient = value_and_gradient(log_density, anchors)
        step = gradient_step(gradient, anchors, denoised, x, sigma, std)
        reweighted = reweighted_mean(values[:3] - log_prob, anchors[:3], x[:3], sigma[:3])
        step[:3] = th.where(sigma[:3] > 0.9, reweighted, step[:3])
        return target, pooled, step, effective_sample_size(log_weights).mean().item()

    def test_of_gentle_energies_comes_from_the_pool(self):
        target, pooled, _, ess = self.targets(log_density_of("flat"), 32)
        assert ess > ENOUGH_SAMPLES and th.equal(target, pooled)

    def test_of_steep_energies_comes_from_the_gradient(self):
        target, pooled, step, ess = self.targets(lambda u: 1e4 * u.sum(dim=2), 4, n_states=1000)
        assert ess < TOO_FEW_SAMPLES and th.equal(target, step) and not th.equal(target, pooled)

    def test_between_them_is_a_mixture(self):
        target, pooled, step, ess = self.targets(log_density_of("linear"), 4, n_states=1000)
        assert TOO_FEW_SAMPLES < ess < ENOUGH_SAMPLES
        is_step, is_pooled = ((target == each).all(dim=2) for each in (step, pooled))
        assert (is_step ^ is_pooled).all()
        share = (ENOUGH_SAMPLES - ess) / (ENOUGH_SAMPLES - TOO_FEW_SAMPLES)
        standard_error = math.sqrt(share * (1 - share) / is_step.numel())
        assert is_step.double().mean().item() == pytest.approx(share, abs=N_STANDARD_ERRORS * standard_error)


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
