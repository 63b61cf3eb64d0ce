"""Saving, loading, going on: bit for bit where SB3's SAC is."""

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from toys import same

from sb3_dqs import DQS
from sb3_dqs.noise import NoiseLevels


@pytest.mark.parametrize("missing", ["policy", "critic.optimizer", "temperature", "target_estimator"])
def test_parameters_that_lack_a_part_are_refused_unless_exact_match_is_off(make_model, missing):
    model, other = make_model().learn(30), make_model(seed=1)
    params = model.get_parameters()
    del params[missing]
    with pytest.raises(ValueError, match=missing):
        make_model().set_parameters(params)
    before = other.get_parameters()[missing]
    other.set_parameters(params, exact_match=False)
    after = other.get_parameters()
    assert same(after.pop(missing), before) and same(after, params) and missing not in params


@pytest.mark.parametrize(
    ("saved", "own"), [("auto", "auto_0.2"), ("auto", 0.2), (0.1, "auto_0.2"), (0.1, 0.2), ("log_linear_1.0_0.1", "auto_0.2")]
)
def test_another_kind_of_ent_coef(make_model, tmp_path, saved, own):
    """Of two tuned temperatures the saved one is taken, otherwise the own one; the rest is loaded in any case."""
    first, second = make_model(ent_coef=saved).learn(40), make_model(ent_coef=own, seed=1)
    first.save(tmp_path / "model")
    loaded = DQS.load(tmp_path / "model", env=gym.make("Pendulum-v1"), ent_coef=own)
    params = first.get_parameters()
    second.set_parameters(params)
    assert same(params, first.get_parameters())  # the dictionary of the user is as before
    is_tuned = saved == "auto" and own == "auto_0.2"
    for model in (loaded, second):
        assert same(model.policy.state_dict(), first.policy.state_dict())
        assert same(model.target_estimator.state_dict(), first.target_estimator.state_dict())
        assert float(model.temperature(1.0)) == pytest.approx(float(first.temperature(1.0)) if is_tuned else 0.2)
    loaded.learn(40, reset_num_timesteps=False)


@pytest.mark.parametrize(("saved", "own"), [("white", "pink"), ("pink", "white"), ("pink", "pink")])
def test_another_exploration_noise_and_number_of_environments(make_model, tmp_path, saved, own):
    model = make_model(exploration_noise=saved).learn(40)
    model.save(tmp_path / "model")
    loaded = DQS.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 3), exploration_noise=own)
    assert same(loaded.policy.state_dict(), model.policy.state_dict())
    states = model.pink_latents.states if saved == own else th.empty(0, 1, 5)
    assert th.equal(loaded.pink_latents.states, states)
    loaded.learn(30, reset_num_timesteps=False)


def test_another_kind_of_denoiser_target(make_model, tmp_path):
    make_model().learn(40).save(tmp_path / "model")
    DQS.load(tmp_path / "model", denoiser_target="energy_gradient", env=gym.make("Pendulum-v1")).learn(40)


@pytest.mark.parametrize("use_sde", [False, True])
def test_policy_kwargs_may_be_given_again(make_model, tmp_path, use_sde):
    model = make_model(use_sde=use_sde, policy_kwargs={"noise": NoiseLevels(sigma_min=0.02), "critic_kwargs": {}})
    model.save(tmp_path / "model")
    given = {"net_arch": [8], "diffusion_steps": 3, "noise": NoiseLevels(sigma_min=0.02), "critic_kwargs": {}}
    loaded = DQS.load(tmp_path / "model", policy_kwargs=given)
    assert loaded.policy_kwargs == given == model.policy_kwargs
    assert loaded.actor.use_sde == use_sde and loaded.actor.noise.sigma_min == 0.02 and loaded.actor.diffusion_steps == 3
    with pytest.raises(ValueError, match="do not equal the stored policy kwargs"):
        DQS.load(tmp_path / "model", policy_kwargs={**given, "diffusion_steps": 4})


def test_load_with_other_arguments(make_model, tmp_path):
    make_model().save(tmp_path / "model")
    loaded = DQS.load(tmp_path / "model", learning_rate=0.0, n_mc_samples=3, buffer_size=1)
    assert loaded.n_mc_samples == loaded.target_estimator.pooled.n_samples == 3 and loaded.env is None
    loaded.predict(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"`n_mc_samples` must be an integer >= 2, got 0\."):
        DQS.load(tmp_path / "model", n_mc_samples=0)


def test_nothing_is_pickled_that_sac_does_not_pickle(make_model, tmp_path):
    make_model().learn(30).save(tmp_path / "dqs")
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=100).save(tmp_path / "sac")

    def keys(path):
        with zipfile.ZipFile(path) as archive:
            return set(json.loads(archive.read("data")))

    ours = {"n_mc_samples", "own_draws_freq", "own_share", "n_draws", "next_share", "n_copies", "policy_delay"}
    ours |= {"denoiser_target", "backup", "exploration_noise", "augmentation", "compile"}
    assert keys(tmp_path / "dqs.zip") - keys(tmp_path / "sac.zip") == ours


# Loads a model and its buffer, and goes on; in a process of its own
RESUME = """
import sys, torch as th
from sb3_dqs import DQS
from test_save_load import go_on

th.set_num_threads(1)
folder = sys.argv[1]
model = DQS.load(f"{folder}/model", device="cpu")
model.load_replay_buffer(f"{folder}/buffer")
go_on(model)
model.save(f"{folder}/resumed")
"""


def go_on(model: DQS) -> None:
    """SB3 saves neither the environment nor the state of the random generators: both are reset."""
    model.set_env(gym.make("Pendulum-v1"), force_reset=True)
    random.seed(7)
    np.random.seed(7)
    th.manual_seed(7)
    model.env.seed(7)
    model.action_space.seed(7)
    model.learn(200, reset_num_timesteps=False)


@pytest.mark.parametrize("exploration_noise", ["white", "pink"])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(make_model, tmp_path, exploration_noise):
    model = make_model(learning_starts=100, exploration_noise=exploration_noise).learn(200)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    go_on(model)
    subprocess.run([sys.executable, "-c", RESUME, tmp_path], check=True, cwd=Path(__file__).parent)
    resumed = DQS.load(tmp_path / "resumed")
    assert same(resumed.get_parameters(), model.get_parameters()) and resumed.num_timesteps == 400
