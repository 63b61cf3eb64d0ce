"""Fixtures: one thread per process, the same seed for every test, small models."""

from typing import Any

import gymnasium as gym
import pytest
import torch as th
from hypothesis import HealthCheck, settings

from sb3_dqs import DQS

# No test depends on the time it takes
settings.register_profile("no_deadline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no_deadline")

# Small networks and batches: these tests check behaviour, not learning
SMALL: dict[str, Any] = {"learning_starts": 20, "batch_size": 16, "buffer_size": 500, "n_mc_samples": 4}
SMALL_POLICY: dict[str, Any] = {"net_arch": [8], "diffusion_steps": 3}


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    th.set_num_threads(1)
    th.manual_seed(0)


@pytest.fixture
def make_model():
    """Factory of small models."""

    def make(policy: Any = "MlpPolicy", env: gym.Env | str = "Pendulum-v1", **kwargs: Any) -> DQS:
        kwargs = {**SMALL, "seed": 0, "device": "cpu"} | kwargs
        kwargs["policy_kwargs"] = SMALL_POLICY | kwargs.get("policy_kwargs", {})
        return DQS(policy, env, **kwargs)

    return make
