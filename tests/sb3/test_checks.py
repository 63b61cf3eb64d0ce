"""Bad input gives one clear error that names the argument, the value and the remedy; nothing is half-built."""

import functools
import inspect
import types
import warnings
from fractions import Fraction

import conftest
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from toys import RandomEnv

from sb3_dqs import DQS, CnnPolicy, MlpPolicy
from sb3_dqs.checks.arguments import ARGUMENT_CHECKS, POLICY_KWARGS_CHECKS, check_arguments
from sb3_dqs.checks.policy import check_policy
from sb3_dqs.critics import Critic
from sb3_dqs.denoiser_targets import PosteriorMean
from sb3_dqs.finite import check_finite
from sb3_dqs.warn_once import warned_of

NAN, INF = float("nan"), float("inf")
BIG = 10**400  # not a float
# argument: bad values
BAD_ARGUMENTS = {
    "policy": [3, None, ["MlpPolicy"]],
    "env": [3, abs, ["Pendulum-v1"]],
    "learning_rate": [-1e-3, NAN, INF, "fast", None, True, BIG, Fraction(-1, 3), np.array([1e-3, 1e-4])],
    "buffer_size": [0, -1, 1.5, 1e6, "big", None, 2**63],
    "learning_starts": [NAN, "soon", BIG],
    "batch_size": [0, -256, 2.5, None, BIG, np.float32(8)],
    "tau": [-0.1, 1.1, NAN, "0.005", None, BIG, th.tensor([0.1, 0.2])],
    "gamma": [-0.1, 1.1, NAN, INF, np.float64(1.5), np.bool_(True)],
    "gradient_steps": [-2, 0.5, None],
    "n_steps": [0, -1, 1.5],
    "target_update_interval": [0, -1, 0.5],
    "target_entropy": ["automatic", NAN, None, -BIG, 1j],
    "sde_sample_freq": [1.5, None, "often"],
    "n_mc_samples": [1, 0, -8, 8.0, "8", 2**40],
    "own_share": [0, -0.5, 1.5, NAN, "all", None],
    "own_draws_freq": [0, -1, 8.0, None],
    "n_draws": [0, -1, 4.0, None],
    "next_share": [0, -0.5, 1.5, NAN, "all", None],
    "n_copies": [0, -1, 2.0, None],
    "policy_delay": [0, -1, 0.5, None],
    "denoiser_target": ["gradient", None, 1, PosteriorMean],
    "augmentation": ["shift", abs, th.nn.ReLU],
    "replay_buffer_class": ["HerReplayBuffer", 1, list, DictRolloutBuffer],
    "replay_buffer_kwargs": [[1], "n_sampled_goal=4"],
    "optimize_memory_usage": [1, "yes", None],
    "stats_window_size": [2.5, -3, "all"],
    "tensorboard_log": [5, ["logs"]],
    "verbose": ["loud", None, 0.5],
    "seed": [-7, 1.0, "random", 2**32],
    "device": ["quantum", None, 1.5],
    "backup": ["semi", None, True],
    "exploration_noise": ["red", None, 1],
    "compile": ["yes", 1, None],
    "policy_kwargs": [[64, 64], "net_arch=[64]"],
    "action_noise": [0.1, "normal"],
    "use_sde": ["no", 1, None],
    "use_sde_at_warmup": ["no", None],
    "train_freq": [0, -1, 1.5, None, (0, "step"), (1, "minute"), (1,)],
    "ent_coef": [0, -0.1, NAN, "automatic", None, True],
    "_init_setup_model": ["yes", 1],
}
BAD_POLICY_KWARGS = {
    "net_arch": [
        [0], [-64], [1.5], 64, "64", {"pi": [64]}, {"pi": [64], "vf": [64]}, {"pi": None, "qf": [8]},
        {"pi": {"pi": [8], "qf": [8]}, "qf": [8]},
    ],
    "critic_class": ["twin", None, ContinuousCritic, Critic],
    "critic_kwargs": [[1], "n_critics=2"],
    "diffusion_steps": [2, 0, -8, 8.5, None, np.array([8, 8])],
    "noise": [0.1, {"sigma_min": 0.1}],
    "solver": ["euler", None],
    "n_frequencies": [0, 1.5, None],
    "n_critics": [0, -1, 1.5],
    "best_of_n_by_q": ["yes", True, 0, 1.5],
    "actor_averaging_rate": [0, 1.5, None, "slow"],
    "share_features_extractor": ["no"],
    "normalize_images": ["no", 1],
    "use_sde": ["no", 1],
    "activation_fn": ["relu", None, th.nn.Conv1d, th.nn.Module, functools.partial(th.nn.Linear, 3), lambda: None],
    "features_extractor_class": ["NatureCNN", None],
    "features_extractor_kwargs": [[1], 4],
    "optimizer_class": ["adamw", None, th.nn.ReLU, th.optim.LBFGS],
    "optimizer_kwargs": [[1e-5], "eps"],
}  # fmt: skip
# Those that the policy ignores, with a warning
IGNORED_POLICY_KWARGS = {"log_std_init", "use_expln", "clip_mean"}
UNKNOWN_POLICY_KWARGS = {"net_arc": [64, 64], "ortho_init": True, "squash_output": True, "features_extractor": None}


