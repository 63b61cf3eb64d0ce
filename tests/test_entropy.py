"""Entropy and log-density from denoising errors and from Jacobians, against closed forms: exact denoisers, no network."""

import math

import pytest
import quadrature
import torch as th

from sb3_dqs.diffusion import SIGMA_MIN, log_det_tanh, training_levels
from sb3_dqs.entropy import immse_entropies, jacobian_entropies, jacobian_log_prob, log_density

TOLERANCE = 0.05  # nats per dimension
N_STANDARD_ERRORS = 4
MEAN, STD = 0.2, 0.15
GAUSSIAN_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


def gaussian_denoiser(x, sigma):
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def boltzmann(energy):
    return (
        lambda *shape: quadrature.sample(energy, *shape),
        lambda x, sigma: quadrature.denoise(energy, x, sigma),
        lambda u: quadrature.log_prob(energy, u.double()).float(),
        quadrature.entropy(energy),
    )


# name: (draw, denoiser, log-density, entropy of one dimension), of unsquashed actions
CASES = {
    "gaussian": (
        lambda *shape: MEAN + STD * th.randn(shape),
        gaussian_denoiser,
        lambda u: -((u - MEAN) ** 2).sum(dim=-1) / (2 * STD**2) - math.log(STD * math.sqrt(2 * math.pi)),
        GAUSSIAN_ENTROPY + math.log(STD),
    ),
    **{energy: boltzmann(energy) for energy in quadrature.ENERGIES},
}


def test_quadrature_against_closed_forms():
    """The entropy of a uniform action is log 2, that of the unsquashed one larger by -E[log(1 - a^2)] = 2 - 2 log 2."""
    assert quadrature.entropy("flat") == pytest.approx(2 - math.log(2), abs=1e-6)
    u = th.tensor([[-2.0], [0.5]], dtype=th.float64)
    exact = 3 * th.tanh(u[:, 0]) - math.log(2 * math.sinh(3) / 3) + (1 - th.tanh(u[:, 0]) ** 2).log()
    assert th.allclose(quadrature.log_prob("linear", u), exact)
    draws = th.tanh(quadrature.sample("linear", 20_000))
    assert draws.mean().item() == pytest.approx(1 / math.tanh(3) - 1 / 3, abs=N_STANDARD_ERRORS * 0.32 / math.sqrt(20_000))


def n_and_tolerance(case):
    """Number of denoiser calls, and four standard errors of them or more: quadrature takes longer than a closed form."""
    return (100_000, TOLERANCE) if case == "gaussian" else (16_000, 2 * TOLERANCE)


@pytest.mark.parametrize(
    ("case", "policy_std"),
    [("gaussian", 0.02), ("gaussian", 0.15), *((case, 1.0) for case in CASES)],  # a wrong one makes noise, no bias
)
@pytest.mark.parametrize("action_dim", [1, 3])
def test_entropies_of_a_batch(case, policy_std, action_dim):
    draw, denoise, _, entropy = CASES[case]
    n, tolerance = n_and_tolerance(case)
    n //= action_dim
    actions, sigma, noise = draw(n, action_dim), training_levels(1, n)[0], th.randn(n, action_dim)
    errors = actions - denoise(actions + sigma * noise, sigma)
    estimate = immse_entropies(errors, noise, sigma, th.full((action_dim,), policy_std)).mean()
    assert estimate.item() / action_dim == pytest.approx(entropy, abs=tolerance)


@pytest.mark.parametrize("action_dim", [2, 6, 17])
def test_entropy_of_two_modes_in_opposite_corners(action_dim):
    """Correlated and far apart: the noisy policy at the highest level must still be Gaussian enough."""
    position, std = 1.2, 0.1

    def denoise(x, sigma):
        total_variance = std**2 + sigma**2
        weight = th.sigmoid(2 * position * x.sum(dim=-1, keepdim=True) / total_variance)  # of the mode at +position
        return std**2 / total_variance * x + (2 * weight - 1) * position * sigma**2 / total_variance

    signs = th.where(th.rand(20_000, 1) < 0.5, -1.0, 1.0)
    actions = signs * position + std * th.randn(20_000, action_dim)
    estimate = -log_density(denoise, actions, th.full((action_dim,), position), n_levels=16, n_noises=1).mean()
    entropy = math.log(2) + action_dim * (GAUSSIAN_ENTROPY + math.log(std))
    assert estimate.item() == pytest.approx(entropy, abs=TOLERANCE * action_dim)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("action_dim", [1, 3])
