"""Networks and policies: what deterministic means, architectures, features extractors, density, export."""

import io

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_dqs import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_dqs.density import log_det_tanh
from sb3_dqs.noise import SIGMA_DATA
from sb3_dqs.policies import DQSPolicy
from sb3_dqs.solvers import find_mode, mode_latent

OBS = spaces.Box(-1, 1, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)


def make_policy(**kwargs) -> DQSPolicy:
    return DQSPolicy(OBS, ACTIONS, lambda _: 1e-3, **({"net_arch": [16]} | kwargs)).eval()


class TestDeterministic:
    def test_depends_on_the_actor_and_the_observation_only(self):
        policy, obs = make_policy(), np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
        actions, _ = policy.predict(obs, deterministic=True)
        th.manual_seed(1)  # not on random state
        assert np.array_equal(actions, policy.predict(obs, deterministic=True)[0])
        for param in policy.critic.parameters():  # not on the critic
            nn.init.normal_(param)
        assert np.array_equal(actions, policy.predict(obs, deterministic=True)[0])
        # not on the rest of the batch (up to the order in which a matrix product adds)
        alone = np.stack([policy.predict(row, deterministic=True)[0] for row in obs])
        np.testing.assert_allclose(actions, alone, atol=1e-5)
        # and it is the actor's own
        with th.no_grad():
            assert th.equal(policy(th.as_tensor(obs), deterministic=True), policy.actor(th.as_tensor(obs), deterministic=True))

    def test_is_the_same_for_two_policies_of_the_same_weights(self):
        policies = [make_policy(), make_policy()]
        policies[1].load_state_dict(policies[0].state_dict())
        obs = np.zeros((1, 3), np.float32)
        first, second = (policy.predict(obs, deterministic=True)[0] for policy in policies)
        assert np.array_equal(first, second)

    def test_stochastic_actions_differ(self):
        policy, obs = make_policy(), np.zeros((1, 3), np.float32)
        assert not np.array_equal(policy.predict(obs)[0], policy.predict(obs)[0])

    def test_is_the_mode_that_is_found_from_the_mode_latent(self):
        actor, obs = make_policy().actor, th.randn(5, 3)
        with th.no_grad():
            actions, embedding, latents = actor(obs, deterministic=True), actor.embed(obs), mode_latent(2).expand(5, -1)

            def denoise(x, step):
                return actor.denoise(embedding, x, th.full((5, 1), actor.levels[step]))

            assert th.allclose(actions, th.tanh(find_mode(denoise, latents, actor.levels)), atol=1e-5)
            assert not th.allclose(actions, actor.sample(embedding, latents), atol=1e-3)

    def test_best_of_n_by_q_takes_the_most_valuable(self):
        policy, obs = make_policy(best_of_n_by_q=8), th.randn(4, 3)
        with th.no_grad():
            candidates = policy.actor.sample(policy.actor.embed(obs).unsqueeze(1), policy.latent_bank.expand(4, -1, -1))
            assert candidates.shape == (4, 8, 2)
            values = policy.critic.q1_values(obs, candidates)  # features are the observations themselves
            chosen = policy(obs, deterministic=True)
            assert th.allclose(policy.critic.q1_values(obs, chosen.unsqueeze(1)).squeeze(1), values.max(dim=1).values)


def test_q1_values_are_those_of_the_first_critic():
    policy, obs, actions = make_policy(n_critics=3), th.randn(700, 3), 2 * th.rand(700, 5, 2) - 1
    with th.no_grad():
        values = policy.critic.q1_values(obs, actions)
        for k in range(5):
            expected = policy.critic.q1_forward(obs, actions[:, k]).squeeze(1)
            assert th.allclose(values[:, k], expected, atol=1e-5)


class OtherLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class OtherReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) - 0.1 * x


def hooked_linear(*sizes: int) -> nn.Linear:
    layer = nn.Linear(*sizes)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output + 1)
    return layer


def assert_same_function(output, expected, inputs):
    assert th.allclose(output, expected, atol=1e-5)
    gradients, expected_gradients = th.autograd.grad(output.sum(), inputs), th.autograd.grad(expected.sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert th.allclose(gradient, expected_gradient, atol=1e-5)


HIDDEN_LAYERS = {
    "plain": lambda: [nn.Linear(16, 8)],
    "without bias": lambda: [nn.Linear(16, 8, bias=False)],
    "of another class": lambda: [OtherLinear(16, 8)],
    "with a hook": lambda: [hooked_linear(16, 8)],
    "parametrized": lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))],
    # Whose derivatives need their own outputs
    "and a tanh": lambda: [nn.Linear(16, 8), nn.Tanh()],
    "and a ReLU": lambda: [nn.Linear(16, 8), nn.ReLU()],
}


