"""Fixed, scheduled and tuned temperatures."""

import pytest
import torch as th

from sb3_dqs.temperature import AutoTemperature, LogLinearSchedule, ScheduledTemperature, make_temperature


def test_fixed():
    temperature = make_temperature(0.2, 1e-3, "cpu")
    assert isinstance(temperature, ScheduledTemperature)
    assert [temperature(progress) for progress in (1.0, 0.5, 0.0)] == [0.2, 0.2, 0.2]
    assert temperature.state_dict() == {}


@pytest.mark.parametrize("ent_coef", ["log_linear_1.0_0.01", LogLinearSchedule(1.0, 0.01)])
def test_log_linear_schedule(ent_coef):
    temperature = make_temperature(ent_coef, 1e-3, "cpu")
    assert [temperature(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([1.0, 0.1, 0.01])


def test_schedule_that_leaves_the_positive_numbers():
    temperature = make_temperature(lambda progress: progress - 0.5, 1e-3, "cpu")
    assert temperature(1.0) == 0.5
    with pytest.raises(ValueError, match="ent_coef: the schedule gave"):
        temperature(0.2)


@pytest.mark.parametrize(("ent_coef", "initial"), [("auto", 1.0), ("auto_0.1", 0.1)])
def test_auto_falls_while_the_entropy_is_above_its_target(ent_coef, initial):
    temperature = make_temperature(ent_coef, 0.1, "cpu")
    assert isinstance(temperature, AutoTemperature)
    assert temperature(1.0).item() == pytest.approx(initial)
    temperature.update(th.tensor(0.0), target_entropy=-1.0)
    after_high_entropy = temperature(1.0).item()
    assert after_high_entropy < initial
    for _ in range(30):
        temperature.update(th.tensor(-3.0), target_entropy=-1.0)
    assert temperature(1.0).item() > after_high_entropy


@pytest.mark.parametrize(
    "ent_coef", ["automatic", "auto_", "auto_0", "auto_-1", "log_linear_1", "log_linear_1_0", "high", 0.0, -1.0, None, [1]]
)
def test_errors_name_the_value_and_the_choices(ent_coef):
    with pytest.raises(ValueError, match=r'ent_coef=.* is not a temperature: pass "auto"'):
        make_temperature(ent_coef, 1e-3, "cpu")


def test_schedules_end_where_they_say():
    """SB3's remaining progress is negative when the last rollout overshoots."""
    temperature = make_temperature("log_linear_1.0_0.01", 3e-4, "cpu")
    assert temperature(-0.5) == temperature(0.0) == pytest.approx(0.01)
    assert make_temperature(lambda progress: 0.1 * progress + 0.005, 3e-4, "cpu")(-0.6) == pytest.approx(0.005)
