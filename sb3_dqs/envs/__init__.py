"""Environments in which a policy shows whether it keeps every good action."""

import sb3_dqs.envs.multigoal  # noqa: F401  # registers it