def cases(table: dict) -> list[tuple]:
    return [(name, value) for name, values in table.items() for value in values]


def test_every_argument_has_one_entry():
    def arguments(cls):
        return set(inspect.signature(cls).parameters)

    assert arguments(DQS) == set(ARGUMENT_CHECKS) == set(BAD_ARGUMENTS)
    given_by_dqs = {"observation_space", "action_space", "lr_schedule"}
    assert arguments(MlpPolicy) - given_by_dqs == set(POLICY_KWARGS_CHECKS) == set(BAD_POLICY_KWARGS) | IGNORED_POLICY_KWARGS


@pytest.mark.parametrize(("name", "value"), cases(BAD_ARGUMENTS))
def test_bad_arguments(name, value, monkeypatch):
    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: pytest.fail("work started before the check"))
    with pytest.raises(ValueError) as error:
        DQS(**{"policy": "MlpPolicy", "env": "Pendulum-v1", name: value})
    message = str(error.value)
    if name == "ent_coef":
        assert message.startswith(f"ent_coef={value!r} is not a temperature: pass ")
    else:
        assert message.startswith(f"`{name}` must be ") and message.endswith((f", got {value!r}.", f"{str(value)[:400]}..."))


@pytest.mark.parametrize("name", ["tau", "buffer_size", "ent_coef"])
def test_numbers_of_more_digits_than_python_writes(name):
    with pytest.raises(ValueError, match=f"{name}.*an integer of 33220 bits"):
        DQS("MlpPolicy", "Pendulum-v1", **{name: 10**10000})


