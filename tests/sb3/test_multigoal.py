"""The environment with four goals."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env

from sb3_dqs.envs.multigoal import GOALS


@pytest.fixture
def env():
    env = gym.make("sb3_dqs/MultiGoal-v0", render_mode="rgb_array")
    env.reset(seed=0)
    return env


def test_is_an_environment_that_sb3_accepts(env):
    check_env(env.unwrapped)


@pytest.mark.parametrize("goal", range(4))
def test_every_goal_is_reached_at_the_same_return(env, goal):
    env.unwrapped.trajectory = [np.zeros(2, np.float32)]
    steps = [env.step((GOALS[goal] / 5).astype(np.float32)) for _ in range(5)]
    _, rewards, terminated, truncated, infos = zip(*steps, strict=True)
    # Four steps of full effort, at distances 4, 3, 2, 1; the last one but one is the radius itself, so a fifth: 0
    assert terminated == (False,) * 4 + (True,) and not any(truncated) and infos[-1]["goal"] == goal
    assert sum(rewards) == pytest.approx(10 - 5 * (1 + 1) - 0.1 * (16 + 9 + 4 + 1 + 0), abs=1e-5)


def test_episodes_end_after_thirty_steps(env):
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(30)]
    assert [truncated for *_, truncated, _ in steps] == [False] * 29 + [True]
    assert all("goal" not in info for *_, info in steps)


def test_the_point_stays_on_the_plane_shown(env):
    for _ in range(20):
        obs, *_ = env.step(np.array([0.9, 0.9], np.float32))
    assert obs.tolist() == [7.0, 7.0] and env.observation_space.contains(obs)


def test_rendering(env):
    blank = env.render()
    env.step(np.array([1.0, 0.5], np.float32))
    assert blank.shape == (400, 400, 3) and blank.dtype == np.uint8
    assert (env.render() != blank).any()
    assert gym.make("sb3_dqs/MultiGoal-v0").unwrapped.render() is None
