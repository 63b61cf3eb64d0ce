"""DQS as a citizen of Stable-Baselines3: arguments, training, logging, noise, reproducibility."""

import inspect
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from quadrature import log_density_of
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_dqs import DQS, MlpPolicy
from sb3_dqs.denoiser_targets import energy_gradient, posterior_mean
from sb3_dqs.density import trace_steps
from sb3_dqs.dqs import ESS_UPDATE_RATE
from sb3_dqs.fast import has_fast_bfloat16
from sb3_dqs.noise import training_levels
from sb3_dqs.temperature import AutoTemperature, LogLinearSchedule

LOGGED = ("actor_loss", "critic_loss", "ent_coef", "ent_coef_loss", "entropy", "ess", "learning_rate", "n_updates")


def test_arguments_are_those_of_sac_in_its_order_then_ours_by_keyword():
    ours, sac = (inspect.signature(cls.__init__).parameters for cls in (DQS, SAC))
    assert list(ours)[: len(sac)] == list(sac)
    for name, parameter in sac.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    for name in list(ours)[len(sac) :]:
        assert ours[name].kind == inspect.Parameter.KEYWORD_ONLY, name


def test_every_argument_is_an_attribute_and_documented(make_model):
    model = make_model()
    for name in inspect.signature(DQS.__init__).parameters:
        if name in ("self", "_init_setup_model"):
            continue
        assert f":param {name}:" in DQS.__doc__
        attribute = {"policy": "policy_class", "stats_window_size": "_stats_window_size"}.get(name, name)
        assert hasattr(model, attribute), name


def test_no_warning_in_construction_and_learning(make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model().learn(60)


@pytest.mark.parametrize("verbose", [0, 2])
def test_same_seed_same_actions_and_rewards_however_verbose(make_model, verbose):
    def run(verbose):
        model = make_model(verbose=verbose)
        model.learn(500)
        size = model.replay_buffer.size()
        return model.replay_buffer.actions[:size], model.replay_buffer.rewards[:size]

    for first, second in zip(run(0), run(verbose), strict=True):
        assert np.array_equal(first, second)


def test_other_seed_other_actions(make_model):
    actions = [make_model(seed=seed).learn(60).replay_buffer.actions for seed in (0, 1)]
    assert not np.array_equal(*actions)


@pytest.mark.parametrize("ent_coef", ["auto", "auto_0.1", 0.2, "log_linear_1.0_0.01", LogLinearSchedule(1.0, 0.1)])
def test_temperatures(make_model, ent_coef):
    model = make_model(ent_coef=ent_coef).learn(60)
    logged = model.logger.name_to_value
    assert logged["train/ent_coef"] > 0
    assert ("train/ent_coef_loss" in logged) == str(ent_coef).startswith("auto")


def test_scheduled_temperature_follows_the_progress(make_model):
    model = make_model(ent_coef="log_linear_1.0_0.01").learn(100)
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("score_target", "mean_ess", "n_pooled"),
    [("posterior_mean", 9.0, 5), ("posterior_mean", 1.0, 0), ("energy_gradient", 1.0, 5)],
)
def test_score_target_is_that_of_the_squashed_critic(make_model, monkeypatch, score_target, mean_ess, n_pooled):
    """Of unsquashed actions, with the log-determinant of the squashing, at the temperature."""
    model = make_model(score_target=score_target)
    model.mean_ess = mean_ess
    monkeypatch.setattr(model.critic, "q1_values", lambda features, actions: 0.2 * 3 * actions.sum(dim=2))
    anchors, sigma = th.randn(5, 4, 1), training_levels(5, 4)
    x = anchors + sigma * th.randn_like(anchors)
    arguments = anchors, 0 * anchors, x, sigma
    th.manual_seed(1)
    target, _ = model._score_target(th.zeros(5, 3), *arguments, 0.2)
    th.manual_seed(1)
    if score_target == "posterior_mean":
        std, density = model.actor.get_std(), log_density_of("linear")
        expected, _ = posterior_mean(lambda states: density, *arguments, std, model.n_mc_samples, n_pooled)
    else:
        expected, _ = energy_gradient(log_density_of("linear"), x, sigma, model.n_mc_samples)
    assert th.allclose(target, expected, rtol=1e-3, atol=1e-4)


def test_critics_value_squashed_actions(make_model, monkeypatch):
    model, seen = make_model().learn(30), []
    forward = model.critic_target.forward
    monkeypatch.setattr(model.critic_target, "forward", lambda obs, actions: seen.append(actions) or forward(obs, actions))
    model.train(10, 64)
    actions = th.cat(seen)
    assert len(actions) == 640 and 0.9 < actions.abs().max() <= 1