def policy_with_layers(activation_fn, hidden_layers) -> DQSPolicy:
    policy = make_policy(net_arch=[16, 8, 8], activation_fn=activation_fn)
    for net, index in ((policy.actor.denoiser, 1), (policy.critic.q_networks[0], 2)):
        net.pop(index)
        for layer in reversed(HIDDEN_LAYERS[hidden_layers]()):
            net.insert(index, layer)
    return policy


@pytest.mark.parametrize("hidden_layers", HIDDEN_LAYERS)
@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh, nn.PReLU, OtherReLU])
def test_sampler_in_bfloat16_computes_what_the_network_does(activation_fn, hidden_layers):
    """Up to rounding, of 2^-9 per operation."""
    actor = policy_with_layers(activation_fn, hidden_layers).actor
    embedding, x = actor.embed(th.randn(64, 3)), th.randn(64, 2)
    expected = actor.denoise(embedding, x, th.full((64, 1), actor.levels[3]))
    denoised = actor._denoiser_at_levels(embedding, th.bfloat16)(x, 3)
    assert denoised.dtype == th.float32
    assert (denoised - expected).abs().max() < 0.02 < 0.05 < expected.std()


@pytest.mark.parametrize("net", [[], [16], *HIDDEN_LAYERS])
@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh, nn.ELU, nn.PReLU, OtherReLU])
def test_sampler_and_values_compute_what_the_networks_do(activation_fn, net):
    """With all derivatives, though layers write into their inputs; and also with layers of the user."""
    if isinstance(net, list):
        policy = make_policy(net_arch=net, activation_fn=activation_fn)
    else:
        policy = policy_with_layers(activation_fn, net)
    actor, critic = policy.actor, policy.critic
    obs, x = th.randn(4, 3), th.randn(4, 2, requires_grad=True)
    embedding, sigma = actor.embed(obs), th.full((4, 1), actor.levels[3])
    before = embedding.clone()
    denoised = actor._denoiser_at_levels(embedding)(x, 3)
    assert_same_function(denoised, actor.denoise(actor.embed(obs), x, sigma), [x, *actor.parameters()])
    assert th.equal(embedding, before)
    values = critic.q1_values(obs, x.unsqueeze(1))  # features are the observations themselves
    assert_same_function(values, critic.q1_forward(obs, x), [x, *critic.q_networks[0].parameters()])


