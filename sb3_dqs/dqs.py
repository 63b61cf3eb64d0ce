"""Diffusion Q-Sampling: the algorithm."""

import math
from collections import defaultdict
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule, TensorDict
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from torch.nn import functional as F

from sb3_dqs.actor import Actor
from sb3_dqs.checks import (
    check_arguments,
    check_finite,
    check_learning_rate,
    check_policy,
    check_target_entropy,
    make_checked_env,
)
from sb3_dqs.critics import Critic
from sb3_dqs.denoiser_targets import (
    ENOUGH_SAMPLES,
    N_ANCHORS,
    LogDensity,
    count_pooled,
    effective_sample_size,
    energy_gradient,
    posterior_mean,
)
from sb3_dqs.density import log_det_tanh, trace_steps
from sb3_dqs.fast import Compiled, has_fast_bfloat16
from sb3_dqs.noise import edm_scalings, training_levels
from sb3_dqs.policies import CnnPolicy, DQSPolicy, MlpPolicy, MultiInputPolicy
from sb3_dqs.temperature import AutoTemperature, ScheduledTemperature, make_temperature

# Rate of the running mean of the effective sample size
ESS_UPDATE_RATE = 0.05

SelfDQS = TypeVar("SelfDQS", bound="DQS")


class DQS(OffPolicyAlgorithm):
    """
    Diffusion Q-Sampling (DQS)
    Off-policy actor-critic whose policy is the Boltzmann distribution of the critic,
    ``pi(a|s) = exp(Q(s, a) / ent_coef) / Z(s)``, drawn from by a diffusion sampler: it keeps every good action.
    Paper: https://arxiv.org/abs/2410.01312 (Jain, Akhound-Sadegh, Ravanbakhsh, RLC 2025)

    The arguments are those of SB3's ``SAC``, in its order and with its defaults; those of DQS follow as keywords.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate for adam optimizer,
        the same learning rate will be used for all networks (Q-Values, Actor and temperature)
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
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
        ``"log_linear_1.0_0.01"`` (the paper's anneal, from the first to the second number), schedules it.
    :param target_update_interval: update the target network every ``target_network_update_freq``
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
    :param n_mc_samples: Number of Monte Carlo samples K of the score target, that is of actions that the critics value per
        target
    :param diffusion_steps: Number of steps of the reverse process, that is of denoiser calls per action
    :param policy_delay: The actor will only be updated once every ``policy_delay`` gradient steps, as in TD3
    :param score_target: What the actor regresses on: ``"posterior_mean"``
        (see :func:`sb3_dqs.denoiser_targets.posterior_mean`), or the paper's ``"energy_gradient"``
        (see :func:`sb3_dqs.denoiser_targets.energy_gradient`)
    :param backup: ``"soft"`` adds the entropy bonus to the critics' target, as SAC; ``"hard"`` does not, as the paper
    :param compile: Whether to compile the sampler of the training with ``torch.compile``: the same results up to rounding,
        and the same files; the first steps take up to a minute more
    :raises ValueError: for an argument that cannot work, before anything is built; and during training when an
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
    temperature: ScheduledTemperature | AutoTemperature

    def __init__(
        self,
        policy: str | type[DQSPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
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
        ent_coef: str | float | Schedule = "auto",
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
        diffusion_steps: int = 8,
        policy_delay: int = 2,
        score_target: str = "posterior_mean",
        backup: str = "soft",
        compile: bool = False,
    ):
        check_arguments(locals())
        check_learning_rate(learning_rate)
        wanted = (policy_kwargs or {}).get("diffusion_steps", diffusion_steps)
        if wanted != diffusion_steps:
            raise ValueError(
                f"policy_kwargs: diffusion_steps={wanted!r} is an argument of DQS: DQS(..., diffusion_steps={wanted!r})."
            )
        if env is None and _init_setup_model:
            raise ValueError("env=None will not do: pass an environment or its name.")
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
            policy_kwargs=dict(policy_kwargs or {}),  # a copy: SB3 adds to it
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

        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.target_entropy = target_entropy
        self.n_mc_samples = n_mc_samples
        self.diffusion_steps = diffusion_steps
        self.policy_delay = policy_delay
        self.score_target = score_target
        self.backup = backup
        self.compile = compile
        self.mean_ess = ENOUGH_SAMPLES

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_policy(self.policy_class, self.policy_kwargs, self.observation_space)
        check_arguments(vars(self))  # again, because loading can change them
        self.policy_kwargs = {**self.policy_kwargs, "diffusion_steps": self.diffusion_steps}
        super()._setup_model()
        self._create_aliases()
        # Running mean and running var
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])
        if self.target_entropy == "auto":
            self.target_entropy = -float(self.actor.action_dim)
        else:
            self.target_entropy = float(self.target_entropy)
        self.sampling_dtype = th.bfloat16 if has_fast_bfloat16(self.device) else None
        self.temperature = make_temperature(self.ent_coef)
        if isinstance(self.temperature, AutoTemperature):
            self.temperature.to(self.device)
            check_target_entropy(self.target_entropy, self.actor.action_dim)

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.compiled_sampler = Compiled(self.actor.sample_with_log_prob) if self.compile else None

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        # Update learning rate according to lr schedule (the temperature has no optimizer, and takes it at every step)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        learning_rate = self.lr_schedule(self._current_progress_remaining)

        logs: dict[str, list[th.Tensor]] = defaultdict(list)

        sample_with_log_prob = self.compiled_sampler or self.actor.sample_with_log_prob
        backup_steps = trace_steps(self.diffusion_steps)
        # One regression target per transition
        n_states = min(batch_size, max(2, math.ceil(batch_size / N_ANCHORS)))  # batch norm needs two

        for gradient_step in range(gradient_steps):
            # Sample replay buffer
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            # For n-step replay, discount factor is gamma**n_steps (when no early termination)
            discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
            ent_coef = self.temperature(self._current_progress_remaining)

            # Draw actions of the current policy: one per next state for the critics and, when the actor learns, too, several
            # per state for it
            is_actor_update = (self._n_updates + gradient_step) % self.policy_delay == 0
            with th.no_grad():
                embeddings = self.actor.embed(replay_data.next_observations)
            if is_actor_update:
                observations = slice_observations(replay_data.observations, slice(n_states))
                embedding = self.actor.embed(observations).unsqueeze(1)
                embeddings = th.cat([embeddings, embedding.detach().expand(-1, N_ANCHORS, -1).flatten(0, 1)])
            with th.no_grad():
                latents = th.randn(len(embeddings), self.actor.action_dim, device=self.device)
                actions, next_log_prob = sample_with_log_prob(
                    embeddings, latents, backup_steps, n_log_probs=batch_size, dtype=self.sampling_dtype
                )
                next_actions, anchors = th.tanh(actions[:batch_size]), actions[batch_size:]
                entropy = -next_log_prob.mean()

                # Compute the next Q values: min over all critics targets
                next_q_values = th.cat(self.critic_target(replay_data.next_observations, next_actions), dim=1)
                next_q_values, _ = th.min(next_q_values, dim=1, keepdim=True)
                if self.backup == "soft":
                    # add entropy term
                    next_q_values = next_q_values - ent_coef * next_log_prob.reshape(-1, 1)
                target_q_values = replay_data.rewards + (1 - replay_data.dones) * discounts * next_q_values

            # Optimize the critics
            current_q_values = self.critic(replay_data.observations, replay_data.actions)
            critic_loss = 0.5 * sum(F.mse_loss(current_q, target_q_values) for current_q in current_q_values)
            assert isinstance(critic_loss, th.Tensor)  # for type checker
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            self.critic.optimizer.step()
            logs["critic_loss"].append(critic_loss.detach())

            if is_actor_update:
                # Noise the actions, denoise them, and estimate what the denoiser should have answered: E[u | x] under
                # exp(Q / ent_coef)
                anchors = anchors.reshape(n_states, N_ANCHORS, -1)
                sigma = training_levels(n_states, N_ANCHORS, self.device)
                noisy_actions = anchors + sigma * th.randn_like(anchors)
                denoised = self.actor.denoise(embedding, noisy_actions, sigma)
                with th.no_grad():
                    target, log_weights = self._score_target(observations, anchors, denoised, noisy_actions, sigma, ent_coef)

                # Optimize the actor; the errors are of unit scale at every noise level (Karras et al. 2022, section 5)
                c_out = edm_scalings(sigma)[1]
                actor_loss = F.mse_loss(denoised / c_out, target / c_out)
                self.actor.optimizer.zero_grad()
                actor_loss.backward()
                self.actor.optimizer.step()
                self.actor.update_std(anchors - denoised.detach(), sigma)
                logs["actor_loss"].append(actor_loss.detach())
                logs["ess"].append(effective_sample_size(log_weights).mean())

            # Optimize the temperature
            if isinstance(self.temperature, AutoTemperature):
                ent_coef_loss = self.temperature.update(entropy, self.target_entropy, self.actor.action_dim, learning_rate)  # type: ignore[arg-type]
                logs["ent_coef_loss"].append(ent_coef_loss)

            # Update target networks
            if gradient_step % self.target_update_interval == 0:
                with th.no_grad():
                    # As polyak_update(), in one pass over the memory instead of two
                    th._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), self.tau)
                # Copy running stats, see SB3's issue #996
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

            logs["ent_coef"].append(th.as_tensor(ent_coef, device=self.device))
            logs["entropy"].append(entropy)

        self._n_updates += gradient_steps

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        means = th.stack([th.stack(values).mean() for values in logs.values()]).tolist()  # one transfer from a GPU
        for (name, values), mean in zip(logs.items(), means, strict=True):
            check_finite(f"train/{name}", mean, self.num_timesteps)
            self.logger.record(f"train/{name}", mean)
            if name == "ess":
                self.mean_ess += (1 - (1 - ESS_UPDATE_RATE) ** len(values)) * (mean - self.mean_ess)

    def _score_target(
        self,
        obs: PyTorchObs,
        anchors: th.Tensor,
        denoised: th.Tensor,
        noisy_actions: th.Tensor,
        sigma: th.Tensor,
        ent_coef: float | th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        What the denoiser should answer: the posterior mean E[u | x] under ``exp(Q / ent_coef)``.

        :param obs: Observation
        :param anchors: unsquashed actions u of the policy, shape (n_states, n_anchors, action_dim)
        :param denoised: what the denoiser answered, shape (n_states, n_anchors, action_dim)
        :param noisy_actions: x, shape (n_states, n_anchors, action_dim)
        :param sigma: noise levels, shape (n_states, n_anchors, 1)
        :param ent_coef: temperature
        :return: targets of shape (n_states, n_anchors, action_dim),
            and the normalised log-weights of their samples, of shape (n_states or fewer, n_anchors, number of samples)
        """
        features = self.critic.extract_features(obs, self.critic.features_extractor)

        def log_density_of(states: slice) -> LogDensity:
            def log_density(unsquashed: th.Tensor) -> th.Tensor:
                return self.critic.q1_values(features[states], th.tanh(unsquashed)) / ent_coef + log_det_tanh(unsquashed)

            return log_density

        if self.score_target == "energy_gradient":
            return energy_gradient(log_density_of(slice(None)), noisy_actions, sigma, self.n_mc_samples)
        n_pooled = count_pooled(self.mean_ess, len(anchors))
        std = self.actor.get_std()
        return posterior_mean(log_density_of, anchors, denoised, noisy_actions, sigma, std, self.n_mc_samples, n_pooled)

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

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        result = super()._setup_learn(*args, **kwargs)
        check_finite("the first observation", self._last_obs, self.num_timesteps)
        return result

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        # One bad number in the buffer would spoil the networks many steps later
        check_finite("the observation", new_obs, self.num_timesteps)
        for info in infos:
            if "terminal_observation" in info:
                check_finite("the terminal observation", info["terminal_observation"], self.num_timesteps)
        check_finite("the reward", reward, self.num_timesteps)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules
        (see ``get_parameters``). If they were saved with another kind of ``ent_coef`` (tuned instead of given, or the
        other way round), the temperature is not loaded, and stays what it is.

        :param load_path_or_dict: location of the saved data, or nested dictionary
        :param exact_match: if True, the given parameters should include parameters for each module (but for the
            temperature) and each of their parameters, otherwise raises an Exception
        :param device: device on which the code should run
        """
        if isinstance(load_path_or_dict, dict):
            params: dict[str, Any] = dict(load_path_or_dict)
        else:
            _, params, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
        params.pop("temperature.optimizer", None)  # in files of earlier versions
        own = self.get_parameters()
        if "temperature" not in own:
            params.pop("temperature", None)
        elif own.keys() - params.keys() == {"temperature"}:
            params["temperature"] = own["temperature"]
        super().set_parameters(params, exact_match, device)

    def _excluded_save_params(self) -> list[str]:
        return super()._excluded_save_params() + [  # noqa: RUF005
            "actor",
            "critic",
            "critic_target",
            "temperature",
            "compiled_sampler",
            "sampling_dtype",  # of the machine
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "actor.optimizer", "critic.optimizer"]
        if isinstance(self.temperature, AutoTemperature):
            state_dicts.append("temperature")
        return state_dicts, []


def slice_observations(obs: PyTorchObs, rows: slice) -> PyTorchObs:
    """
    Some of a batch of observations.

    :param obs: Observation
    :param rows: which
    :return: observations of the same kind
    """
    return {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]
