"""Networks and policies: what deterministic means, architectures, features extractors, modules of users, export."""

import contextlib
import io
import math

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from torch import nn
from toys import same

from sb3_dqs import CnnPolicy, MlpPolicy
from sb3_dqs.critics import MlpCritic
from sb3_dqs.policies import DQSPolicy
from sb3_dqs.warn_once import warned_of

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

    def test_best_of_n_by_q_takes_the_most_valuable(self):
        policy, obs = make_policy(best_of_n_by_q=8), th.randn(4, 3)
        with th.no_grad():
            u = policy.actor.sample(policy.actor.embed(obs).unsqueeze(1), policy.latent_bank.expand(4, -1, -1))
            assert u.shape == (4, 8, 2)
            energy, chosen = policy.critic.energy(obs), policy(obs, deterministic=True)
            assert th.allclose(energy(chosen.unsqueeze(1)).squeeze(1), energy(th.tanh(u)).max(dim=1).values)


class TestArchitecture:
    @pytest.mark.parametrize(
        ("net_arch", "actor_widths", "critic_widths"),
        [
            (None, [256, 256, 1], [256, 256, 1]),
            ([], [1], [1]),
            ({"pi": [8], "qf": [4, 4]}, [8, 1], [4, 4, 1]),
        ],
    )
    @pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
    def test_net_arch_and_activation(self, make_model, net_arch, actor_widths, critic_widths, activation_fn):
        model = make_model(policy_kwargs={"net_arch": net_arch, "activation_fn": activation_fn}).learn(40)
        # The first layer of the actor's residual is the sum of three; its Gaussian, a mean and a spread, has one layer more
        gaussian_widths = [*actor_widths[:1], *actor_widths[:-1], 2] if len(actor_widths) > 1 else [2]
        nets = (
            ([model.actor.embed_features, *model.actor.net], actor_widths),
            (model.actor.gaussian, gaussian_widths),
            (model.critic.q_networks[1], critic_widths),
        )
        for net, widths in nets:
            assert [layer.out_features for layer in net if isinstance(layer, nn.Linear)] == widths
            assert sum(isinstance(layer, activation_fn) for layer in net) == len(widths) - 1
        assert np.isfinite(model.predict(model.env.reset(), deterministic=True)[0]).all()

    def test_optimizer_and_number_of_critics(self, make_model):
        kwargs = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-4}, "n_critics": 3}
        model = make_model(policy_kwargs=kwargs).learn(40)
        for net in (model.actor, model.critic):
            assert isinstance(net.optimizer, RMSpropTFLike) and net.optimizer.defaults["eps"] == 1e-4
        assert len(model.critic.q_networks) == len(model.critic_target.q_networks) == 3

    @pytest.mark.parametrize("is_normalized", [False, True])
    def test_images(self, make_model, is_normalized):
        env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=True)
        kwargs = {"features_extractor_kwargs": {"features_dim": 8}}
        if is_normalized:
            box = spaces.Box(0, 1, env.observation_space.shape, np.float32)
            env = gym.wrappers.TransformObservation(env, lambda obs: (obs / 255).astype(np.float32), box)
            kwargs["normalize_images"] = False
        model = make_model("CnnPolicy", env, buffer_size=50, policy_kwargs=kwargs).learn(30)
        assert isinstance(model.actor.features_extractor, NatureCNN) and isinstance(model.policy, CnnPolicy)
        assert model.actor.normalize_images == model.critic.normalize_images == (not is_normalized)

    def test_ignored_arguments_of_sac_warn_once_each(self, make_model):
        warned_of.clear()
        with pytest.warns(UserWarning) as caught:
            make_model(policy_kwargs={"log_std_init": -3, "use_expln": True, "clip_mean": 2.0})
        messages = [str(warning.message) for warning in caught]
        assert [sum(name in text for text in messages) for name in ("log_std_init", "use_expln", "clip_mean")] == [1, 1, 1]

    @pytest.mark.parametrize("scale", [1e5, 1e20, 1e30, np.inf])
    def test_absurd_weights_give_finite_actions_or_none(self, scale):
        """Where the outputs are not finite, as in SAC, there is no action."""
        policy = make_policy()
        with th.no_grad():
            for param in policy.actor.parameters():
                param.copy_(scale * th.randn_like(param))
        for deterministic in (True, False):
            with contextlib.nullcontext() if scale < 1e20 else pytest.raises(ValueError, match="policy: the action"):
                actions, _ = policy.predict(np.ones((3, 3), np.float32), deterministic=deterministic)
                assert np.isfinite(actions).all() and (np.abs(actions) <= 1).all()

    def test_buffers_are_of_floats_and_move_with_the_policy(self):
        policy = make_policy(use_sde=True, best_of_n_by_q=4)
        assert all(tensor.is_floating_point() for tensor in policy.buffers())
        assert all(tensor.device.type == "meta" for tensor in policy.to("meta").buffers())
        attributes = [value for module in policy.modules() for value in vars(module).values()]
        assert not any(isinstance(value, th.Tensor) for value in attributes)  # which would not move

    def test_save_and_load(self, tmp_path):
        kwargs = {"share_features_extractor": True, "best_of_n_by_q": 4, "diffusion_steps": 4, "critic_class": OtherCritic}
        policy = MlpPolicy(OBS, ACTIONS, lambda _: 1e-3, net_arch=[8], **kwargs)
        policy.save(str(tmp_path / "policy.pt"))
        loaded = MlpPolicy.load(str(tmp_path / "policy.pt"))
        assert loaded.share_features_extractor and loaded.best_of_n_by_q == 4 and loaded.actor.diffusion_steps == 4
        assert isinstance(loaded.critic, OtherCritic) and same(policy.state_dict(), loaded.state_dict())
        obs = np.ones((2, 3), np.float32)
        assert np.array_equal(*(each.predict(obs, deterministic=True)[0] for each in (policy, loaded)))