def test_training_sees_the_entropy_that_the_policy_reports(make_model):
    model = make_model(learning_rate=0.0, ent_coef=0.1, env=OneStepEnv()).learn(30)
    model.train(50, 64)
    expected = model.policy.entropy(model.replay_buffer.sample(20).observations, n_actions=200).mean().item()
    # 64 states in each of 50 updates; half as many traces as the policy itself takes
    assert model.logger.name_to_value["train/entropy"] == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("score_target", ["posterior_mean", "energy_gradient"])
@pytest.mark.parametrize("backup", ["soft", "hard"])
def test_score_targets_and_backups(make_model, score_target, backup):
    model = make_model(score_target=score_target, backup=backup).learn(60)
    for name in LOGGED:
        assert np.isfinite(model.logger.name_to_value[f"train/{name}"]), name


def test_sampling_in_bfloat16_is_sampling(make_model, monkeypatch):
    """Where the processor is fast at it; the densities, from small differences, are the same on average."""
    model = make_model().learn(200)
    actor, n = model.actor, 4000
    assert model.sampling_dtype == (th.bfloat16 if has_fast_bfloat16(model.device) else None)
    embedding, latents = actor.embed(th.randn(1, 3)).expand(n, -1), th.randn(n, 1)
    with th.no_grad():
        (exact, exact_log_prob), (actions, log_prob) = (
            actor.sample_with_log_prob(embedding, latents, trace_steps(8), dtype=dtype) for dtype in (None, th.bfloat16)
        )
    assert not th.equal(actions, exact) and (actions - exact).abs().mean() < 0.01 * exact.std()
    errors = log_prob - exact_log_prob
    assert errors.abs().mean() < 0.1 and abs(errors.mean()) < 0.02


def test_matrix_products_are_in_the_precision_of_the_sampler(make_model, monkeypatch):
    """Of the hidden layers: their weights rounded, and multiplied in single precision, would be no faster."""
    model, linear, dtypes = make_model(policy_kwargs={"net_arch": [8, 8]}).learn(30), th.nn.functional.linear, []

    def spy(x, weight, bias=None):
        dtypes.append((x.dtype, weight.dtype))
        return linear(x, weight, bias)

    monkeypatch.setattr(th.nn.functional, "linear", spy)
    model.sampling_dtype = th.bfloat16
    model.train(1, 64)
    assert dtypes.count((th.bfloat16, th.bfloat16)) == 2 * model.diffusion_steps  # hidden and last layer


def test_tuned_temperature_is_put_on_the_device_of_the_model(make_model, monkeypatch):
    devices = []
    monkeypatch.setattr(AutoTemperature, "to", lambda self, device: devices.append(device) or self)
    model = make_model(ent_coef="auto")
    assert devices == [model.device]


@pytest.mark.parametrize("dtype", [None, th.bfloat16])
def test_training_in_both_precisions(make_model, dtype):
    model = make_model().learn(30)
    model.sampling_dtype = dtype
    model.train(5, 64)
    assert all(param.dtype == th.float32 and param.isfinite().all() for param in model.policy.parameters())


def test_actions_of_the_actor_and_the_log_probs_are_those_of_the_sampler(make_model, monkeypatch):
    """One run of the sampler serves both; the densities are those of the next actions."""
    model, seen = make_model().learn(30), {}
    sample, score_target = model.actor.sample_with_log_prob, model._score_target

    def spy(embedding, latents, steps, n_log_probs, dtype):
        seen["actions"], seen["log_prob"] = sample(embedding, latents, steps, n_log_probs, dtype)
        return seen["actions"], seen["log_prob"]

    monkeypatch.setattr(model.actor, "sample_with_log_prob", spy)
    monkeypatch.setattr(
        model, "_score_target", lambda obs, anchors, *args: seen.update(anchors=anchors) or score_target(obs, anchors, *args)
    )
    model._n_updates = 0  # the actor is updated
    model.train(1, 64)
    assert seen["log_prob"].shape == (64,) and len(seen["actions"]) == 128
    assert th.equal(seen["anchors"], seen["actions"][64:].reshape(16, 4, 1))
    assert model.logger.name_to_value["train/entropy"] == pytest.approx(-seen["log_prob"].mean().item())


