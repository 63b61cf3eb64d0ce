"""The actor: its denoiser, what it draws and the densities, against closed forms."""

import copy
import functools
import math

import numpy as np
import pytest
import torch as th
from networks import make_actor
from torch import nn

from sb3_dqs import fast
from sb3_dqs.actor import Actor
from sb3_dqs.density import log_det_tanh, trace_steps
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.solvers import dpm_solver_2m, find_mode, mode_latent


def gaussian_actor(**kwargs) -> Actor:
    """With zero weights F = 0: the denoiser of a Gaussian of standard deviation sigma_data around 0."""
    actor = make_actor(**kwargs)
    with th.no_grad():
        for param in actor.parameters():
            param.zero_()
    return actor


@pytest.fixture(autouse=True)
def without_gradients():
    with th.no_grad():
        yield


class TestDenoiser:
    def test_is_that_of_the_scalings(self):
        """``c_skip x + c_out F(s, c_in x, c_noise)``, with a linear F that gives each of its inputs back."""
        noise = NoiseLevels(sigma_data=0.5)
        actor = gaussian_actor(action_dim=1, net_arch=(), noise=noise, n_frequencies=2)
        actor.embed_features.weight.copy_(th.tensor([[1, 2, 3]]))
        actor.embed_action.weight.fill_(5)
        actor.embed_level.weight.copy_(th.tensor([[7, 11, 13, 17]]))
        actor.input_norm.weight.copy_((1 + actor.input_norm.eps) ** 0.5 * th.ones(3))  # the features as they are
        obs, x, sigma = th.randn(4, 3), th.randn(4, 1), th.tensor([0.03, 0.4, 2.0, 20.0]).unsqueeze(1)
        phase = sigma.log() / 4
        output = obs @ th.tensor([[1.0], [2.0], [3.0]]) + 5 * x / (sigma**2 + 0.25).sqrt()
        output = output + 7 * phase.sin() + 11 * (2 * phase).sin() + 13 * phase.cos() + 17 * (2 * phase).cos()
        expected = 0.25 / (sigma**2 + 0.25) * x + 0.5 * sigma / (sigma**2 + 0.25).sqrt() * output
        assert th.allclose(actor.denoise(actor.embed(obs), x, sigma), expected, atol=1e-4)
        # One number for all
        assert th.allclose(actor.denoise(actor.embed(obs), x, 0.4)[1], expected[1], atol=1e-4)

    def test_of_several_actions_per_state_is_that_of_each(self):
        actor, obs, x, sigma = make_actor(), th.randn(5, 3), th.randn(5, 7, 2), NoiseLevels().training(5, 7)
        embedding = actor.embed(obs)
        denoised = actor.denoise(embedding.unsqueeze(1), x, sigma)
        for k in range(7):
            assert th.allclose(denoised[:, k], actor.denoise(embedding, x[:, k], sigma[:, k]), atol=1e-6)


class TestObservations:
    def test_are_normalised(self):
        """Shifted and scaled observations give the same embedding, down to standard deviations of sqrt(eps)."""
        actor, scaled, scale = make_actor().train(), make_actor().train(), th.tensor([2, 1000, 1])
        scaled.load_state_dict(actor.state_dict())
        obs, shift = th.randn(2_000, 3) + 1, th.tensor([0, -5000, 3])
        with th.enable_grad():
            for batch in obs.split(20):
                actor.embed(batch)
                scaled.embed(scale * batch + shift)
        expected = actor.embed(obs)
        assert th.allclose(scaled.embed(scale * obs + shift), expected, atol=0.01) and expected.std(dim=0).max() > 0.1

    def test_move_its_statistics_only_in_training_and_with_gradients(self):
        actor, obs = make_actor().train(), th.randn(20, 3)
        before = copy.deepcopy(actor.state_dict())
        actor.embed(obs)
        with th.enable_grad():
            actor.eval().embed(obs)
            actor.train().embed(obs[:1])  # one row has no variance
            actor.input_norm.requires_grad_(False)
            actor.embed(obs)
            assert all(th.equal(value, before[name]) for name, value in actor.state_dict().items())
            actor.input_norm.requires_grad_(True)
            actor.embed(obs)
        rate = 10 / 11  # of the first batch
        assert th.allclose(actor.input_norm.running_mean, rate * obs.mean(dim=0), atol=1e-6)
        assert th.allclose(actor.input_norm.running_var, 1 + rate * (obs.var(dim=0) - 1), atol=1e-5)

    def test_as_large_as_single_precision_holds_give_finite_embeddings(self):
        actor = make_actor(net_arch=(256, 256)).train()
        for size in (1e20, 1e38):
            with th.enable_grad():
                actor.embed(size * th.tensor([[1.0, -1, 1], [-1, 1, 0]]))
            assert actor.embed(size * th.tensor([[1.0, -1, 1]])).isfinite().all()
            assert all(buffer.isfinite().all() for buffer in actor.buffers())

    @pytest.mark.parametrize("width", [1, 2, 64])
    def test_matter_at_any_width(self, width):
        assert make_actor(net_arch=(width, 8), activation_fn=nn.Tanh).embed(th.randn(50, 3)).std(dim=0).min() > 1e-4


