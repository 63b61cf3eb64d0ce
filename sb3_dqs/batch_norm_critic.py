"""Batch-normalised critic without a target network (CrossQ)."""

import copy
import itertools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_dqs import averaging, fast
from sb3_dqs.batch_norm import BatchNorm
from sb3_dqs.critics import Critic, Energy, mean_energy, minimum, squared_errors
from sb3_dqs.running_mean import RunningMean

# Lower limit of the unit of the networks' outputs
MIN_UNIT = 2.0**-10
# Upper limit of the mean square of a batch's soft rewards, so that its running mean stays finite in single precision
MAX_MEAN_SQUARE = 1e30


class BatchNormCritic(Critic):
    """
    Critic networks with batch normalisation before every linear layer, and no target network (Bhatt et al. 2024, "CrossQ",
    https://arxiv.org/abs/1902.05605).

    In training, ``(s, a)`` and ``(s', a')`` pass the networks together, so that both are normalised by the statistics of
    both: separate passes would give the two halves of the Bellman equation different statistics. The statistics keep their
    gradients: with those of ``(s, a)`` alone Pendulum-v1 was not learned (return -1293 after 3,750 steps; with all of them
    -203 after 2,500). Elsewhere the running means of the statistics are used, and are multiplied into the linear layers, so
    that the candidates of the actor cost no more than with plain networks. Of the features extractor the two halves are
    separate passes.

    Without a target network the values move fast, on Hopper-v5 faster than an actor follows. So the energy, which defines the
    policy, is the mean over running averages of the networks. Targets and loss use the networks, not the averages.

    With 256 inputs of unit variance to the last layer and a learning rate of 1e-3, a step of Adam moves the outputs by up to
    some tenths, which hides what an action is worth where rewards are small. So a value is the output times ``unit``, a power
    of two: ``unit_ratio`` times the root mean square of the soft rewards ``r - discounts * ent_coef * log pi``,
    rounded up, and at most 1; a batch whose soft rewards are all 0 leaves it as it is. When it changes, the last layers are
    rescaled, so that the values stay (as in Pop-Art, van Hasselt et al. 2016, https://arxiv.org/abs/1602.07714).

    A subclass with other targets or errors overrides :meth:`combine` or :meth:`errors`; :meth:`td_loss` calls neither
    ``backup_values()`` nor ``loss()``.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Network architecture
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    :param n_critics: Number of critic networks to create.
    :param share_features_extractor: Whether the features extractor is shared with the actor; the actor's loss alone then
        trains it
    :param momentum: least rate of the running means; CrossQ's value
    :param eps: added to the variances; CrossQ's value
    :param warm_up: the n-th update moves the running means at the rate ``max(momentum, warm_up / (n + warm_up))``, because
        the networks change fast at first
    :param averaging_rate: least rate of the running averages of the networks, see
        :func:`sb3_dqs.averaging.averaging_rate`; 1 for the networks themselves, as they were before the present update.
        Measured entropy gap on Pendulum-v1 (three seeds): 0.34, 0.20 and 0.04 nats; 0.10, 0.47 and 0.36 over the last 50th of
        the updates, at most 200
    :param unit_ratio: unit of the outputs in root mean squares of the soft rewards, before it is rounded up. Measured on
        Pendulum-v1 with normalised rewards: see docs/results.md, "Small rewards"
    """

    features_extractor: BaseFeaturesExtractor
    unit: th.Tensor
    has_target: ClassVar[bool] = False
    # CrossQ's: without a target network, the long memory of Adam's default of 0.9 slows learning or makes it diverge
    adam_kwargs: ClassVar[dict[str, Any]] = {"betas": (0.5, 0.999)}

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
        momentum: float = 0.01,
        eps: float = 1e-3,
        warm_up: float = 10.0,
        averaging_rate: float = 0.001,
        unit_ratio: float = 2.0,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
        )
        numbers = (momentum, eps, warm_up, averaging_rate, unit_ratio)
        if not (all(isinstance(n, Real) and 0 < n < math.inf for n in numbers) and max(momentum, averaging_rate) <= 1):
            raise ValueError(
                "policy_kwargs: `critic_kwargs` must have positive numbers, momentum and averaging_rate at most 1, got "
                f"{momentum=}, {eps=}, {warm_up=}, {averaging_rate=}, {unit_ratio=}."
            )
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        sizes = [features_dim + get_action_dim(action_space), *net_arch]
        self.q_networks = nn.ModuleList()
        for _ in range(n_critics):
            layers: list[nn.Module] = []
            for size, next_size in itertools.pairwise(sizes):
                layers += [BatchNorm(size, eps, momentum, warm_up), nn.Linear(size, next_size), activation_fn()]
            layers += [BatchNorm(sizes[-1], eps, momentum, warm_up), nn.Linear(sizes[-1], 1)]
            self.q_networks.append(nn.Sequential(*layers))
        self.unit_ratio = unit_ratio
        self.register_buffer("unit", th.ones(()))
        self.mean_square = RunningMean(0.0, momentum)  # of the soft rewards; 0 until there was one
        self.averaging_rate = averaging_rate
        self.averaged_networks = copy.deepcopy(self.q_networks).requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("qf") and name[2:].isdigit():
                raise AttributeError(
                    f"'{type(self).__name__}' object has no attribute '{name}'; its networks are in q_networks, and "
                    'normalise. policy_kwargs=dict(critic_class="mlp") has those of SAC.'
                ) from error
            raise

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        As SB3's ``ContinuousCritic``.

        :param obs: Observation
        :param actions: actions in [-1, 1], shape (batch_size, action_dim)
        :return: values of each network, shape (batch_size, 1)
        """
        inputs = self._inputs(obs, actions)
        return tuple(self.unit * q_network(inputs) for q_network in self.q_networks)

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        As SB3's ``ContinuousCritic``: the first network alone.

        :param obs: Observation
        :param actions: actions in [-1, 1], shape (batch_size, action_dim)
        :return: shape (batch_size, 1)
        """
        return self.unit * self.q_networks[0](self._inputs(obs, actions))

    def _inputs(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return th.cat([features, actions], dim=1)

    def combine(self, q_values: Sequence[th.Tensor]) -> th.Tensor:
        """
        What the targets are made of: the minimum. :meth:`td_loss` and :meth:`backup_values` call it.

        :param q_values: values of each network, shape (batch_size, 1)
        :return: shape (batch_size, m)
        """
        return minimum(q_values)

    def errors(self, q_values: Sequence[th.Tensor], targets: th.Tensor) -> th.Tensor:
        """
        Errors of the values. :meth:`td_loss` and :meth:`loss` call it.

        :param q_values: values of each network, shape (batch_size, 1)
        :param targets: shape (batch_size, m)
        :return: scalar
        """
        return squared_errors(q_values, targets)

    def backup_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        return self.combine(self(obs, actions))

    def loss(self, obs: PyTorchObs, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        return self.errors(self(obs, actions), targets)

    def td_loss(
        self,
        critic_target: Critic,
        obs: PyTorchObs,
        actions: th.Tensor,
        next_obs: PyTorchObs,
        next_actions: th.Tensor,
        soft_rewards: th.Tensor,
        discounts: th.Tensor,
    ) -> th.Tensor:
        # The averages take up what the last update made of the networks
        n_updates = max(
            (layer.n_batches for layer in self.q_networks.modules() if isinstance(layer, BatchNorm)), default=math.inf
        )
        rate = averaging.averaging_rate(max(n_updates, 0) + 1, self.averaging_rate)
        averaging.update_average(self.averaged_networks, self.q_networks, rate)
        self._update_unit(soft_rewards, n_updates <= 0)
        inputs, next_inputs = self._inputs(obs, actions), self._inputs(next_obs, next_actions)
        both = th.cat([inputs, next_inputs])
        values = [self.unit * training_pass(q_network, both, self.training_dtype) for q_network in self.q_networks]
        pairs = [both_values.split([len(inputs), len(next_inputs)]) for both_values in values]
        targets = soft_rewards + discounts * self.combine([next_values.detach() for _, next_values in pairs])
        return self.errors([q_values for q_values, _ in pairs], targets)

    def energy(self, obs: PyTorchObs) -> Energy:
        features = self.extract_features(obs, self.features_extractor)
        outputs = mean_energy(fast.energy(fast.fold_batch_norm(network), features) for network in self.averaged_networks)
        return lambda actions: self.unit * outputs(actions)

    @th.no_grad()
    def _update_unit(self, soft_rewards: th.Tensor, is_first: bool) -> None:
        last_layers = [network[-1] for network in (*self.q_networks, *self.averaged_networks)]
        if not all(fast.is_unchanged(layer, nn.Linear) for layer in last_layers):  # their outputs need not scale with weights
            return
        mean_square = soft_rewards.pow(2).mean().clamp(max=MAX_MEAN_SQUARE)
        value = self.mean_square.value
        if is_first:
            value.zero_()
        had_scale, has_scale = value > 0, mean_square > 0  # sparse rewards without an entropy term: most batches have none
        self.mean_square.update(mean_square, has_scale)
        value.copy_(th.where(had_scale, value, mean_square))
        unit = (self.unit_ratio * value.sqrt()).log2().ceil().exp2().clamp(MIN_UNIT, 1.0)
        unit = th.where(value > 0, unit, self.unit)
        if not is_first:  # new networks have no values to keep
            ratio = self.unit / unit
            for layer in last_layers:
                for parameter in layer.parameters():
                    parameter.mul_(ratio)
        self.unit.copy_(unit)


def training_pass(network: nn.Module, x: th.Tensor, dtype: th.dtype | None = None) -> th.Tensor:
    """
    A batch through a network, normalised by its own statistics.

    :param network: successive layers
    :param x: shape (n, size)
    :param dtype: precision of large layers between the first linear layer and the last, see
        :func:`sb3_dqs.fast.as_functions`; by default that of the weights
    :return: shape (n, 1)
    """
    assert isinstance(network, nn.Sequential)  # for type checker
    layers = list(network)  # not children(), which leaves out a layer that comes twice
    linear = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    # The first tells small differences between actions, the last gives large values
    functions = fast.as_functions(layers, dtype, precise=linear[:1] + linear[-1:])
    for layer, function in zip(layers, functions, strict=True):
        x = layer.normalize(x) if isinstance(layer, BatchNorm) else function(x)
    return x
