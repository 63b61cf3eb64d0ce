"""The estimators of E[u | x], against closed forms and quadrature."""

import math

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from quadrature import ENERGIES, denoise, log_density_of, sample, sample_posterior

from sb3_dqs.denoiser_targets import (
    BoltzmannDensity,
    DenoiserTarget,
    Draws,
    EnergyGradient,
    GradientStep,
    PooledMean,
    PosteriorMean,
    effective_sample_size,
    log_normal,
    make_denoiser_target,
    value_and_gradient,
)
from sb3_dqs.noise import NoiseLevels, c_out
from sb3_dqs.solvers import MAX_UNSQUASHED

# A test with this many standard errors fails by chance once in 16,000 runs
N_STANDARD_ERRORS = 4


def gaussian(mean, std):
    return lambda u: -((u - mean) ** 2).sum(dim=-1) / (2 * std**2)


def make_draws(u, x, sigma, denoised=None, std=0.9):
    """With one number for what is the same in all draws."""
    sigma = th.as_tensor(sigma).expand(*x.shape[:2], 1)
    return Draws(u, x, sigma, th.zeros_like(u) if denoised is None else denoised, th.as_tensor(std).expand_as(u[:, :1]))


def noisy_draws(n_states, n_draws, action_dim, **kwargs):
    u, sigma = th.randn(n_states, n_draws, action_dim).clamp(-2, 2), NoiseLevels().training(n_states, n_draws)
    return make_draws(u, u + sigma * th.randn_like(u), sigma, **kwargs)


def at_the_fixed_point(energy, sigma, n, n_draws=1, std=0.9):
    """Three x, low, middling and high, n times each, with u from p(u|x) and the exact denoiser."""
    x = math.hypot(0.9, sigma) * th.tensor([-1.5, 0.2, 1.5])
    u, exact = sample_posterior(energy, x, th.full((3,), sigma), n), denoise(energy, x, sigma)
    u, x, exact = (values.reshape(-1, n_draws, 1) for values in (u, x.repeat_interleave(n), exact.repeat_interleave(n)))
    return make_draws(u, x, sigma, exact, std)


def assert_zero_mean(errors, floor):
    errors = errors.reshape(3, -1)
    assert (errors.mean(dim=1).abs() < N_STANDARD_ERRORS * errors.std(dim=1) / math.sqrt(errors.shape[1]) + floor).all()


class TestBoltzmannDensity:
    def test_density_is_that_of_squashed_actions_at_the_temperature(self):
        density = BoltzmannDensity(lambda obs: lambda actions: 0.2 * 3 * actions.sum(dim=2), th.zeros(5, 3), 0.2)
        u = th.randn(5, 4, 2)
        values, gradient = value_and_gradient(density, u)
        assert th.allclose(values, log_density_of("linear")(u), atol=1e-5) and not values.requires_grad
        # d/du of 3 tanh(u) + log(1 - tanh(u)^2)
        a = th.tanh(u)
        assert th.allclose(gradient, 3 * (1 - a**2) - 2 * a, atol=1e-5)

    def test_rows_have_their_own_observations_and_features_are_computed_once(self):
        calls = []

        def energy(obs):
            calls.append(obs)
            return lambda actions: obs["offset"] + 0 * actions.sum(dim=2)

        density = BoltzmannDensity(energy, {"offset": th.arange(5.0).unsqueeze(1)}, th.tensor(0.5))
        u = th.zeros(5, 3, 1)
        assert th.equal(density(u), density(u)) and len(calls) == 1
        assert th.equal(density[1:3](u[1:3]), density(u)[1:3]) and density(u)[1:3, 0].tolist() == [2, 4]