@pytest.mark.parametrize("gradient_steps", [1, 10])
def test_mean_effective_sample_size_approaches_the_present_one(make_model, gradient_steps):
    model = make_model(learning_rate=0.0, ent_coef=1e6, policy_delay=1).learn(30)  # the policy is near uniform
    model.mean_ess = 1.0
    for _ in range(10 // gradient_steps):
        model.train(gradient_steps, 64)
    ess = model.logger.name_to_value["train/ess"]
    assert model.mean_ess == pytest.approx(1 + (1 - (1 - ESS_UPDATE_RATE) ** 10) * (ess - 1), rel=0.2) and ess > 2


@pytest.mark.parametrize("policy_delay", [1, 2, 3])
@pytest.mark.parametrize("gradient_steps", [1, 4])
def test_policy_delay(make_model, policy_delay, gradient_steps):
    """The actor is updated once every so many gradient steps, the critics at each."""
    model, n = make_model(policy_delay=policy_delay, learning_starts=50).learn(50), {"actor": 0, "critic": 0}

    def count(name):
        step = getattr(model, name).optimizer.step
        return lambda: (n.update({name: n[name] + 1}), step())

    for name in n:
        getattr(model, name).optimizer.step = count(name)
    for _ in range(12 // gradient_steps):
        model.train(gradient_steps, 16)
    assert n == {"actor": 12 // policy_delay, "critic": 12}


def test_backups_differ_by_the_entropy_bonus(make_model):
    """With gamma = 0 the bonus has no way into the target; with a large one the soft critic is far above the hard one."""

    def mean_q(backup, gamma):
        model = make_model(backup=backup, gamma=gamma, ent_coef=50.0, learning_rate=1e-2, tau=0.5).learn(200)
        data = model.replay_buffer.sample(100)
        return model.critic(data.observations, data.actions)[0].mean().item()

    assert mean_q("soft", 0.9) > mean_q("hard", 0.9) + 20
    assert mean_q("soft", 0.0) == pytest.approx(mean_q("hard", 0.0), abs=5)


def test_train_by_hand_and_learning_rate_schedule(make_model):
    model = make_model(learning_rate=lambda progress: 1e-3 * progress).learn(50)
    updates = model._n_updates
    model.train(gradient_steps=3)
    assert model._n_updates == updates + 3
    learning_rate = 1e-3 * model._current_progress_remaining
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate)
    # The temperature's: an entropy far above its target lowers log ent_coef by one learning rate per step
    model.target_entropy = -1e6
    before = model.temperature.log_ent_coef.item()
    model.train(gradient_steps=3)
    assert before - model.temperature.log_ent_coef.item() == pytest.approx(3 * learning_rate, rel=1e-3)


def test_tau_and_target_update_interval_are_read_at_every_call(make_model):
    model = make_model().learn(30)
    before = [param.clone() for param in model.critic_target.parameters()]
    model.tau = 0.0
    model.train(2, 16)
    assert all(th.equal(old, new) for old, new in zip(before, model.critic_target.parameters(), strict=True))
    model.tau = 0.25
    model.train(1, 16)
    for online, old, target in zip(model.critic.parameters(), before, model.critic_target.parameters(), strict=True):
        assert th.allclose(target, 0.25 * online + 0.75 * old, atol=1e-6)
    model.tau = 1.0
    model.train(1, 16)
    pairs = list(zip(model.critic.parameters(), model.critic_target.parameters(), strict=True))
    assert all(th.equal(online, target) for online, target in pairs)
    model.target_update_interval = 3
    model.train(3, 16)  # at the first step only
    assert not any(th.equal(online, target) for online, target in pairs)
    model.train(1, 16)
    assert all(th.equal(online, target) for online, target in pairs)


def test_n_step_returns_use_the_discounts_of_the_buffer(make_model, monkeypatch):
    """With discounts of 0 the critics' target is the reward alone."""
    model = make_model(n_steps=3, learning_rate=1e-2, ent_coef=0.1, tau=1.0).learn(60)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    sample = model.replay_buffer.sample

    def sample_without_future(*args, **kwargs):
        data = sample(*args, **kwargs)
        assert 0 < data.discounts.max() <= 0.99**1
        return data._replace(rewards=th.ones_like(data.rewards), discounts=th.zeros_like(data.discounts))

    monkeypatch.setattr(model.replay_buffer, "sample", sample_without_future)
    model.train(600, 32)
    data = sample(50)
    assert (model.critic(data.observations, data.actions)[0] - 1).abs().mean() < 0.3


@pytest.mark.parametrize(
    "noise", [NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)), OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.1 * np.ones(1))]
)
def test_action_noise(make_model, noise):
    make_model(action_noise=noise).learn(40)
    make_model(env=make_vec_env("Pendulum-v1", 2), action_noise=noise).learn(40)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_use_sde_holds_the_noise(make_model, n_envs):
    model = make_model(env=make_vec_env("Pendulum-v1", n_envs), use_sde=True, sde_sample_freq=4, train_freq=8)
    model.learn(120, log_interval=1)
    obs = model.env.reset()
    first, again = (model.predict(obs, deterministic=False)[0] for _ in range(2))
    assert np.array_equal(first, again)
    model.policy.reset_noise(n_envs)
    assert not np.array_equal(first, model.predict(obs, deterministic=False)[0])
    # A batch of another size takes the first noise
    assert model.predict(np.tile(obs[:1], (7, 1)))[0].shape == (7, 1)


