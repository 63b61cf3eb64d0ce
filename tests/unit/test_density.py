"""Log-densities along the path of the sampler, against closed forms and quadrature: exact denoisers, no network."""

import math

import pytest
import quadrature
import torch as th
from quadrature import even_latents, gaussian, two_gaussians

from sb3_dqs.density import PathDensity, log_det_tanh, trace_steps
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.solvers import dpm_solver_2m, invert

N_STANDARD_ERRORS = 4
NOISE = NoiseLevels()
MEAN, STD = 0.2, 0.3
# name: (denoiser, log-density, entropy of one dimension), of unsquashed actions
CASES = {
    "gaussian": (
        gaussian(MEAN, STD),
        lambda u: th.distributions.Normal(MEAN, STD).log_prob(u).sum(dim=-1),
        0.5 * math.log(2 * math.pi * math.e) + math.log(STD),
    ),
    **{
        energy: (
            quadrature.exact(energy),
            lambda u, energy=energy: quadrature.log_prob(energy, u.double()),
            quadrature.entropy(energy),
        )
        for energy in quadrature.ENERGIES
    },
}


def draw(denoise, latents, n_steps):
    """Actions, and their log-densities."""
    sigmas = NOISE.sampling(n_steps)
    density = PathDensity(denoise, latents, sigmas)
    return dpm_solver_2m(denoise, sigmas[0] * latents, sigmas, density), density.log_density(latents)


def test_quadrature_against_closed_forms():
    """The entropy of a uniform action is log 2, that of the unsquashed one larger by -E[log(1 - a^2)] = 2 - 2 log 2."""
    assert quadrature.entropy("flat") == pytest.approx(2 - math.log(2), abs=1e-6)
    u = th.tensor([[-2.0], [0.5]], dtype=th.float64)
    exact = 3 * th.tanh(u[:, 0]) - math.log(2 * math.sinh(3) / 3) + (1 - th.tanh(u[:, 0]) ** 2).log()
    assert th.allclose(quadrature.log_prob("linear", u), exact)
    # Its mean is 1 / tanh(3) - 1/3, its standard deviation 0.32
    draws = th.tanh(quadrature.sample("linear", 10_000))
    assert draws.mean().item() == pytest.approx(1 / math.tanh(3) - 1 / 3, abs=N_STANDARD_ERRORS * 0.32 / 100)


@pytest.mark.parametrize(("n_steps", "expected"), [(3, [1, 2]), (4, [1, 3]), (8, [1, 3, 5, 7]), (9, [1, 3, 5, 7, 8])])
def test_steps_of_the_traces(n_steps, expected):
    assert trace_steps(n_steps) == expected


@pytest.mark.parametrize("action_dim", [1, 3])
def test_traces_of_a_linear_denoiser(action_dim):
    """With any shape of x; in one dimension, or if the matrix is diagonal, without noise."""
    matrix = th.randn(action_dim, action_dim, dtype=th.float64)
    x = th.randn(5000, 2, action_dim, dtype=th.float64)
    for factor in (matrix, matrix.diag().diag()):
        density = PathDensity(lambda x, sigma, factor=factor: x @ factor, x, [2.0, 0.5, 0.1], steps=[2])
        for step, sigma in enumerate(density.sigmas):
            density(step, x, sigma, x @ factor)
        assert list(density.traces) == [2] and density.traces[2].shape == x.shape[:2]
        noise = 1e-9 + (N_STANDARD_ERRORS * density.traces[2].std() / math.sqrt(10_000)).item()
        assert density.traces[2].mean().item() == pytest.approx(matrix.trace().item(), abs=noise)
    assert density.traces[2].std() < 1e-9