@pytest.mark.parametrize(("name", "value"), cases(BAD_POLICY_KWARGS))
def test_bad_policy_kwargs(name, value):
    with pytest.raises(ValueError) as error:
        DQS("MlpPolicy", "Pendulum-v1", policy_kwargs={name: value})
    message = str(error.value)
    assert message.startswith(f"policy_kwargs: `{name}` must be ") and message.endswith(f", got {value!r}.")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("net_arc", r"did you mean net_arch\? Known are .*diffusion_steps.*net_arch"),
        ("features_extractor", r"did you mean .*features_extractor.*\? Known are .*diffusion_steps.*net_arch"),
        ("ortho_init", r"did you mean log_std_init\? Known are .*diffusion_steps.*net_arch"),
        ("squash_output", r"known are .*diffusion_steps.*net_arch"),
        ("sde", r"known are .*diffusion_steps.*net_arch"),
        ("n_mc_samples", "it is one of DQS itself"),
    ],
)
def test_unknown_policy_kwargs(name, hint):
    with pytest.raises(ValueError, match=f"is not an argument of DQSPolicy; {hint}") as error:
        DQS("MlpPolicy", "Pendulum-v1", policy_kwargs={name: True})
    assert str(error.value).startswith(f"policy_kwargs: {name}=True ") and "use_sde" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "kwargs"),
    [
        ("replay_buffer_kwargs", {"replay_buffer_kwargs": {"alpha": 0.6}}),
        ("replay_buffer_kwargs", {"replay_buffer_kwargs": {"n_envs": 2}}),
        ("replay_buffer_class=HerReplayBuffer: it needs dict", {"replay_buffer_class": HerReplayBuffer}),
        ("features_extractor_class", {"policy_kwargs": {"features_extractor_class": th.nn.Bilinear}}),
        ("features_extractor_kwargs", {"policy_kwargs": {"features_extractor_kwargs": {"cnn_output_dim": 8}}}),
        ("critic_kwargs", {"policy_kwargs": {"critic_kwargs": {"n_quantiles": 25}}}),
        ("optimizer_kwargs", {"policy_kwargs": {"optimizer_kwargs": {"lr": 1e-3}}}),
        ("optimizer_kwargs", {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"betas": (0.9, 0.9)}}}),
        ("action_noise", {"action_noise": NormalActionNoise(np.zeros(2), np.ones(2))}),
        ("action_noise", {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), np.full(1, NAN))}),
        ("`action_noise` must give finite numbers", {"action_noise": NormalActionNoise(np.zeros(1), np.full(1, INF))}),
        ("ent_coef", {"ent_coef": lambda: 0.1}),
        ("ent_coef", {"ent_coef": lambda progress: [progress]}),
        ("learning_rate", {"learning_rate": lambda a, b: 1e-3}),
        ("buffer_size", {"buffer_size": 2**40}),
    ],
)
def test_arguments_that_do_not_go_together(names, kwargs):
    with pytest.raises(ValueError, match=names):
        DQS("MlpPolicy", "Pendulum-v1", device="cpu", **{"buffer_size": 10} | kwargs)


OBS = spaces.Box(-1, 1, (2,), np.float32)


class PairEnv(RandomEnv):
    """Observations of two parts."""

    def __init__(self):
        super().__init__(spaces.Dict({"a": OBS, "b": OBS}), spaces.Box(-1, 1, (1,), np.float32))


def test_replay_buffers_of_dictionaries():
    with pytest.raises(ValueError, match="`optimize_memory_usage` must be "):
        DQS("MultiInputPolicy", PairEnv(), buffer_size=10, optimize_memory_usage=True)
    with pytest.raises(AssertionError, match="not supported for Dict observation spaces"):  # SB3's
        DQS("MultiInputPolicy", PairEnv(), buffer_size=10, n_steps=3)


class OwnOption(MlpPolicy):
    """Takes an option of its own out of its keywords."""

    def __init__(self, *args, **kwargs):
        self.size = kwargs.pop("size", 0)
        super().__init__(*args, **kwargs)


