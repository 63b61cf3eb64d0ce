"""Exponential moving averages."""

import pytest
import torch as th

from sb3_dqs.running_mean import RunningMean


def test_mean_of_a_constant_is_approached_by_the_rate():
    initial = th.tensor([1.0, 5.0])
    mean = RunningMean(initial, rate=0.1)
    for _ in range(7):
        mean.update(th.tensor([3.0, 2.0], requires_grad=True))
    kept = 0.9**7
    assert mean.value.tolist() == pytest.approx([3 - 2 * kept, 2 + 3 * kept])
    assert initial.tolist() == [1, 5] and not mean.value.requires_grad


@pytest.mark.parametrize("weight", [0, 0.5, th.tensor(0.5), th.tensor(0)])
def test_weight_is_a_factor_of_the_rate(weight):
    mean = RunningMean(1.0, rate=0.2)
    mean.update(th.tensor(2.0), weight)
    assert mean.value.item() == pytest.approx(1 + 0.2 * float(weight))