class TestSampler:
    def test_draws_those_of_a_known_policy_with_their_densities(self):
        """Few steps come near, see the tests of the solver; the density is that of the Gaussian, squashed."""
        actor, exact = gaussian_actor(diffusion_steps=40), th.distributions.Normal(0, 0.91)
        embedding, latents = actor.embed(th.zeros(500, 3)), th.randn(500, 2)
        u, log_prob = actor.sample_log_prob(embedding, latents)
        assert th.equal(u, actor.sample(embedding, latents)) and (u - 0.91 * latents).abs().max() < 0.2
        for estimate in (log_prob, actor.log_prob(embedding, u)):
            assert estimate.shape == (500,)
            assert (estimate - exact.log_prob(u).sum(dim=1) + log_det_tanh(u)).abs().mean() < 0.1

    @pytest.mark.parametrize("action_dim", [1, 3])
    def test_density_of_a_network_is_that_of_its_jacobian(self, action_dim):
        """The change of variables from latents to actions; and the same from the actions back."""
        actor = make_actor(action_dim, activation_fn=nn.Tanh, diffusion_steps=60)
        nn.init.normal_(actor.net[-1].weight, std=0.25)  # zero at first
        embedding = actor.embed(th.randn(30, 3)).double().unsqueeze(1).expand(-1, 40, -1)
        actor.double()
        latents = th.randn(30, 1, action_dim, dtype=th.float64).expand(-1, 40, -1)  # 40 probes each
        u, log_prob = actor.sample_log_prob(embedding, latents)
        steps = 1e-6 * th.eye(action_dim, dtype=th.float64)
        embedding_once, latent = embedding[:, :action_dim], latents[:, :1]
        columns = actor.sample(embedding_once, latent + steps) - actor.sample(embedding_once, latent - steps)
        exact = th.distributions.Normal(0, 1).log_prob(latent.squeeze(1)).sum(dim=1) - log_det_tanh(u[:, 0])
        exact = exact - th.linalg.slogdet(columns / 2e-6).logabsdet
        for estimate in (log_prob, actor.log_prob(embedding, u)):
            # What is left comes from the ends of the integral: a network at random is not smooth there
            assert (estimate.mean(dim=1) - exact).abs().mean() < 0.3 * exact.std()

    def test_actions_of_the_training_are_squashed_and_their_densities_take_fewer_traces(self):
        actor, obs = make_actor(net_arch=(16, 16)), th.randn(50, 3)
        for dtype in (None, th.bfloat16):
            actor.training_dtype = dtype
            th.manual_seed(1)
            actions, log_prob = actor.action_log_prob(obs)
            th.manual_seed(1)
            latents, embedding = th.randn(50, 2), actor.embed(obs)
            u, expected = actor.sample_log_prob(embedding, latents, trace_steps(8), dtype)
            assert th.equal(actions, th.tanh(u)) and th.equal(log_prob, expected)
            assert th.equal(actor.training_sample(embedding, latents), u)

    def test_solver_and_levels_are_those_given(self):
        seen = []

        def solver(denoise, x, sigmas, callback):
            seen.append(sigmas)
            return dpm_solver_2m(denoise, x, sigmas, callback)

        noise = NoiseLevels(sigma_max=10.0)
        actor = make_actor(solver=solver, noise=noise, diffusion_steps=5)
        obs, latents = th.randn(4, 3), th.randn(4, 2)
        u = actor.sample(actor.embed(obs), latents)
        actor.action_log_prob(obs)
        actor(obs)
        assert seen == [noise.sampling(5)] * 3
        with fast.disabled():  # the noise is scaled to the highest level
            denoise = functools.partial(actor.denoise, actor.embed(obs))
            expected = dpm_solver_2m(denoise, 10 * latents, noise.sampling(5))
        assert th.allclose(u, expected, atol=1e-5)


