"""Nothing that is not finite acts, is learnt from or is saved, and the one at fault is named."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from toys import RandomEnv

from sb3_dqs import DQS
from sb3_dqs.finite import find_not_finite, is_finite

NAN, INF = float("nan"), float("inf")
OBS, ACTIONS = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float32)
ZEROS = np.zeros(3, np.float32)


# The networks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("net.1.bias", value) for value in (NAN, INF, -INF)],
        *[("gaussian.5.bias", value) for value in (NAN, INF, -INF)],
        *[("embed_features.weight", value) for value in (NAN, INF)],
        *[(name, NAN) for name in ("input_norm.bias", "gaussian.0.weight")],
    ],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_one_bad_weight_does_not_act(make_model, name, value, deterministic):
    model = make_model()
    model.predict(ZEROS, deterministic=deterministic)
    with th.no_grad():
        model.actor.get_parameter(name).view(-1)[0] = value
    with pytest.raises(ValueError, match=r"policy: the action .* is not finite"):
        model.predict(np.ones(3, np.float32), deterministic=deterministic)


def test_bad_weights_are_not_evaluated_and_collect_nothing(make_model):
    model = make_model(learning_starts=0)
    model.actor.embed_level.weight.data.fill_(NAN)
    with pytest.raises(ValueError, match="policy: the action"):
        evaluate_policy(model, gym.make("Pendulum-v1"), 1)
    with pytest.raises(ValueError, match="policy: the action"):
        model.learn(5)
    assert model.replay_buffer.size() == 0


def test_bad_critic_does_not_choose(make_model):
    model = make_model(policy_kwargs={"best_of_n_by_q": 4})
    model.critic.averaged_networks[0][-1].bias.data.fill_(NAN)
    with pytest.raises(ValueError, match="policy: the action"):
        model.predict(ZEROS, deterministic=True)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("policy", "actor.gaussian.5.weight", INF),
        ("policy", "critic.q_networks.1.0.bias", NAN),
        ("temperature", "log_ent_coef", NAN),
        ("target_estimator", "mean_ess.value", NAN),
    ],
)
def test_bad_parameters_are_neither_taken_nor_saved(make_model, tmp_path, part, key, value):
    model, path = make_model().learn(30), tmp_path / "model.zip"
    model.save(path)
    good = path.read_bytes()
    parameters = model.get_parameters()
    parameters[part] = {**parameters[part], key: th.full_like(parameters[part][key], value)}
    other = make_model(seed=1)
    before = other.actor.embed_features.weight.clone()
    with pytest.raises(ValueError, match=rf"set_parameters\(\): nothing is changed, because {part}\.{key} is not finite"):
        other.set_parameters(parameters)
    assert th.equal(before, other.actor.embed_features.weight)
    th.nn.Module.load_state_dict(getattr(model, part), parameters[part])
    with pytest.raises(ValueError, match=rf"nothing is written, because {part}\.{key} is not finite; load an earlier"):
        model.save(path)
    assert path.read_bytes() == good


def test_bad_parameters_in_a_file(make_model, tmp_path, monkeypatch):
    model = make_model().learn(30)
    model.critic.q_networks[1][1].weight.data[0, 0] = INF
    monkeypatch.setattr(DQS, "_check_state", lambda *args: None)
    model.save(tmp_path / "model")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"policy\.critic\.q_networks\.1\.1\.weight is not finite"):
        DQS.load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"policy\.critic\.q_networks\.1\.1\.weight is not finite"):
        make_model().set_parameters(tmp_path / "model")


def test_mask_of_minus_infinity_is_sound(make_model, tmp_path):
    class Masked(FlattenExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.register_buffer("mask", th.tensor([0, -INF, 0]))

        def forward(self, obs):
            return (super().forward(obs) + self.mask).softmax(dim=1)

    model = make_model(policy_kwargs={"features_extractor_class": Masked}).learn(30)
    model.save(tmp_path / "model")
    DQS.load(tmp_path / "model").predict(ZEROS)


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_gradient_that_is_not_finite(make_model, part):
    """The losses are, so that only the weights tell."""
    model = make_model().learn(30)
    next(iter(getattr(model, part).parameters())).register_hook(lambda gradient: gradient * INF)
    reason = rf"(policy\.{part}\.\S+|train/actor_loss) is not finite at step 30.* lower learning_rate .*learning_rate=0\.001"
    with pytest.raises(ValueError, match=reason):
        model.train(1, 16)


def test_find_not_finite():
    state = {"a": [th.zeros(2), {"b": th.tensor([1, INF])}], "c": th.tensor([1 + 1j, NAN]), "d": th.tensor(3), "e": "text"}
    assert find_not_finite(state) == "c" and find_not_finite(state["a"], name="a") is None
    assert find_not_finite({"policy": {"w.bias": th.tensor(INF)}}, {"w.bias"}) == "policy.w.bias"


@pytest.mark.parametrize("value", [1, True, 3e38, [1, 2.5], "text", [[1], [2, 3]], np.array([1, 2]), th.zeros(2), 1j])
def test_is_finite(value):
    assert is_finite(value)


@pytest.mark.parametrize("value", [NAN, -1e39, [1, INF], np.float16(INF), np.array([1, NAN], object), th.tensor([NAN])])
def test_is_not_finite(value):
    assert not is_finite(value)


# The environment


class StepEnv(RandomEnv):
    """What ``change(env, obs, reward, done, info)`` makes of the 9th step of six-step episodes, or of those that end one."""

    def __init__(self, change, at_end=False):
        super().__init__(spaces.Box(-1, 1, (2,), np.float64), ACTIONS)
        self.change, self.at_end, self.count = change, at_end, 0

    def step(self, action):
        assert np.isfinite(action).all()
        self.count += 1
        obs, reward, _, _, info = super().step(action)
        is_done = self.count % 6 == 0
        result = (obs, reward, is_done, info)
        if is_done if self.at_end else self.count == 9:
            result = self.change(*result)
        return *result[:3], False, result[3]


@pytest.mark.parametrize("value", [1e39, -1e300, NAN])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_numbers_beyond_single_precision(make_model, what, value):
    def change(obs, reward, done, info):
        return (np.full(2, value), reward, done, info) if what == "observation" else (obs, value, done, info)

    model = make_model(env=StepEnv(change))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=f"the {what} is not finite at step 9"):
        model.learn(20)
    assert model.replay_buffer.size() == 8
    with pytest.raises(ValueError, match=r"observation=.* is not finite"):
        model.predict(np.full(2, value))


def test_the_environment_at_fault_is_named(make_model):
    env = DummyVecEnv([lambda: StepEnv(None), lambda: StepEnv(lambda obs, reward, done, info: (obs, NAN, done, info))])
    env.envs[0].count = 100  # past the ninth step
    with pytest.raises(ValueError, match=r"the reward of environment 1 \(of 0 to 1; .*\) is not finite at step 18"):
        make_model(env=env).learn(20)


def test_the_environment_of_a_terminal_observation_is_named(make_model):
    """The bad number is the second of two, and of the first of two environments."""

    def spoil(obs, reward, done, info):
        return np.array([0, NAN]), reward, done, info

    env = DummyVecEnv([lambda: StepEnv(spoil, at_end=True), lambda: StepEnv(None)])
    with pytest.raises(ValueError, match=r"the terminal observation of environment 0 \(of 0 to 1; .*\) is not finite"):
        make_model(env=env).learn(20)


@pytest.mark.parametrize("extra", [{"terminal_observation": NAN}, {"terminal_observation": "none"}, {"debug": NAN}])
def test_infos_are_free_within_an_episode(make_model, extra):
    make_model(env=StepEnv(lambda obs, reward, done, info: (obs, reward, done, extra))).learn(30)


@pytest.mark.parametrize("form", [list, lambda obs: None, th.as_tensor, lambda obs: obs.astype(object)])
def test_forms_of_the_terminal_observation(make_model, form):
    env = DummyVecEnv([lambda: StepEnv(lambda obs, reward, done, info: (obs, reward, done, info), at_end=True)])
    step_wait = env.step_wait

    def reformed():
        obs, rewards, dones, infos = step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = form(info["terminal_observation"])
        return obs, rewards, dones, infos

    env.step_wait = reformed
    make_model(env=env).learn(30)


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_vec_normalize_is_named_and_not_saved(make_model, tmp_path, what):
    def change(obs, reward, done, info):
        return (np.full(2, -INF), reward, done, info) if what == "observation" else (obs, -INF, done, info)

    env = VecNormalize(DummyVecEnv([lambda: StepEnv(change)]))
    callback = CheckpointCallback(3, tmp_path, save_vecnormalize=True, save_replay_buffer=True)
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match=rf"the {what} is not finite.*-inf\].*VecNormalize's statistics"),
    ):
        make_model(env=env).learn(20, callback)
    saved = sorted(tmp_path.glob("*vecnormalize*"))
    assert [path.name.split("_")[-2] for path in saved] == ["3", "6"]  # not the 9th
    for path in saved:
        loaded = VecNormalize.load(path, DummyVecEnv([lambda: StepEnv(change)]))
        assert np.isfinite(loaded.ret_rms.var) and np.isfinite(loaded.obs_rms.mean).all()


class LateNoise(NormalActionNoise):
    """Not finite from the 5th draw on."""

    def __init__(self, value):
        super().__init__(np.zeros(1), np.ones(1))
        self.value, self.count = value, 0

    def __call__(self):
        self.count += 1
        return super().__call__() if self.count < 5 else np.full(1, self.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])  # SAC clips infinity to the bounds
def test_noise_is_at_fault(make_model, value):
    model = make_model(action_noise=LateNoise(value), env=StepEnv(None))
    with pytest.raises(ValueError, match=rf"`action_noise`: the noise is not finite at step 4: \[ *{value}\]\. Fix"):
        model.learn(8)
    assert model.replay_buffer.size() == 4 and model.env.envs[0].unwrapped.count == 4


def test_drawing_from_the_noise_changes_no_random_number(make_model):
    np.random.seed(3)
    expected = np.random.get_state()[1].copy()
    make_model(seed=None, action_noise=NormalActionNoise(np.zeros(1), np.ones(1)))
    assert np.array_equal(np.random.get_state()[1], expected)


@pytest.mark.parametrize("value", [INF, -0.1, NAN])
def test_learning_rate_on_its_way(make_model, value):
    model = make_model(learning_rate=lambda progress: value if 0.1 < progress < 0.3 else 1e-3)
    with pytest.raises(ValueError, match="learning_rate: the function gave"):
        model.learn(60)
    assert find_not_finite(model.get_parameters()) is None


def test_learning_rate_that_was_replaced(make_model):
    model = make_model().learn(30)
    model.lr_schedule = lambda progress: "slow"
    with pytest.raises(ValueError, match="learning_rate: the function gave 'slow'"):
        model.train(1, 16)


def test_boxes_beyond_single_precision(make_model):
    """In double precision they are boxes like others."""
    env = MissingEnv(1.0)
    env.action_space = spaces.Box(-1e100, 1e100, (1,), np.float64)
    env = TransformReward(env, lambda reward: 0.0)
    model = make_model(env=env, action_noise=NormalActionNoise(np.zeros(1), np.ones(1))).learn(30)
    assert abs(model.predict(ZEROS[:2])[0]) > 1e90


def test_schedules_end_at_zero_though_the_rollout_overshoots(make_model):
    make_model(learning_rate=lambda progress: 1e-3 * progress, train_freq=7, ent_coef=lambda p: 0.1 + p).learn(50)


class Missing(BaseFeaturesExtractor):
    """Takes what is not finite for missing, and says so."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)

    def forward(self, obs):
        is_there = obs.isfinite()
        return th.cat([th.where(is_there, obs, 0), is_there.float()], dim=1)


