"""Attributes of SAC that users' code reads and sets."""

import copy
from typing import TYPE_CHECKING, Any

import torch as th

from sb3_dqs.checks.arguments import check_arguments
from sb3_dqs.checks.temperature import check_target_entropy
from sb3_dqs.temperature import AutoTemperature, FixedTemperature, Temperature, make_temperature, read_target_entropy
from sb3_dqs.warn_once import warn_once

if TYPE_CHECKING:
    from sb3_dqs.actor import Actor


class SACAttributes:
    """The temperature under SAC's names. SAC keeps it in tensors and an optimizer, :class:`sb3_dqs.DQS` in a module."""

    actor: "Actor"
    ent_coef: Any
    temperature: Temperature
    device: th.device
    _current_progress_remaining: float

    @property
    def target_entropy(self) -> Any:
        """Target entropy of a tuned temperature, in nats; may be set during training."""
        if "target_entropy" not in vars(self):
            raise AttributeError("target_entropy")
        temperature = vars(self).get("temperature")
        return temperature.target_entropy if isinstance(temperature, AutoTemperature) else vars(self)["target_entropy"]

    @target_entropy.setter
    def target_entropy(self, value: Any) -> None:
        temperature = vars(self).get("temperature")
        if temperature is not None:  # the model is built
            value = read_target_entropy(check_arguments({"target_entropy": value})["target_entropy"], self.actor.action_dim)
        if isinstance(temperature, AutoTemperature):
            check_target_entropy(value, temperature.action_dim)
            temperature.target_entropy = value
            if isinstance(self.ent_coef, AutoTemperature):  # what load() makes the temperature of
                self.ent_coef = copy.deepcopy(self.ent_coef)
                self.ent_coef.target_entropy = value
        vars(self)["target_entropy"] = value

    @property
    def log_ent_coef(self) -> th.Tensor | None:
        """Logarithm of a tuned temperature, shape (1,), may be written to; None for others, as in SAC."""
        return self.temperature.log_ent_coef if isinstance(self.temperature, AutoTemperature) else None

    @log_ent_coef.setter
    def log_ent_coef(self, value: th.Tensor | float) -> None:
        number = float(th.as_tensor(value).detach())
        if not -80 < number < 80:  # float32
            raise ValueError(
                f"log_ent_coef={number} is not the logarithm of a temperature: pass a number such as math.log(0.1)."
            )
        if isinstance(self.temperature, FixedTemperature):
            check_target_entropy(self.target_entropy, self.actor.action_dim)
            self.temperature = make_temperature("auto", self.target_entropy, self.actor.action_dim).to(self.device)
            self.ent_coef = "auto"
            warn_once("log_ent_coef: the temperature was fixed, and is tuned from here on; set ent_coef_tensor to fix it.")
        if not isinstance(self.temperature, AutoTemperature):
            raise AttributeError(
                f"`log_ent_coef` cannot be set, because ent_coef={self.ent_coef!r} is neither tuned nor fixed; "
                'load or create the model with ent_coef="auto".'
            )
        self.temperature.log_ent_coef.fill_(number)

    @property
    def ent_coef_tensor(self) -> th.Tensor:
        """The present temperature, 0-d. Setting it to another value fixes it there, as ``ent_coef=value`` does."""
        return self.temperature(self._current_progress_remaining)

    @ent_coef_tensor.setter
    def ent_coef_tensor(self, value: th.Tensor | float) -> None:
        number = float(th.as_tensor(value).detach())
        if number == float(self.ent_coef_tensor) and not isinstance(self.temperature, FixedTemperature):
            return  # only moved to another device, say
        temperature = make_temperature(number).to(self.device)
        vars(self)["target_entropy"] = self.target_entropy  # of a temperature of the user, perhaps
        self.ent_coef, self.temperature = number, temperature

    @property
    def ent_coef_optimizer(self) -> None:
        """None: a temperature is updated without an optimizer, by steps of the learning rate of the networks."""
        return None

    @ent_coef_optimizer.setter
    def ent_coef_optimizer(self, value: th.optim.Optimizer | None) -> None:
        if value is not None:
            warn_once(
                "`ent_coef_optimizer` has no effect: a tuned temperature is updated without an optimizer, by steps of the "
                "learning rate of the networks. To set the temperature: model.log_ent_coef = math.log(0.1)."
            )