class TestActing:
    def test_deterministic_action_is_the_mode_found_from_the_mode_latent(self):
        actor, obs = make_actor(), th.randn(5, 3)
        actions, embedding, latents = actor(obs, deterministic=True), actor.embed(obs), mode_latent(2).expand(5, -1)
        mode = find_mode(functools.partial(actor.denoise, embedding), 20 * latents, NoiseLevels().sampling(8))
        assert th.allclose(actions, th.tanh(mode), atol=1e-5)
        assert not th.allclose(actions, th.tanh(actor.sample(embedding, latents)), atol=1e-3)

    def test_held_noise_is_one_per_environment_and_moves_with_the_actor(self):
        actor, obs = make_actor(use_sde=True), th.zeros(3, 3)
        assert len(actor(obs).unique(dim=0)) == 1  # before reset_noise() there is one for all
        actor.reset_noise(3)
        actions = actor(obs)
        assert len(actions.unique(dim=0)) == 3 and th.equal(actor(obs), actions)
        # A batch of another size takes the first
        assert th.allclose(actor(th.zeros(5, 3)), actions[:1].expand(5, -1), atol=1e-6)
        actor.reset_noise(3)
        assert not th.allclose(actor(obs), actions, atol=1e-3)
        assert actor.to("meta").held_latents.device.type == "meta"

    def test_without_held_noise_every_action_is_another(self):
        actor = make_actor()
        assert len(th.cat([actor(th.zeros(3, 3)), actor(th.zeros(3, 3))]).unique(dim=0)) == 6
        with pytest.raises(ValueError, match="use_sde=True"):
            actor.reset_noise()

    @pytest.mark.parametrize("scale", [1e5, 1e20, 1e30, np.inf])
    def test_absurd_weights_give_finite_actions_or_nan(self, scale):
        """NaN where the outputs are not finite, never a bound of the box."""
        actor = make_actor()
        for param in actor.parameters():
            param.copy_(scale * th.randn_like(param))
        for deterministic in (True, False):
            actions = actor(th.ones(3, 3), deterministic)
            assert (actions.isfinite().all() and actions.abs().max() <= 1) if scale < 1e20 else actions.isnan().all()


def test_first_policy_is_near_a_gaussian_that_is_near_uniform():
    actor = make_actor(net_arch=(64, 64), diffusion_steps=40)
    latents = th.randn(1000, 2)
    u = actor.sample(actor.embed(th.randn(1000, 3)), latents)
    assert (u - 0.91 * latents).abs().mean() < 0.1 and actor.get_std().tolist() == pytest.approx([0.91] * 2)


@pytest.mark.parametrize("output", [-1e6, -2.0, 0.5, 1e6])
def test_standard_deviation_of_the_gaussian_is_bounded(output):
    """From the least noise level to 30 times that of uniform actions."""
    actor = gaussian_actor(action_dim=1)
    actor.gaussian[-1].bias.copy_(th.tensor([0.7, output]))
    _, mean, std = actor.split(actor.embed(th.zeros(1, 3)))
    assert mean.item() == pytest.approx(0.7) and std.item() == pytest.approx(0.91 * math.exp(3.4 * math.tanh(output / 3.4)))
    assert 0.03 < std.item() < 28
