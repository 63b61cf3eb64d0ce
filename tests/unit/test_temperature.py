"""Fixed, scheduled and tuned temperatures."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch as th

from sb3_dqs.temperature import (
    AutoTemperature,
    FixedTemperature,
    ScheduledTemperature,
    Temperature,
    log_linear,
    make_temperature,
)


def values(temperature: Temperature, *progress: float) -> list[float]:
    return [temperature(each).item() for each in progress]


def test_fixed():
    temperature = make_temperature(0.2)
    assert isinstance(temperature, FixedTemperature) and values(temperature, 1.0, 0.5, 0.0) == pytest.approx([0.2] * 3)
    assert temperature.update(th.tensor(0.0), 0.1) is None and temperature.state_dict() == {}
    assert temperature(1.0).shape == ()


@pytest.mark.parametrize("ent_coef", ["log_linear_1.0_0.01", partial(log_linear, 1.0, 0.01)])
def test_log_linear_schedule(ent_coef):
    temperature = make_temperature(ent_coef)
    assert isinstance(temperature, ScheduledTemperature) and temperature.update(th.tensor(0.0), 0.1) is None
    assert values(temperature, 1.0, 0.5, 0.0) == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_schedule_that_leaves_the_positive_numbers(value):
    temperature = make_temperature(lambda progress: 0.5 if progress > 0.3 else value)
    assert temperature(1.0) == 0.5
    with pytest.raises(ValueError, match=r"ent_coef: the schedule gave .* at progress_remaining=0\.200"):
        temperature(0.2)


def test_temperature_of_the_user_is_copied():
    given = AutoTemperature(0.3, target_entropy=-5.0, action_dim=2, gain=1.0)
    temperature = make_temperature(given, target_entropy=-1.0, action_dim=1)
    temperature.update(th.tensor(100.0), 0.1)
    assert isinstance(temperature, AutoTemperature) and temperature.gain == 1.0 and temperature.target_entropy == -5.0
    assert given(1.0).item() == pytest.approx(0.3) and temperature(1.0) < 0.29


@pytest.mark.parametrize(("ent_coef", "initial"), [("auto", 1.0), ("auto_0.1", 0.1)])
def test_tuned_temperature_starts_where_it_is_told_and_is_saved(ent_coef, initial):
    temperature = make_temperature(ent_coef, -1.0, 1)
    assert temperature(1.0).item() == pytest.approx(initial) and temperature(1.0).shape == ()
    temperature.update(th.tensor(3.0, requires_grad=True), 0.1)
    assert not temperature(1.0).requires_grad
    other = make_temperature("auto", -1.0, 1)
    other.load_state_dict(temperature.state_dict())
    for each in (temperature, other):  # the running mean of the error, too
        each.update(th.tensor(-3.0), 0.1)
    assert temperature(0.5) == other(0.5)


@pytest.mark.parametrize(
    ("entropy", "rate"), [(10.0, -1.0), (-10.0, 3.0), (-6.0, 0.0), (-5.9, -10 * 0.1 / 3), (-6.1, 10 * 0.1 / 3)]
)
def test_steps_of_the_tuned_temperature(entropy, rate):
    """10 times the error per half dimension, from -3 to 1, times the learning rate; the loss is that before the step."""
    temperature = make_temperature("auto_0.5", target_entropy=-6.0, action_dim=6)
    for _ in range(200):  # until the running mean is there
        temperature.update(th.tensor(entropy), 1e-3)
    before = temperature.log_ent_coef.item()
    loss = temperature.update(th.tensor(entropy), 1e-3)
    assert loss.item() == pytest.approx(-rate * before, rel=1e-3, abs=1e-6)
    assert temperature.log_ent_coef.item() - before == pytest.approx(1e-3 * rate, rel=1e-2, abs=1e-6)


def test_fields_of_the_tuned_temperature():
    temperature = AutoTemperature(1.0, target_entropy=0.0, action_dim=2, gain=2.0, max_rise=1.5, error_update_rate=0.25)
    temperature.update(th.tensor(0.4), 0.1)
    assert temperature.log_ent_coef.item() == pytest.approx(-0.1 * 2 * 0.25 * 0.4)
    temperature.update(th.tensor(-100.0), 0.1)
    assert temperature.log_ent_coef.item() == pytest.approx(-0.1 * 2 * 0.25 * 0.4 + 0.1 * 1.5)


def test_tuned_temperature_keeps_the_entropy_of_a_growing_critic_at_its_target():
    """
    A policy exp(Q / ent_coef) whose Q is quadratic and grows by one learning rate per step; the noise of an estimate of the
    entropy is one nat. The mean error of 500 steps is within 0.5 nats.
    """
    dim, target_entropy, learning_rate, errors = 6, -6.0, 3e-4, []
    temperature = make_temperature("auto_0.01", target_entropy, dim)
    scale = math.exp(2 * 6 / dim) * 2 * math.pi * math.e * 0.01  # the entropy is at its target
    for _ in range(2000):
        scale *= math.exp(learning_rate)
        entropy = dim / 2 * math.log(2 * math.pi * math.e * temperature(1.0).item() / scale)
        errors.append(entropy - target_entropy)
        temperature.update(th.tensor(entropy + th.randn(()).item()), learning_rate)
    assert abs(np.mean(errors[-500:])) < 0.5


@pytest.mark.parametrize(
    "ent_coef",
    ["automatic", "auto_", "auto_0", "auto_-1", "log_linear_1", "log_linear_1_0", "high", 0.0, -1.0, None, [1], True],
)
def test_errors_name_the_value_and_the_choices(ent_coef):
    with pytest.raises(ValueError, match=r'ent_coef=.* is not a temperature: pass "auto"'):
        make_temperature(ent_coef)


class TestBounds:
    """A tuned temperature stays within the scale of Q."""

    def make(self, initial: float) -> AutoTemperature:
        return AutoTemperature(initial, target_entropy=-2.0, action_dim=2, min_ratio=0.01, max_ratio=10.0)

    def test_is_lifted_to_the_least_and_says_so_once(self):
        temperature = self.make(1e-9)
        with pytest.warns(UserWarning, match=r"target_entropy=-2 with it: it is nearly a point; raise"):
            temperature.bound(th.tensor(5.0))
        assert temperature(1.0).item() == pytest.approx(0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(50):
                temperature.update(th.tensor(1.0), 0.1)  # falls
                temperature.bound(th.tensor(5.0))
        assert temperature(1.0).item() == pytest.approx(0.05)

    def test_rises_to_the_largest(self):
        temperature = self.make(1.0)
        temperature.bound(th.tensor(1.0))
        for _ in range(200):
            temperature.update(th.tensor(-9.0), 0.1)
        assert temperature(1.0).item() == pytest.approx(10.0)
        with pytest.warns(UserWarning, match="ent_coef=10 is at its bound.*uniform; lower"):
            temperature.bound(th.tensor(1.0))

    def test_one_that_begins_above_may_fall_but_not_rise(self):
        """A new critic hardly depends on the action."""
        temperature = self.make(1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            temperature.bound(th.tensor(0.001))
        assert temperature(1.0).item() == pytest.approx(1.0)
        temperature.update(th.tensor(-9.0), 0.1)
        assert temperature(1.0).item() == pytest.approx(1.0)
        for _ in range(30):
            temperature.update(th.tensor(5.0), 0.1)
        assert temperature(1.0).item() < 0.9

    @pytest.mark.parametrize("q_spread", [0.0, math.nan])
    def test_no_scale_no_bound(self, q_spread):
        temperature = self.make(1e-9)
        temperature.bound(th.tensor(q_spread))
        assert temperature(1.0).item() == pytest.approx(1e-9)