@pytest.mark.parametrize("dtype", [None, th.bfloat16])
def test_what_hooks_keep_is_not_overwritten(dtype):
    actor, kept = make_policy(net_arch=[16, 8]).actor, []
    actor.denoiser[1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    with th.no_grad():
        actor._denoiser_at_levels(actor.embed(th.randn(64, 3)), dtype)(th.randn(64, 2), 3)
    assert (kept[0] < 0).any()


@pytest.mark.parametrize("net_arch", [None, [], [2], [16, 16], {"pi": [8], "qf": [4, 4]}, {"pi": [], "qf": [4]}])
@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
def test_architectures(make_model, net_arch, activation_fn):
    model = make_model(policy_kwargs={"net_arch": net_arch, "activation_fn": activation_fn})
    model.learn(40)
    assert np.isfinite(model.predict(model.env.reset(), deterministic=True)[0]).all()


@pytest.mark.parametrize("kwargs", [{}, {"eps": 1e-4}, {"foreach": True}, {"differentiable": True}, {"fused": False}])
def test_adam_is_fused_unless_the_user_wants_it_otherwise(kwargs):
    policy = make_policy(optimizer_kwargs=kwargs)
    for optimizer in (policy.actor.optimizer, policy.critic.optimizer):
        assert bool(optimizer.defaults["fused"]) == (set(kwargs) <= {"eps"})
        assert all(optimizer.defaults[name] == value for name, value in kwargs.items())


@pytest.mark.parametrize("kwargs", [{"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-4}}, {"n_critics": 1}])
def test_optimizers_and_number_of_critics(make_model, kwargs):
    model = make_model(policy_kwargs=kwargs).learn(40)
    assert isinstance(model.actor.optimizer, kwargs.get("optimizer_class", th.optim.Adam))
    assert len(model.critic.q_networks) == kwargs.get("n_critics", 2)


class SmallCombined(BaseFeaturesExtractor):
    """A features extractor with parameters, for vectors."""

    def __init__(self, observation_space: spaces.Space, width: int = 5):
        super().__init__(observation_space, width)
        self.linear = nn.Linear(spaces.flatdim(observation_space), width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(self.linear(observations))


@pytest.mark.parametrize("share", [False, True])
def test_features_extractor_learns_from_the_actor_and_targets_stay_in_eval_mode(make_model, share):
    kwargs = {"features_extractor_class": SmallCombined, "share_features_extractor": share}
    model = make_model(policy_kwargs=kwargs).learn(30)
    assert (model.critic.features_extractor is model.actor.features_extractor) == share
    assert model.critic_target.features_extractor is not model.critic.features_extractor
    before = model.actor.features_extractor.linear.weight.clone()
    model.train(2, 16)
    assert not th.equal(before, model.actor.features_extractor.linear.weight)
    assert not model.critic_target.features_extractor.training
    for online, target in zip(model.batch_norm_stats, model.batch_norm_stats_target, strict=True):
        assert th.equal(online, target)


def test_images_and_dictionaries(make_model):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    kwargs = {"features_extractor_kwargs": {"features_dim": 8}}
    model = make_model("CnnPolicy", env, buffer_size=50, policy_kwargs=kwargs).learn(30)
    assert isinstance(model.actor.features_extractor, NatureCNN) and isinstance(model.policy, CnnPolicy)

    env = SimpleMultiObsEnv(num_col=2, num_row=2, discrete_actions=False, channel_last=False)
    model = make_model("MultiInputPolicy", env, buffer_size=50, policy_kwargs={"share_features_extractor": True}).learn(30)
    assert isinstance(model.policy, MultiInputPolicy)


def test_images_that_are_normalized_already(make_model):
    class Normalized(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = spaces.Box(0, 1, env.observation_space.shape, np.float32)

        def observation(self, observation):
            return (observation / 255).astype(np.float32)

    env = Normalized(FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=True))
    make_model("CnnPolicy", env, buffer_size=50, policy_kwargs={"normalize_images": False}).learn(30)


def test_ignored_arguments_of_sac_warn_once_each(make_model):
    with pytest.warns(UserWarning) as caught:
        make_model(policy_kwargs={"log_std_init": -3, "use_expln": True, "clip_mean": 2.0})
    messages = [str(warning.message) for warning in caught]
    assert [sum(name in message for message in messages) for name in ("log_std_init", "use_expln", "clip_mean")] == [1, 1, 1]


@pytest.mark.parametrize("scale", [1e10, 1e20, 1e30, np.inf])
def test_absurd_weights_give_finite_actions(scale):
    policy = make_policy()
    with th.no_grad():
        for param in policy.actor.parameters():
            param.copy_(scale * th.randn_like(param))
    for deterministic in (True, False):
        actions, _ = policy.predict(np.ones((3, 3), np.float32), deterministic=deterministic)
        assert np.isfinite(actions).all() and (np.abs(actions) <= 1).all()


def test_held_noise_moves_with_the_actor():
    assert make_policy(use_sde=True).to("meta").actor.held_latents.device.type == "meta"


def test_state_dict_has_floats_only():
    assert all(tensor.is_floating_point() for tensor in make_policy().state_dict().values())


class TestDensity:
    """``log_prob`` and ``entropy`` are those of a known policy, and of a network what its Jacobian says."""

    def test_of_an_actor_with_a_known_policy(self):
        # With zero weights F = 0: the denoiser of a Gaussian of standard deviation sigma_data around 0
        policy = make_policy(diffusion_steps=40)
        with th.no_grad():
            for param in policy.actor.parameters():
                param.zero_()
        obs, exact = th.zeros(3, 3), th.distributions.Normal(0, SIGMA_DATA)
        quantiles = exact.icdf((th.arange(10_000, dtype=th.float64) + 0.5) / 10_000)
        expected = exact.entropy() + (1 - th.tanh(quantiles) ** 2).log().mean().item()
        assert policy.entropy(obs, n_actions=1000).numpy() / 2 == pytest.approx([float(expected)] * 3, abs=0.05)
        actions = th.tensor([[0.0, 0.0], [0.5, 0.0], [-0.9, 0.5]])
        log_prob = policy.log_prob(obs, actions)
        assert th.allclose(log_prob, (exact.log_prob(th.atanh(actions)) - (1 - actions**2).log()).sum(dim=1), atol=0.1)
        # At the bounds, too, where the density of squashed actions is not bounded
        assert policy.log_prob(obs[:2], th.tensor([[1.0, 1.0], [-1.0, 0.0]])).isfinite().all()

    @pytest.mark.parametrize("action_dim", [1, 3])
    def test_of_a_network_is_that_of_its_jacobian(self, action_dim):
        """The change of variables from latents to actions; and the same from the actions back."""
        space = spaces.Box(-1, 1, (action_dim,), np.float32)
        actor = DQSPolicy(OBS, space, lambda _: 1e-3, net_arch=[16], activation_fn=nn.Tanh, diffusion_steps=60).actor
        with th.no_grad():
            embedding = actor.embed(th.randn(50, 3)).double().unsqueeze(1).expand(-1, 40, -1)
            actor.double()
            latents = th.randn(50, 1, action_dim, dtype=th.float64).expand(-1, 40, -1)  # 40 probes each
            unsquashed, log_prob = actor.sample_with_log_prob(embedding, latents, range(1, 60))
            assert th.allclose(unsquashed, actor.sample_unsquashed(embedding, latents))
            jacobian = th.func.vmap(th.func.jacrev(actor.sample_unsquashed, argnums=1))(embedding[:, :1], latents[:, :1])
            jacobian = jacobian.reshape(50, action_dim, action_dim)
            exact = th.distributions.Normal(0, 1).log_prob(latents[:, 0]).sum(dim=1)
            exact = exact - th.linalg.slogdet(jacobian).logabsdet - log_det_tanh(unsquashed[:, 0])
            for estimate in (log_prob, actor.log_prob(embedding, unsquashed)):
                errors = (estimate.mean(dim=1) - exact).abs()
                # What is left comes from the ends of the integral: a network at random is not smooth there
                assert errors.mean() < 0.3 * exact.std()

    def test_standard_deviation_is_that_of_the_errors_at_high_levels(self):
        actor, std, sigma = make_policy().actor, th.tensor([0.3, 2.0]), th.tensor([0.05, 20.0, 2.0, 5.0]).reshape(4, 1)
        before = actor.get_std()
        actor.update_std(th.randn(8, 2, 2), sigma[[0, 2]])  # none is high
        assert th.equal(actor.get_std(), before) and before.tolist() == pytest.approx([SIGMA_DATA] * 2)
        for _ in range(1000):
            errors = std * th.randn(8, 4, 2) + th.tensor([100.0, 0.0, 100.0, 0.0]).reshape(4, 1)
            actor.update_std(errors, sigma.expand(8, 4, 1))
        assert th.allclose(actor.get_std(), std, rtol=0.1)

    def test_shapes(self):
        policy = make_policy()
        assert policy.log_prob(th.zeros(4, 3), th.zeros(4, 2)).shape == (4,)
        assert policy.entropy(th.zeros(4, 3), n_actions=3).shape == (4,)


def test_policy_save_and_load(tmp_path):
    kwargs = {"share_features_extractor": True, "best_of_n_by_q": 4, "diffusion_steps": 4}
    policy = MlpPolicy(OBS, ACTIONS, lambda _: 1e-3, net_arch=[8], **kwargs)
    policy.save(str(tmp_path / "policy.pt"))
    loaded = MlpPolicy.load(str(tmp_path / "policy.pt"))
    assert loaded.share_features_extractor and loaded.best_of_n_by_q == 4 and loaded.actor.diffusion_steps == 4
    obs = np.ones((2, 3), np.float32)
    first, second = (each.predict(obs, deterministic=True)[0] for each in (policy, loaded))
    assert np.array_equal(first, second)


def test_parameters_to_vector_and_back():
    policy = make_policy()
    vector = policy.parameters_to_vector()
    policy.load_from_vector(vector * 0)
    assert not policy.parameters_to_vector().any()


class DeterministicPolicy(nn.Module):
    """What one exports: observation in, scaled action out."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        return self.policy(obs, deterministic=True)


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("best_of_n_by_q", [None, 4])
def test_export_of_the_deterministic_path_for_batches_of_any_size(best_of_n_by_q):
    module = DeterministicPolicy(make_policy(diffusion_steps=4, best_of_n_by_q=best_of_n_by_q)).eval()
    dynamic_shapes = ({0: th.export.Dim("batch", min=1, max=4096)},)
    with th.no_grad():
        exported = th.export.export(module, (th.randn(2, 3),), dynamic_shapes=dynamic_shapes).module()
        buffer = io.BytesIO()
        program = th.onnx.export(module, (th.randn(2, 3),), dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False)
        program.save(buffer)
        session = onnxruntime.InferenceSession(buffer.getvalue())
        for batch_size in (1, 2, 300):
            obs = th.randn(batch_size, 3)
            expected = module(obs)
            assert th.allclose(exported(obs), expected, atol=1e-5)
            (result,) = session.run(None, {session.get_inputs()[0].name: obs.numpy()})
            np.testing.assert_allclose(result, expected.numpy(), atol=1e-4)


def test_density_and_entropy_are_those_of_evaluation_mode(make_model):
    class Extractor(FlattenExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.norm = nn.BatchNorm1d(self.features_dim)

        def forward(self, observations):
            return self.norm(super().forward(observations))

    policy = make_model(policy_kwargs={"features_extractor_class": Extractor}).learn(30).policy
    policy.set_training_mode(True)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.log_prob(th.zeros(1, 3), th.zeros(1, 1))
    policy.set_training_mode(True)
    policy.entropy(th.zeros(1, 3))
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items())
