"""Environments for the tests of RL Zoo: ``--gym-packages zoo_envs``. Short episodes, so that evaluations are quick."""

import gymnasium as gym

gym.register("ShortPendulum-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=10)
gym.register(
    "Goal-v0",
    entry_point="stable_baselines3.common.envs:BitFlippingEnv",
    kwargs={"n_bits": 3, "continuous": True},
    max_episode_steps=10,
)
