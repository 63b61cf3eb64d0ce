"""DQS as a citizen of Stable-Baselines3: arguments, training, logging, noise, reproducibility."""

import copy
import inspect
import math
import threading
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import prune
from toys import OneStepEnv, RandomEnv, Recorder, RecordingCritic, TwoRecorders, same

from sb3_dqs import DQS, MlpPolicy
from sb3_dqs.density import log_det_tanh
from sb3_dqs.noise import c_out
from sb3_dqs.temperature import AutoTemperature
from sb3_dqs.warn_once import warned_of

LOGGED = ("actor_loss", "critic_loss", "ent_coef", "ent_coef_loss", "entropy", "ess", "learning_rate")


def short_episodes() -> RandomEnv:
    """Of seven steps."""
    return RandomEnv(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-1, 1, (1,), np.float32))


def record_batches(model: DQS) -> list:
    """What the replay buffer returns from now on."""
    batches, sample = [], model.replay_buffer.sample
    model.replay_buffer.sample = lambda *args, **kwargs: batches.append(sample(*args, **kwargs)) or batches[-1]
    return batches


class TestArguments:
    def test_are_those_of_sac_in_its_order_then_ours_by_keyword(self):
        ours, sac = (inspect.signature(cls.__init__).parameters for cls in (DQS, SAC))
        assert list(ours)[: len(sac)] == list(sac)
        for name, parameter in sac.items():
            assert name == "learning_rate" or ours[name].default == parameter.default, name
            assert ours[name].kind == parameter.kind, name
        for name in list(ours)[len(sac) :]:
            assert ours[name].kind == inspect.Parameter.KEYWORD_ONLY, name

    def test_are_attributes_and_documented(self, make_model):
        model = make_model()
        for name in inspect.signature(DQS.__init__).parameters:
            if name not in ("self", "_init_setup_model"):
                assert f":param {name}:" in DQS.__doc__
                attribute = {"policy": "policy_class", "stats_window_size": "_stats_window_size"}.get(name, name)
                assert hasattr(model, attribute), name

    def test_policy_kwargs_of_the_caller_are_not_changed(self):
        def policy_kwargs():
            return {"net_arch": [4], "features_extractor_kwargs": {"features_dim": 8}, "normalize_images": False}

        env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
        given = policy_kwargs()
        model = DQS("CnnPolicy", env, policy_kwargs=given, buffer_size=10, use_sde=True)  # SB3 itself would add three entries
        assert given == policy_kwargs() == model.policy_kwargs

    @pytest.mark.parametrize(
        ("train_freq", "gradient_steps", "n_updates"),
        [(4, -1, 24), ((3, "step"), 2, 16), ((1, "episode"), -1, 28), ((1, "episode"), 0, 0)],
    )
    def test_train_frequencies(self, make_model, train_freq, gradient_steps, n_updates):
        model = make_model(env=short_episodes(), train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=0)
        assert model.learn(24)._n_updates == n_updates


