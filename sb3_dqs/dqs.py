"""Diffusion Q-Sampling: the algorithm."""

import copy
import inspect
import io
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule, TensorDict
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from torch import nn

from sb3_dqs import fast
from sb3_dqs.actor import Actor
from sb3_dqs.checks.arguments import check_arguments, check_learning_rate
from sb3_dqs.checks.collection import check_action_noise, check_buffer_fits, check_replay_buffer
from sb3_dqs.checks.env import make_checked_env
from sb3_dqs.checks.policy import check_policy
from sb3_dqs.checks.temperature import check_temperature
from sb3_dqs.critics import Critic
from sb3_dqs.denoiser_targets import BoltzmannDensity, DenoiserTarget, Draws, make_denoiser_target
from sb3_dqs.exploration import PinkLatents
from sb3_dqs.finite import LOAD_EARLIER, FiniteStepCallback, check_finite, check_parameters, find_not_finite
from sb3_dqs.noise import c_out
from sb3_dqs.observations import count, select, where
from sb3_dqs.policies import CnnPolicy, DQSPolicy, MlpPolicy, MultiInputPolicy
from sb3_dqs.sac_attributes import SACAttributes
from sb3_dqs.saving import atomic, check_model_file
from sb3_dqs.temperature import Temperature, make_temperature, read_target_entropy
from sb3_dqs.training_mode import evaluation_mode, locked
from sb3_dqs.warn_once import warn_once

SelfDQS = TypeVar("SelfDQS", bound="DQS")


def share_of(n_states: int, share: float) -> int:
    """Number of the states of a batch that a loss of the actor uses: at least two, which batch normalisation needs."""
    return min(max(math.ceil(share * n_states), 2), n_states)