class OtherCritic(MlpCritic):
    """To be told from the usual one."""


class NormExtractor(BaseFeaturesExtractor):
    """With parameters, batch normalisation and dropout, for vectors. Remembers whether it was in training mode."""

    def __init__(self, observation_space: spaces.Space, width: int = 5):
        super().__init__(observation_space, width)
        self.linear = nn.Linear(spaces.flatdim(observation_space), width)
        self.layers = nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.modes = []

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.modes.append(self.training)
        return self.layers(self.linear(observations))


class TableExtractor(FlattenExtractor):
    """Makes a table at its first call, as of positions or masks."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space)
        self.scale, self.table = nn.Parameter(th.ones(self.features_dim)), None

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.table is None:
            self.table = th.linspace(0.5, 1, self.features_dim)
        return super().forward(observations) * (self.table * self.scale)


class EnergyExtractor(FlattenExtractor):
    """Its features are the gradient of a learnt potential."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space)
        self.potential = nn.Sequential(nn.Linear(self.features_dim, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        with th.enable_grad():
            x = observations.detach().clone().requires_grad_(True)
            return th.autograd.grad(self.potential(x).sum(), x, create_graph=True)[0]


class NormCritic(MlpCritic):
    """A layer of normalisation after every hidden layer."""

    def __init__(self, *args, norm, **kwargs):
        super().__init__(*args, **kwargs)
        for q_net in self.q_networks:
            q_net.insert(1, norm(q_net[0].out_features))


class NormReLU(nn.Sequential):
    """An activation that normalises."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(8), nn.ReLU())


def statistics(module: nn.Module) -> dict[str, th.Tensor]:
    """Running statistics of batch normalisation."""
    return {name: value.clone() for name, value in module.state_dict().items() if "running_" in name or "tracked" in name}


class TestModulesOfUsers:
    @pytest.mark.parametrize("share", [False, True])
    def test_features_extractor(self, make_model, share):
        """It learns from the actor, and is in training mode where SAC's is; targets never are."""
        kwargs = {"features_extractor_class": NormExtractor, "share_features_extractor": share, "critic_class": "mlp"}
        model = make_model(policy_kwargs=kwargs, own_draws_freq=2, policy_delay=1).learn(30)
        actors, critics, targets = (net.features_extractor for net in (model.actor, model.critic, model.critic_target))
        assert (critics is actors) == share and targets is not critics
        of_critics = {id(param) for group in model.critic.optimizer.param_groups for param in group["params"]}
        assert of_critics.isdisjoint(map(id, actors.parameters()))
        before, n_modes = actors.linear.weight.clone(), [len(net.modes) for net in (actors, critics, targets)]
        model.train(4, 16)  # every second update of the actor draws actions of its own
        assert not th.equal(before, actors.linear.weight)
        modes = [net.modes[n:] for net, n in zip((actors, critics, targets), n_modes, strict=True)]
        if share:
            # The next observations, critic.loss, those that the actor learns from, and energies: of candidates, of u, their
            # spread; at next states only of u
            assert modes[0] == [True, True, True, False, False, False, True, True, True, False] * 2
        else:
            assert modes[0] == [True] * 8 and modes[1] == [True, False, False, False, True, False] * 2
        assert modes[2] == [False] * 4
        model.predict(np.zeros(3, np.float32))
        assert not actors.modes[-1]

    @pytest.mark.parametrize("cls", [TableExtractor, EnergyExtractor])
    def test_features_extractor_that_caches_or_differentiates(self, make_model, cls):
        make_model(policy_kwargs={"features_extractor_class": cls}).learn(40)

    def test_running_statistics_of_targets_are_those_of_the_critics(self, make_model):
        model = make_model(policy_kwargs={"features_extractor_class": NormExtractor, "critic_class": "mlp"}).learn(30)
        model.train(2, 16)
        first, second = statistics(model.critic), statistics(model.critic_target)
        running = [name for name in first if "running_" in name]
        assert running and all(th.equal(first[name], second[name]) for name in running)

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
    def test_norm_in_critics(self, make_model, norm):
        """Batch normalisation counts the batches it has seen in training mode: one per gradient step, no candidates."""
        kwargs = {"critic_class": NormCritic, "critic_kwargs": {"norm": norm}}
        model = make_model(policy_kwargs=kwargs, denoiser_target="energy_gradient").learn(30)
        before = statistics(model.critic)
        model.actor_loss(model.replay_buffer.sample(16).observations, 0.1)[0].backward()
        assert same(statistics(model.critic), before) and model.critic.training
        model.train(4, 16)
        for name, value in statistics(model.critic).items():
            if "tracked" in name:
                assert value == before[name] + 4
            assert not th.equal(value, before[name])
        assert bool(before) == (norm is nn.BatchNorm1d)

    def test_batch_norm_in_the_actor(self, make_model):
        model = make_model(policy_kwargs={"activation_fn": NormReLU}).learn(30)
        before = statistics(model.actor)
        model.predict(np.zeros((2, 3), np.float32))
        assert same(statistics(model.actor), before)
        model.train(2, 16)
        assert all(not th.equal(value, before[name]) for name, value in statistics(model.actor).items())

    def test_a_part_that_is_replaced_is_in_evaluation_mode_when_predicting(self, make_model):
        model = make_model(policy_kwargs={"features_extractor_class": NormExtractor}).learn(30)
        obs = np.zeros((2, 3), np.float32)
        model.predict(obs)
        extractor = model.actor.features_extractor = NormExtractor(model.observation_space)
        model.predict(obs)
        assert extractor.modes == [False]

    @pytest.mark.parametrize("method", ["log_prob", "entropy"])
    def test_density_and_entropy_are_those_of_evaluation_mode(self, make_model, method):
        policy = make_model(policy_kwargs={"features_extractor_class": NormExtractor}).learn(30).policy
        policy.set_training_mode(True)
        before = statistics(policy)
        arguments = {"log_prob": (th.zeros(4, 3), th.zeros(4, 1)), "entropy": (th.zeros(4, 3), 3)}
        values = getattr(policy, method)(*arguments[method])
        assert values.shape == (4,) and values.isfinite().all()
        assert same(statistics(policy), before)


NET = nn.Linear(1, 1)


class BrokenCritic(MlpCritic):
    """Wrong in one way."""

    def __init__(self, *args, method, **kwargs):
        super().__init__(*args, **kwargs)
        setattr(self, *WRONG[method])


class ForgetfulCritic(MlpCritic):
    """Its networks are in a plain list only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for i in range(self.n_critics):
            delattr(self, f"qf{i}")


class HalfRegistered(MlpCritic):
    """Replaces both networks, and registers the first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.q_networks[0][0].in_features
        self.q_networks[:] = [nn.Sequential(nn.Linear(width, 1)) for _ in range(2)]
        self.add_module("qf0", self.q_networks[0])


class FailingCritic(MlpCritic):
    """Fails for a reason of its own."""

    def __init__(self, *args, function, **kwargs):
        super().__init__(*args, **kwargs)
        function()


class NamelessCritic(MlpCritic):
    """Has other names for the arguments than SB3."""

    def __init__(self, space, action_space):
        super().__init__(space, action_space, [4], nn.Flatten(), 3)


def fail(obs, *actions):
    raise RuntimeError("no such layer")


WRONG = {
    "energy fails": ("energy", fail),
    "energy is of one action": ("energy", lambda obs: lambda actions: actions[:, 0, 0]),
    "backup_values has one dimension": ("backup_values", lambda obs, actions: actions[:, 0]),
    "backup_values is a tuple": ("backup_values", lambda obs, actions: (actions, actions)),
    "energy has no gradient": ("energy", lambda obs: lambda actions: actions.sum(dim=2).detach()),
    "energy has no gradient but that of the network": ("energy", lambda obs: lambda actions: NET(actions.detach()).squeeze(2)),
    "loss fails": ("loss", fail),
    "loss of every row": ("loss", lambda obs, actions, targets: targets),
    "loss is constant": ("loss", lambda obs, actions, targets: targets.mean()),
    "loss reaches no network": ("q_networks", [nn.Linear(4, 1)]),
}


class TestCriticsThatCannotWork:
    @pytest.mark.parametrize("method", list(WRONG))
    def test_are_refused_when_built_with_their_name(self, make_model, method):
        kwargs = {"critic_class": BrokenCritic, "critic_kwargs": {"method": method}}
        with pytest.raises(ValueError, match=r"`critic_class`=BrokenCritic") as error:
            make_model(policy_kwargs=kwargs)
        message = str(error.value)
        assert "no such layer" in message if "fails" in method else method.split()[0] in message

    @pytest.mark.parametrize("extractor", [FlattenExtractor, NormExtractor])
    def test_whose_networks_are_not_registered_are_refused(self, make_model, extractor):
        kwargs = {"critic_class": ForgetfulCritic, "features_extractor_class": extractor, "share_features_extractor": False}
        with pytest.raises(ValueError, match="ForgetfulCritic: loss depends on 8 weights that are not registered"):
            make_model(policy_kwargs=kwargs)

    @pytest.mark.parametrize(
        ("function", "message"),
        [(lambda: math.sqrt("two"), "must be real number"), (lambda: nn.Linear("a", 1), "argument 'size'")],
    )
    def test_errors_of_the_constructor_itself_are_not_hidden(self, make_model, function, message):
        with pytest.raises(TypeError, match=message):
            make_model(policy_kwargs={"critic_class": FailingCritic, "critic_kwargs": {"function": function}})

    def test_loss_without_a_gradient_is_refused(self, make_model):
        with pytest.raises(ValueError, match="the gradient of loss reaches none of its registered networks"):
            make_model(policy_kwargs={"critic_class": BrokenCritic, "critic_kwargs": {"method": "loss is constant"}})

    def test_one_network_that_is_not_registered_is_enough(self, make_model):
        with pytest.raises(ValueError, match="HalfRegistered: loss depends on 2 weights that are not registered"):
            make_model(policy_kwargs={"critic_class": HalfRegistered})

    @pytest.mark.parametrize(
        ("critic_class", "critic_kwargs", "reason"),
        [
            (NamelessCritic, None, "unexpected keyword"),
            (MlpCritic, {"colour": 1}, "unexpected keyword.*colour"),
            (BrokenCritic, {"method": "loss fails", "colour": 1}, "unexpected keyword.*colour"),  # by its parent
        ],
    )
    def test_constructors_that_do_not_take_the_arguments(self, make_model, critic_class, critic_kwargs, reason):
        with pytest.raises(ValueError, match=rf"`critic_class`.*{critic_class.__name__}.*{reason}"):
            make_model(policy_kwargs={"critic_class": critic_class, "critic_kwargs": critic_kwargs})

    def test_sound_ones_can_be_built_without_gradients(self, make_model):
        with th.no_grad():
            make_model(policy_kwargs={"critic_class": NormCritic, "critic_kwargs": {"norm": nn.LayerNorm}})

    def test_checking_leaves_their_statistics(self):
        kwargs = {"critic_class": NormCritic, "critic_kwargs": {"norm": nn.BatchNorm1d}}
        policy = DQSPolicy(OBS, ACTIONS, lambda _: 1e-3, net_arch=[8], **kwargs)
        assert all((value == 1).all() if "var" in name else not value.any() for name, value in statistics(policy).items())


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


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_export_to_an_older_version_of_onnx():
    """torch converts its graph to version 17, in which chunk() and split() are written otherwise."""
    module = DeterministicPolicy(make_policy(diffusion_steps=4)).eval()
    obs, buffer = th.randn(2, 3), io.BytesIO()
    with th.no_grad():
        th.onnx.export(module, (obs,), buffer, opset_version=17, verbose=False)
        session = onnxruntime.InferenceSession(buffer.getvalue())
        (result,) = session.run(None, {session.get_inputs()[0].name: obs.numpy()})
        np.testing.assert_allclose(result, module(obs).numpy(), atol=1e-4)
