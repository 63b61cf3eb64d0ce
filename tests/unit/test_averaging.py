"""Running averages of modules."""

import copy

import pytest
import torch as th
from torch import nn

from sb3_dqs.averaging import update_average


def test_is_the_geometric_average_of_what_the_module_was():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average, rate = copy.deepcopy(module), 0.3
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(5):
        module(th.randn(4, 2))  # moves the buffers
        for param in module.parameters():
            param.data.normal_()
        update_average(average, module, rate)
        for name, value in module.state_dict().items():
            expected[name] = value if name == "1.num_batches_tracked" else (1 - rate) * expected[name] + rate * value
    for name, value in average.state_dict().items():
        assert th.allclose(value, expected[name], atol=1e-6), name
    assert average[1].num_batches_tracked == 5


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_limits(rate):
    module = nn.Linear(2, 3)
    average, before = copy.deepcopy(module), copy.deepcopy(module)
    module.weight.data.normal_()
    update_average(average, module, rate)
    assert th.equal(average.weight, module.weight if rate else before.weight)
