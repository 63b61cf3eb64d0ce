"""Bad input gives one clear error that names the argument, the value and the remedy; nothing is half-built."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import SAC
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.sac.policies import SACPolicy
from toys import RandomEnv

from sb3_dqs import DQS, CnnPolicy, MlpPolicy
from sb3_dqs.checks import ARGUMENT_CHECKS, POLICY_KWARGS_CHECKS, check_arguments, check_finite, check_policy
from sb3_dqs.critics import Critic
from sb3_dqs.denoiser_targets import PosteriorMean

NAN, INF = float("nan"), float("inf")
BAD_COUNTS, BAD_SHARES = [0, -1, 1.5, None], [0, -0.5, 1.5, NAN, "all", None]
# argument: bad values
BAD_ARGUMENTS = {
    "learning_rate": [-1e-3, NAN, INF, "fast", None, True],
    "buffer_size": [*BAD_COUNTS, 1e6, "big"],
    "learning_starts": [-1, NAN, "soon"],
    "batch_size": BAD_COUNTS,
    "tau": [-0.1, 1.1, NAN, "0.005", None],
    "gamma": [-0.1, 1.1, NAN, INF],
    "gradient_steps": [-2, 0.5, None],
    "n_steps": BAD_COUNTS,
    "target_update_interval": BAD_COUNTS,
    "target_entropy": ["automatic", NAN, None],
    "sde_sample_freq": [0, -2, 1.5],
    "n_mc_samples": [1, 0, -8, 8.0, "8"],
    "own_share": BAD_SHARES,
    "own_draws_freq": BAD_COUNTS,
    "n_draws": BAD_COUNTS,
    "next_share": BAD_SHARES,
    "n_copies": BAD_COUNTS,
    "policy_delay": BAD_COUNTS,
    "denoiser_target": ["gradient", None, 1, PosteriorMean],
    "augmentation": ["shift", abs, th.nn.ReLU],
    "replay_buffer_class": ["HerReplayBuffer", 1],
    "backup": ["semi", None, True],
    "compile": ["yes", 1, None],
    "policy_kwargs": [[64, 64], "net_arch=[64]"],
    "action_noise": [0.1, "normal"],
    "use_sde": ["no", 1, None],
    "use_sde_at_warmup": ["no", None],
    "train_freq": [*BAD_COUNTS, (0, "step"), (1, "minute"), (1,)],
    "ent_coef": [0, -0.1, NAN, "automatic", None, True],
}
BAD_POLICY_KWARGS = {
    "net_arch": [[0], [-64], [1.5], 64, "64", {"pi": [64]}, {"pi": [64], "vf": [64]}],
    "critic_class": ["twin", None, ContinuousCritic, Critic],
    "critic_kwargs": [[1], "n_critics=2"],
    "diffusion_steps": [2, 0, -8, 8.5, None],
    "noise": [0.1, {"sigma_min": 0.1}],
    "solver": ["euler", None],
    "n_frequencies": BAD_COUNTS,
    "n_critics": BAD_COUNTS,
    "best_of_n_by_q": ["yes", True, 0, 1.5],
    "share_features_extractor": ["no"],
    "activation_fn": ["relu", None],
}
OBS, ACTIONS = spaces.Box(-1, 1, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float32)


def cases(table: dict) -> list[tuple]:
    return [(name, value) for name, values in table.items() for value in values]


def test_the_tables_are_complete():
    assert set(ARGUMENT_CHECKS) | {"ent_coef"} == set(BAD_ARGUMENTS)
    assert set(POLICY_KWARGS_CHECKS) == set(BAD_POLICY_KWARGS)


@pytest.mark.parametrize(("name", "value"), cases(BAD_ARGUMENTS))
def test_bad_arguments(name, value, monkeypatch):
    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: pytest.fail("work started before the check"))
    with pytest.raises(ValueError) as error:
        DQS("MlpPolicy", "Pendulum-v1", **{name: value})
    message = str(error.value)
    if name == "ent_coef":
        assert message.startswith(f"ent_coef={value!r} is not a temperature: pass ")
    else:
        assert message.startswith(f"`{name}` must be ") and message.endswith(f", got {value!r}.")


@pytest.mark.parametrize(("name", "value"), cases(BAD_POLICY_KWARGS))
def test_bad_policy_kwargs(name, value):
    with pytest.raises(ValueError) as error:
        DQS("MlpPolicy", "Pendulum-v1", policy_kwargs={name: value})
    message = str(error.value)
    assert message.startswith(f"policy_kwargs: `{name}` must be ") and message.endswith(f", got {value!r}.")


@pytest.mark.parametrize("name", ["net_arc", "ortho_init", "squash_output", "features_extractor"])
def test_unknown_policy_kwargs(name):
    with pytest.raises(ValueError, match=r"is not an argument of DQSPolicy; known are .*diffusion_steps.*net_arch") as error:
        DQS("MlpPolicy", "Pendulum-v1", policy_kwargs={name: True})
    assert str(error.value).startswith(f"policy_kwargs: {name}=True ") and "use_sde" not in str(error.value)


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
        (spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32)), "remove that dimension"),
    ],
)
def test_bad_action_spaces(action_space, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        DQS("MlpPolicy", RandomEnv(OBS, action_space))
    assert str(action_space) in str(error.value)


@pytest.mark.parametrize(
    ("policy", "env", "message"),
    [
        ("MlpPolicy", None, "`env` must be an environment or its name, got None"),
        ("MlpPolicy", "CartPole-v1", r"Discrete\(2\)"),
        ("MlpPolicy", SimpleMultiObsEnv(discrete_actions=False), "MultiInputPolicy"),
        ("MlpLstmPolicy", "Pendulum-v1", "unknown"),
        ("MultiInputPolicy", "Pendulum-v1", "policy=MultiInputPolicy needs dictionary observations"),
        (SACPolicy, "Pendulum-v1", "policy=SACPolicy is not a policy of DQS: pass MlpPolicy, CnnPolicy or MultiInput"),
    ],
)
def test_wrong_policy_or_environment(policy, env, message):
    with pytest.raises(ValueError, match=message):
        DQS(policy, env)


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
    check_finite("the observation", {"image": np.zeros(3), "goal": np.zeros(2)}, 5)
    with pytest.raises(ValueError, match=r"the observation \[goal\] is not finite at step 5"):
        check_finite("the observation", {"image": np.zeros(3), "goal": np.array([0, NAN])}, 5)


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
