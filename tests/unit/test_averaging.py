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

    def test_stands_in_with_tied_parameters_while_the_module_stays(self):
        layer = nn.Linear(2, 2)
        module = nn.ModuleDict({"first": layer, "second": nn.Sequential(layer)})
        average = RunningAverage(module, 0.5)
        before = layer.weight.detach().clone()
        average.update(shifted(module, 1.0))
        average.update(shifted(module, 1.0))
        stand_in = average.stand_in(module)
        assert stand_in["first"].weight is stand_in["second"][0].weight
        assert th.allclose(stand_in["first"].weight, before + 2 - 1 / 21)  # rates 1 and 20 / 21
        assert module["first"] is layer and th.allclose(layer.weight, before + 2)

    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    @pytest.mark.parametrize("kind", ["gru", "weight_norm", "parametrization", "buffers and hooks"])
    def test_stand_in_computes_what_the_module_would_with_the_average(self, kind):
        module: nn.Module = nn.GRU(3, 3) if kind == "gru" else nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        calls: list[int] = []
        if kind == "weight_norm":
            nn.utils.weight_norm(module[0])
        elif kind == "parametrization":
            nn.utils.parametrizations.spectral_norm(module[0])
        elif kind == "buffers and hooks":
            module[0].register_forward_hook(lambda *_: calls.append(1))
            module[1].running_mean += 1
        average, x = RunningAverage(module, 0.5), th.rand(4, 3)
        module.eval()
        average.update(shifted(module, 0.1))
        average.update(shifted(module, 0.1))
        with th.no_grad():
            found = average.stand_in(module)(x)
            for param, value in zip(module.parameters(), average.values, strict=True):
                param.copy_(value)
            expected = module(x)
        first, second = (value[0] if kind == "gru" else value for value in (found, expected))
        assert th.allclose(first, second, atol=1e-6)
        assert len(calls) == 2 * (kind == "buffers and hooks")

    @pytest.mark.parametrize(
        "change", ["one bit", "one bias", "empty", "row", "column", "data", "load", "swap", "add", "complex"]
    )
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
        elif change == "one bias":
            module[1].bias.data[5] += 1
        elif change == "empty":
            module.register_parameter("empty", nn.Parameter(th.zeros(0)))
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

    def test_frozen_parameters_are_copied(self):
        module = nn.Linear(2, 2)
        average = RunningAverage(module, 0.5)
        module.bias.requires_grad_(False)
        before = module.bias.clone()
        average.update(shifted(module, 1.0))
        assert th.allclose(average.values[0], module.weight)
        assert th.equal(average.values[1], before + 1)  # moved by something else: copied


def test_waits_for_lazy_parameters():
    module = nn.LazyLinear(2)
    average = RunningAverage(module, 0.5)
    module(th.rand(1, 3))
    assert not average.is_current(module)
    average.restart(module)
    average.update(module)
    assert average.is_current(module)