class TestPooledMean:
    @pytest.mark.parametrize("energy", ENERGIES)
    @pytest.mark.parametrize("sigma", [0.05, 0.4, 2.0, 20.0])
    @pytest.mark.parametrize("n_samples", [2, 12])
    def test_of_one_draw_is_unbiased_at_the_fixed_point(self, energy, sigma, n_samples):
        """If u comes from pi, the target has no bias: at every x, for any number of samples."""
        draws = at_the_fixed_point(energy, sigma, 4000)
        targets, metrics = PooledMean(n_samples)(log_density_of(energy), draws)
        assert targets.shape == draws.x.shape and 1 <= metrics["ess"] <= n_samples
        assert_zero_mean(targets - draws.denoised, floor=1e-4)

    @pytest.mark.parametrize("energy", ENERGIES)
    @pytest.mark.parametrize(("n_samples", "rms_bound", "bound"), [(2, 0.03, 0.1), (16, 0.015, 0.05)])
    def test_of_several_draws_is_nearly_unbiased_at_the_fixed_point(self, energy, n_samples, rms_bound, bound):
        """
        That every component of the mixture gives its share costs some bias. Measured with 20,000 draws, in standard
        deviations of p(u|x): root mean square 0.012 to 0.017 with 2 samples and below 0.004 with 16; 0.05 and 0.013 at most.
        The bounds leave room for the noise of so few draws, about 0.01.
        """
        n, n_sets, n_draws = 3000 if n_samples == 2 else 1000, 12, 4
        sigma = NoiseLevels().training(n_sets, n_draws).flatten()
        x = sample(energy, len(sigma)) + sigma * th.randn_like(sigma)
        u = sample_posterior(energy, x, sigma, n)
        # From n repetitions of each x to n repetitions of each set of n_draws
        columns = u.reshape(n_sets, n_draws, n).transpose(1, 2).reshape(-1, n_draws, 1)
        xs, sigmas = (each.reshape(n_sets, 1, n_draws, 1).expand(-1, n, -1, -1).flatten(0, 1) for each in (x, sigma))
        targets, _ = PooledMean(n_samples)(log_density_of(energy), make_draws(columns, xs, sigmas))
        bias = (targets.reshape(n_sets, n, n_draws).mean(dim=1).flatten() - denoise(energy, x, sigma)) / u.std(dim=1)
        assert bias.pow(2).mean().sqrt() < rms_bound and bias.abs().max() < bound

    @pytest.mark.parametrize("n_draws", [1, 4])
    def test_with_many_samples_u_does_not_matter(self, n_draws):
        """Two modes, where u knows of one; and two dimensions."""
        sigma = th.tensor([0.3, 0.6, 1.0, 4.0])[:n_draws].reshape(1, -1, 1).expand(10, -1, -1)
        x, estimator = 0.4 + 0.3 * sigma * th.randn(10, n_draws, 1), PooledMean(4000)
        for u in (-0.5, 0.7):
            targets, _ = estimator(log_density_of("two modes"), make_draws(th.full_like(x, u), x, sigma))
            assert (targets - denoise("two modes", x, sigma)).abs().mean() < 0.02
        x = th.cat([x, -x], dim=2)
        targets, _ = estimator(log_density_of("linear"), make_draws(th.full_like(x, 3.0), x, sigma))
        assert (targets - denoise("linear", x, sigma)).abs().mean() < 0.03

    @pytest.mark.parametrize("n_copies", [1, 2, 4])
    def test_copies_of_one_action(self, n_copies):
        """Of a Gaussian the mean of p(u|x) is x / (1 + sigma^2 / std^2), whatever the other copies are."""
        std = sigma = 0.5
        u = std * th.randn(40_000, 1, 1)
        x = u + sigma * th.randn(40_000, n_copies, 1)
        sigmas = th.full_like(x, sigma)
        draws = Draws(u, x, sigmas, th.zeros_like(x), th.full_like(u, std))
        targets, _ = PooledMean(3)(gaussian(0.0, std), draws)
        slopes = (targets * x).mean(dim=(0, 2)) / x.pow(2).mean(dim=(0, 2))
        assert (slopes - 0.5).abs().max() < 0.015

    def test_pool_is_that_of_the_state_without_the_draws_of_other_copies(self):
        density, estimator, draws = log_density_of("linear"), PooledMean(6), noisy_draws(5, 3, 2)
        th.manual_seed(1)
        targets, _ = estimator(density, draws)
        # Other states, or the third draw of the first: the first target is as before
        moved = th.zeros(5, 3, 1)
        moved[1:], moved[0, 2] = 3.0, 3.0
        for other in (
            make_draws(draws.u, draws.x + th.arange(5).reshape(-1, 1, 1), draws.sigma),
            make_draws(draws.u + moved, draws.x, draws.sigma),
        ):
            th.manual_seed(1)
            assert th.equal(estimator(density, other)[0][0, :2], targets[0, :2])
            assert not th.allclose(estimator(density, other)[0][0, :2], targets[0, :2])  # without the seed it would not be

    def test_effective_sample_size_is_that_of_all_candidates(self):
        """With the density of the proposals themselves, and one x, all candidates but u have equal weights."""
        draws, prior_std = make_draws(th.full((1, 1, 1), 50.0), th.zeros(1, 1, 1), 1.0), 0.7
        _, metrics = PooledMean(9, prior_std)(gaussian(0.0, prior_std), draws)
        assert metrics["ess"].item() == pytest.approx(9, rel=1e-4)


