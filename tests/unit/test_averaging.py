"""Running averages of modules."""

import copy

import pytest
import torch as th
from torch import nn

from sb3_dqs.averaging import RunningAverage, averaging_rate, update_average


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


def test_averaging_rate_spans_the_last_twentieth_then_a_fixed_number():
    assert averaging_rate(1, 0.001) == 1
    value, spans = 0.0, 5_000
    for n in range(1, spans + 1):
        value += averaging_rate(n, 0.0) * (n - value)
    # Mean of n under weights proportional to n^19 is 20 / 21 of the last n
    assert value == pytest.approx(spans * 20 / 21, rel=0.005)
    assert averaging_rate(19_000, 0.001) > 0.001 == averaging_rate(20_000, 0.001)


def shifted(module: nn.Module, amount: float) -> nn.Module:
    with th.no_grad():
        for param in module.parameters():
            param += amount
    return module


class TestRunningAverage:
    def test_is_the_average_of_what_the_module_was(self):
        module = nn.Linear(2, 3)
        average = RunningAverage(module, lowest_rate=0.5)
        expected = module.weight.detach().clone()
        for n in range(1, 8):
            shifted(module, 1.0)
            average.update(module)
            rate = max(20 / (n + 19), 0.5)
            expected = (1 - rate) * expected + rate * module.weight
        assert th.allclose(average.values[0], expected) and average.n_updates == 7

    def test_acts_in_the_place_of_tied_parameters_and_gives_them_back(self):
        layer = nn.Linear(2, 2)
        module = nn.ModuleDict({"first": layer, "second": nn.Sequential(layer)})
        average = RunningAverage(module, 0.5)
        weight, before = layer.weight, layer.weight.clone()
        average.update(shifted(module, 1.0))
        average.update(shifted(module, 1.0))
        with average.in_place_of(module):
            assert th.equal(module["first"].weight, module["second"][0].weight)
            inside = module["first"].weight.clone()
        assert th.allclose(inside, before + 2 - 1 / 21)  # rates 1 and 20 / 21
        assert layer.weight is weight and th.allclose(weight, before + 2)

    def test_gives_the_parameters_back_after_an_error(self):
        module = nn.Linear(2, 2)
        weight = module.weight
        with pytest.raises(KeyError), RunningAverage(module, 0.5).in_place_of(module):
            raise KeyError
        assert module.weight is weight

    @pytest.mark.parametrize("change", ["one bit", "row", "column", "data", "load", "swap", "add", "complex"])
    def test_notices_every_change(self, change):
        module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        module.register_parameter("factor", nn.Parameter(th.ones(2, dtype=th.complex64)))
        average = RunningAverage(module, 0.5)
        average.update(module)
        assert average.is_current(module)
        first, second = module[0].weight, module[1].weight
        if change == "one bit":
            with th.no_grad():
                first[0, 0] = th.nextafter(first[0, 0], th.tensor(10.0))
        elif change == "row":
            first.data[7] = 0
        elif change == "column":
            first.data[:, 7] = 0
        elif change == "complex":
            module.factor.data.mul_(1j)
        elif change == "data":
            first.data.mul_(1.01)
        elif change == "load":
            module[0].load_state_dict(nn.Linear(64, 64).state_dict())
        elif change == "swap":
            first.data, second.data = second.data, first.data
        else:
            module.append(nn.Linear(2, 2))
        assert not average.is_current(module)
        average.restart(module)
        average.update(module)
        assert average.is_current(module)

    def test_frozen_parameters_stay(self):
        module = nn.Linear(2, 2)
        average = RunningAverage(module, 0.5)
        module.bias.requires_grad_(False)
        before = module.bias.clone()
        average.update(shifted(module, 1.0))
        assert th.equal(average.values[1], before) and th.allclose(average.values[0], module.weight)