class OwnSignature(MlpPolicy):
    """Takes what it must."""

    def __init__(self, obs_space, act_space, schedule, use_sde=False):
        super().__init__(obs_space, act_space, schedule, net_arch=[4], use_sde=use_sde)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"policy_kwargs": {"net_arch": (8, 4)}},
        {"policy_kwargs": {"net_arch": {"pi": (np.int32(8),), "qf": (4,), "critic": "none"}}},
        {"policy_kwargs": {"activation_fn": functools.partial(th.nn.Softmax, dim=1), "net_arch": [8]}},
        {"policy_kwargs": {"activation_fn": lambda: th.nn.Sequential(th.nn.LayerNorm(8), th.nn.CELU()), "net_arch": [8]}},
        {"policy_kwargs": types.MappingProxyType({"net_arch": [8]})},
        {"policy_kwargs": {"optimizer_class": functools.partial(th.optim.AdamW, eps=1e-5), "net_arch": [8]}},
        {"policy": OwnOption, "policy_kwargs": {"size": 3, "net_arch": [8]}},
        {"policy": OwnSignature},
        {"seed": np.int64(3), "verbose": False, "stats_window_size": np.int64(5)},
        {"stats_window_size": None, "tensorboard_log": None, "learning_starts": -5, "sde_sample_freq": 0, "use_sde": np.True_},
        {"tau": Fraction(1, 3), "gamma": th.tensor(0.9), "learning_rate": np.array(1e-3), "target_entropy": th.tensor(-2.0)},
        {
            "ent_coef": Fraction(1, 3),
            "n_mc_samples": np.uint8(3),
            "train_freq": (np.int64(2), "step"),
            "own_share": Fraction(1, 2),
        },
        {"n_draws": th.tensor(2), "policy_delay": np.array(2), "backup": "hard", "use_sde_at_warmup": np.False_},
    ],
)
def test_what_means_something_is_accepted(kwargs, tmp_path):
    start = {"policy": "MlpPolicy", "env": "Pendulum-v1", "buffer_size": 50, "batch_size": 4, "learning_starts": 5}
    model = DQS(**start | kwargs, device="cpu").learn(10)
    model.save(tmp_path / "model")
    DQS.load(tmp_path / "model", env=gym.make("Pendulum-v1"), tau=Fraction(1, 4), n_copies=np.int16(1)).learn(10)


def test_ignored_arguments_warn_once_at_the_line_of_the_user(make_model):
    warned_of.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            make_model(policy_kwargs={"clip_mean": 2.5})
    assert [str(warning.message)[:41] for warning in seen] == ["policy_kwargs: `clip_mean=2.5` is ignored"]
    assert seen[0].filename == conftest.__file__


def test_arguments_of_a_target_network_warn_where_there_is_none(make_model, recwarn):
    warned_of.clear()
    make_model(policy_kwargs={"critic_class": "mlp"}, tau=0.02, target_update_interval=2)
    make_model()
    assert not [warning for warning in recwarn if "no effect" in str(warning.message)]
    make_model(tau=0.02, target_update_interval=2)
    messages = [str(warning.message) for warning in recwarn if "no effect" in str(warning.message)]
    assert [message[:13] for message in messages] == ["`tau=0.02` ha", "`target_updat"]


@pytest.mark.parametrize("value", [-1e-3, NAN, INF, None, "fast"])
@pytest.mark.parametrize("bad_end", [0.0, 1.0])
def test_learning_rates_of_a_function_are_checked_before_training(value, bad_end):
    with pytest.raises(ValueError, match=rf"learning_rate: the function gave {value!r} at progress_remaining={bad_end}"):
        DQS("MlpPolicy", "Pendulum-v1", learning_rate=lambda progress: value if progress == bad_end else 1e-3)


def test_schedule_that_ends_at_zero_is_refused_before_training():
    with pytest.raises(ValueError, match=r"ent_coef: the schedule gave 0\.0 at progress_remaining=0\.000"):
        DQS("MlpPolicy", "Pendulum-v1", ent_coef=lambda progress: 0.1 * progress)


def test_good_numbers_are_accepted():
    """Also floats without a fraction, as in a script of a SAC user, and numbers of NumPy."""
    kwargs = {"buffer_size": np.int64(20), "batch_size": np.int32(4), "learning_starts": 5e0, "n_draws": np.int64(2)}
    kwargs |= {"gamma": np.float32(0.9), "target_entropy": np.float32(-2), "ent_coef": np.float32(0.1)}
    kwargs["policy_kwargs"] = {"net_arch": [np.int64(8)], "n_critics": np.int64(1), "diffusion_steps": np.int64(3)}
    DQS("MlpPolicy", "Pendulum-v1", **kwargs).learn(10)


