"""Replay buffers that sample new transitions more often."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_dqs.buffers import RecentDictReplayBuffer, RecentNStepReplayBuffer, RecentReplayBuffer

BOX = spaces.Box(-np.inf, np.inf, (1,), np.float64)
ACTIONS = spaces.Box(-1, 1, (1,), np.float32)


def filled(buffer, n_steps: int):
    """Of every transition observation and reward are its number, counted over steps, and its next observation is the next."""
    for step in range(n_steps):
        number = np.full((buffer.n_envs, 1), float(step))
        obs, next_obs = number, number + 1
        if isinstance(buffer, RecentDictReplayBuffer):
            obs, next_obs = {"x": obs}, {"x": next_obs}
        zeros = np.zeros(buffer.n_envs)
        buffer.add(obs, next_obs, np.zeros((buffer.n_envs, 1)), number[:, 0], zeros, [{}] * buffer.n_envs)
    return buffer


def sampled(buffer, batch_size: int) -> np.ndarray:
    return buffer.sample(batch_size).rewards.flatten().numpy()


@given(
    buffer_size=st.integers(2, 12),
    n_steps=st.integers(1, 30),
    n_envs=st.integers(1, 3),
    optimize_memory_usage=st.booleans(),
    recent_share=st.floats(0, 1),
    recent_size=st.integers(1, 40),
)
def test_samples_are_stored_transitions(buffer_size, n_steps, n_envs, optimize_memory_usage, recent_share, recent_size):
    buffer = RecentReplayBuffer(
        n_envs * buffer_size,
        BOX,
        ACTIONS,
        "cpu",
        n_envs,
        optimize_memory_usage=optimize_memory_usage,
        handle_timeout_termination=not optimize_memory_usage,
        recent_share=recent_share,
        recent_size=recent_size,
    )
    data = filled(buffer, n_steps).sample(64)
    numbers, n_recent = data.rewards.flatten().numpy(), round(64 * recent_share)
    n_stored = min(n_steps, buffer_size - optimize_memory_usage * (n_steps >= buffer_size))
    assert n_steps - n_stored <= numbers.min() and numbers.max() < n_steps
    np.testing.assert_array_equal(data.observations.flatten(), numbers)
    np.testing.assert_array_equal(data.next_observations.flatten(), numbers + 1)
    n_newest = min(max(recent_size // n_envs, 1), n_stored)
    assert (numbers[64 - n_recent :] >= n_steps - n_newest).all()


@pytest.mark.parametrize("recent_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("cls", [RecentReplayBuffer, RecentDictReplayBuffer, RecentNStepReplayBuffer])
def test_share_of_the_newest(cls, recent_share):
    """A tenth of the transitions are the newest: they are the share of them and a tenth of the rest."""
    obs_space = spaces.Dict({"x": BOX}) if cls is RecentDictReplayBuffer else BOX
    kwargs = {"n_steps": 1} if cls is RecentNStepReplayBuffer else {}
    buffer = cls(1_000, obs_space, ACTIONS, "cpu", recent_share=recent_share, recent_size=100, **kwargs)
    n, expected = 20_000, recent_share + (1 - recent_share) / 10
    np.random.seed(0)
    found = (sampled(filled(buffer, 1_300), n) >= 1_200).mean()
    assert abs(found - expected) <= 4 * np.sqrt(0.09 * (1 - recent_share) / n)  # four standard errors
    oldest = sampled(buffer, n).min()
    assert oldest == (300 if recent_share < 1 else 1_200)


def test_n_step_returns():
    buffer = filled(RecentNStepReplayBuffer(100, BOX, ACTIONS, "cpu", n_steps=3, gamma=0.5, recent_size=10), 50)
    data = buffer.sample(500)
    start = data.observations.flatten().numpy()
    n = np.minimum(3, 50 - start)
    expected = sum(0.5**k * (start + k) * (k < n) for k in range(3))
    np.testing.assert_allclose(data.rewards.flatten(), expected, rtol=1e-6)
    np.testing.assert_allclose(data.discounts.flatten(), 0.5**n)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"recent_share": 1.5}, "`recent_share` must be a number from 0 to 1, got 1.5"),
        ({"recent_share": float("nan")}, "`recent_share` must be a number from 0 to 1, got nan"),
        ({"recent_size": 0}, "`recent_size` must be an integer >= 1, got 0"),
        ({"recent_size": 2.5}, "`recent_size` must be an integer >= 1, got 2.5"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RecentReplayBuffer(10, BOX, ACTIONS, "cpu", **kwargs)