class TestReproducibility:
    def test_no_warning_in_construction_and_learning(self, make_model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_model().learn(60)

    def test_same_seed_same_actions_and_rewards_however_verbose(self, make_model):
        def run(**kwargs):
            buffer = make_model(**kwargs).learn(300).replay_buffer
            return buffer.actions.copy(), buffer.rewards.copy()

        first, *others = run(), run(), run(verbose=2)
        for other in others:
            assert all(map(np.array_equal, first, other))
        assert not np.array_equal(first[0], run(seed=1)[0])

    @pytest.mark.parametrize("kwargs", [{}, {"ent_coef": 0.1, "denoiser_target": "energy_gradient"}])
    def test_many_gradient_steps_are_as_many_calls_bit_for_bit(self, make_model, kwargs):
        """Networks, optimizers, temperature and running means."""

        def parameters(*gradient_steps):
            model = make_model(policy_delay=2, target_update_interval=3, **kwargs).learn(30)
            np.random.seed(1)
            th.manual_seed(1)
            for n in gradient_steps:
                model.train(n, 16)
            assert model._n_updates == 10 + 64
            return model.get_parameters()

        expected = parameters(64)
        assert same(parameters(*[1] * 64), expected)
        assert same(parameters(7, 0, 57), expected)


class ConstantCritic(RecordingCritic):
    """Its target network answers 10."""

    def backup_values(self, obs, actions):
        return th.full_like(super().backup_values(obs, actions), 10.0)


class TestCritics:
    @pytest.mark.parametrize("n_steps", [1, 3])
    @pytest.mark.parametrize("backup", ["soft", "hard"])
    def test_targets(self, make_model, backup, n_steps):
        """``r + discount * (10 - ent_coef * log pi)``; the logged entropy is the mean of ``-log pi``."""
        policy_kwargs = {"critic_class": ConstantCritic}
        model = make_model(backup=backup, n_steps=n_steps, ent_coef=0.3, policy_kwargs=policy_kwargs).learn(40)
        assert isinstance(model.replay_buffer, NStepReplayBuffer) == (n_steps > 1)
        batches = record_batches(model)
        model.train(1, 300)
        (data,) = batches
        next_obs, next_actions = model.critic_target.seen[-1]
        obs, actions, targets = model.critic.seen[-1]
        assert same([obs, actions, next_obs], [data.observations, data.actions, data.next_observations])
        assert 0.8 < next_actions.abs().max() <= 1  # squashed
        discounts = 0.99 if n_steps == 1 else data.discounts
        bonus = (targets - data.rewards) / discounts - 10
        entropy = model.logger.name_to_value["train/entropy"]
        assert bonus.mean().item() == pytest.approx(0.3 * entropy if backup == "soft" else 0, abs=1e-5)
        assert bonus.std() > 0.1 if backup == "soft" else bonus.abs().max() < 1e-5

    def test_targets_of_terminal_states(self, make_model):
        model = make_model(env=OneStepEnv(), policy_kwargs={"critic_class": ConstantCritic}).learn(30)
        batches = record_batches(model)
        model.train(1, 16)
        assert th.equal(model.critic.seen[-1][2], batches[0].rewards)

    def test_tau_and_target_update_interval_are_read_at_every_call(self, make_model):
        model = make_model(policy_kwargs={"critic_class": "mlp"}).learn(30)
        before = [param.clone() for param in model.critic_target.parameters()]
        model.tau = 0.0
        model.train(2, 16)
        assert same(before, list(model.critic_target.parameters()))
        model.tau = 0.25
        model.train(1, 16)
        for online, old, target in zip(model.critic.parameters(), before, model.critic_target.parameters(), strict=True):
            assert th.allclose(target, 0.25 * online + 0.75 * old, atol=1e-6)
        model.tau, model.target_update_interval = 1.0, 3
        is_updated = []
        for _ in range(6):
            model.train(1, 16)
            is_updated.append(same(model.critic.state_dict(), model.critic_target.state_dict()))
        # 13 updates so far: the next ones are those numbered 13, 14, 15
        assert is_updated == [False, False, True] * 2

    @pytest.mark.parametrize("gradient_steps", [1, 4])
    @pytest.mark.parametrize("policy_delay", [1, 2, 3])
    def test_policy_delay(self, make_model, policy_delay, gradient_steps):
        """The actor is updated once every so many gradient steps, the critics at each."""
        model, n = make_model(policy_delay=policy_delay, learning_starts=50).learn(50), {"actor": 0, "critic": 0}
        for name in n:
            step = getattr(model, name).optimizer.register_step_post_hook
            step(lambda *args, name=name: n.update({name: n[name] + 1}))
        for _ in range(12 // gradient_steps):
            model.train(gradient_steps, 16)
        assert n == {"actor": 12 // policy_delay, "critic": 12}


def both_actions(model: DQS, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """The deterministic action, and that of the actor itself."""
    action, _ = model.predict(obs.numpy(), deterministic=True)
    with th.no_grad():
        return th.as_tensor(action), th.as_tensor(model.policy.unscale_action(model.actor.mode(obs).numpy()))


class Deterministic(th.nn.Module):
    """As SB3's page on export wraps an actor; or a policy."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        return self.policy(obs, deterministic=True)


class TestActor:
    """What its update asks of a denoiser's target."""

    @pytest.mark.parametrize(("n_rows", "own_share"), [(64, 0.25), (128, 0.25), (10, 0.25), (64, 1.0), (5, 0.01), (1, 0.25)])
    def test_rows_are_a_share_of_what_came_back_in_no_order_and_none_is_preferred(self, make_model, n_rows, own_share):
        """The batch can have another number of rows than was asked for."""
        kwargs = {"denoiser_target": Recorder(), "own_share": own_share, "n_draws": 3, "policy_delay": 1}
        model, n_updates = make_model(**kwargs).learn(25), 200
        sample = model.replay_buffer.sample
        number = th.arange(float(n_rows)).unsqueeze(1).expand(-1, 3)
        model.replay_buffer.sample = lambda *args, **kwargs: sample(n_rows)._replace(observations=number)
        model.target_estimator.seen.clear()
        model.train(n_updates, 64)
        densities, draws = zip(*model.target_estimator.seen, strict=True)
        n_states = min(max(math.ceil(n_rows * own_share), 2), n_rows)
        assert all(draw.x.shape == draw.denoised.shape == (n_states, 3, 1) for draw in draws)
        rows = th.stack([density.obs[:, 0] for density in densities])
        assert all(len(update.unique()) == n_states for update in rows)
        share = n_states / n_rows
        counts = rows.flatten().long().bincount(minlength=n_rows)
        assert (counts - n_updates * share).abs().max() <= 5 * math.sqrt(n_updates * share * (1 - share))
        # Every place sees all rows
        assert (rows.mean(dim=0) - (n_rows - 1) / 2).abs().max() < 5 * n_rows / math.sqrt(12 * n_updates)

    def test_density_is_that_of_the_squashed_critic_and_draws_are_of_the_actor(self, make_model):
        policy_kwargs = {"critic_class": "mlp"}
        model = make_model(env=OneStepEnv(), denoiser_target=Recorder(), policy_kwargs=policy_kwargs).learn(40)
        actor, obs = model.actor, th.rand(400, 2)
        with th.no_grad():
            actor.net[-1].bias.add_(1.0)  # elsewhere than standard normal numbers
        loss, metrics = model.actor_loss(obs, 0.2)
        density, draws = model.target_estimator.seen[-1]
        assert len(density.obs) == 100 and metrics == {}
        with th.no_grad():
            for k in range(4):
                q_values = th.cat(model.critic(density.obs, th.tanh(draws.u[:, k])), dim=1)
                expected = q_values.mean(dim=1) / 0.2 + log_det_tanh(draws.u[:, k])
                assert th.allclose(density(draws.u)[:, k], expected, atol=1e-4)
            embedding = actor.embed(density.obs).unsqueeze(1)
            u = actor.sample(embedding, th.randn(100, 200, 2))
            assert ((draws.u.mean(dim=(0, 1)) - u.mean(dim=(0, 1))).abs() < 5 * u.std(dim=(0, 1)) / 20).all()
            noise = (draws.x - draws.u) / draws.sigma
            assert noise.mean().abs() < 5 / math.sqrt(800) and abs(noise.var() - 1) < 5 * math.sqrt(2 / 800)
            assert th.allclose(draws.denoised, actor.denoise(embedding, draws.x, draws.sigma), atol=1e-5)
            assert th.equal(draws.std, actor.split(embedding)[2])
            assert th.allclose(actor.get_std(), draws.std.mean(dim=(0, 1)))
            expected = ((draws.denoised - draws.u) / c_out(draws.sigma, draws.std)).pow(2).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        loss.backward()
        assert all(param.grad is not None for param in actor.parameters())

    def test_uses_the_critics_draws_at_next_states_but_for_every_eighth_update(self, make_model):
        model = make_model(denoiser_target=TwoRecorders(), own_draws_freq=8, policy_delay=1).learn(25)
        batches, draw, drawn = record_batches(model), model.actor.draw, []
        model.actor.draw = lambda embedding: drawn.append(draw(embedding)) or drawn[-1]
        own, copies = model.target_estimator.seen, model.target_estimator.for_next_states.seen
        first, n_own, n_copies = model._n_updates, len(own), len(copies)
        model.train(16, 64)
        used = [i for i in range(16) if (first + i) % 8 != 0]
        assert len(used) == 14 == len(copies) - n_copies and len(own) - n_own == 2
        for (density, draws), i in zip(copies[n_copies:], used, strict=True):
            rows = (density.obs.unsqueeze(1) == batches[i].next_observations).all(dim=2).float().argmax(dim=1)
            assert th.equal(density.obs, batches[i].next_observations[rows]) and draws.x.shape == (32, 2, 1)
            # A transition can be in the batch twice
            u = drawn[i][0]
            assert all(((u == row_u) & (batches[i].next_observations == obs).all(dim=1, keepdim=True)).any()
                       for row_u, obs in zip(draws.u.squeeze(1), density.obs, strict=True))  # fmt: skip
            noise = (draws.x - draws.u) / draws.sigma
            assert abs(noise.mean()) < 5 / math.sqrt(64) and not th.allclose(noise[:, 0], noise[:, 1])

    @pytest.mark.parametrize("env", [OneStepEnv, lambda: BitFlippingEnv(n_bits=2, continuous=True, max_steps=3)])
    def test_draws_at_the_observation_where_an_episode_terminates(self, make_model, env):
        """No action follows the terminal observation."""
        env = env()
        policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
        model = make_model(policy, env=env)
        batches, embed, embedded = record_batches(model.learn(30)), model.actor.embed, []
        model.actor.embed = lambda obs: embedded.append(obs) or embed(obs)
        td_loss, seen = model.critic.td_loss, []
        model.critic.td_loss = lambda *args: seen.append(args) or td_loss(*args)
        model.train(1, 64)
        batch = batches[0]
        assert seen[0][3] is batch.next_observations  # the critic's are those of the environment
        obs, next_obs, drawn = (
            th.cat([*part.values()], dim=1) if isinstance(part, dict) else part
            for part in (batch.observations, batch.next_observations, embedded[0])
        )
        is_terminal = batch.dones.flatten() > 0
        assert is_terminal.any() and th.equal(drawn, th.where(is_terminal.unsqueeze(1), obs, next_obs))

    @pytest.mark.parametrize("critic_class", ["batch_norm", "mlp"])
    def test_temperature_is_that_of_the_states_it_acts_in(self, critic_class):
        """Where every episode is one step long: at the terminal observation nothing holds the entropy."""
        model = DQS("MlpPolicy", OneStepEnv(), learning_rate=3e-3, batch_size=64, seed=0, device="cpu",
                    policy_kwargs={"net_arch": [32], "critic_class": critic_class}).learn(900)  # fmt: skip
        entropy = model.policy.entropy(th.tensor([[1.0, 0.0]]), n_actions=256).item()
        assert float(model.ent_coef_tensor) < 0.8 and entropy == pytest.approx(model.target_entropy, abs=0.7)

    def test_updates_at_next_states_train_the_whole_actor_and_nothing_else(self, make_model):
        model = make_model(denoiser_target=TwoRecorders(), policy_delay=1).learn(30)
        assert model._n_updates % model.own_draws_freq != 0
        critic_step, gradients = model.critic.optimizer.step, []
        model.critic.optimizer.step = lambda: (
            critic_step(), gradients.extend(param.grad.clone() for param in model.critic.q_networks.parameters()))  # fmt: skip
        model.train(1, 64)
        names = ("input_norm", "embed_features", "embed_action", "gaussian", "net")
        parts = [getattr(model.actor, name) for name in names]
        assert all(any(param.grad.any() for param in part.parameters()) for part in parts)
        assert same(gradients, [param.grad for param in model.critic.q_networks.parameters()])

    def test_next_states_need_an_estimator_for_them(self, make_model):
        model, obs = make_model(denoiser_target="energy_gradient").learn(25), th.rand(6, 3)
        with pytest.raises(ValueError, match="for_next_states"):
            model.next_actor_loss(obs, th.randn(6, 1), 0.2)

    def test_draws_actions_of_its_own_as_often_as_episodes_begin(self, make_model):
        model = make_model(denoiser_target=TwoRecorders(), own_draws_freq=8)
        for share, freq in ((0.0, 8), (0.01, 8), (0.1, 5), (0.25, 2), (0.4, 2), (0.5, 1), (1.0, 1)):
            dones = (th.arange(100) < 100 * share).float().unsqueeze(1)
            assert [n for n in range(17) if model.draws_own_actions(n, dones)] == list(range(0, 17, freq)), share

    def test_draws_actions_of_its_own_where_most_transitions_end_an_episode(self, make_model):
        model = make_model(env=OneStepEnv(), denoiser_target=TwoRecorders(), policy_delay=1).learn(25)
        model.target_estimator.seen.clear()
        model.train(5, 64)
        assert len(model.target_estimator.seen) == 5 and not model.target_estimator.for_next_states.seen

    def test_frozen_keeps_its_parameters_while_the_critic_learns(self, make_model):
        model = make_model().learn(20)
        model.actor.requires_grad_(False)
        actor, critic = (copy.deepcopy(part.state_dict()) for part in (model.actor, model.critic))
        model.learn(30, reset_num_timesteps=False)
        assert same(model.actor.state_dict(), actor) and not same(model.critic.state_dict(), critic)
        assert math.isfinite(model.logger.name_to_value["train/actor_loss"])

    def test_deterministic_actions_come_from_its_average_and_nothing_else_does(self, make_model, tmp_path):
        kwargs = {"learning_rate": 1e-2, "policy_delay": 1}
        plain = make_model(policy_kwargs={"actor_averaging_rate": 1}, **kwargs).learn(60)
        model = make_model(policy_kwargs={"actor_averaging_rate": 0.4}, **kwargs)
        seen = [[param.detach().clone() for param in model.actor.parameters()]]
        average_actor = model.policy.average_actor
        model.policy.average_actor = lambda: (
            average_actor(), seen.append([param.detach().clone() for param in model.actor.parameters()])
        )  # fmt: skip
        model.learn(60)
        del model.policy.average_actor
        assert len(seen) == 41 and same(model.actor.state_dict(), plain.actor.state_dict())
        obs = np.zeros((1, 3), np.float32)
        for i, value in enumerate(model.policy.actor_average.values):
            expected = seen[0][i]
            for n, params in enumerate(seen[1:], start=1):
                rate = max(20 / (n + 19), 0.4)
                expected = (1 - rate) * expected + rate * params[i]
            assert th.allclose(value, expected, atol=1e-5)
        action, _ = model.predict(obs, deterministic=True)
        assert not np.allclose(action, plain.predict(obs, deterministic=True)[0])
        states = th.get_rng_state()
        stochastic, _ = model.predict(obs)
        th.set_rng_state(states)
        assert np.array_equal(stochastic, plain.predict(obs)[0])
        model.save(tmp_path / "model")
        assert np.array_equal(DQS.load(tmp_path / "model").predict(obs, deterministic=True)[0], action)

    @pytest.mark.parametrize("by_data", [False, True])
    def test_changed_by_hand_acts_itself_and_its_average_begins_anew(self, make_model, tmp_path, by_data):
        model = make_model().learn(60)
        obs = th.zeros(1, 3)
        assert model.policy.actor_average.n_updates > 10 and not th.equal(*both_actions(model, obs))
        with th.no_grad():
            param = next(iter(model.actor.parameters()))
            (param.data if by_data else param).mul_(1 + 1e-6)
        assert th.equal(*both_actions(model, obs))
        model.save(tmp_path / "model")
        assert th.equal(*both_actions(DQS.load(tmp_path / "model"), obs))
        model.learn(12, reset_num_timesteps=False)
        assert 1 < model.policy.actor_average.n_updates < 10
        assert not th.equal(*both_actions(model, obs))

    def test_can_be_cloned_before_and_after_training(self, make_model):
        """As SAC: by gradients through policy(obs, deterministic=True), and predict() follows at once."""
        model = make_model(learning_rate=1e-2)
        obs = th.rand(64, 3)
        optimizer = th.optim.Adam(model.policy.actor.parameters(), 1e-2)
        for _ in range(2):
            for _ in range(100):
                loss = (model.policy(obs, deterministic=True) - 0.5).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert np.abs(model.predict(obs.numpy(), deterministic=True)[0] / 2 - 0.5).mean() < 0.1
            model.learn(60)

    def test_clone_outlives_the_first_losses(self, make_model):
        """The statistics that normalise the features are those of the demonstrations."""
        model = make_model().learn(30)
        policy = make_model(seed=3).policy
        policy.set_training_mode(True)
        obs = model.replay_buffer.sample(64).observations
        optimizer = th.optim.Adam(policy.actor.parameters(), 1e-2)
        for _ in range(300):
            loss = (policy.actor.mode(obs) - obs[:, :1]).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error = (policy.actor.mode(obs) - obs[:, :1]).pow(2).mean()
        model.policy.load_state_dict(policy.state_dict())
        model.policy.set_training_mode(True)
        model.actor_loss(model.replay_buffer.sample(64).observations, 0.2)
        assert (model.actor.mode(obs) - obs[:, :1]).pow(2).mean() < error + 0.01 < 0.05

    @pytest.mark.parametrize("kwargs", [{"batch_size": 2}, {"batch_size": 16, "next_share": 0.01, "own_share": 0.01}])
    def test_never_learns_from_a_single_row(self, make_model, kwargs):
        class Norm(th.nn.Module):
            def forward(self, x):
                assert len(x) > 1 or not th.is_grad_enabled()
                return x.relu()

        make_model(policy_kwargs={"activation_fn": Norm}, **kwargs).learn(60)

    def test_called_by_itself_acts_as_predict_does(self, make_model):
        model = make_model().learn(60)
        obs = th.rand(8, 3)
        expected = model.policy.scale_action(model.predict(obs.numpy(), deterministic=True)[0])
        for actor in (model.actor, copy.deepcopy(model.actor), copy.deepcopy(model.policy).actor):
            with th.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the tracer
                assert np.allclose(actor(obs, deterministic=True), expected, atol=1e-6)
                assert np.allclose(th.jit.trace(Deterministic(actor).eval(), obs)(obs), expected, atol=1e-5)
        exported = th.export.export(Deterministic(model.actor).eval(), (obs,)).module()
        assert np.allclose(exported(obs).detach(), expected, atol=1e-5)
        warned_of.clear()
        with pytest.warns(UserWarning, match=r"Where gradients are enabled.*torch\.no_grad"):
            itself = model.actor(obs, deterministic=True)
        assert not np.allclose(itself.detach(), expected, atol=1e-6)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
    @pytest.mark.parametrize("change", ["cloned", "cloned by its own optimizer", "loaded"])
    @pytest.mark.parametrize("export", ["trace", "export"])
    def test_exported_without_eval_after_a_change_acts_itself(self, make_model, change, export):
        model, obs = make_model(learning_rate=1e-2).learn(60), th.rand(8, 3)
        if change == "loaded":
            model.actor.load_state_dict(make_model(seed=1).learn(60).actor.state_dict())
        else:
            is_own = change == "cloned by its own optimizer"
            optimizer = model.actor.optimizer if is_own else th.optim.Adam(model.actor.parameters(), 1e-2)
            for _ in range(3):
                optimizer.zero_grad()
                model.actor(obs, deterministic=True).sum().backward()
                optimizer.step()
        module = Deterministic(model.policy.actor)
        if export == "trace":
            with th.no_grad():
                exported = th.jit.trace(module, obs)
        else:
            exported = th.export.export(module, (obs,)).module()
        with th.no_grad():
            assert np.allclose(exported(obs), model.actor.mode(obs), atol=1e-5)

    def test_replaced_begins_the_average_anew(self, make_model):
        model, other, obs = make_model().learn(60), make_model(seed=1).learn(60), th.rand(8, 3)
        model.policy.actor = model.actor = copy.deepcopy(other.policy.actor)
        model.learn(40, reset_num_timesteps=False)
        expected = model.policy.actor_average.stand_in(model.actor).mode(obs).detach()
        assert 1 < model.policy.actor_average.n_updates < 30
        assert np.allclose(model.policy.scale_action(model.predict(obs.numpy(), deterministic=True)[0]), expected, atol=1e-6)

    def test_moved_without_its_policy_takes_the_average_along(self, make_model):
        model = make_model().learn(60)
        actor = copy.deepcopy(model.actor).double().eval()
        with th.no_grad():
            pairs = list(zip(actor.deterministic_actor().parameters(), model.policy.actor_average.values, strict=True))
        assert all(mine.dtype == th.float64 and th.equal(mine.float(), its) for mine, its in pairs)

    def test_quantised_acts_as_its_last_update_does(self, make_model):
        model = make_model().learn(60)
        obs = th.rand(8, 3)
        quantised = th.ao.quantization.quantize_dynamic(model.policy.actor, {th.nn.Linear}, dtype=th.qint8)
        with th.no_grad():
            assert np.allclose(quantised(obs, deterministic=True), model.actor.mode(obs), atol=0.05)

    def test_perturbed_parameters_act(self, make_model):
        model = make_model().learn(60)
        obs = th.zeros(1, 3)
        changed = {name: param + 0.5 for name, param in model.policy.named_parameters() if name.startswith("actor.")}
        with th.no_grad():
            action = th.func.functional_call(model.policy, changed, (obs, True))
            stacked = {name: th.stack([param, param]) for name, param in changed.items()}
            both = th.func.vmap(lambda params: th.func.functional_call(model.policy, params, (obs, True)))(stacked)
            for name, param in model.policy.named_parameters():
                param.copy_(changed.get(name, param))
        expected = model.policy.scale_action(model.predict(obs.numpy(), deterministic=True)[0])
        assert np.allclose(action, expected, atol=1e-5) and np.allclose(both, expected, atol=1e-5)

    def test_average_acts_through_the_modules_as_they_are(self, make_model):
        class Extractor(FlattenExtractor):
            def __init__(self, observation_space):
                super().__init__(observation_space)
                self.lock = threading.Lock()  # cannot be copied

        model = make_model(policy_kwargs={"features_extractor_class": Extractor}).learn(60)
        obs, calls = np.ones((1, 3), np.float32), []
        handle = model.actor.embed_features.register_forward_hook(lambda *_: calls.append(1))
        before, _ = model.predict(obs, deterministic=True)
        assert calls and model.actor.average_is_current
        handle.remove()
        model.actor.add_module("adapter", th.nn.Linear(2, 2))
        prune.random_unstructured(model.actor.embed_features, "weight", 0.5)
        assert not np.array_equal(model.predict(obs, deterministic=True)[0], before)
        model.learn(40, reset_num_timesteps=False)
        assert model.policy.actor_average.is_current(model.actor)

    def test_other_threads_see_the_actor_itself(self, make_model):
        model = make_model().learn(60)
        weight, obs = model.actor.embed_features.weight, np.zeros((1, 3), np.float32)
        seen = []
        handle = model.actor.embed_features.register_forward_hook(lambda *_: seen.append(model.actor.embed_features.weight))
        model.predict(obs, deterministic=True)
        handle.remove()
        assert seen and all(value is weight for value in seen)

    def test_parameters_of_the_critic_alone_leave_the_average(self, make_model):
        model = make_model().learn(60)
        obs = th.zeros(1, 3)
        before = both_actions(model, obs)
        state = model.policy.state_dict()
        critic, actor = ({n: v for n, v in state.items() if n.startswith(start)} for start in ("critic.", "actor."))
        model.policy.load_state_dict(critic | actor, strict=False)
        assert th.equal(*both_actions(model, obs)) and not th.equal(*before)
        model.learn(40, reset_num_timesteps=False)
        before = both_actions(model, obs)
        model.policy.load_state_dict(critic, strict=False)
        assert th.equal(both_actions(model, obs)[0], before[0]) and not th.equal(*before)

    def test_layers_added_after_construction_are_loaded(self, make_model):
        model, other = make_model().learn(60), make_model()
        for each in (model, other):
            each.actor.add_module("adapter", th.nn.Linear(2, 2))
        model.learn(60, reset_num_timesteps=False)
        other.policy.load_state_dict(model.policy.state_dict())
        obs = th.zeros(1, 3)
        assert th.equal(both_actions(model, obs)[0], both_actions(other, obs)[0])
        assert not th.equal(*both_actions(other, obs))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
    @pytest.mark.parametrize("change_by_hand", [False, True])
    def test_exported_policy_acts_as_predict(self, make_model, change_by_hand):
        model = make_model().learn(60)
        obs = np.zeros((2, 3), np.float32)
        model.predict(obs, deterministic=True)
        if change_by_hand:
            for param in model.actor.parameters():
                param.data.mul_(1.1)
        module = Deterministic(model.policy).eval()
        with th.no_grad():
            traced = th.jit.trace(module, th.as_tensor(obs))
        exported = th.export.export(module, (th.as_tensor(obs),)).module()
        expected = model.policy.scale_action(model.predict(obs, deterministic=True)[0])
        assert np.allclose(traced(th.as_tensor(obs)).detach(), expected, atol=1e-5)
        assert np.allclose(exported(th.as_tensor(obs)).detach(), expected, atol=1e-5)

    @pytest.mark.parametrize(("saved", "loaded"), [(1, 0.1), (0.1, 1)])
    def test_another_averaging_rate_can_be_loaded(self, make_model, tmp_path, saved, loaded):
        model = make_model(policy_kwargs={"actor_averaging_rate": saved}).learn(60)
        model.save(tmp_path / "model")
        kwargs = {**model.policy_kwargs, "actor_averaging_rate": loaded}
        other = DQS.load(tmp_path / "model", env=model.get_env(), custom_objects={"policy_kwargs": kwargs})
        obs = th.zeros(1, 3)
        assert th.equal(both_actions(model, obs)[1], both_actions(other, obs)[0])
        other.learn(60)
        assert th.equal(*both_actions(other, obs)) == (loaded == 1)

    def test_training_sees_the_entropy_that_the_policy_reports(self, make_model):
        model = make_model(learning_rate=0.0, ent_coef=0.1, env=OneStepEnv(), policy_kwargs={"diffusion_steps": 8}).learn(30)
        with th.no_grad():  # narrow at the terminal observation [0, 1], where the policy does not act
            model.actor.gaussian[-1].weight[2:].normal_(std=10.0)  # of the standard deviations
        entropies = model.policy.entropy(th.eye(2), n_actions=200)
        assert (entropies[0] - entropies[1]).abs() > 1
        model.train(30, 100)
        expected = model.policy.entropy(model.replay_buffer.sample(20).observations, n_actions=200).mean().item()
        # Fewer traces than the policy itself takes
        assert model.logger.name_to_value["train/entropy"] == pytest.approx(expected, abs=0.3)

    def test_learns_in_the_states_it_acts_in(self):
        model = DQS("MlpPolicy", OneStepEnv(), ent_coef=0.3, learning_rate=3e-3, learning_starts=100, batch_size=64, seed=0,
                    policy_kwargs={"net_arch": [32]}, device="cpu")  # fmt: skip
        model.learn(900)
        action, _ = model.predict(np.array([1, 0], np.float32), deterministic=True)
        assert np.abs(action - 0.7).max() < 0.25


class TestNamesOfSac:
    def test_tuned_temperature(self, make_model):
        model = make_model(ent_coef="auto_0.5")
        assert float(model.log_ent_coef) == pytest.approx(math.log(0.5))
        assert float(model.ent_coef_tensor) == pytest.approx(0.5)
        model.learn(40)
        assert float(model.ent_coef_tensor) == pytest.approx(math.exp(model.log_ent_coef)) != pytest.approx(0.5)
        assert "train/ent_coef_loss" in model.logger.name_to_value
        assert model.ent_coef_optimizer is None  # as SAC's of a fixed temperature: the common guard is `is not None`

    def test_temperature_can_be_set_as_pipelines_of_sac_do(self, make_model, tmp_path):
        model = make_model(ent_coef="auto_0.5")
        for value in (th.log(th.ones(1) * 0.2).requires_grad_(True), th.nn.Parameter(th.tensor(math.log(0.2))), math.log(0.2)):
            model.log_ent_coef = value
            assert float(model.ent_coef_tensor) == pytest.approx(0.2)
            assert float(model.log_ent_coef[0]) == pytest.approx(math.log(0.2))
        model.log_ent_coef.copy_(th.tensor([-0.7]))
        assert float(model.ent_coef_tensor) == pytest.approx(math.exp(-0.7))
        model.log_ent_coef.data = th.tensor([-2.0])
        assert float(model.ent_coef_tensor) == pytest.approx(math.exp(-2))
        model.ent_coef_tensor = model.ent_coef_tensor.to("cpu")  # moved, and still tuned
        model.ent_coef_optimizer = None
        with pytest.warns(UserWarning, match=r"`ent_coef_optimizer` has no effect.*model\.log_ent_coef = "):
            model.ent_coef_optimizer = th.optim.Adam([th.nn.Parameter(th.zeros(1))])
        model.ent_coef_tensor = th.tensor(0.25)
        model.learn(40)
        model.save(tmp_path / "model")
        assert float(model.ent_coef_tensor) == float(DQS.load(tmp_path / "model").ent_coef_tensor) == 0.25
        model.log_ent_coef = math.log(0.125)  # tuned again
        model.learn(40, reset_num_timesteps=False)
        model.save(tmp_path / "model")
        loaded = DQS.load(tmp_path / "model")
        assert float(loaded.log_ent_coef) == float(model.log_ent_coef) == pytest.approx(math.log(0.125), abs=0.05)
        for value in (math.nan, 1e3):
            with pytest.raises(ValueError, match=r"log_ent_coef=.* is not the logarithm of a temperature"):
                model.log_ent_coef = value
        unreachable = make_model(ent_coef=0.1, target_entropy=5.0)
        with pytest.raises(ValueError, match=r"target_entropy=5\.0 cannot be reached"):
            unreachable.log_ent_coef = 0.0
        own = make_model(ent_coef=AutoTemperature(0.5, -3.0, 1))
        own.ent_coef_tensor, own.log_ent_coef = 0.1, -1.0
        assert own.target_entropy == own.temperature.target_entropy == -3.0
        scheduled = make_model(ent_coef="log_linear_1.0_0.01")
        with pytest.raises(AttributeError, match=r"`log_ent_coef` cannot be set, because .* is neither tuned nor fixed"):
            scheduled.log_ent_coef = 0.0
        with pytest.raises(ValueError, match=r"ent_coef=-1\.0 is not a temperature"):
            model.ent_coef_tensor = -1

    def test_networks_of_the_mlp_critic_are_missed_with_the_replacement_named(self, make_model):
        assert not hasattr(make_model().critic, "qf0") and make_model(policy_kwargs={"critic_class": "mlp"}).critic.qf0
        with pytest.raises(AttributeError, match=r"no attribute 'qf1'; .*q_networks.*critic_class=\"mlp\""):
            _ = make_model().critic.qf1

    def test_gaussian_is_missed_with_the_replacement_named(self, make_model):
        model = make_model()
        for name in ("mu", "latent_pi", "log_std", "action_dist", "get_action_dist_params"):
            assert not hasattr(model.actor, name)
            with pytest.raises(AttributeError, match=rf"no attribute '{name}': .*policy\.entropy\(obs\)"):
                getattr(model.actor, name)
            with pytest.raises(AttributeError, match=rf"`{name}` cannot be set: .*exploration_noise"):
                setattr(model.actor, name, th.nn.Linear(2, 2))

    def test_target_entropy_can_be_set_during_training(self, make_model, tmp_path):
        model = make_model(ent_coef="auto_0.1", learning_rate=1e-2).learn(20)
        model.target_entropy = 0.69  # above the policy's, which is above -1, the default: the temperature rises, not falls
        model.train(50, 16)
        assert float(model.ent_coef_tensor) > 0.1
        model.save(tmp_path / "model")
        loaded = DQS.load(tmp_path / "model")
        assert loaded.target_entropy == loaded.temperature.target_entropy == 0.69
        for value in (0.7, math.nan, None, "low"):
            with pytest.raises(ValueError, match=r"`?target_entropy`?"):
                model.target_entropy = value
        assert model.target_entropy == 0.69
        model.target_entropy = "auto"
        assert model.target_entropy == model.temperature.target_entropy == -1.0

    def test_target_entropy_of_a_temperature_of_the_user(self, make_model, tmp_path):
        temperature = AutoTemperature(0.1, -3.0, 1)
        model = make_model(ent_coef=temperature)
        assert model.target_entropy == -3.0
        model.target_entropy = -2
        model.save(tmp_path / "model")
        loaded = DQS.load(tmp_path / "model")
        assert loaded.target_entropy == loaded.temperature.target_entropy == -2.0 and temperature.target_entropy == -3.0

    @pytest.mark.parametrize(
        ("ent_coef", "last"), [(0.2, 0.2), ("log_linear_1.0_0.01", 0.01), (lambda p: 10 ** (2 * p - 2), 0.01)]
    )
    def test_temperature_that_is_not_tuned(self, make_model, ent_coef, last):
        model = make_model(ent_coef=ent_coef).learn(100)
        assert float(model.ent_coef_tensor) == pytest.approx(last, rel=0.1)
        assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(last, rel=0.1)
        assert "train/ent_coef_loss" not in model.logger.name_to_value
        assert model.log_ent_coef is None and model.ent_coef_optimizer is None

    def test_learning_rate_schedule(self, make_model):
        model = make_model(learning_rate=lambda progress: 1e-3 * progress).learn(50)
        model.train(gradient_steps=3)
        learning_rate = 1e-3 * model._current_progress_remaining
        for net in (model.actor, model.critic):
            assert net.optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate)


class TestExploration:
    @pytest.mark.parametrize(("exploration_noise", "is_correlated"), [("white", False), ("pink", True)])
    def test_noise_of_rollouts(self, make_model, exploration_noise, is_correlated):
        """The policy of a new actor is near N(0, sigma_data^2): its action grows with the latent."""
        env = make_vec_env("Pendulum-v1", 50)
        kwargs = {"learning_starts": 0, "gradient_steps": 0, "buffer_size": 5_000, "seed": 0}
        model = make_model(env=env, exploration_noise=exploration_noise, **kwargs).learn(5_000)
        actions = model.replay_buffer.actions[:100, :, 0]  # steps, environments
        correlation = np.corrcoef(actions[:-4].ravel(), actions[4:].ravel())[0, 1]
        assert correlation == pytest.approx(0.5 if is_correlated else 0.0, abs=0.2)
        # Outside of rollouts, actions are independent
        obs = np.tile(model.env.reset()[:1], (50, 1))
        pairs = np.array([model.predict(obs)[0].ravel() for _ in range(100)])
        assert abs(np.corrcoef(pairs[:-1].ravel(), pairs[1:].ravel())[0, 1]) < 0.1

    def test_pink_noise_and_held_noise_exclude_each_other(self, make_model):
        warned_of.clear()
        with pytest.warns(UserWarning, match=r'`exploration_noise="pink"` has no effect with use_sde=True'):
            make_model(use_sde=True, exploration_noise="pink")

    @pytest.mark.parametrize(("norm_reward", "ent_coef"), [(True, "auto"), (False, "auto"), (True, "auto_0.1"), (True, 0.1)])
    def test_normalised_rewards_and_a_temperature_of_1_are_warned_of(self, make_model, norm_reward, ent_coef):
        warned_of.clear()
        env = VecNormalize(make_vec_env("Pendulum-v1", 1), norm_reward=norm_reward)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_model(env=env, ent_coef=ent_coef)
        is_warned = any("VecNormalize(norm_reward=True)" in str(warning.message) for warning in caught)
        assert is_warned == (norm_reward and ent_coef == "auto")

    def test_use_sde_holds_one_noise_per_environment(self, make_model):
        model = make_model(env=make_vec_env("Pendulum-v1", 3), use_sde=True, sde_sample_freq=4, train_freq=8).learn(60)
        obs = np.zeros((3, 3), np.float32)
        first, again = (model.predict(obs)[0] for _ in range(2))
        model.policy.reset_noise(3)
        second, _ = model.predict(obs)
        assert np.array_equal(first, again) and not np.array_equal(first, second)
        assert len(np.unique(first)) == len(np.unique(second)) == 3

    def test_use_sde_explores_from_the_beginning_and_logs_std(self, make_model):
        kwargs = {"use_sde_at_warmup": True, "train_freq": (1, "episode"), "learning_starts": 150}
        model = make_model(use_sde=True, **kwargs)
        logged = {}
        model.set_logger(configure(None, []))
        dump = model.logger.dump
        model.logger.dump = lambda step: (logged.update(model.logger.name_to_value), dump(step))
        model.learn(200, log_interval=1)
        assert logged["train/std"] == pytest.approx(model.actor.get_std().mean().item(), rel=0.1)
        # A smooth function of the state: with held noise, actions change by far less than independent draws would
        actions = model.replay_buffer.actions[:150].ravel()
        assert np.abs(np.diff(actions)).mean() < 0.5 * np.abs(actions - np.random.permutation(actions)).mean()


class TestSurroundings:
    def test_her(self, make_model):
        env = BitFlippingEnv(n_bits=4, continuous=True)
        model = make_model("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=30).learn(80)
        assert env.action_space.contains(model.predict(env.reset()[0], deterministic=True)[0])

    def test_vec_normalize_and_subprocesses(self, make_model):
        subprocesses = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}}
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, **subprocesses), clip_reward=1e-3)
        model = make_model(env=env, gradient_steps=-1).learn(60)
        batches = record_batches(model)
        model.train(1, 16)
        assert 0 < batches[0].rewards.abs().max() <= 1.1e-3 < np.abs(model.replay_buffer.rewards).max()
        env.close()

    @pytest.mark.parametrize("kwargs", [{}, {"denoiser_target": "energy_gradient", "backup": "hard"}])
    def test_logged_names_and_the_name_of_the_run(self, make_model, tmp_path, kwargs):
        model = make_model(MlpPolicy, short_episodes(), tensorboard_log=str(tmp_path), **kwargs).learn(50, log_interval=1)
        scalars = EventAccumulator(str(tmp_path / "DQS_1")).Reload().Tags()["scalars"]
        assert {f"train/{name}" for name in LOGGED} | {"rollout/ep_rew_mean", "time/fps"} <= set(scalars)
        model.train(2, 16)
        assert all(np.isfinite(model.logger.name_to_value[f"train/{name}"]) for name in (*LOGGED, "n_updates"))