@pytest.mark.parametrize(
    ("action_space", "remedy"),
    [
        (spaces.Discrete(2), "DQN or PPO"),
        (spaces.Box(-np.inf, np.inf, (2,), np.float32), "finite bounds"),
        (spaces.Box(-1, 1, (0,), np.float32), "remove that dimension"),
        (spaces.Box(0, 255, (3,), np.uint8), "dtype=numpy.float32"),
        (spaces.Box(-2e38, 2e38, (2,), np.float32), "nearer bounds"),
        (spaces.Box(-6e4, 6e4, (1,), np.float16), "nearer bounds"),
        (spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32)), "remove that dimension"),
    ],
)
def test_bad_action_spaces(action_space, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        DQS("MlpPolicy", RandomEnv(OBS, action_space))
    assert str(action_space) in str(error.value)


ACTIONS = spaces.Box(-1, 1, (1,), np.float32)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4, start=-2),
        spaces.MultiDiscrete([3, 3], start=[0, 1]),
        spaces.MultiDiscrete([[2, 2]]),
        spaces.Box(0, 1, (), np.float32),
        spaces.Box(0, 1, (2, 0), np.float32),
        spaces.Graph(OBS, None),
        spaces.Sequence(OBS),
        spaces.Tuple([OBS, OBS]),
        spaces.Dict(),
        spaces.Dict(a=spaces.Tuple([OBS])),
        spaces.Dict({"arm.left": OBS}),
        spaces.Dict(a=spaces.Discrete(2, start=1)),
    ],
    ids=str,
)
def test_bad_observation_spaces(space):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match="the observation space") as error:
        DQS(policy, RandomEnv(space, ACTIONS), buffer_size=10)
    assert str(space) in str(error.value)


class Joined(BaseFeaturesExtractor):
    """Reads what SB3's extractors cannot."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 2)

    def forward(self, obs):
        return th.cat([*obs.values()], dim=1)[:, :2]


def test_an_extractor_of_ones_own_may_read_more(make_model):
    space = spaces.Dict({"arm.left": OBS, "": OBS})
    make_model("MultiInputPolicy", RandomEnv(space, ACTIONS), policy_kwargs={"features_extractor_class": Joined}).learn(30)


def test_policies_of_dictionaries(make_model):
    """An extractor that reads other observations, too, is the user's choice, as in SAC."""
    with pytest.raises(ValueError, match="policy=MultiInputPolicy needs dictionary observations"):
        make_model("MultiInputPolicy", RandomEnv(OBS, ACTIONS))
    make_model("MultiInputPolicy", RandomEnv(OBS, ACTIONS), policy_kwargs={"features_extractor_class": FlattenExtractor})
    with pytest.raises(ValueError, match=r'policy=MlpPolicy cannot read dictionary observations.* pass "MultiInputPolicy"'):
        make_model(MlpPolicy, PairEnv())
    make_model(MlpPolicy, PairEnv(), policy_kwargs={"features_extractor_class": CombinedExtractor})
    for policy, env, extractor in (
        ("MultiInputPolicy", PairEnv(), FlattenExtractor),
        ("MlpPolicy", RandomEnv(OBS, ACTIONS), CombinedExtractor),
    ):
        with pytest.raises(ValueError, match=f"features_extractor_class={extractor.__name__} cannot read the observations"):
            make_model(policy, env, policy_kwargs={"features_extractor_class": extractor})


def test_discrete_environment_by_name():
    with pytest.raises(ValueError, match=r"Discrete\(2\)"):
        DQS("MlpPolicy", "CartPole-v1")
    with pytest.raises(ValueError):
        DQS("MlpPolicy", IdentityEnv())


def test_file_of_another_algorithm(tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=1).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"policy=.*Policy is not a policy of DQS"):
        DQS.load(tmp_path / "model")


