"""Policies of DQS: they build the actor, the critics and their optimizers, and predict."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import TanhBijector
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_dqs import fast
from sb3_dqs.actor import Actor
from sb3_dqs.averaging import RunningAverage
from sb3_dqs.batch_norm_critic import BatchNormCritic
from sb3_dqs.checks.critic import check_critic
from sb3_dqs.critics import Critic, MlpCritic
from sb3_dqs.finite import LOAD_EARLIER, is_finite
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.saving import atomic
from sb3_dqs.solvers import MAX_UNSQUASHED, Solver, dpm_solver_2m
from sb3_dqs.training_mode import Lock, locked
from sb3_dqs.warn_once import warn_once

CRITICS: dict[str, type[Critic]] = {"batch_norm": BatchNormCritic, "mlp": MlpCritic}
# Arguments of the policy that go to the actor as they are
ACTOR_KWARGS = ("use_sde", "diffusion_steps", "noise", "solver", "n_frequencies")

# What Python says where arguments do not fit a function; torch's functions say "argument", too, of their own
CALL_ERROR = re.compile(
    r"unexpected keyword argument|multiple values for argument|required (positional|keyword-only) argument|"
    r"takes .* positional arguments? but"
)


class DQSPolicy(BasePolicy):
    """
    Policy class (with both actor and critic) for DQS.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy and value networks.
    :param activation_fn: Activation function
    :param use_sde: Whether to hold the sampler's noise between two calls of ``reset_noise()``
    :param log_std_init: Accepted for the sake of SAC's configurations and ignored, with a warning:
        the policy is no Gaussian
    :param use_expln: Likewise
    :param clip_mean: Likewise
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments
        to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use,
        ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments,
        excluding the learning rate, to pass to the optimizer
    :param n_critics: Number of critic networks to create.
    :param share_features_extractor: Whether to share or not the features extractor
        between the actor and the critic (this saves computation time)
    :param critic_class: ``"batch_norm"`` (:class:`sb3_dqs.batch_norm_critic.BatchNormCritic`), ``"mlp"`` (the plain twin
        networks of SAC, :class:`sb3_dqs.critics.MlpCritic`), or a class, see :class:`sb3_dqs.critics.Critic`
    :param critic_kwargs: Keyword arguments to pass to the critic, besides those of SB3's ``ContinuousCritic``
    :param diffusion_steps: Number of denoiser calls per action, at least 3; more is more accurate and slower
    :param noise: Noise levels, see :class:`sb3_dqs.noise.NoiseLevels`
    :param solver: Solver of the reverse process, see :mod:`sb3_dqs.solvers`
    :param n_frequencies: Number of frequencies by which the noise level enters the actor
    :param best_of_n_by_q: Let ``deterministic=True`` return the action of highest value (by the critic's energy) among this
        many, instead of the one that the actor alone finds
    :param actor_averaging_rate: Without gradients, deterministic actions come from a running average of the actor's
        parameters, with this rate per update of the actor, or a larger one at the beginning, see
        :func:`sb3_dqs.averaging.averaging_rate`; 1 for the actor itself. Training and stochastic actions use the actor itself.
        If something other than ``train()`` changed its parameters, deterministic actions do so, too, and the average begins
        anew at the next ``train()``
    """

    actor: Actor
    actor_average: RunningAverage | None
    critic: Critic
    critic_target: Critic
    latent_bank: th.Tensor  # with best_of_n_by_q only

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        use_sde: bool = False,
        log_std_init: float | None = None,
        use_expln: bool | None = None,
        clip_mean: float | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        critic_class: str | type[Critic] = "batch_norm",
        critic_kwargs: dict[str, Any] | None = None,
        diffusion_steps: int = 8,
        noise: NoiseLevels | None = None,
        solver: Solver = dpm_solver_2m,
        n_frequencies: int = 2,
        best_of_n_by_q: int | None = None,
        actor_averaging_rate: float = 0.001,
    ):
        # Copies, because SB3 adds to the dictionary of the features extractor
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            dict(features_extractor_kwargs or {}),
            optimizer_class=optimizer_class,
            optimizer_kwargs=dict(optimizer_kwargs or {}),
            squash_output=True,
            normalize_images=normalize_images,
        )
        for name, value in {"log_std_init": log_std_init, "use_expln": use_expln, "clip_mean": clip_mean}.items():
            if value is not None:
                warn_once(
                    f"policy_kwargs: `{name}={value}` is ignored, it shapes SAC's Gaussian and DQS has none; "
                    "remove it to silence this warning.",
                    key=name,
                )

        self.lock = Lock()

        if net_arch is None:
            net_arch = [256, 256]

        actor_arch, critic_arch = get_actor_critic_arch(net_arch)

        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.best_of_n_by_q = best_of_n_by_q
        self.actor_averaging_rate = actor_averaging_rate
        self.critic_class = CRITICS[critic_class] if isinstance(critic_class, str) else critic_class
        self.own_critic_kwargs = critic_kwargs
        self.share_features_extractor = share_features_extractor
        net_kwargs = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "activation_fn": self.activation_fn,
            "normalize_images": normalize_images,
        }
        self.actor_kwargs = {
            **net_kwargs,
            "net_arch": actor_arch,
            "use_sde": use_sde,
            "diffusion_steps": diffusion_steps,
            "noise": noise,
            "solver": solver,
            "n_frequencies": n_frequencies,
        }
        self.critic_kwargs = {
            **net_kwargs,
            "net_arch": critic_arch,
            "n_critics": n_critics,
            "share_features_extractor": share_features_extractor,
            **(critic_kwargs or {}),
        }

        self._build(lr_schedule)
        if best_of_n_by_q is not None:
            uniforms = th.quasirandom.SobolEngine(self.actor.action_dim, scramble=True, seed=0).draw(best_of_n_by_q)
            self.register_buffer("latent_bank", th.special.ndtri(uniforms.clamp(1e-4, 1 - 1e-4)), persistent=False)

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        self.actor_average = None
        if self.actor_averaging_rate < 1:
            self.actor_average = RunningAverage(self.actor, self.actor_averaging_rate).to(self.device)
            self.actor.follow(self.actor_average)
        self.actor.optimizer = self._make_optimizer(self.actor.parameters(), lr_schedule)

        if self.share_features_extractor:
            self.critic = self.make_critic(features_extractor=self.actor.features_extractor)
            # The shared features extractor learns from the actor's loss only
            critic_parameters = [param for name, param in self.critic.named_parameters() if "features_extractor" not in name]
        else:
            self.critic = self.make_critic(features_extractor=None)
            critic_parameters = list(self.critic.parameters())

        if self.critic_class not in CRITICS.values():
            check_critic(self.critic, self.observation_space, self.action_space)

        if self.critic_class.has_target:
            # Critic target should not share the features extractor with critic
            self.critic_target = self.make_critic(features_extractor=None)
            self.critic_target.load_state_dict(self.critic.state_dict())
            # Target networks should always be in eval mode
            self.critic_target.set_training_mode(False)
        else:
            # No module of its own: parameters have one name
            self.__dict__["critic_target"] = self.critic

        self.critic.optimizer = self._make_optimizer(critic_parameters, lr_schedule)

    def _make_optimizer(self, parameters: Iterable[nn.Parameter], lr_schedule: Schedule) -> th.optim.Optimizer:
        parameters = list(parameters)
        kwargs = dict(self.optimizer_kwargs)
        if isinstance(self.optimizer_class, type) and issubclass(self.optimizer_class, (th.optim.Adam, th.optim.AdamW)):
            kwargs = {**self.critic_class.adam_kwargs, **kwargs}
        kwargs = fast.optimizer_kwargs(self.optimizer_class, kwargs, parameters)
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()

        data.update(
            dict(
                net_arch=self.net_arch,
                activation_fn=self.activation_fn,
                **{name: self.actor_kwargs[name] for name in ACTOR_KWARGS},
                critic_class=self.critic_class,
                critic_kwargs=self.own_critic_kwargs,
                best_of_n_by_q=self.best_of_n_by_q,
                actor_averaging_rate=self.actor_averaging_rate,
                n_critics=self.critic_kwargs["n_critics"],
                share_features_extractor=self.share_features_extractor,
                lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
                optimizer_class=self.optimizer_class,
                optimizer_kwargs=self.optimizer_kwargs,
                features_extractor_class=self.features_extractor_class,
                features_extractor_kwargs=self.features_extractor_kwargs,
            )
        )
        return data

    def reset_noise(self, batch_size: int = 1) -> None:
        """
        Draw new noise for the sampler, when using ``use_sde=True``.

        :param batch_size: number of environments, each with its own noise
        """
        self.actor.reset_noise(batch_size=batch_size)

    def average_actor(self) -> None:
        """Move the running average of the actor, if there is one; called after every update of the actor."""
        if self.actor_average is not None:
            self.actor_average.update(self.actor)
            self.actor.average_is_current = True

    def restart_average(self) -> None:
        """Begin the running average anew if something else changed or replaced the actor; called before updates."""
        self.actor.follow(self.actor_average)
        if self.actor_average is not None and not self.actor_average.is_current(self.actor):
            self.actor_average.restart(self.actor)
            self.actor.average_is_current = False

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        As torch's. The running average of the actor may be missing or, without need, be there: a model can be loaded with
        another ``actor_averaging_rate``.

        :param state_dict: parameters and buffers
        """
        prefix = "actor_average."
        given = {name: value.shape for name, value in state_dict.items() if name.startswith(prefix)}
        own = self._shapes_of_average(prefix)
        if given and own and given != own:
            self.actor_average.restart(self.actor)  # type: ignore[union-attr]  # other layers since it began
            own = self._shapes_of_average(prefix)
        if given != own:
            others = OrderedDict((name, value) for name, value in state_dict.items() if name not in given)
            others._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
            if self.actor_average is not None:
                has_actor = any(name.startswith("actor.") for name in others)
                others.update((name, th.zeros_like(value) if has_actor else value) for name, value in
                              self.actor_average.state_dict(prefix=prefix).items())  # fmt: skip
            state_dict = others
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self.actor.follow(self.actor_average)
        self.actor.notice_changes()
        return result

    def _shapes_of_average(self, prefix: str) -> dict[str, th.Size]:
        average = {} if self.actor_average is None else self.actor_average.state_dict(prefix=prefix)
        return {name: value.shape for name, value in average.items()}

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return Actor(**actor_kwargs).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        try:
            return self.critic_class(**critic_kwargs).to(self.device)
        except TypeError as error:
            if not CALL_ERROR.search(str(error)):  # of the constructor's own work
                raise
            raise ValueError(
                f"policy_kwargs: `critic_class`={self.critic_class.__name__} fails with the keyword arguments "
                f"{', '.join(critic_kwargs)} ({error}); take all of them under these names, and in `critic_kwargs` give those "
                "that it takes."
            ) from error

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    @locked
    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As SB3's, and checks that observation and action are finite.

        :param observation: the input observation
        :param state: not used
        :param episode_start: not used
        :param deterministic: Whether or not to return deterministic actions
        :return: the action in the action space, and ``state``
        :raises ValueError: if the observation is not finite, unless the features extractor makes finite features of it (NaN
            as a missing value), and if the action is not
        """
        parts = observation.values() if isinstance(observation, dict) else [observation]
        for part in () if isinstance(observation, tuple) else parts:  # SB3 explains what is wrong with a tuple
            if not is_finite(part) and not self.has_finite_features(observation):
                raise ValueError(
                    f"observation={part} is not finite; check the environment, or what prepares its observations."
                )
        actions, state = super().predict(observation, state, episode_start, deterministic)
        if not np.isfinite(actions).all():
            raise ValueError(
                f"policy: the action {actions} is not finite, because its weights or outputs are not; {LOAD_EARLIER}."
            )
        return actions, state

    @th.no_grad()
    def has_finite_features(self, observation: np.ndarray | dict[str, np.ndarray]) -> bool:
        """
        Whether the features extractor takes NaN or infinity in this observation for a missing value.

        :param observation: the input observation
        :return: True if the features are finite
        """
        self.set_training_mode(False)
        obs, _ = self.obs_to_tensor(observation)
        return bool(self.actor.extract_features(obs, self.actor.features_extractor).isfinite().all())

    def save(self, path: str) -> None:
        """
        Save model to a given location. The file is whole at any moment: the old one, or the new one.

        :param path:
        """
        with atomic(path, "") as file:
            super().save(file)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if deterministic and self.best_of_n_by_q is not None:
            actor = self.actor.deterministic_actor()
            embedding = actor.embed(observation)
            u = actor.sample(embedding.unsqueeze(1), self.latent_bank.expand(embedding.shape[0], -1, -1))
            actions = th.tanh(u)
            values, best = self.critic.energy(observation)(actions).max(dim=1, keepdim=True)
            action = actions.gather(1, best.unsqueeze(2).expand(-1, 1, actions.shape[2])).squeeze(1)
            return action + 0 * values  # NaN where the values are not finite
        if deterministic and type(self.actor).forward is not Actor.forward:
            return self.actor.deterministic_actor()(observation, deterministic)
        return self.actor(observation, deterministic)

    @locked
    @th.no_grad()
    def log_prob(self, obs: PyTorchObs, actions: th.Tensor, n_probes: int = 16) -> th.Tensor:
        """
        Log-density of the policy, from the sampler run backwards; see :mod:`sb3_dqs.density` for the formula and its
        sources.

        :param obs: Observation
        :param actions: actions in [-1, 1] (as in the replay buffer), one per observation
        :param n_probes: number of random directions that the estimate is averaged over; with one action dimension all
            give the same
        :return: log-density with respect to the actions in [-1, 1], in nats, shape (batch_size,)
        :raises ValueError: if the actions are no tensor, lie outside [-1, 1], or are not one per observation
        """
        self.set_training_mode(False)  # as predict()
        embedding = self.actor.embed(obs)
        shape = (len(embedding), *(self.action_space.shape or ()))
        is_suitable = isinstance(actions, th.Tensor) and actions.shape == shape and actions.device == embedding.device
        if not is_suitable or not (actions.abs() <= 1).all():
            raise ValueError(
                f"`actions` must be a tensor of shape {shape} on {embedding.device}, one action in [-1, 1] per observation, "
                f"got {actions!r}: pass "
                "torch.as_tensor(policy.scale_action(actions), dtype=torch.float32, device=policy.device)."
            )
        u = TanhBijector.inverse(actions.to(embedding.dtype).flatten(start_dim=1))
        repeated = u.clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED).unsqueeze(1).expand(-1, n_probes, -1)
        return self.actor.log_prob(embedding.unsqueeze(1), repeated).mean(dim=1)

    @locked
    @th.no_grad()
    def entropy(self, obs: PyTorchObs, n_actions: int = 64) -> th.Tensor:
        """
        Entropy of the policy, the mean of minus the log-density of its actions; see :mod:`sb3_dqs.density`.

        :param obs: Observation
        :param n_actions: number of actions per state
        :return: entropy of the action in [-1, 1]^d, in nats, shape (batch_size,)
        """
        self.set_training_mode(False)  # as predict()
        embedding = self.actor.embed(obs).unsqueeze(1)
        latents = th.randn(len(embedding), n_actions, self.actor.action_dim, device=embedding.device)
        _, log_prob = self.actor.sample_log_prob(embedding, latents)
        return -log_prob.mean(dim=1)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        From [-1, 1] to the bounds of the action space. The sampler comes so near the bounds that rounding can go past
        them: hence the clipping.

        :param scaled_action: actions in [-1, 1]
        :return: actions in the action space
        """
        assert isinstance(self.action_space, spaces.Box)  # for type checker
        return np.clip(super().unscale_action(scaled_action), self.action_space.low, self.action_space.high)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode.

        This affects certain modules, such as batch normalisation and dropout.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)
        self.training = mode


MlpPolicy = DQSPolicy


class CnnPolicy(DQSPolicy):
    """
    :class:`DQSPolicy` for images: ``NatureCNN`` is the default features extractor.

    :param args: as :class:`DQSPolicy`
    :param kwargs: as :class:`DQSPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": NatureCNN, **kwargs})


class MultiInputPolicy(DQSPolicy):
    """
    :class:`DQSPolicy` for dictionary observations: ``CombinedExtractor`` is the default features extractor.

    :param args: as :class:`DQSPolicy`
    :param kwargs: as :class:`DQSPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": CombinedExtractor, **kwargs})