class DQS(SACAttributes, OffPolicyAlgorithm):
    """
    Diffusion Q-Sampling (DQS)
    Off-policy actor-critic whose policy is the Boltzmann distribution of the critic,
    ``pi(a|s) = exp(Q(s, a) / ent_coef) / Z(s)``, drawn from by a diffusion sampler, so that it keeps several good actions.
    Paper: https://arxiv.org/abs/2410.01312 (Jain, Akhound-Sadegh, Ravanbakhsh, RLC 2025)

    The arguments are those of SB3's ``SAC``, in its order; those of DQS follow as keywords.
    The default ``learning_rate`` is CrossQ's.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate for adam optimizer,
        the same learning rate will be used for all networks (Q-Values, Actor and temperature)
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1), for critics with a target network
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many gradient steps as steps done in the environment
        during the rollout.
    :param action_noise: the action noise type (None by default), this can help
        for hard exploration problem. Cf common.noise for the different action noise type.
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``).
        If ``None``, it will be automatically selected.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer
        at a cost of more complexity.
        See https://github.com/DLR-RM/stable-baselines3/issues/37#issuecomment-637501195
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) when updating the Q-value network.
    :param ent_coef: Temperature alpha of the policy. ``"auto"`` tunes it to reach ``target_entropy``
        (``"auto_0.1"`` from 0.1); a number fixes it; a function of the remaining progress (from 1 to 0), or
        ``"log_linear_1.0_0.01"`` (the paper's anneal, from the first to the second number), schedules it; a
        :class:`sb3_dqs.temperature.Temperature` is used as it is.
    :param target_update_interval: update the target network every ``target_update_interval``
        gradient steps.
    :param target_entropy: target entropy when learning ``ent_coef`` (``ent_coef = 'auto'``), in nats, of the action
        scaled to [-1, 1]^d; ``"auto"`` is -d
    :param use_sde: Whether to hold the noise of the sampler for ``sde_sample_freq`` steps, so that exploration is a
        smooth function of the state (default: False)
    :param sde_sample_freq: Sample a new noise every n steps when using ``use_sde``
        Default: -1 (only sample at the beginning of the rollout)
    :param use_sde_at_warmup: Whether to use the policy with held noise instead of uniform sampling
        during the warm up phase (before learning starts)
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation.
        See :class:`sb3_dqs.policies.DQSPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param n_mc_samples: Number of Monte Carlo samples K of the denoiser's target: how many actions the critic evaluates per
        target, at least 2; larger is more accurate and slower. An instance as ``denoiser_target`` has a number of its own
    :param own_draws_freq: Every ``own_draws_freq``-th update of the actor minimises ``actor_loss()``, with new actions at the
        batch's observations. The others minimise ``next_actor_loss()``, with the actions that the critics' target has drawn
        at the next observations, if the estimator allows it; see ``draws_own_actions()``
    :param own_share: Share of the batch's observations, at random, that ``actor_loss()`` uses
    :param n_draws: Number of actions that ``actor_loss()`` draws per observation, each noised once
    :param next_share: Share of the batch's next observations, at random, that ``next_actor_loss()`` uses
    :param n_copies: Number of noisy copies that ``next_actor_loss()`` makes of each action
    :param policy_delay: The actor will only be updated once every ``policy_delay`` gradient steps, as in TD3
    :param denoiser_target: What the actor regresses on: ``"posterior_mean"``
        (:class:`sb3_dqs.denoiser_targets.PosteriorMean`), the paper's ``"energy_gradient"``
        (:class:`sb3_dqs.denoiser_targets.EnergyGradient`), or a :class:`sb3_dqs.denoiser_targets.DenoiserTarget`
    :param backup: ``"soft"`` adds the entropy bonus to the critics' target, as SAC; ``"hard"`` does not, as the paper
    :param exploration_noise: Noise that the sampler starts from in rollouts: ``"white"``, new at every step, or ``"pink"``,
        correlated over time (:class:`sb3_dqs.exploration.PinkLatents`). Use ``"pink"`` if the reward lies many steps away in
        one direction. With ``use_sde=True`` this argument has no effect
    :param augmentation: Module applied to the observations and to the next observations of a batch, once each, in training
        only (random shifts of images, for instance)
    :param compile: Whether to compile the sampler of the training with ``torch.compile``: the same results up to rounding,
        and the same files; the first steps take up to a minute more
    :raises ValueError: for an invalid argument, before anything is built; and during training when an
        observation, a reward or a loss is not finite
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DQSPolicy
    actor: Actor
    critic: Critic
    critic_target: Critic
    temperature: Temperature
    target_estimator: DenoiserTarget

    def __init__(
        self,
        policy: str | type[DQSPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float | Schedule | Temperature = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        n_mc_samples: int = 12,
        own_draws_freq: int = 8,
        own_share: float = 0.25,  # own_share * n_draws = next_share * n_copies = 1: each loss has batch_size noisy actions
        n_draws: int = 4,
        next_share: float = 0.5,
        n_copies: int = 2,
        policy_delay: int = 2,
        denoiser_target: str | DenoiserTarget = "posterior_mean",
        backup: str = "soft",
        exploration_noise: str = "white",
        augmentation: nn.Module | None = None,
        compile: bool = False,
    ):
        stats_window_size = check_arguments(locals())["stats_window_size"]
        if env is None and _init_setup_model:
            raise ValueError("`env` must be an environment or its name, got None.")
        super().__init__(
            policy,
            make_checked_env(env, verbose),  # type: ignore[arg-type]  # None when loading
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=dict(policy_kwargs or {}),
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            support_multi_env=True,
        )

        # As the user gave them: SB3 adds use_sde, which would not equal what load(policy_kwargs=...) is given
        self.policy_kwargs = dict(policy_kwargs or {})

        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.target_entropy = target_entropy
        self.n_mc_samples = n_mc_samples
        self.own_draws_freq = own_draws_freq
        self.own_share = own_share
        self.n_draws = n_draws
        self.next_share = next_share
        self.n_copies = n_copies
        self.policy_delay = policy_delay
        self.denoiser_target = denoiser_target
        self.backup = backup
        self.exploration_noise = exploration_noise
        self.augmentation = augmentation
        self.compile = compile

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_policy(self.policy_class, self.policy_kwargs, self.observation_space)
        policy_kwargs = self.policy_kwargs
        # Again, because loading can change them
        arguments = {name: value for name, value in vars(self).items() if name not in ("env", "policy")}
        vars(self).update(check_arguments(arguments))
        check_replay_buffer(vars(self), self.observation_space, self.action_space)
        check_action_noise(self.action_noise, self.action_space)  # type: ignore[arg-type]
        self.policy_kwargs = {**self.policy_kwargs, "use_sde": self.use_sde}
        try:
            super()._setup_model()
        except MemoryError as error:
            raise ValueError(f"`buffer_size` must fit into memory, got {self.buffer_size}: {error}.") from error
        self.policy_kwargs = policy_kwargs
        self._create_aliases()
        self._warn_about_arguments()
        # Running mean and running var
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])
        self.target_entropy = read_target_entropy(self.target_entropy, self.actor.action_dim)
        self.temperature = make_temperature(self.ent_coef, self.target_entropy, self.actor.action_dim).to(self.device)
        check_temperature(self.temperature, self._current_progress_remaining, self.actor.action_dim)
        self.target_estimator = make_denoiser_target(self.denoiser_target, self.n_mc_samples).to(self.device)
        self.pink_latents = PinkLatents(self.actor.action_dim).to(self.device)
        if self.augmentation is not None:
            self.augmentation.to(self.device)

    def _warn_about_arguments(self) -> None:
        for name in () if self.critic.has_target else ("tau", "target_update_interval"):
            if getattr(self, name) != inspect.signature(DQS.__init__).parameters[name].default:
                warn_once(
                    f"`{name}={getattr(self, name)}` has no effect: {type(self.critic).__name__} has no target network; pass "
                    'policy_kwargs=dict(critic_class="mlp") for the critic of SAC, or remove it to silence this warning.',
                    key=name,
                )
        if self.ent_coef == "auto" and getattr(self._vec_normalize_env, "norm_reward", False):
            warn_once(
                "VecNormalize(norm_reward=True) makes rewards small beside the initial temperature of 1, so that learning "
                'begins late, as with SAC; pass ent_coef="auto_0.1", or norm_reward=False.'
            )
        if self.use_sde and self.exploration_noise == "pink":
            warn_once(
                '`exploration_noise="pink"` has no effect with use_sde=True, which keeps one noise for sde_sample_freq '
                "steps; leave out one of the two arguments."
            )

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.actor.training_dtype = self.critic.training_dtype = fast.training_dtype(self.device)
        if self.compile:
            fast.compile_sampler(self.actor)

    @locked
    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        # The average of the actor that predict() uses begins anew if something else changed the actor
        self.policy.restart_average()
        # Update learning rate according to lr schedule (the temperature takes it as an argument of update())
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        learning_rate = self.lr_schedule(self._current_progress_remaining)

        logs: dict[str, list[th.Tensor]] = defaultdict(list)

        for _ in range(gradient_steps):
            # Sample replay buffer
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            obs, next_obs = replay_data.observations, replay_data.next_observations
            if self.augmentation is not None:
                with th.no_grad():  # its parameters, if any, are not trained
                    obs, next_obs = self.augmentation(obs), self.augmentation(next_obs)
            # No action follows a terminal observation, and the targets multiply its value by 0: a' is drawn at s instead, so
            # that actor and entropy are those of states in which the policy acts
            acting_obs = where(replay_data.dones.flatten() > 0, obs, next_obs)
            # For n-step replay, discount factor is gamma**n_steps (when no early termination)
            discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
            discounts = (1 - replay_data.dones) * discounts
            # A clone, because a temperature may return its buffer
            ent_coef = self.temperature(self._current_progress_remaining).clone()

            # Critics: Q(s, a) -> r + gamma (1 - done) (Q_target(s', a') - ent_coef log pi(a'|s')),  a' ~ pi(.|s').
            # A critic without a target network, as the default, is its own Q_target
            with th.no_grad():
                # a' = tanh(next_u)
                next_u, next_log_prob = self.actor.draw(self.actor.embed(acting_obs))
                # entropy term
                soft_rewards = replay_data.rewards
                if self.backup == "soft":
                    soft_rewards = soft_rewards - discounts * ent_coef * next_log_prob.unsqueeze(1)
            # td_loss() adds the discounted values, because a batch-normalised critic takes (s, a) and (s', a') in one pass
            critic_loss = self.critic.td_loss(
                self.critic_target, obs, replay_data.actions, next_obs, th.tanh(next_u), soft_rewards, discounts
            )
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            self.critic.optimizer.step()
            logs["critic_loss"].append(critic_loss.detach())

            # Actor: D(s, x, sigma) -> E[u | s, x],  tanh(u) ~ exp(Q(s, .) / ent_coef) / Z(s),  x = u + sigma eps.
            # It learns at s' from the actions of the critics' target, or, every few updates, at s from new ones
            if self._n_updates % self.policy_delay == 0:
                if self.draws_own_actions(self._n_updates // self.policy_delay, replay_data.dones):
                    actor_loss, metrics = self.actor_loss(obs, ent_coef)
                    # As seldom as this loss, because it is one more run of the critic and changes slowly
                    q_spread = self.q_spread(obs)
                    self.temperature.bound(q_spread)
                    metrics = {**metrics, "q_spread": q_spread}
                else:
                    actor_loss, metrics = self.next_actor_loss(acting_obs, next_u, ent_coef)
                if actor_loss.requires_grad:  # some parameter of the actor is not frozen
                    self.actor.optimizer.zero_grad()
                    actor_loss.backward()
                    self.actor.optimizer.step()
                    self.policy.average_actor()
                logs["actor_loss"].append(actor_loss.detach())
                for name, value in metrics.items():
                    logs[name].append(value)

            # Temperature: entropy -> target_entropy, at s', where log pi is known
            entropy = -next_log_prob.mean()
            ent_coef_loss = self.temperature.update(entropy, learning_rate)
            if ent_coef_loss is not None:
                logs["ent_coef_loss"].append(ent_coef_loss)
            logs["ent_coef"].append(ent_coef)
            logs["entropy"].append(entropy)

            # Target networks
            if self.critic.has_target and self._n_updates % self.target_update_interval == 0:
                # polyak_update() in one pass over the memory
                fast.update_target(self.critic.parameters(), self.critic_target.parameters(), self.tau)
                # Copy running stats, see SB3's issue #996
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

            self._n_updates += 1

        check_temperature(self.temperature, self._current_progress_remaining, self.actor.action_dim)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if logs:
            # One transfer from a GPU
            all_values = [value.to(self.device, th.float32).mean() for values in logs.values() for value in values]
            numbers = iter(th.stack(all_values).tolist())
            remedy = f"To go on, {LOAD_EARLIER} ({learning_rate=})"
            for name, values in logs.items():
                mean = sum(islice(numbers, len(values))) / len(values)
                check_finite(f"train/{name}", mean, self.num_timesteps, remedy)
                self.logger.record(f"train/{name}", mean)
        check_parameters(self.policy, [self.actor.optimizer, self.critic.optimizer], self.num_timesteps, learning_rate)

    def draws_own_actions(self, n_actor_updates: int, dones: th.Tensor) -> bool:
        """
        Decide which loss an update of the actor minimises.

        Every ``own_draws_freq``-th update minimises ``actor_loss()``, and every update does if the estimator does not take
        next states. The others minimise ``next_actor_loss()``, which saves a run of the sampler. No next state is the first of
        an episode, so ``actor_loss()`` is minimised more often where episodes end early: if a share p of the batch terminates
        one, by about every ``1 / (2 p)``-th update, twice the share of first states. Time limits do not count.

        :param n_actor_updates: number of updates of the actor before this one
        :param dones: 1 where an episode terminates, 0 elsewhere, also at time limits; shape (batch_size, 1)
        :return: True for ``actor_loss()``, False for ``next_actor_loss()``
        """
        if self.target_estimator.for_next_states is None:
            return True
        share = float(dones.mean())
        freq = self.own_draws_freq if share == 0 else min(self.own_draws_freq, math.ceil(0.5 / share))
        return n_actor_updates % freq == 0

    def actor_loss(self, obs: PyTorchObs, ent_coef: th.Tensor | float) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Denoising loss of the actor at random observations of a batch, a share ``own_share`` of them. It draws ``n_draws``
        actions per observation, noises each once, and regresses the denoiser on the estimator's targets.
        Moves the running means of the estimator and, in training mode, those of the actor's features.

        :param obs: Observation
        :param ent_coef: temperature
        :return: the loss, 0-d, and scalars to log, by name
        """
        n_states = share_of(count(obs), self.own_share)
        obs = select(obs, th.randperm(count(obs), device=self.device)[:n_states])
        embedding = self.actor.embed(obs).unsqueeze(1)
        with th.no_grad():
            latents = th.randn(n_states, self.n_draws, self.actor.action_dim, device=self.device)
            u = self.actor.training_sample(embedding, latents)
        errors, metrics = self._denoising_errors(obs, embedding, u, self.n_draws, self.target_estimator, ent_coef)
        return errors.mean(), metrics

    @th.no_grad()
    def q_spread(self, obs: PyTorchObs) -> th.Tensor:
        """
        Estimate how much the critic's energy, its Q in exp(Q / ent_coef), depends on the action.

        :param obs: Observation
        :return: standard deviation of Q over uniform actions at a state, root mean square over the states, 0-d
        """
        pairs = 2 * th.rand(count(obs), 2, self.actor.action_dim, device=self.device) - 1
        with evaluation_mode(self.critic):
            values = self.critic.energy(obs)(pairs)
        # Half the mean squared difference of two draws is their variance
        return ((values[:, 0] - values[:, 1]).pow(2).mean() / 2).sqrt()

    def next_actor_loss(
        self,
        next_obs: PyTorchObs,
        next_u: th.Tensor,
        ent_coef: th.Tensor | float,
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Denoising loss of the actor at random next observations of a batch, a share ``next_share`` of them. It uses the action
        that the critics' target has drawn there, and noises it ``n_copies`` times. Moves the running means of the actor's
        features in training mode.

        :param next_obs: next observations; in ``train()`` the observation itself where an episode terminates
        :param next_u: unsquashed actions of the policy there, shape (batch_size, action_dim)
        :param ent_coef: temperature
        :return: the loss, 0-d, and scalars to log, by name
        :raises ValueError: if ``for_next_states`` of the estimator is None, see ``draws_own_actions()``
        """
        estimator = self.target_estimator.for_next_states
        if estimator is None:
            raise ValueError("next_actor_loss() needs an estimator whose `for_next_states` is not None; use actor_loss().")
        rows = th.rand(len(next_u), device=self.device).argsort()[: share_of(len(next_u), self.next_share)]
        next_obs, u = select(next_obs, rows), next_u[rows].unsqueeze(1)
        embedding = self.actor.embed(next_obs).unsqueeze(1)
        errors, metrics = self._denoising_errors(next_obs, embedding, u, self.n_copies, estimator, ent_coef)
        return errors.mean(), metrics

    def _denoising_errors(
        self,
        obs: PyTorchObs,
        embedding: th.Tensor,
        u: th.Tensor,
        n_noisy: int,
        estimator: DenoiserTarget,
        ent_coef: th.Tensor | float,
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Add noise to unsquashed actions u, ``x = u + sigma * eps``, and compare the denoiser's answers D(s, x, sigma) with the
        estimator's targets for ``E[u | s, x]``.

        :param obs: observations of n_states states
        :param embedding: of these, with gradients, shape (n_states, 1, width)
        :param u: shape (n_states, n_noisy, action_dim), or (n_states, 1, action_dim): one action, noised n_noisy times
        :param n_noisy: number of noisy actions per state
        :param estimator: gives the targets
        :param ent_coef: temperature
        :return: squared errors divided by ``c_out(sigma)^2``, so that all noise levels weigh alike (Karras et al. 2022,
            section 5), averaged over the action's dimensions, shape (n_states, n_noisy), and scalars to log, by name
        """
        sigma = self.actor.noise.training(len(u), n_noisy, self.device)
        x = u + sigma * th.randn(len(u), n_noisy, self.actor.action_dim, device=self.device)
        denoised = self.actor.denoise(embedding, x, sigma)
        # The critic values actions in evaluation mode: without dropout, with the running statistics of batch normalisation
        with th.no_grad(), evaluation_mode(self.critic):
            _, _, std = self.actor.split(embedding)
            density = BoltzmannDensity(self.critic.energy, obs, ent_coef)
            targets, metrics = estimator(density, Draws(u, x, sigma, denoised, std))
            scale = c_out(sigma, std)
            self.actor.last_std = std.mean(dim=(0, 1))  # logged, see Actor.get_std()
        return ((denoised - targets) / scale).pow(2).mean(dim=2), metrics

    def learn(
        self: SelfDQS,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DQS",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDQS:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if isinstance(callback, list):
            callback = CallbackList(callback)
        elif not isinstance(callback, BaseCallback):
            callback = ConvertCallback(callback)
        return super()._init_callback([FiniteStepCallback(), callback], progress_bar)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        def checked_noise() -> np.ndarray:
            assert action_noise is not None  # for type checker
            noise = action_noise()
            check_finite("`action_noise`: the noise", noise, self.num_timesteps, "Fix `action_noise`")
            return noise

        sample = partial(super()._sample_action, learning_starts, checked_noise if action_noise is not None else None, n_envs)  # type: ignore[arg-type]
        if self.use_sde or self.exploration_noise != "pink" or self.num_timesteps < learning_starts:
            return sample()
        with self.policy.lock:  # other threads that predict meanwhile must not act by these latents
            self.actor.held_latents = self.pink_latents(n_envs)
            try:
                return sample()
            finally:
                self.actor.held_latents = None

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may overshoot: schedules are functions from 1 to 0
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        check_learning_rate(self.lr_schedule, [self._current_progress_remaining])
        super()._update_learning_rate(optimizers)

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file. The file is whole at any moment: the old
        one, or the new one.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        :raises ValueError: if a parameter is not finite; nothing is written then
        """
        self._check_state(self.get_parameters(), f"save(path={path}): nothing is written")
        with atomic(path, "zip") as file:
            super().save(file, exclude, include)

    def save_replay_buffer(self, path: str | Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as a pickle file, which is whole at any moment: the old one, or the new one.

        :param path: Path to the file where the replay buffer should be saved.
            if path is a str or pathlib.Path, the path is automatically created if necessary.
        """
        with atomic(path, "pkl") as file:
            super().save_replay_buffer(file)

    def load_replay_buffer(self, path: str | Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file. Unpickling can run any code: load only files that you trust.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: When using ``HerReplayBuffer`` with online sampling:
            If set to ``True``, we assume that the last trajectory in the replay buffer was finished
            (and truncate it).
            If set to ``False``, we assume that we continue the same trajectory (same episode).
        :raises ValueError: if the file is truncated or corrupt, or holds no replay buffer for these spaces; the present
            buffer stays
        """
        present = getattr(self, "replay_buffer", None)
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            check_buffer_fits(self.replay_buffer, self.observation_space, self.action_space)
        except OSError:
            raise
        except Exception as error:
            self.replay_buffer = present
            raise ValueError(
                f"path={path}: the file is truncated or corrupt, or no replay buffer for these spaces "
                f"({type(error).__name__}: {error}); give the path of a file that save_replay_buffer() wrote."
            ) from error

    @classmethod
    def load(cls: type[SelfDQS], path: str | Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> SelfDQS:
        """
        As SB3's: see there for the arguments. Unpickling can run any code: load only files that you trust.

        :param path: path to the file (or a file-like) where to load the agent from
        :return: new model instance with loaded parameters
        :raises ValueError: if the file is truncated or corrupt, is no saved model, or holds parameters that are not finite
        :raises RuntimeError: as torch's, if ``policy_kwargs`` make another model than the saved one
        """
        check_model_file(path)
        try:
            with th.inference_mode(False):  # parameters made in inference mode could not be trained
                return super().load(path, *args, **kwargs)
        except KeyError as error:
            # SB3 takes any ValueError for the sign of an old DQN, and then misses the optimizer of DQN
            if isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise

    def _check_state(self, state: dict[str, Any], start: str) -> None:
        name = find_not_finite(state, {name for name, _ in self.policy.named_parameters()})
        if name is not None:
            raise ValueError(f"{start}, because {name} is not finite; {LOAD_EARLIER}.")

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules
        (see ``get_parameters``). State of another kind of ``ent_coef`` or ``denoiser_target``, under other names, is skipped,
        and so is that of another ``exploration_noise``.

        :param load_path_or_dict: location of the saved data, or nested dictionary
        :param exact_match: if True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception
        :param device: device on which the code should run
        :raises ValueError: if a parameter is not finite, the file is truncated or corrupt, or a module is missing; nothing is
            changed then
        :raises RuntimeError: as torch's, if the parameters are of another model; nothing is changed then
        """
        start = "set_parameters(): nothing is changed"
        if isinstance(load_path_or_dict, dict):
            params: dict[str, Any] = dict(load_path_or_dict)
        else:
            check_model_file(load_path_or_dict)
            start = f"set_parameters({load_path_or_dict}): nothing is changed"
            _, params, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
        if self.exploration_noise == "pink":
            params.setdefault("pink_latents", self.pink_latents.state_dict())
        else:
            params.pop("pink_latents", None)
        self._check_state(params, start)
        for name in ("temperature", "target_estimator"):
            own = getattr(self, name).state_dict()
            if name in params and own.keys().isdisjoint(params[name]):
                params[name] = own
        before: dict[str, Any] = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(params, exact_match, device)
        except Exception as error:
            super().set_parameters(before, True, device)
            if not isinstance(error, RuntimeError):  # torch's
                raise
            reason = textwrap.shorten(str(error).partition("\n")[2] or str(error), 300)
            raise RuntimeError(
                f"{start}, because the parameters are those of another model ({reason}); build the model with the "
                "`policy_kwargs` of the saved one, and with the algorithm that saved it."
            ) from error

    def _excluded_save_params(self) -> list[str]:
        return super()._excluded_save_params() + [  # noqa: RUF005
            "actor",
            "critic",
            "critic_target",
            "batch_norm_stats",
            "batch_norm_stats_target",
            "temperature",
            "target_estimator",
            "pink_latents",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy", "actor.optimizer", "critic.optimizer", "temperature", "target_estimator"]
        if self.exploration_noise == "pink":
            names.append("pink_latents")
        return names, []
