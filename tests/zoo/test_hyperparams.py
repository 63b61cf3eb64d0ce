"""The entries of dqs.yml, and those of the paper's setting."""

import warnings
from pathlib import Path

import pytest
import rl_zoo3
import yaml
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv

from sb3_dqs import DQS
from sb3_dqs.dqs_paper import hyperparams as ENTRIES_OF_THE_PAPER
from sb3_dqs.rl_zoo import get_hyperparams_path
from sb3_dqs.warn_once import warned_of

ENTRIES = yaml.safe_load(get_hyperparams_path().read_text(encoding="utf-8"))
ENTRIES_OF_SAC = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml").read_text())
MUJOCO = "HalfCheetah Hopper Walker2d Ant Humanoid Swimmer Reacher Pusher InvertedPendulum InvertedDoublePendulum".split()
OF_THE_ZOO = ("n_timesteps", "normalize", "env_wrapper", "n_envs", "policy")


def make_model(entry: dict) -> DQS:
    """As RL Zoo does, but in another environment."""
    arguments = {key: value for key, value in entry.items() if key not in OF_THE_ZOO}
    for key in ("policy_kwargs", "replay_buffer_kwargs"):
        if key in arguments:
            arguments[key] = eval(arguments[key])
    if str(arguments.get("learning_rate", "")).startswith("lin_"):
        arguments["learning_rate"] = float(arguments["learning_rate"].removeprefix("lin_"))
    if isinstance(arguments.get("train_freq"), list):
        arguments["train_freq"] = tuple(arguments["train_freq"])
    env = "Pendulum-v1"
    if "replay_buffer_class" in arguments:
        arguments["replay_buffer_class"] = HerReplayBuffer
        env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=4)
    warned_of.clear()
    return DQS(entry["policy"], env, device="cpu", **(arguments | {"buffer_size": 100}))


def test_every_environment_of_sac_has_an_entry():
    assert ENTRIES_OF_SAC.keys() - ENTRIES.keys() == set()


def test_both_versions_of_mujoco_have_the_same_entry():
    for name in MUJOCO:
        assert ENTRIES[f"{name}-v4"] == ENTRIES[f"{name}-v5"]


@pytest.mark.parametrize("env_id", ENTRIES)
def test_entry_makes_a_model(env_id):
    """DQS takes the arguments, and says of none that it has no effect."""
    assert {"n_timesteps", "policy"} <= ENTRIES[env_id].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(ENTRIES[env_id])


def test_the_paper_has_the_same_environments():
    assert set(ENTRIES_OF_THE_PAPER) == set(ENTRIES)


@pytest.mark.parametrize("env_id", ENTRIES)
def test_entry_of_the_paper_makes_a_model(env_id):
    entry = ENTRIES_OF_THE_PAPER[env_id]
    assert (entry["denoiser_target"], entry["n_mc_samples"], entry["backup"]) == ("energy_gradient", 1000, "hard")
    assert entry["ent_coef"].startswith("log_linear") and not entry["use_sde"]
    assert entry.get("gamma") == ENTRIES[env_id].get("gamma")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_model(entry).critic.has_target
