"""The environments in which it matters to keep several good actions."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env

from sb3_dqs.envs.fork import ANGLES
from sb3_dqs.envs.keeper import CORNERS


@pytest.mark.parametrize("name", ["Corridor", "DelayedBest", "Fork", "Keeper"])
def test_is_an_environment_that_sb3_accepts(name):
    check_env(gym.make(f"sb3_dqs/{name}-v0").unwrapped)


class TestKeeper:
    def test_one_favourite_corner_is_always_saved(self):
        env = gym.make("sb3_dqs/Keeper-v0")
        env.reset(seed=0)
        # Of the first shot the keeper knows nothing
        rewards = [env.unwrapped.step(CORNERS[2].astype(np.float32))[1] for _ in range(50)]
        assert not any(rewards[1:])

    def test_corners_in_turn_are_saved_about_once_in_four(self):
        env = gym.make("sb3_dqs/Keeper-v0")
        env.reset(seed=0)
        steps = [env.unwrapped.step(CORNERS[shot % 4].astype(np.float32)) for shot in range(400)]
        assert np.mean([reward for _, reward, *_ in steps]) == pytest.approx(0.75, abs=0.11)  # five standard errors
        assert [info["corner"] for *_, info in steps[:4]] == [0, 1, 2, 3]

    def test_reward_falls_with_the_distance_from_the_corner(self):
        env = gym.make("sb3_dqs/Keeper-v0")
        env.reset(seed=0)
        env.unwrapped.step(CORNERS[0].astype(np.float32))
        _, reward, terminated, *_ = env.unwrapped.step(CORNERS[3] + np.array([0.2, 0]))
        assert reward == pytest.approx(np.exp(-0.5)) and terminated


class TestFork:
    @pytest.mark.parametrize("opening", range(4))
    def test_all_routes_have_the_same_return(self, opening):
        env = gym.make("sb3_dqs/Fork-v0")
        env.reset(seed=0)
        env.unwrapped.position = np.zeros(2)
        action = np.array([np.cos(ANGLES[opening]), np.sin(ANGLES[opening])])
        steps = [env.step(action) for _ in range(3)]
        assert [terminated for _, _, terminated, _, _ in steps] == [False, False, True]
        assert sum(reward for _, reward, *_ in steps) == pytest.approx(10 - 3 * 2) and steps[-1][4]["route"] == opening

    @pytest.mark.parametrize(("closed", "angle"), [((), 0.0), ((0,), ANGLES[0]), ((), ANGLES[0] + np.deg2rad(11))])
    def test_walls_and_closed_openings_end_the_episode(self, closed, angle):
        env = gym.make("sb3_dqs/Fork-v0", closed=closed)
        env.reset(seed=0)
        env.unwrapped.position = np.zeros(2)
        position, reward, terminated, _, info = env.step(np.array([np.cos(angle), np.sin(angle)]))
        assert reward == -5 and terminated and np.linalg.norm(position) < 0.71 and not info


class TestCorridor:
    @staticmethod
    def outward(env, angle):
        """Steps from the middle in one direction, to the end of the episode."""
        env.reset(seed=0)
        env.unwrapped.position = np.zeros(2)
        steps = [env.step(np.array([np.cos(angle), np.sin(angle)]))]
        while not (steps[-1][2] or steps[-1][3]):
            steps.append(env.step(np.array([np.cos(angle), np.sin(angle)])))
        return steps

    @pytest.mark.parametrize("angle", [0.0, 1.0, 4.0])
    def test_speed_is_rewarded_in_every_direction(self, angle):
        steps = self.outward(gym.make("sb3_dqs/Corridor-v0"), angle)
        assert [reward for _, reward, *_ in steps] == pytest.approx([1 - 0.5**n for n in range(1, 21)])

    @pytest.mark.parametrize("door", range(8))
    def test_only_the_open_door_leads_to_the_goal(self, door):
        env = gym.make("sb3_dqs/Corridor-v0", door=door)
        steps = self.outward(env, 2 * np.pi * door / 8)
        assert steps[-1][1] == 10 and steps[-1][2] and steps[-1][4]["is_success"]
        steps = self.outward(env, 2 * np.pi * (door + 1) / 8)
        assert len(steps) == 20 and not any(reward for _, reward, *_ in steps)
        assert 5 * np.linalg.norm(steps[-1][0][:2]) <= 2

    @pytest.mark.parametrize(
        ("position", "velocity"),
        [([-2.4, 0.0], [1.0, 0.0]), ([1.6, -1.15], [0.55, 0.83])],  # from outside, and aslant, to behind the door
    )
    def test_wall_stops_the_point_wherever_it_comes_from(self, position, velocity):
        env = gym.make("sb3_dqs/Corridor-v0", door=0)
        env.reset(seed=0)
        env.unwrapped.position, env.unwrapped.velocity = np.array(position), np.array(velocity)
        is_inside = np.linalg.norm(position) <= 2
        for _ in range(3):
            obs, *_ = env.step(np.array(velocity))
        assert (5 * np.linalg.norm(obs[:2]) <= 2) == is_inside

    def test_refuses_another_door(self):
        with pytest.raises(ValueError, match="`door` must be an integer from 0 to 7, or None for the open field, got 8"):
            gym.make("sb3_dqs/Corridor-v0", door=8)


class TestDelayedBest:
    @pytest.mark.parametrize(("action", "n_steps", "expected"), [(-1.0, 1, 5.0), (1.0, 6, 20.0)])
    def test_both_goals(self, action, n_steps, expected):
        env = gym.make("sb3_dqs/DelayedBest-v0")
        env.reset()
        steps = [env.step(np.array([action])) for _ in range(n_steps)]
        assert sum(reward for _, reward, *_ in steps) == pytest.approx(expected) and steps[-1][2]

    def test_small_steps_cost(self):
        env = gym.make("sb3_dqs/DelayedBest-v0")
        env.reset()
        assert env.step(np.array([0.0]))[1] == -1