def test_densities_of_candidates_are_exact_far_from_the_middle():
    """Where the noise is small beside the action: as many points as a matrix product would be taken for."""
    means, u = (6 + 0.03 * th.randn(5, n, 6, dtype=th.float64) for n in (4, 48))
    stds = th.full((5, 4, 1), 0.03, dtype=th.float64)
    exact = -((u.unsqueeze(1) - means.unsqueeze(2)) / 0.03).pow(2).sum(dim=3) / 2
    assert th.allclose(log_normal(u, means, stds), exact)
    means, u = means.float(), u.float()
    exact = -((u.double().unsqueeze(1) - means.double().unsqueeze(2)) / 0.03).pow(2).sum(dim=3) / 2
    assert (log_normal(u, means, stds.float()) - exact).abs().max() < 1e-3


class TestGradientStep:
    @pytest.mark.parametrize("energy", ENERGIES)
    @pytest.mark.parametrize("sigma", [0.02, 0.2, 0.8, 20.0])
    @pytest.mark.parametrize("std", [0.3, 1.0])
    def test_has_zero_mean_at_the_fixed_point(self, energy, sigma, std):
        """Stein's identity: at every x, for any number of modes and any ``std``, with steps shortened in common."""
        draws = at_the_fixed_point(energy, sigma, 4000, n_draws=4, std=std)
        # The longest step does not bind for gentle energies
        estimator = GradientStep(max_step=math.inf) if energy == "two modes" else GradientStep()
        targets, _ = estimator(log_density_of(energy), draws)
        # In units of the posterior's width, and up to what single precision leaves of (x - D) / sigma^2
        assert_zero_mean((targets - draws.denoised) / (sigma * std / math.hypot(sigma, std)), floor=1e-3)

    @pytest.mark.parametrize("sigma", [0.05, 0.2, 5.0])
    def test_of_a_gaussian_is_exact(self, sigma):
        """One step from anywhere reaches the posterior mean, at every noise level, without noise."""
        mean, std = 0.3, 0.5
        u, x = (0.2 * th.randn(1000, 2, 3) for _ in range(2))
        targets, _ = GradientStep(math.inf, math.inf)(gaussian(mean, std), make_draws(u, x, sigma, std=std))
        assert th.allclose(targets, (mean / std**2 + x / sigma**2) / (1 / std**2 + 1 / sigma**2), atol=1e-4)

    @pytest.mark.parametrize(("common_step", "max_step"), [(3.0, 12.0), (1.0, 2.0)])
    def test_lengths_of_steps_of_a_steep_energy(self, common_step, max_step):
        """Uphill everywhere; lengths in units of the width that p(u|x) has for a Gaussian policy."""
        draws = noisy_draws(50, 4, 3, std=th.tensor([0.02, 0.5, 2.0]))
        targets, _ = GradientStep(common_step, max_step)(lambda u: -1e10 * th.tanh(u).sum(dim=2), draws)
        steps = (targets - draws.u) * (draws.sigma**2 + draws.std**2).sqrt() / (draws.sigma * draws.std)
        lengths = steps.norm(dim=2)
        assert (steps < 1e-2).all() and lengths.max() < max_step + 1e-2
        assert lengths.median() == pytest.approx(common_step, rel=0.5)

    def test_lengths_of_steps_of_one_action_per_state_are_limited_by_those_of_most_states(self):
        """One very steep state does not shorten the steps of the others."""
        u, sigma, slopes = th.zeros(40, 1, 2), th.full((40, 2, 1), 5.0), th.full((40, 1), 100.0)
        slopes[0] = 1e6
        targets, _ = GradientStep()(lambda u: slopes * u.sum(dim=2), make_draws(u, u.expand(-1, 2, -1), sigma))
        lengths = (targets / (5 * 0.9 / math.hypot(5, 0.9))).norm(dim=2)
        assert th.allclose(lengths[1:], th.tensor(3.0)) and th.allclose(lengths[0], th.tensor(12.0))

    def test_one_gradient_serves_all_copies(self):
        u, sigma = th.randn(20, 1, 2), NoiseLevels().training(20, 3)
        x, density = u + sigma * th.randn(20, 3, 2), log_density_of("linear")
        estimator = GradientStep(math.inf, math.inf)
        targets, _ = estimator(density, make_draws(u, x, sigma))
        expected, _ = estimator(density, make_draws(u.expand(-1, 3, -1), x, sigma))
        assert th.allclose(targets, expected, atol=1e-5)