def test_actions_that_are_not_scaled(make_model):
    policy = make_model().policy
    wrong_shapes = (th.zeros(2, 1), th.zeros(1, 2), th.zeros(1))
    for actions in (th.full((1, 1), 1.5), th.full((1, 1), NAN), np.zeros((1, 1), np.float32), *wrong_shapes):
        with pytest.raises(ValueError, match=r"`actions` must be .* got [\s\S]*: pass torch\.as_tensor"):
            policy.log_prob(th.zeros(1, 3), actions)


class SpoiltEnv(RandomEnv):
    """Gives a bad number at the 7th step, or at the beginning."""

    def __init__(self, what: str, value: float):
        super().__init__(OBS, ACTIONS)
        self.what, self.value, self.count = what, value, 0  # what: reward or (first, terminal) observation

    def spoil(self, obs):
        return np.full_like(obs, self.value)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return (self.spoil(obs) if "first" in self.what else obs), info

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        self.count += 1
        if self.count == 7:
            obs, reward = (obs, self.value) if self.what == "reward" else (self.spoil(obs), reward)
            terminated = "terminal" in self.what
        return obs, reward, terminated, False, info


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("what", "step"), [("first observation", 0), ("reward", 7), ("observation", 7), ("terminal observation", 7)]
)
def test_bad_numbers_of_the_environment_stop_training(make_model, what, value, step):
    model = make_model(env=SpoiltEnv(what, value))
    with pytest.raises(ValueError, match=f"the {what} is not finite at step {step}"):
        model.learn(20)
    # Nothing of that step was stored
    assert model.replay_buffer.size() == max(step - 1, 0)
    assert np.isfinite(model.replay_buffer.rewards).all()


@pytest.mark.parametrize("deterministic", [True, False])
def test_bad_observation_at_prediction(make_model, deterministic):
    with pytest.raises(ValueError, match=r"observation=\[nan nan nan\] is not finite"):
        make_model().predict(np.full(3, NAN, np.float32), deterministic=deterministic)


def test_nan_in_training_names_the_quantity_and_the_step(make_model):
    model = make_model().learn(30)
    model.replay_buffer.rewards[:] = NAN
    with pytest.raises(ValueError, match=r"train/critic_loss is not finite at step 31"):
        model.learn(10, reset_num_timesteps=False)


def test_check_finite_names_the_part_of_a_dictionary():
    check_finite("the observation", {"image": np.zeros(3), "goal": np.zeros(2)}, 5, "Fix it")
    with pytest.raises(ValueError, match=r"the observation \[goal\] is not finite at step 5: .* Fix it\."):
        check_finite("the observation", {"image": np.zeros(3), "goal": np.array([0, NAN])}, 5, "Fix it")


@given(
    st.dictionaries(st.sampled_from(list(ARGUMENT_CHECKS)), st.none() | st.text() | st.floats() | st.integers(), max_size=3)
)
def test_check_arguments_raises_nothing_but_value_errors(arguments):
    try:
        check_arguments(arguments)
    except ValueError as error:
        assert any(str(error).startswith((f"`{name}` must be", f"{name}=")) for name in arguments)


def test_check_policy_knows_the_arguments_of_parents():
    class Mixin:
        """Without a constructor."""

    class MixedPolicy(Mixin, MlpPolicy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    check_policy(CnnPolicy, {"net_arch": [4], "n_critics": 1, "features_extractor_class": None}, OBS)
    check_policy(MixedPolicy, {"net_arch": [4], "use_sde": True}, OBS)


@pytest.mark.parametrize("target_entropy", [0.7, 5.0])
def test_entropy_that_no_policy_has(target_entropy):
    with pytest.raises(ValueError, match=f"target_entropy={target_entropy} cannot be reached"):
        DQS("MlpPolicy", "Pendulum-v1", target_entropy=target_entropy)
    DQS("MlpPolicy", "Pendulum-v1", target_entropy=0.6, buffer_size=10)
    DQS("MlpPolicy", "Pendulum-v1", target_entropy=target_entropy, ent_coef=0.1, buffer_size=10)  # not used
