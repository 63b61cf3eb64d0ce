"""
The methods of a critic that ``DQS.train()`` calls, and the twin networks of SAC and TD3.

A critic of your own is a :class:`Critic`; pass its class as ``policy_kwargs=dict(critic_class=...)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import BaseModel, ContinuousCritic
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn import functional as F

from sb3_dqs import fast

# From actions in [-1, 1], shape (batch_size, n_actions, action_dim), to values, shape (batch_size, n_actions)
Energy = Callable[[th.Tensor], th.Tensor]


def minimum(q_values: Iterable[th.Tensor]) -> th.Tensor:
    """The smallest of several values, each of shape (batch_size, 1)."""
    return th.cat(list(q_values), dim=1).min(dim=1, keepdim=True).values


def mean_energy(energies: Iterable[Energy]) -> Energy:
    """The mean of several energies, see ``Critic.energy()``."""
    functions = list(energies)
    return lambda actions: th.stack([function(actions) for function in functions]).mean(dim=0)


def squared_errors(q_values: Iterable[th.Tensor], targets: th.Tensor) -> th.Tensor:
    """Half the mean squared error of several values, summed, as in SAC and TD3; all of shape (batch_size, 1)."""
    return 0.5 * th.stack([F.mse_loss(values, targets) for values in q_values]).sum()


class Critic(BaseModel, ABC):
    """
    The three methods of a critic, and ``td_loss()``, which has a default.

    Its constructor takes what SB3's ``ContinuousCritic`` takes (``observation_space``,
    ``action_space``, ``net_arch``, ``features_extractor``, ``features_dim``, ``activation_fn``, ``normalize_images``,
    ``n_critics``, ``share_features_extractor``) and what ``policy_kwargs=dict(critic_kwargs=...)`` names.
    """

    # Whether it has a target network: without, ``DQS.critic_target`` is the critic itself
    has_target: ClassVar[bool] = True
    # Arguments of Adam, for critic and actor, where the user gives none
    adam_kwargs: ClassVar[dict[str, Any]] = {}
    # Precision of large hidden layers in ``td_loss()``, for a critic that takes another; None is that of the weights
    training_dtype: th.dtype | None = None
    optimizer: th.optim.Optimizer

    @abstractmethod
    def backup_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        What the target is made of, asked of the target network at next states: the minimum of twins, kept quantiles, ...

        :param obs: Observation
        :param actions: actions in [-1, 1], shape (batch_size, action_dim)
        :return: shape (batch_size, m)
        """

    @abstractmethod
    def loss(self, obs: PyTorchObs, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        Loss of the critic, with gradients.

        :param obs: Observation
        :param actions: actions in [-1, 1], shape (batch_size, action_dim)
        :param targets: ``soft_rewards + discounts * backup_values``, see ``td_loss()``, shape (batch_size, m)
        :return: scalar
        """

    def td_loss(
        self,
        critic_target: "Critic",
        obs: PyTorchObs,
        actions: th.Tensor,
        next_obs: PyTorchObs,
        next_actions: th.Tensor,
        soft_rewards: th.Tensor,
        discounts: th.Tensor,
    ) -> th.Tensor:
        """
        What ``DQS.train()`` minimises: ``loss()`` with the right-hand side of the soft Bellman equation for targets. Override
        it where both sides of the equation need one pass.

        :param critic_target: the target network
        :param obs: Observation
        :param actions: actions in [-1, 1], shape (batch_size, action_dim)
        :param next_obs: next observations
        :param next_actions: actions of the policy there, shape (batch_size, action_dim)
        :param soft_rewards: rewards with the entropy of the next state, ``r - discounts * ent_coef * log pi(a'|s')``, or ``r``
            with a hard backup, shape (batch_size, 1)
        :param discounts: ``(1 - done) * gamma``, or ``(1 - done) * gamma**n`` for n-step returns, shape (batch_size, 1)
        :return: scalar
        """
        with th.no_grad():
            targets = soft_rewards + discounts * critic_target.backup_values(next_obs, next_actions)
        return self.loss(obs, actions, targets)

    @abstractmethod
    def energy(self, obs: PyTorchObs) -> Energy:
        """
        The values Q(s, a) that define the policy ``exp(Q / ent_coef)``, for many actions per state. In the actor's update the
        critic is in evaluation mode.

        :param obs: Observation
        :return: differentiable function from actions in [-1, 1], shape (batch_size, n_actions, action_dim), to values of shape
            (batch_size, n_actions); what depends on the observation alone is computed once
        """


class MlpCritic(ContinuousCritic, Critic):
    """
    SB3's critics as a :class:`Critic`: the targets are made of the minimum over the networks, as in SAC and TD3; the mean over
    the networks defines the policy, because it moves less from update to update than one of them, or than their minimum.
    """

    def backup_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        return minimum(self(obs, actions))

    def loss(self, obs: PyTorchObs, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        return squared_errors(self(obs, actions), targets)

    def energy(self, obs: PyTorchObs) -> Energy:
        features = self.extract_features(obs, self.features_extractor)
        return mean_energy(fast.energy(q_network, features) for q_network in self.q_networks)