def test_mean_log_density_is_minus_the_entropy(case, action_dim):
    draw, denoise, _, entropy = CASES[case]
    n, tolerance = n_and_tolerance(case)
    actions = draw(n // action_dim // 16, action_dim)
    estimate = -log_density(denoise, actions, th.full((action_dim,), 0.5), n_levels=16, n_noises=1).mean()
    assert estimate.item() / action_dim == pytest.approx(entropy, abs=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_log_density_pointwise(case):
    _, denoise, exact, _ = CASES[case]
    actions = th.linspace(-0.3, 0.7, 5) if case == "gaussian" else th.linspace(-2, 2, 5)
    actions = actions.unsqueeze(1)
    estimates = th.stack([log_density(denoise, actions, th.full((1,), 0.5), n_levels=64, n_noises=4) for _ in range(20)])
    standard_error = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert ((estimates.mean(dim=0) - exact(actions)).abs() < N_STANDARD_ERRORS * standard_error + 0.01).all()


def test_few_noise_levels_are_unbiased():
    """The soft backup uses 4 levels: noisy, but right on average."""
    draw, denoise, _, entropy = CASES["gaussian"]
    for policy_std in (0.02, 0.15, 1.0):  # a wrong one does not matter
        estimates = -log_density(denoise, draw(40_000, 1), th.full((1,), policy_std), n_levels=4, n_noises=1)
        standard_error = estimates.std().item() / math.sqrt(len(estimates))
        assert estimates.mean().item() == pytest.approx(entropy, abs=N_STANDARD_ERRORS * standard_error + 0.01)


class TestJacobianEntropies:
    """Entropies of squashed actions, from exact Jacobians."""

    @pytest.mark.parametrize("action_dim", [1, 2, 5])
    def test_of_a_linear_map(self, action_dim):
        """Without the squashing it is a Gaussian, whose entropy is known."""
        matrix = th.eye(action_dim) + 0.3 * th.randn(action_dim, action_dim)
        unsquashed = th.randn(10, action_dim) @ matrix + 0.5
        estimates = jacobian_entropies(unsquashed, matrix.expand(10, -1, -1)) - log_det_tanh(unsquashed)
        expected = action_dim * GAUSSIAN_ENTROPY + matrix.det().abs().log().item()
        assert estimates.tolist() == pytest.approx([expected] * 10, abs=0.01)

    @pytest.mark.parametrize("action_dim", [1, 3])
    @pytest.mark.parametrize("slope", [1e-3, 3.0])
    def test_of_quantile_maps(self, action_dim, slope):
        """Inverse distribution functions draw exactly from exp(slope * a), for small slopes the uniform distribution."""
        z = th.randn(20_000, action_dim, dtype=th.float64, requires_grad=True)
        low, high = math.exp(-slope), math.exp(slope)
        unsquashed = th.atanh((low + th.special.ndtr(z) * (high - low)).log() / slope)
        (slopes,) = th.autograd.grad(unsquashed.sum(), z)
        estimates = jacobian_entropies(unsquashed.detach(), th.diag_embed(slopes)) / action_dim
        entropy = math.log(2 * math.sinh(slope) / slope) - slope * (1 / math.tanh(slope) - 1 / slope)
        standard_error = estimates.std().item() / math.sqrt(len(estimates))
        assert estimates.mean().item() == pytest.approx(entropy, abs=N_STANDARD_ERRORS * standard_error + 1e-3)
        if slope < 1:
            assert entropy == pytest.approx(math.log(2), abs=1e-4)

    @pytest.mark.parametrize("action_dim", [1, 3])
    def test_log_prob_of_the_uniform_policy(self, action_dim):
        """At every action, not on average."""
        z = th.randn(1000, action_dim, dtype=th.float64).clamp(-3, 3).requires_grad_(True)
        unsquashed = th.atanh(2 * th.special.ndtr(z) - 1)
        (slopes,) = th.autograd.grad(unsquashed.sum(), z)
        entropies = jacobian_entropies(unsquashed.detach(), th.diag_embed(slopes))
        log_prob = jacobian_log_prob(entropies, z.detach())
        # Up to the scales below ``SIGMA_MIN``, here of at least 0.5
        floor = action_dim * 0.5 * math.log1p((SIGMA_MIN / 0.5) ** 2)
        assert log_prob.tolist() == pytest.approx([-action_dim * math.log(2)] * 1000, abs=floor + 1e-6)

    def test_of_singular_maps_is_finite(self):
        """Scales below ``SIGMA_MIN`` count as that wide."""
        unsquashed = th.tensor([[0.0, 0.0], [8.0, -8.0]])
        flat, line = th.zeros(2, 2, 2), th.ones(2, 2, 2)
        lost = 2 * GAUSSIAN_ENTROPY + 2 * math.log(SIGMA_MIN)
        assert jacobian_entropies(unsquashed, flat)[0].item() == pytest.approx(lost)
        # The line has one scale of 2 and one of 0
        assert jacobian_entropies(unsquashed, line)[0].item() == pytest.approx(lost + math.log(2 / SIGMA_MIN), abs=0.01)
        assert all(jacobian_entropies(unsquashed, jacobian).isfinite().all() for jacobian in (flat, line))
