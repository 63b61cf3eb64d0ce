"""
Losses and parameters after 200 steps of training, against those of the last deliberate change.

A refactoring leaves them as they are, bit for bit on the machine that recorded them. After a deliberate change of behaviour:
``python tests/snapshots/test_snapshots.py``, and say in the commit why they differ.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv

from sb3_dqs import DQS
from sb3_dqs.dqs_paper import PAPER

SNAPSHOTS = Path(__file__).with_name("snapshots.json")


def make_images() -> FakeImageEnv:
    env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False)
    env.observation_space.seed(0)  # what its observations are drawn from
    return env


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {**PAPER, "n_mc_samples": 32, "policy_kwargs": {"critic_class": "mlp"}},
    "hard backup": {"backup": "hard"},
    "fixed temperature": {"ent_coef": 0.1},
    "scheduled temperature": {"ent_coef": "log_linear_1.0_0.1"},
    "use_sde": {"use_sde": True, "sde_sample_freq": 4},
    "images": {"policy": "CnnPolicy", "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 16}}},
    "dictionary": {"policy": "MultiInputPolicy"},
    "gradient_steps=8": {"train_freq": 8, "gradient_steps": 8},
}
ENVS = {"images": make_images, "dictionary": lambda: BitFlippingEnv(n_bits=4, continuous=True)}
SMALL = {"learning_starts": 20, "batch_size": 32, "buffer_size": 300, "seed": 0, "device": "cpu"}


def machine() -> str:
    """What the last bits depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vendor = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("vendor_id")), "")
    return f"torch {th.__version__}, {platform.machine()}, {th.backends.cpu.get_cpu_capability()}, {vendor}"


def record(name: str) -> dict[str, Any]:
    """
    Train 200 steps.

    :param name: of the case
    :return: losses of the first gradient steps and of the last, norms of the networks, and a digest of all parameters
    """
    th.set_num_threads(1)
    kwargs = {"policy": "MlpPolicy", "env": ENVS.get(name, lambda: "Pendulum-v1")(), **SMALL, **CASES[name]}
    kwargs["policy_kwargs"] = {"net_arch": [16, 16], **kwargs.get("policy_kwargs", {})}
    model = DQS(**kwargs)
    model.actor.training_dtype = model.critic.training_dtype = None  # processors with and without bfloat16 products agree
    losses = []
    for n_steps in (22, 178):  # learning starts after 20
        model.learn(n_steps, reset_num_timesteps=False)
        names = ("train/critic_loss", "train/actor_loss", "train/ent_coef", "train/entropy")
        losses.append([model.logger.name_to_value.get(loss) for loss in names])
    parameters = th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])
    return {
        "early losses": losses[0],
        "late losses": losses[1],
        "norms": [
            float(sum(p.detach().double().pow(2).sum() for p in net.parameters())) for net in (model.actor, model.critic)
        ],
        "digest": hashlib.sha256(parameters.numpy().tobytes()).hexdigest()[:16],
    }


@pytest.mark.parametrize("name", list(CASES))
def test_training_is_what_it_was(name: str):
    snapshots = json.loads(SNAPSHOTS.read_text())
    found, expected = record(name), snapshots[name]
    if snapshots["machine"] == machine():
        assert found == expected
    # Elsewhere rounding differs, and what differs grows with the steps
    assert found["early losses"] == pytest.approx(expected["early losses"], rel=1e-3)


if __name__ == "__main__":
    SNAPSHOTS.write_text(json.dumps({"machine": machine(), **{name: record(name) for name in CASES}}, indent=1) + "\n")
