"""Saving, loading, going on: bit for bit where SB3's SAC is."""

import json
import subprocess
import sys
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dqs import DQS


def equal_parameters(first, second) -> bool:
    return all(th.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("ent_coef", ["auto", 0.1, "log_linear_1.0_0.1"])
def test_save_and_load(make_model, tmp_path, ent_coef):
    model = make_model(ent_coef=ent_coef).learn(60)
    model.save(tmp_path / "model")
    loaded = DQS.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"))
    assert equal_parameters(model.policy.state_dict(), loaded.policy.state_dict())
    assert loaded.temperature(0.5) == model.temperature(0.5)
    assert equal_parameters(model.temperature.state_dict(), loaded.temperature.state_dict())
    assert ent_coef != "auto" or loaded.temperature.mean_error != 0
    assert loaded.num_timesteps == model.num_timesteps and loaded._n_updates == model._n_updates
    obs = np.zeros((2, 3), np.float32)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    loaded.learn(60, reset_num_timesteps=False)


@pytest.mark.parametrize("saved", ["auto", 0.1, "log_linear_1.0_0.1"])
@pytest.mark.parametrize("loaded", ["auto_0.2", 0.2, "log_linear_0.2_0.1"])
def test_load_with_another_ent_coef(make_model, tmp_path, saved, loaded):
    first = make_model(ent_coef=saved).learn(40)
    first.save(tmp_path / "model")
    second = DQS.load(tmp_path / "model", env=gym.make("Pendulum-v1"), ent_coef=loaded)
    assert equal_parameters(first.policy.state_dict(), second.policy.state_dict())
    resumed = saved == "auto" and loaded == "auto_0.2"
    assert float(second.temperature(1.0)) == pytest.approx(float(first.temperature(1.0)) if resumed else 0.2)
    second.learn(40, reset_num_timesteps=False)


def test_get_parameters_begins_with_the_policy(make_model):
    names = list(make_model().get_parameters())
    assert names == ["policy", "actor.optimizer", "critic.optimizer", "temperature"]
    assert list(make_model(ent_coef=0.1).get_parameters()) == ["policy", "actor.optimizer", "critic.optimizer"]


def test_set_parameters(make_model):
    first, second = make_model(seed=0), make_model(seed=1)
    assert not equal_parameters(first.policy.state_dict(), second.policy.state_dict())
    second.set_parameters(first.get_parameters())
    assert equal_parameters(first.policy.state_dict(), second.policy.state_dict())


@pytest.mark.parametrize("ent_coef", ["auto_0.3", 0.3])
def test_set_parameters_with_and_without_a_temperature(make_model, ent_coef):
    """What does not fit is left out, and the dictionary of the user is as before; also one of an earlier version."""
    model = make_model(ent_coef=ent_coef)
    for params in (
        make_model(ent_coef=0.1).get_parameters(),
        make_model(ent_coef="auto").get_parameters() | {"temperature.optimizer": {}},
    ):
        names = list(params)
        model.set_parameters(params)
        assert list(params) == names
        taken = "temperature" in params and ent_coef == "auto_0.3"
        assert float(model.temperature(1.0)) == pytest.approx(1.0 if taken else 0.3)


def test_other_parameters_that_are_missing_are_named(make_model):
    params = {"policy": make_model().policy.state_dict()}
    with pytest.raises(ValueError, match=r"got {'policy'}$"):
        make_model().set_parameters(params)


def test_a_file_is_loaded_though_its_learning_rate_would_be_refused(make_model, tmp_path):
    """For what an earlier version accepted."""
    model = make_model()
    model.learning_rate = lambda progress: 1e-3 * (progress - 0.1)
    model.save(tmp_path / "model")
    DQS.load(tmp_path / "model").predict(np.zeros(3, np.float32))


def test_nothing_is_pickled_that_sac_does_not_pickle(make_model, tmp_path):
    make_model().learn(30).save(tmp_path / "dqs")
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=100).save(tmp_path / "sac")

    def keys(path):
        with zipfile.ZipFile(path) as archive:
            return set(json.loads(archive.read("data")))

    ours = {"n_mc_samples", "diffusion_steps", "score_target", "policy_delay", "backup", "compile", "mean_ess"}
    assert keys(tmp_path / "dqs.zip") - keys(tmp_path / "sac.zip") <= ours


def test_load_with_other_arguments(make_model, tmp_path):
    make_model().save(tmp_path / "model")
    loaded = DQS.load(tmp_path / "model", learning_rate=0.0, n_mc_samples=3, diffusion_steps=5, buffer_size=1)
    assert loaded.n_mc_samples == 3 and loaded.actor.diffusion_steps == 5 and loaded.env is None
    loaded.predict(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="n_mc_samples=0"):
        DQS.load(tmp_path / "model", n_mc_samples=0)


def test_set_env(make_model, tmp_path):
    model = make_model().learn(30)
    model.set_env(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model.learn(30)
    with pytest.raises(ValueError):
        model.set_env(gym.make("MountainCarContinuous-v0"))
    model.save(tmp_path / "model")
    loaded = DQS.load(tmp_path / "model")
    loaded.set_env(gym.make("Pendulum-v1"))
    loaded.learn(30)


def test_replay_buffer(make_model, tmp_path):
    model = make_model().learn(40)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make_model()
    other.load_replay_buffer(tmp_path / "buffer")
    assert np.array_equal(model.replay_buffer.actions, other.replay_buffer.actions)


# A part of a training ("whole", "first" or "second" half), of both algorithms, in a process of its own
PART = """
import random, sys
import gymnasium as gym, numpy as np, torch as th
from stable_baselines3 import SAC
from sb3_dqs import DQS

th.set_num_threads(1)
part, folder = sys.argv[1:]
kwargs = dict(learning_starts=100, batch_size=32, buffer_size=2000, policy_kwargs=dict(net_arch=[16]), seed=0, device="cpu")
for cls in (SAC, DQS):
    path = f"{folder}/{cls.__name__}"
    if part != "second":
        model = cls("MlpPolicy", "Pendulum-v1", **kwargs).learn(500)
    if part == "first":
        model.save(path)
        model.save_replay_buffer(path + "_buffer")
        continue
    if part == "second":
        model = cls.load(path, env=gym.make("Pendulum-v1"), device="cpu")
        model.load_replay_buffer(path + "_buffer")
    model.set_env(gym.make("Pendulum-v1"), force_reset=True)
    random.seed(7); np.random.seed(7); th.manual_seed(7); model.env.seed(7); model.action_space.seed(7)
    model.learn(500, reset_num_timesteps=False)
    np.save(f"{path}_{part}.npy", model.policy.parameters_to_vector())
"""


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path):
    """
    500 steps, saved, and 500 more in a new process equal 1000 in one; SAC under the same protocol beside it.
    As SB3 saves neither the environment nor the state of the random generators, both trainings reset and reseed
    after 500 steps.
    """
    for part in ("whole", "first", "second"):
        subprocess.run([sys.executable, "-c", PART, part, str(tmp_path)], check=True, capture_output=True)
    for name in ("SAC", "DQS"):
        whole, resumed = (np.load(tmp_path / f"{name}_{part}.npy") for part in ("whole", "second"))
        assert np.array_equal(whole, resumed), name