class TestPosteriorMean:
    """Which of the two estimators gives the targets."""

    @pytest.mark.parametrize(
        ("mean_ess", "noise", "n_pooled"),
        [(1.0, 9, 0), (3.5, 9, 0), (3.6, 9, 7), (3.75, 1, 5), (4.0, 0, 10), (9.0, 2, 10), (9.0, 3, 22), (9.0, 9, 35)],
    )
    def test_pool_in_the_first_states_and_gradient_in_the_others(self, mean_ess, noise, n_pooled):
        draws = noisy_draws(40, 4, 2)
        slopes = th.linspace(1, 3, 40).unsqueeze(1)  # each state has its own energy
        density = BoltzmannDensity(lambda slopes: lambda actions: slopes * actions.sum(dim=2), slopes, 1.0)
        estimator = PosteriorMean(5)
        estimator.mean_ess.value.fill_(mean_ess)
        estimator.gradient_noise.value.fill_(noise)
        assert (estimator.for_next_states is estimator.gradient) == (noise < 3)
        th.manual_seed(1)
        targets, metrics = estimator(density, draws)
        # In an eighth of the states candidates are valued in any case
        first = slice(max(n_pooled, 5))
        th.manual_seed(1)
        pooled, expected_metrics = PooledMean(5)(density[first], draws[first])
        rest = slice(n_pooled, None)
        steps, _ = GradientStep()(density[rest], draws[rest])
        assert th.equal(targets[:n_pooled], pooled[:n_pooled]) and th.equal(targets[rest], steps)
        assert th.equal(metrics["ess"], expected_metrics["ess"])
        assert estimator.mean_ess.value.item() == pytest.approx(0.95 * mean_ess + 0.05 * metrics["ess"].item())
        errors = (steps - draws.denoised[rest]) / c_out(draws.sigma, draws.std)[rest]
        assert metrics["gradient_noise"].item() == pytest.approx(0.95 * noise + 0.05 * errors.pow(2).mean().item(), rel=1e-4)

    @given(st.floats(1, 1000), st.integers(1, 1000))
    def test_number_of_states(self, mean_ess, n_states):
        estimator = PosteriorMean(min_pooled_share=1.0, max_pooled_share=1.0, enough_samples=6.0, too_few_samples=3.0)
        assert estimator.count_pooled(n_states) == n_states - 1  # before the first update
        estimator.mean_ess.value.fill_(mean_ess)
        n_pooled = estimator.count_pooled(n_states)
        assert isinstance(n_pooled, int) and 0 <= n_pooled < n_states
        assert n_pooled == n_states - 1 or mean_ess < 6
        assert n_pooled == 0 or mean_ess > 3
        estimator.mean_ess.value.fill_(4.5)
        assert estimator.count_pooled(2 * n_states) == n_states
        estimator.min_pooled_share = estimator.max_pooled_share = 0.5
        assert estimator.count_pooled(4 * n_states) == n_states


