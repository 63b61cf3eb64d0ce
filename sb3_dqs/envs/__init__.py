"""Environments that show whether a policy keeps every good action; importing this package registers them."""

from sb3_dqs.envs.multigoal import MultiGoalEnv

__all__ = ["MultiGoalEnv"]
