"""Fixed, scheduled and tuned temperatures."""

import math

import numpy as np
import pytest
import torch as th

from sb3_dqs.temperature import GAIN, MAX_RISE, AutoTemperature, LogLinearSchedule, ScheduledTemperature, make_temperature


def test_fixed():
    temperature = make_temperature(0.2)
    assert isinstance(temperature, ScheduledTemperature)
    assert [temperature(progress) for progress in (1.0, 0.5, 0.0)] == [0.2, 0.2, 0.2]
    assert temperature.state_dict() == {}


@pytest.mark.parametrize("ent_coef", ["log_linear_1.0_0.01", LogLinearSchedule(1.0, 0.01)])
def test_log_linear_schedule(ent_coef):
    temperature = make_temperature(ent_coef)
    assert [temperature(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([1.0, 0.1, 0.01])


def test_schedule_that_leaves_the_positive_numbers():
    temperature = make_temperature(lambda progress: progress - 0.5)
    assert temperature(1.0) == 0.5
    with pytest.raises(ValueError, match="ent_coef: the schedule gave"):
        temperature(0.2)


@pytest.mark.parametrize(("ent_coef", "initial"), [("auto", 1.0), ("auto_0.1", 0.1)])
def test_auto_falls_while_the_entropy_is_above_its_target(ent_coef, initial):
    temperature = make_temperature(ent_coef)
    assert isinstance(temperature, AutoTemperature)
    assert temperature(1.0).item() == pytest.approx(initial)
    temperature.update(th.tensor(0.0), target_entropy=-1.0, action_dim=1, learning_rate=0.1)
    after_high_entropy = temperature(1.0).item()
    assert after_high_entropy < initial
    for _ in range(30):
        temperature.update(th.tensor(-3.0), target_entropy=-1.0, action_dim=1, learning_rate=0.1)
    assert temperature(1.0).item() > after_high_entropy


def test_auto_is_of_one_device_and_no_graph():
    temperature = make_temperature("auto")
    temperature.update(th.tensor(0.0, requires_grad=True), target_entropy=-1.0, action_dim=1, learning_rate=0.1)
    assert not temperature(1.0).requires_grad
    assert {value.device.type for value in temperature.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("entropy", "rate"), [(10.0, -1.0), (-10.0, MAX_RISE), (-6.0, 0.0), (-5.9, -GAIN * 0.1 / 3), (-6.1, GAIN * 0.1 / 3)]
)
def test_steps_of_the_tuned_temperature(entropy, rate):
    """In proportion to the error per half dimension, limited, in units of the learning rate."""
    temperature = make_temperature("auto")
    for _ in range(200):  # until the running mean is there
        temperature.update(th.tensor(entropy), target_entropy=-6.0, action_dim=6, learning_rate=1e-3)
    before = temperature.log_ent_coef.item()
    loss = temperature.update(th.tensor(entropy), target_entropy=-6.0, action_dim=6, learning_rate=1e-3)
    assert loss.item() == pytest.approx(-rate * before, rel=1e-3, abs=1e-6)
    assert temperature.log_ent_coef.item() - before == pytest.approx(1e-3 * rate, rel=1e-2, abs=1e-6)


def test_loss_of_the_tuned_temperature_is_that_before_the_step():
    temperature = make_temperature("auto_0.1")
    loss = temperature.update(th.tensor(10.0), target_entropy=-1.0, action_dim=1, learning_rate=0.1)
    assert loss.item() == pytest.approx(math.log(0.1))  # times the largest gradient, 1
    assert temperature.log_ent_coef.item() == pytest.approx(math.log(0.1) - 0.1)


def test_tuned_temperature_keeps_the_entropy_of_a_growing_critic_at_its_target():
    """
    A policy exp(Q / ent_coef) whose Q is quadratic and grows by a learning rate per step, with noise of one nat: of 500
    values the mean is within 0.5 nats.
    """
    dim, target_entropy, learning_rate, errors = 6, -6.0, 3e-4, []
    temperature = make_temperature("auto_0.01")
    scale = math.exp(2 * 6 / dim) * 2 * math.pi * math.e * 0.01  # the entropy is at its target
    for _ in range(3000):
        scale *= math.exp(learning_rate)
        entropy = dim / 2 * math.log(2 * math.pi * math.e * temperature(1.0).item() / scale)
        errors.append(entropy - target_entropy)
        temperature.update(th.tensor(entropy + th.randn(()).item()), target_entropy, dim, learning_rate)
    assert abs(np.mean(errors[-500:])) < 0.5


@pytest.mark.parametrize(
    "ent_coef", ["automatic", "auto_", "auto_0", "auto_-1", "log_linear_1", "log_linear_1_0", "high", 0.0, -1.0, None, [1]]
)
def test_errors_name_the_value_and_the_choices(ent_coef):
    with pytest.raises(ValueError, match=r'ent_coef=.* is not a temperature: pass "auto"'):
        make_temperature(ent_coef)


def test_schedules_end_where_they_say():
    """SB3's remaining progress is negative when the last rollout overshoots."""
    temperature = make_temperature("log_linear_1.0_0.01")
    assert temperature(-0.5) == temperature(0.0) == pytest.approx(0.01)
    assert make_temperature(lambda progress: 0.1 * progress + 0.005)(-0.6) == pytest.approx(0.005)
