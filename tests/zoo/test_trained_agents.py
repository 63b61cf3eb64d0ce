"""The agents in rl-trained-agents/ load and act as when they were trained."""

from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dqs import DQS

AGENTS = Path(__file__).parents[2] / "rl-trained-agents" / "dqs"


@pytest.mark.parametrize(("name", "least"), [("MountainCarContinuous-v0", 90)])
def test_agent_reaches_its_return(name, least):
    env = Monitor(gym.make(name))
    env.reset(seed=0)
    model = DQS.load(AGENTS / f"{name}_1" / f"{name}.zip", device="cpu")
    mean, _ = evaluate_policy(model, env, n_eval_episodes=3)
    assert mean >= least
