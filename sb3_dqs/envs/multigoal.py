"""A point that can go to any of four goals: the environment in which a policy shows whether it keeps every good action."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

GOALS = np.array([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
GOAL_RADIUS = 1.0
POSITION_LIMIT = 7.0
# Weights of the reward's parts. At the start the four goals are equally good, and every other direction is worse.
GOAL_REWARD = 10.0
DISTANCE_WEIGHT = 0.1
EFFORT_WEIGHT = 1.0
# More than a step of random moves is worth to a policy that values its entropy at a temperature of 1: arriving pays
STEP_COST = 1.0


class MultiGoalEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point moves on the plane and is rewarded for reaching any one of four goals around it, after Haarnoja et al.
    (2017), "Reinforcement Learning with Deep Energy-Based Policies", https://arxiv.org/abs/1702.08165, section 5.1.
    Registered as ``sb3_dqs/MultiGoal-v0``, with episodes of at most 30 steps.

    - Observation: position, shape (2,), in [-7, 7]
    - Action: displacement, shape (2,), in [-1, 1]
    - Reward: ``-1 - |action|^2 - 0.1 * squared distance to the nearest goal``, and 10 more on reaching a goal, which ends
      the episode; ``info["goal"]`` is then its number, from 0 to 3
    - Start: near the middle, normally distributed with standard deviation 0.1

    :param render_mode: "rgb_array" or None
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  # as every environment of Gymnasium
    observation_space = spaces.Box(-POSITION_LIMIT, POSITION_LIMIT, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.trajectory: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        position = 0.1 * self.np_random.standard_normal(2)
        self.trajectory = [position.clip(-POSITION_LIMIT, POSITION_LIMIT).astype(np.float32)]
        return self.trajectory[-1], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, np.float64).clip(-1, 1)
        position = (self.trajectory[-1] + action).clip(-POSITION_LIMIT, POSITION_LIMIT).astype(np.float32)
        self.trajectory.append(position)
        distances = np.linalg.norm(GOALS - position, axis=1)
        goal = int(distances.argmin())
        reached = bool(distances[goal] < GOAL_RADIUS)
        cost = STEP_COST + EFFORT_WEIGHT * float((action**2).sum()) + DISTANCE_WEIGHT * distances[goal] ** 2
        reward = GOAL_REWARD * reached - cost
        return position, float(reward), reached, False, {"goal": goal} if reached else {}

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4, 4), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        ax = figure.add_subplot(aspect="equal", xlim=(-7, 7), ylim=(-7, 7))
        draw_goals(ax)
        ax.plot(*np.array(self.trajectory).T, ".-", color="tab:blue")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_goals(ax: Any) -> None:
    """
    Draw the goals as circles.

    :param ax: axes of Matplotlib
    """
    from matplotlib.patches import Circle

    for goal in GOALS:
        ax.add_patch(Circle(tuple(goal), GOAL_RADIUS, color="tab:red", alpha=0.4))


gym.register("sb3_dqs/MultiGoal-v0", entry_point="sb3_dqs.envs.multigoal:MultiGoalEnv", max_episode_steps=30)
