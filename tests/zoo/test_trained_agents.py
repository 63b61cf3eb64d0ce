"""The agents in rl-trained-agents/ load and act as when they were trained."""

from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dqs import DQS

AGENTS = Path(__file__).parents[2] / "rl-trained-agents" / "dqs"


RETURNS = {  # at least, in the mean of three episodes
    "BipedalWalker-v3": 250,
    "InvertedDoublePendulum-v5": 9_000,
    "LunarLanderContinuous-v3": 100,
    "MountainCarContinuous-v0": 90,
    "PandaReach-v3": -5,
    "Pendulum-v1": -400,
    "Reacher-v5": -10,
}
PACKAGES = {"BipedalWalker-v3": "Box2D", "LunarLanderContinuous-v3": "Box2D", "PandaReach-v3": "panda_gym"}


def test_every_agent_is_tested():
    assert sorted(path.name for path in AGENTS.iterdir()) == sorted(f"{name}_1" for name in RETURNS)


@pytest.mark.parametrize(("name", "least"), RETURNS.items())
def test_agent_reaches_its_return(name, least):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    env = Monitor(gym.make(name))
    env.reset(seed=0)
    model = DQS.load(AGENTS / f"{name}_1" / f"{name}.zip", env=env, device="cpu", buffer_size=1)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=3)
    assert mean >= least
