"""Batches of observations of every kind."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_dqs.observations import count, select, zero_observations

OBS = {"image": th.arange(24, dtype=th.uint8).reshape(4, 2, 3), "vector": th.arange(4.0).unsqueeze(1)}


@pytest.mark.parametrize("rows", [slice(1, 3), th.tensor([3, 0])])
def test_rows_of_tensors_and_of_dictionaries(rows):
    selected = select(OBS, rows)
    assert selected.keys() == OBS.keys() and count(OBS) == 4
    for key, part in OBS.items():
        assert th.equal(selected[key], part[rows]) and th.equal(select(part, rows), part[rows])
    assert count(selected) == count(selected["image"]) == 2


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (spaces.Box(0, 255, (3, 8, 8), np.uint8), (3, 8, 8), th.uint8),
        (spaces.Discrete(5), (1,), th.int64),
        (spaces.MultiBinary(4), (4,), th.int8),
    ],
)
def test_zeros_of_every_space(space, shape, dtype):
    for obs in (zero_observations(space, 2, "cpu"), zero_observations(spaces.Dict({"part": space}), 2, "cpu")["part"]):
        assert obs.shape == (2, *shape) and obs.dtype == dtype and not obs.any()
