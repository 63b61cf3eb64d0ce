"""Running averages of modules."""

import copy

import pytest
import torch as th
from torch import nn

from sb3_dqs.averaging import averaging_rate, copy_without_gradients, parameter_norm, update_average


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


def test_buffers_that_are_not_saved_are_left_alone():
    module = nn.Linear(2, 3)
    module.register_buffer("noise", th.zeros(1), persistent=False)
    average = copy.deepcopy(module)
    module.noise = th.ones(4)
    update_average(average, module, 0.5)
    assert th.equal(average.noise, th.zeros(1))


def test_infinities_that_stay_are_no_nan():
    module = nn.Linear(2, 3)
    module.register_buffer("mask", th.tensor([0.0, -th.inf]))
    average = copy.deepcopy(module)
    update_average(average, module, 0.5)
    assert th.equal(average.mask, module.mask)


def test_averaging_rate_spans_the_last_twentieth_then_a_fixed_number():
    assert averaging_rate(1, 0.001) == 1
    value, spans = 0.0, 5_000
    for n in range(1, spans + 1):
        value += averaging_rate(n, 0.0) * (n - value)
    # Mean of n under weights proportional to n^19 is 20 / 21 of the last n
    assert value == pytest.approx(spans * 20 / 21, rel=0.005)
    assert averaging_rate(19_000, 0.001) > 0.001 == averaging_rate(20_000, 0.001)


def test_copy_shares_what_is_frozen_and_leaves_the_optimizer():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    module.optimizer = th.optim.SGD(module[1].parameters(), 0.1)
    result = copy_without_gradients(module)
    assert result[0].weight is module[0].weight and result[1].weight is not module[1].weight
    assert result.optimizer is None and not result.training
    assert not any(param.requires_grad for param in result.parameters()) and module[1].weight.requires_grad
    update_average(result, module, 0.5)
    assert th.equal(result[0].weight, module[0].weight)


def test_parameter_norm():
    module = nn.Linear(1, 2)
    module.weight.data = th.tensor([[3.0], [4.0]])
    module.bias.data = th.tensor([0.0, 12.0])
    assert float(parameter_norm(module)) == 13
    assert float(parameter_norm(nn.ReLU())) == 0