@pytest.mark.parametrize("action_dim", [1, 3])
def test_density_of_a_gaussian_with_one_trace(action_dim):
    """Above and below that level the integrals are known."""
    std, sigma, sigma_max, latents = 3.0, 2.0, 5.0, th.randn(5, action_dim)
    density = PathDensity(gaussian(0.0, std), latents, [sigma_max, sigma])
    density(1, latents, sigma, density.denoise(latents, sigma))
    trace = action_dim * std**2 / (std**2 + sigma**2)
    expected = -(latents.pow(2).sum(dim=1) + action_dim * math.log(2 * math.pi)) / 2 - action_dim * math.log(sigma)
    expected = expected - trace * (1 - (sigma / sigma_max) ** 2) / 2 + (action_dim - trace) / 2
    assert th.allclose(density.log_density(latents), expected, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_density_of_many_steps_is_exact_at_every_action(case):
    """Up to the noise below ``sigma_min``, which the sampler does not undo."""
    denoise, exact, _ = CASES[case]
    u, log_density = draw(denoise, th.randn(100, 1, dtype=th.float64), 60)
    assert (log_density - exact(u)).abs().median() < 0.05


# Measured with 20,000 draws, in nats: 0.02 or less for all but the two modes, and there 0.13
@pytest.mark.parametrize(("case", "bound"), [("gaussian", 0.05), ("flat", 0.05), ("linear", 0.05), ("two modes", 0.2)])
@pytest.mark.parametrize("action_dim", [1, 3])
def test_entropy_of_the_default_sampler(case, bound, action_dim):
    """Dimensions are independent and their latents quantiles of the normal distribution, so that nothing here is noisy."""
    denoise, _, entropy = CASES[case]
    latents = th.cat([even_latents(200)[th.randperm(200)] for _ in range(action_dim)], dim=1)
    density = PathDensity(denoise, latents, NOISE.sampling(8))
    dpm_solver_2m(denoise, NOISE.sampling(8)[0] * latents, NOISE.sampling(8), density)
    assert -density.log_density(latents).mean().item() == pytest.approx(action_dim * entropy, abs=action_dim * bound)
    density.steps = trace_steps(8)
    assert -density.log_density(latents).mean().item() == pytest.approx(action_dim * entropy, abs=1.5 * action_dim * bound)


@pytest.mark.parametrize(("n_steps", "bound"), [(8, 0.25), (40, 0.1)])
@pytest.mark.parametrize("case", CASES)
def test_density_of_given_actions(case, n_steps, bound):
    """The sampler run backwards; also far from what the policy draws."""
    denoise, exact, _ = CASES[case]
    sigmas, u = NOISE.sampling(n_steps), th.linspace(-1, 1.5, 9, dtype=th.float64).unsqueeze(1)
    density = PathDensity(denoise, u, sigmas)
    latents = invert(denoise, u, sigmas, density)
    assert (density.log_density(latents) - exact(u)).abs().mean() < bound


@pytest.mark.parametrize("action_dim", [2, 17])
def test_entropy_of_two_modes_in_opposite_corners(action_dim):
    """Correlated and far apart: the noise of the traces averages out."""
    std = 0.1
    _, log_density = draw(two_gaussians(0.5, th.full((action_dim,), 1.2), std), th.randn(2000, action_dim), 60)
    entropy = math.log(2) + action_dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(std))
    standard_error = log_density.std().item() / math.sqrt(len(log_density))
    # Below sigma_min a Gaussian's density is not quite smooth
    ends = action_dim * (NOISE.sigma_min / std) ** 4
    tolerance = N_STANDARD_ERRORS * standard_error + ends + 0.05 * action_dim
    assert -log_density.mean().item() == pytest.approx(entropy, abs=tolerance)


def test_step_of_the_finite_difference_is_small():
    """A tenth of it changes traces little, also for the two modes, whose denoiser is the most bent."""
    x, denoise = th.linspace(-1, 1, 50, dtype=th.float64).unsqueeze(1), CASES["two modes"][0]
    sigmas = NOISE.sampling(8)
    usual, small = PathDensity(denoise, x, sigmas), PathDensity(denoise, x, sigmas, shift=0.01)
    small.signs = usual.signs
    for step in range(1, 8):
        denoised = denoise(x, sigmas[step])
        usual(step, x, sigmas[step], denoised)
        small(step, x, sigmas[step], denoised)
        assert 0 < (usual.traces[step] - small.traces[step]).abs().mean() < 0.05


def test_log_det_tanh():
    u = th.linspace(-5, 5, 60, dtype=th.float64).reshape(10, 2, 3)
    naive = (1 - th.tanh(u) ** 2).log().sum(dim=2)
    assert th.allclose(log_det_tanh(u), naive, rtol=1e-9)
    assert th.allclose(log_det_tanh(u.float()).double(), naive, atol=1e-5)
    # Far out, where 1 - tanh^2 underflows: 4 exp(-2 |u|)
    far = th.tensor([[50.0], [-50.0]], requires_grad=True)
    assert log_det_tanh(far).tolist() == pytest.approx([math.log(4) - 100] * 2)
    (gradient,) = th.autograd.grad(log_det_tanh(far).sum(), far)
    assert gradient.flatten().tolist() == pytest.approx([-2, 2])
