"""The entries of dqs.yml."""

import warnings
from pathlib import Path

import pytest
import rl_zoo3
import yaml
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv

from sb3_dqs import DQS

ENTRIES = yaml.safe_load((Path(__file__).parents[2] / "hyperparams" / "dqs.yml").read_text())
ENTRIES_OF_SAC = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml").read_text())
OF_THE_ZOO = ("n_timesteps", "normalize", "env_wrapper", "n_envs", "policy")


def test_every_environment_of_sac_has_an_entry():
    assert ENTRIES_OF_SAC.keys() - ENTRIES.keys() == set()


@pytest.mark.parametrize("env_id", ENTRIES)
def test_entry_makes_a_model(env_id):
    """DQS takes the arguments, and says of none that it has no effect."""
    entry = {key: value for key, value in ENTRIES[env_id].items() if key not in OF_THE_ZOO}
    for key in ("policy_kwargs", "replay_buffer_kwargs"):
        if key in entry:
            entry[key] = eval(entry[key])
    if str(entry.get("learning_rate", "")).startswith("lin_"):
        entry["learning_rate"] = float(entry["learning_rate"].removeprefix("lin_"))
    if isinstance(entry.get("train_freq"), list):
        entry["train_freq"] = tuple(entry["train_freq"])
    env = "Pendulum-v1"
    if "replay_buffer_class" in entry:
        entry["replay_buffer_class"] = HerReplayBuffer
        env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DQS(ENTRIES[env_id]["policy"], env, device="cpu", **(entry | {"buffer_size": 100}))
    assert model.learning_rate == entry.get("learning_rate", 1e-3)