class TestEnergyGradient:
    @pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0])
    @pytest.mark.parametrize("mean", [0.0, 1.5])
    def test_of_a_broad_gaussian_is_exact(self, sigma, mean):
        """Of the width of the prior, and anywhere: with any number of samples."""
        draws, prior_std = make_draws(th.zeros(20, 3, 2), th.randn(20, 3, 2), sigma), 1.3
        targets, metrics = EnergyGradient(4, prior_std)(gaussian(mean, prior_std), draws)
        assert th.allclose(targets, mean + prior_std**2 / (prior_std**2 + sigma**2) * (draws.x - mean), atol=1e-5)
        assert mean != 0 or metrics["ess"].item() == pytest.approx(4, rel=1e-4)

    @pytest.mark.parametrize("energy", ENERGIES)
    @pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
    def test_against_quadrature(self, energy, sigma):
        x = th.linspace(-1.5, 1.5, 6).reshape(1, 6, 1)
        draws = make_draws(x, x, sigma)
        repeated = Draws(*(values.expand(30, -1, -1) for values in (draws.u, x, draws.sigma, x)), draws.std)
        estimates, _ = EnergyGradient(1000)(log_density_of(energy), repeated)
        # The logarithm of a mean has a bias of order 1 / n_samples
        error = (estimates.mean(dim=0) - denoise(energy, x, sigma).squeeze(0)).abs()
        assert (error < N_STANDARD_ERRORS * estimates.std(dim=0) / math.sqrt(30) + 5e-3).all()


@pytest.mark.parametrize("estimator", [PooledMean(4), GradientStep(), PosteriorMean(4), EnergyGradient(4)])
@pytest.mark.parametrize("slope", [1e3, -1e10, 1e30])
def test_targets_of_steep_energies_are_finite(estimator, slope):
    density = BoltzmannDensity(lambda obs: lambda actions: slope * actions.sum(dim=2), th.zeros(50, 1), 1.0)
    if isinstance(estimator, PosteriorMean):
        estimator.mean_ess.value.fill_(3.75)
    targets, metrics = estimator(density, noisy_draws(50, 4, 3, std=th.tensor([0.02, 0.5, 2.0])))
    assert targets.isfinite().all() and all(value.isfinite() for value in metrics.values())
    if isinstance(estimator, EnergyGradient):
        assert targets.abs().max() <= MAX_UNSQUASHED


@given(st.integers(2, 50), st.integers(0, 1000))
def test_effective_sample_size_between_one_and_all(n, seed):
    generator = th.Generator().manual_seed(seed)
    log_weights = th.log_softmax(5 * th.randn(3, 2, n, generator=generator), dim=2)
    ess = effective_sample_size(log_weights)
    assert ess.shape == (3, 2) and (ess > 1 - 1e-4).all() and (ess < n + 1e-2).all()
    assert th.allclose(ess, 1 / log_weights.exp().pow(2).sum(dim=2), rtol=1e-3)
    assert effective_sample_size(th.full((n,), -math.log(n))).item() == pytest.approx(n, rel=1e-4)
    one_hot = th.log_softmax(th.eye(n)[0] * 1e4, dim=0)
    assert effective_sample_size(one_hot).item() == pytest.approx(1, rel=1e-4)


def test_estimators_by_name_and_by_instance():
    assert isinstance(make_denoiser_target("energy_gradient", 7), EnergyGradient)
    assert (
        make_denoiser_target("energy_gradient", 7).n_samples == make_denoiser_target("posterior_mean", 7).pooled.n_samples == 7
    )

    class Own(DenoiserTarget):
        pass

    given = Own()
    estimator = make_denoiser_target(given, 7)
    assert isinstance(estimator, Own) and estimator is not given
