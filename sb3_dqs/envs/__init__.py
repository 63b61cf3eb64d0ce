"""Environments that show whether a policy keeps every good action; importing this package registers them."""

from sb3_dqs.envs.corridor import CorridorEnv
from sb3_dqs.envs.delayed_best import DelayedBestEnv
from sb3_dqs.envs.fork import ForkEnv
from sb3_dqs.envs.keeper import KeeperEnv
from sb3_dqs.envs.multigoal import MultiGoalEnv

__all__ = ["CorridorEnv", "DelayedBestEnv", "ForkEnv", "KeeperEnv", "MultiGoalEnv"]
