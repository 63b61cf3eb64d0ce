# %% [markdown]
# # Goals, with hindsight experience replay
#
# A point in a plane must reach a random goal; the reward is -1 until it is there, 0 then. `HerReplayBuffer` and
# `MultiInputPolicy` are those of SB3. 2,500 steps take about a minute and a half on one core; `STEPS=600 python
# goals_with_her.py` is a quick look.

# %%
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3 import HerReplayBuffer

from sb3_dqs import DQS

STEPS = int(os.environ.get("STEPS", "2500"))
OUT = Path(os.environ.get("OUT", "."))
EPISODE = 25  # steps
th.set_num_threads(1)  # networks this small are no faster with more


# %%
class Reach(gym.Env):
    """A point moves by up to 0.1 per step and dimension; the goal counts as reached within 0.1."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Dict(
        {name: spaces.Box(-1, 1, (2,), np.float32) for name in ("observation", "achieved_goal", "desired_goal")}
    )

    def observe(self):
        return {"observation": self.point.copy(), "achieved_goal": self.point.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.goal = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return self.observe(), {}

    def step(self, action):
        self.point = (self.point + 0.1 * action).clip(-1, 1).astype(np.float32)
        reward = float(self.compute_reward(self.point, self.goal, {}))
        return self.observe(), reward, False, False, {"is_success": reward == 0}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.1).astype(np.float32)


gym.register("Reach-v0", Reach, max_episode_steps=EPISODE)

# %% [markdown]
# ## Train

# %%
model = DQS(
    "MultiInputPolicy",
    "Reach-v0",
    replay_buffer_class=HerReplayBuffer,
    replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"),
    gamma=0.95,
    learning_starts=200,
    seed=0,
    device="cpu",
)
model.learn(STEPS)

# %% [markdown]
# ## Paths of 20 episodes with deterministic actions

# %%
env, n_reached = gym.make("Reach-v0"), 0
figure = Figure(figsize=(4.2, 4.2), layout="constrained")
ax = figure.subplots()
for episode in range(20):
    obs, _ = env.reset(seed=1_000 + episode)
    path, info = [obs["achieved_goal"]], {}
    for _ in range(EPISODE):
        action, _ = model.predict(obs, deterministic=True)
        obs, _, _, _, info = env.step(action)
        path.append(obs["achieved_goal"])
    n_reached += info["is_success"]
    color = "tab:blue" if info["is_success"] else "tab:red"
    ax.plot(*np.array(path).T, color=color, linewidth=1, alpha=0.7)
    ax.plot(*path[0], ".", color=color)
    ax.plot(*obs["desired_goal"], "*", color="black", markersize=8)
print(f"{n_reached} of 20 goals reached after {model.num_timesteps:,} steps")
ax.set(title=f"{n_reached} of 20 goals (stars) reached", aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
figure.savefig(OUT / "goals_with_her.png", dpi=120)