def test_use_sde_explores_from_the_beginning_and_logs_std(make_model):
    model = make_model(
        use_sde=True, use_sde_at_warmup=True, sde_sample_freq=-1, train_freq=(1, "episode"), learning_starts=150
    )
    logged = {}
    model.set_logger(configure(None, []))
    dump = model.logger.dump
    model.logger.dump = lambda step: (logged.update(model.logger.name_to_value), dump(step))
    model.learn(200, log_interval=1)
    assert 0 < logged["train/std"] < 1
    # A smooth function of the state: with held noise, actions change by far less than independent draws would
    actions = model.replay_buffer.actions[:150].ravel()
    assert np.abs(np.diff(actions)).mean() < 0.5 * actions.std() or actions.std() < 0.2


def test_reset_noise_without_use_sde_names_the_remedy(make_model):
    with pytest.raises(ValueError, match="use_sde=True"):
        make_model().policy.reset_noise()


@pytest.mark.parametrize("train_freq", [4, (3, "step"), (1, "episode")])
@pytest.mark.parametrize("gradient_steps", [-1, 2, 0])
def test_train_frequencies(make_model, train_freq, gradient_steps):
    model = make_model(train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=0, policy_kwargs={"net_arch": []})
    model.learn(24 if train_freq != (1, "episode") else 210)
    assert (model._n_updates > 0) == (gradient_steps != 0)


def test_her(make_model):
    env = BitFlippingEnv(n_bits=4, continuous=True)
    model = make_model("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=30)
    model.learn(80)
    assert env.action_space.contains(model.predict(env.reset()[0], deterministic=True)[0])


def test_vec_normalize_and_subprocesses(make_model):
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv))
    make_model(env=env, gradient_steps=-1).learn(60)
    env.close()


def test_callbacks_and_evaluation(make_model, tmp_path):
    env = gym.make("Pendulum-v1")
    callbacks = CallbackList(
        [
            CheckpointCallback(100, str(tmp_path), save_replay_buffer=True),
            EvalCallback(env, eval_freq=150, n_eval_episodes=1, best_model_save_path=str(tmp_path), warn=False, verbose=0),
            StopTrainingOnMaxEpisodes(1),
        ]
    )
    model = make_model().learn(1000, callback=callbacks)
    assert model.num_timesteps == 200
    assert {"best_model.zip", "rl_model_100_steps.zip"} <= {path.name for path in tmp_path.iterdir()}
    mean_return, _ = evaluate_policy(model, model.env, n_eval_episodes=1, warn=False)
    assert np.isfinite(mean_return)


def test_logged_names(make_model, tmp_path):
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(450, log_interval=1, tb_log_name="run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run_1")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in LOGGED if name != "n_updates"} | {"rollout/ep_rew_mean", "time/fps"} <= tags


def test_default_tensorboard_name(make_model, tmp_path):
    make_model(tensorboard_log=str(tmp_path)).learn(5)
    assert (tmp_path / "DQS_1").is_dir()


def test_policy_kwargs_of_the_caller_are_not_changed():
    def policy_kwargs():
        return {"net_arch": [4], "features_extractor_kwargs": {"features_dim": 8}, "normalize_images": False}

    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    given = policy_kwargs()
    DQS("CnnPolicy", env, policy_kwargs=given, buffer_size=10, use_sde=True)  # SB3 itself would add three entries
    assert given == policy_kwargs()


class OneStepEnv(gym.Env):
    """The reset observation is never a next observation; the best action is 0.7 in both dimensions of a matrix."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2, 1), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([1, 0], np.float32), {}

    def step(self, action):
        return np.array([0, 1], np.float32), -5 * float(np.abs(action - 0.7).sum()), True, False, {}


def test_actor_learns_in_the_states_it_acts_in():
    model = DQS("MlpPolicy", OneStepEnv(), ent_coef=0.3, learning_rate=3e-3, learning_starts=100, batch_size=64, seed=0,
                policy_kwargs={"net_arch": [32]}, device="cpu")  # fmt: skip
    model.learn(900)
    action, _ = model.predict(np.array([1, 0], np.float32), deterministic=True)
    assert np.abs(action - 0.7).max() < 0.25


def test_policy_by_class_and_custom_logger(make_model, tmp_path):
    model = DQS(MlpPolicy, "Pendulum-v1", buffer_size=100, learning_starts=10, policy_kwargs={"net_arch": [4]})
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(210, log_interval=1)
    assert (tmp_path / "progress.csv").read_text()


def test_setup_model_later_and_twice():
    model = DQS("MlpPolicy", "Pendulum-v1", buffer_size=10, _init_setup_model=False)
    assert not hasattr(model, "actor")
    model._setup_model()
    model._setup_model()
    assert model.target_entropy == -1.0