class MissingEnv(RandomEnv):
    """One of the two numbers is missing at every second step, and in the last observation."""

    def __init__(self, value):
        super().__init__(OBS, ACTIONS)
        self.value = value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([self.value, 0], np.float32), {}

    def step(self, action):
        _, reward, _, is_over, info = super().step(action)
        return np.array([0, self.value if self.n_steps % 2 else 1], np.float32), reward, False, is_over, info


@pytest.mark.parametrize("value", [NAN, -INF])
def test_missing_values_that_the_extractor_takes(make_model, value):
    model = make_model(env=MissingEnv(value), policy_kwargs={"features_extractor_class": Missing}).learn(40)
    assert not np.isfinite(model.replay_buffer.observations[:40]).all()
    evaluate_policy(model, MissingEnv(value), 1, warn=False)
    with pytest.raises(ValueError, match="the first observation is not finite"):
        make_model(env=MissingEnv(value)).learn(10)
    env = VecNormalize(DummyVecEnv([lambda: MissingEnv(value)]))  # whose means would be NaN for good
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="VecNormalize's statistics"):
        make_model(env=env, policy_kwargs={"features_extractor_class": Missing}).learn(10)


def test_conversions_and_hints_of_sb3(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict((ZEROS, {}))
    pandas = pytest.importorskip("pandas")
    assert model.predict(pandas.DataFrame(np.zeros((4, 3))))[0].shape == (4, 1)
    with pytest.raises(ValueError, match="observation="):
        model.predict(pandas.DataFrame(np.full((4, 3), NAN)))
    assert model.predict([0.0, 0.5, 1.0])[0].shape == (1,)


def test_environment_of_openai_gym(monkeypatch):
    """SB3 converts it with shimmy; here by a stand-in for both."""

    class Old:
        __module__ = "gym.envs"
        action_space = observation_space = object()

    converted = RandomEnv(OBS, ACTIONS)
    monkeypatch.setattr("sb3_dqs.checks.env._patch_env", lambda env: converted if isinstance(env, Old) else env)
    assert DQS("MlpPolicy", Old(), buffer_size=10, device="cpu").observation_space == OBS
