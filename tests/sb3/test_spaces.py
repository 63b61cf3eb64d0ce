"""Every observation space of SB3, and every box of actions."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from toys import RandomEnv

from sb3_dqs import DQS, MlpPolicy

BOX = spaces.Box(-1, 1, (2,), np.float32)
OBSERVATION_SPACES = {
    "box": BOX,
    "float64": spaces.Box(-1, 1, (3,), np.float64),
    "matrix": spaces.Box(-1, 1, (3, 2), np.float32),
    "unbounded": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
    "dictionary": spaces.Dict({"vector": BOX, "index": spaces.Discrete(3), "bits": spaces.MultiBinary(2)}),
}


def learn_and_predict(observation_space=BOX, action_space=BOX, batch_size=4):
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    env = RandomEnv(observation_space, action_space)
    model = DQS(
        policy, env, learning_starts=5, batch_size=batch_size, buffer_size=30, n_mc_samples=2,
        policy_kwargs={"net_arch": [2], "diffusion_steps": 3}, seed=0, device="cpu",
    )  # fmt: skip
    model.learn(12)
    obs, _ = env.reset()
    for deterministic in (False, True):
        action, _ = model.predict(obs, deterministic=deterministic)
        assert action in action_space
    return model


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_observation_spaces(name):
    learn_and_predict(OBSERVATION_SPACES[name])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_small_batches(batch_size):
    learn_and_predict(batch_size=batch_size)


@st.composite
def action_boxes(draw) -> spaces.Box:
    shape = draw(st_numpy.array_shapes(max_dims=2, max_side=3))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    low = draw(st_numpy.arrays(dtype, shape, elements=st.floats(-10, 10, width=32)))
    width = draw(st_numpy.arrays(dtype, shape, elements=st.floats(0.125, 10, width=32)))
    return spaces.Box(low, (low + width).astype(dtype), dtype=dtype)


@settings(max_examples=10)
@given(action_boxes())
def test_any_box_of_actions(action_space):
    """Any shape, asymmetric bounds, either precision: actions stay inside, and the buffer holds them scaled."""
    model = learn_and_predict(action_space=action_space)
    assert np.abs(model.replay_buffer.actions[: model.replay_buffer.size()]).max() <= 1 + 1e-5


def test_saturated_actions_stay_in_the_action_space():
    """-1.7 + 0.5 * 2 * 2.3 rounds to more than 0.6 in float32."""
    space = spaces.Box(-1.7, 0.6, (3,), np.float32)
    policy = MlpPolicy(BOX, space, lambda _: 1e-3, net_arch=[8])
    for action in policy.unscale_action(np.array([[1, -1, 1], [-1, 1, -1]], np.float32)):
        assert space.contains(action)
    with th.no_grad():
        policy.actor.net[-1].bias.fill_(100.0)  # an actor that always answers the bound
    actions, _ = policy.predict(np.zeros((4, 2), np.float32))
    assert all(space.contains(action) for action in actions)
    np.testing.assert_allclose(actions, space.high[None].repeat(4, 0), atol=1e-6)  # tanh(8) is a little less than 1
