"""Networks of DQS: an actor that is a denoiser run backwards, critics, and the policies that hold both."""

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import TanhBijector
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_dqs.diffusion import (
    MAX_UNSQUASHED,
    SIGMA_BROAD,
    SIGMA_DATA,
    SIGMA_MIN,
    edm_scalings,
    find_mode,
    log_det_tanh,
    mode_latent,
    sampling_levels,
    solve_forward_ode,
    solve_reverse_ode,
)
from sb3_dqs.entropy import flow_log_density, random_signs, with_traces

# The noise level enters the network as sines and cosines of 2^0 ... 2^(N_FREQUENCIES - 1) times c_noise
N_FREQUENCIES = 8
# Rate of the running mean of the policy's variance
VARIANCE_UPDATE_RATE = 0.01
# Rows that a critic values at once on a CPU (on this much memory traffic is small beside the products)
CPU_CHUNK_ROWS = 512


class Actor(BasePolicy):
    """
    Actor network (policy) for DQS: a denoiser ``D(s, x, sigma)`` that estimates ``E[u | s, x]`` from a noisy unsquashed
    action ``x = u + sigma * eps``. Run from pure noise to none, it draws u, and ``a = tanh(u)`` is the action.
    Scalings of Karras et al. (2022), "EDM", https://arxiv.org/abs/2206.00364, Table 1.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Network architecture
    :param features_extractor: Network to extract features
        (a CNN when using images, a nn.Flatten() layer otherwise)
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param use_sde: Whether to hold the sampler's noise between two calls of ``reset_noise()``
    :param diffusion_steps: Number of denoiser calls per action
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    """

    action_space: spaces.Box
    mode_latent: th.Tensor
    held_latents: th.Tensor
    frequencies: th.Tensor
    level_c_in: th.Tensor
    level_waves: th.Tensor
    unsquashed_variance: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        use_sde: bool = False,
        diffusion_steps: int = 8,
        normalize_images: bool = True,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )

        # Save arguments to re-create object at loading
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.use_sde = use_sde
        self.diffusion_steps = diffusion_steps

        self.action_dim = get_action_dim(self.action_space)
        self.levels = sampling_levels(diffusion_steps)
        # c_skip and c_out of each level
        self.sampling_scalings = th.stack(edm_scalings(th.tensor(self.levels))[:2], dim=1).tolist()

        # The first layer is a sum of three: its observation part is computed once for all levels and all samples
        width = net_arch[0] if len(net_arch) > 0 else self.action_dim
        self.embed_features = nn.Linear(features_dim, width)
        self.embed_action = nn.Linear(self.action_dim, width, bias=False)
        self.embed_level = nn.Linear(2 * N_FREQUENCIES, width, bias=False)
        if len(net_arch) > 0:
            self.denoiser = nn.Sequential(activation_fn(), *create_mlp(width, self.action_dim, net_arch[1:], activation_fn))
        else:
            self.denoiser = nn.Sequential()

        # Constants, rebuilt with the network and not saved
        self.register_buffer("frequencies", 2.0 ** th.arange(N_FREQUENCIES), persistent=False)
        *_, c_in, c_noise = edm_scalings(th.tensor(self.levels).unsqueeze(1))
        self.register_buffer("level_c_in", c_in.unsqueeze(2), persistent=False)
        self.register_buffer("level_waves", self._waves(c_noise), persistent=False)
        self.register_buffer("mode_latent", mode_latent(self.action_dim), persistent=False)
        # Variance of the unsquashed action per dimension, averaged over states; at first that of the uniform policy
        self.register_buffer("unsquashed_variance", th.full((self.action_dim,), SIGMA_DATA**2))

        # What use_sde=True holds: one latent per environment
        self.register_buffer("held_latents", th.randn(1, self.action_dim) if use_sde else th.zeros(1, 1), persistent=False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()

        data.update(
            dict(
                net_arch=self.net_arch,
                features_dim=self.features_dim,
                activation_fn=self.activation_fn,
                use_sde=self.use_sde,
                diffusion_steps=self.diffusion_steps,
                features_extractor=self.features_extractor,
            )
        )
        return data

    def get_std(self) -> th.Tensor:
        """
        Standard deviation of the policy's unsquashed actions, given the state; a running root mean square over the
        states of the last updates. Logged by SB3 as ``train/std`` with ``use_sde=True``.

        :return: shape (action_dim,)
        """
        return self.unsquashed_variance.sqrt().clamp(min=SIGMA_MIN)

    def update_std(self, errors: th.Tensor, sigma: th.Tensor) -> None:
        """
        Update what ``get_std()`` returns, from the errors at high noise levels, where the denoiser answers the mean.

        :param errors: ``u - D(s, x, sigma)`` for actions u of the policy, shape (..., action_dim)
        :param sigma: noise levels, shape (..., 1)
        """
        is_high = (sigma >= SIGMA_BROAD).to(errors.dtype)
        variance = (is_high * errors.pow(2)).flatten(end_dim=-2).sum(dim=0) / is_high.sum().clamp(min=1)
        self.unsquashed_variance.lerp_(variance, VARIANCE_UPDATE_RATE * is_high.sum().clamp(max=1))

    def reset_noise(self, batch_size: int = 1) -> None:
        """
        Draw new noise for the sampler, to be held until the next call, when using ``use_sde=True``:
        meanwhile the action is a smooth function of the state.

        :param batch_size: number of environments, each with its own noise
        """
        if not self.use_sde:
            raise ValueError("reset_noise() is only available with use_sde=True, and this actor was built with use_sde=False.")
        self.held_latents = th.randn(batch_size, self.action_dim, device=self.device)

    def embed(self, obs: PyTorchObs) -> th.Tensor:
        """
        The observation's part of the first layer.

        :param obs: Observation
        :return: shape (batch_size, width of the first layer)
        """
        return self.embed_features(self.extract_features(obs, self.features_extractor))

    def denoise(self, embedding: th.Tensor, x: th.Tensor, sigma: th.Tensor) -> th.Tensor:
        """
        Denoiser ``D(s, x, sigma) = c_skip x + c_out F(s, c_in x, c_noise)`` (Karras et al. 2022, equation (7)).

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param x: noisy unsquashed actions, shape (..., action_dim)
        :param sigma: noise levels, shape (..., 1)
        :return: estimate of E[u | s, x], shape (..., action_dim)
        """
        c_skip, c_out, c_in, c_noise = edm_scalings(sigma)
        hidden = embedding + self.embed_action(c_in * x) + self.embed_level(self._waves(c_noise))
        return c_skip * x + c_out * self.denoiser(hidden)

    def _waves(self, c_noise: th.Tensor) -> th.Tensor:
        phases = c_noise * self.frequencies
        return th.cat([phases.sin(), phases.cos()], dim=-1)

    def sample(self, embedding: th.Tensor, latents: th.Tensor) -> th.Tensor:
        """
        Run the reverse process, and squash what it gives.

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param latents: standard normal numbers, shape (..., action_dim)
        :return: actions in [-1, 1], shape (..., action_dim)
        """
        return th.tanh(self.sample_unsquashed(embedding, latents))

    def sample_unsquashed(self, embedding: th.Tensor, latents: th.Tensor, dtype: th.dtype | None = None) -> th.Tensor:
        """
        Run the reverse process.

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param latents: standard normal numbers, shape (..., action_dim)
        :param dtype: precision of the hidden layers; by default that of the weights
        :return: unsquashed actions u, shape (..., action_dim)
        """
        return solve_reverse_ode(self._denoiser_at_levels(embedding, dtype), latents, self.levels)

    def sample_with_log_prob(
        self,
        embedding: th.Tensor,
        latents: th.Tensor,
        steps: Collection[int],
        n_log_probs: int | None = None,
        dtype: th.dtype | None = None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Run the reverse process, and tell the density of what it draws; see :func:`sb3_dqs.entropy.flow_log_density`.

        :param embedding: what ``embed()`` returned, shape (n, ..., width)
        :param latents: standard normal numbers, shape (n, ..., action_dim)
        :param steps: of the sampler, after the first, at which the trace is taken, at the price of a denoiser call each
        :param n_log_probs: for how many of the rows, the first; all by default
        :param dtype: precision of the hidden layers; by default that of the weights
        :return: unsquashed actions u, shape (n, ..., action_dim), and log-densities of ``tanh(u)`` in nats,
            shape (n_log_probs, ...)
        """
        first = slice(n_log_probs)
        denoise = self._denoiser_at_levels(th.cat([embedding, embedding[first]]), dtype)
        denoise, traces = with_traces(denoise, random_signs(latents[first]), self.levels, steps)
        unsquashed = solve_reverse_ode(denoise, latents, self.levels)
        return unsquashed, flow_log_density(latents[first], traces, self.levels) - log_det_tanh(unsquashed[first])

    def log_prob(self, embedding: th.Tensor, unsquashed: th.Tensor) -> th.Tensor:
        """
        Log-density of the policy at the actions ``tanh(u)``, from the reverse process run backwards;
        see :func:`sb3_dqs.entropy.flow_log_density`.

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param unsquashed: unsquashed actions u, shape (..., action_dim)
        :return: estimate in nats, shape (...)
        """
        denoise = self._denoiser_at_levels(th.cat([embedding, embedding]))
        denoise, traces = with_traces(denoise, random_signs(unsquashed), self.levels, range(1, len(self.levels)))
        latents = solve_forward_ode(denoise, unsquashed, self.levels)
        return flow_log_density(latents, traces, self.levels) - log_det_tanh(unsquashed)

    def _denoiser_at_levels(
        self, embedding: th.Tensor, dtype: th.dtype | None = None
    ) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        ``denoise()`` at the levels of the sampler, for as many rows of the embedding, from the first, as x has. What depends
        on the levels and on the weights alone is computed once.
        """
        level_embeddings = self.embed_level(self.level_waves).unbind()
        weights = (self.level_c_in * self.embed_action.weight).unbind()
        layers = as_functions(self.denoiser, dtype)

        def denoise(x: th.Tensor, step: int) -> th.Tensor:
            c_skip, c_out = self.sampling_scalings[step]
            # The first layer sees small differences of x, and is small
            hidden = F.linear(x, weights[step], level_embeddings[step])
            hidden = hidden.add_(embedding if embedding.shape[0] == x.shape[0] else embedding[: x.shape[0]])
            for layer in layers:
                hidden = layer(hidden)
            return (c_skip * x).add(hidden, alpha=c_out)

        return denoise

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        embedding = self.embed(obs)
        if deterministic:
            latents = self.mode_latent.expand(embedding.shape[0], -1)
            return th.tanh(find_mode(self._denoiser_at_levels(embedding), latents, self.levels))
        return self.sample(embedding, self._acting_latents(embedding))

    def _acting_latents(self, embedding: th.Tensor) -> th.Tensor:
        n_envs = embedding.shape[0]
        if not self.use_sde:
            return th.randn(n_envs, self.action_dim, device=embedding.device)
        # As gSDE: one noise per environment, or the first one for batches of another size
        return self.held_latents if len(self.held_latents) == n_envs else self.held_latents[:1].expand(n_envs, -1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


def as_functions(layers: Iterable[nn.Module], dtype: th.dtype | None = None) -> list[Callable[[th.Tensor], th.Tensor]]:
    """
    What successive layers compute, as functions: ReLUs write into the output of the plain linear layer before them, plain
    linear layers are in the given precision. Others, and those with hooks, are called as they are.

    :param layers: in their order
    :param dtype: precision; by default that of the weights
    :return: functions, the first of a tensor that nothing else needs
    """
    functions: list[Callable[[th.Tensor], th.Tensor]] = []
    is_free = True  # nothing else needs the input
    for layer in layers:
        has_hooks = bool(layer._forward_hooks or layer._forward_pre_hooks)
        if is_free and type(layer) is nn.ReLU and not has_hooks:
            functions.append(th.relu_)
        elif dtype is None:
            functions.append(layer)
        elif type(layer) is nn.Linear and not has_hooks:
            functions.append(_linear_in(dtype, layer.weight, layer.bias))
        else:
            functions.append(_in_own_precision(layer))
        is_free = type(layer) is nn.Linear and not has_hooks
    return functions


def _linear_in(dtype: th.dtype, weight: th.Tensor, bias: th.Tensor | None) -> Callable[[th.Tensor], th.Tensor]:
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


def _in_own_precision(layer: nn.Module) -> Callable[[th.Tensor], th.Tensor]:
    weight = next(layer.parameters(), None)
    return layer if weight is None else lambda x: layer(x.to(weight.dtype))


class Critic(ContinuousCritic):
    """SB3's critics, whose first can value many actions per state at the price of one pass of the features extractor."""

    def q1_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        The values that define the policy: those of the first critic network alone, as for the actor of TD3 (Fujimoto et
        al. 2018, https://arxiv.org/abs/1802.09477, Algorithm 1), for many actions per state. The first layer is computed
        as a sum, the features' part once per state, the action's part once per action.

        :param features: what ``extract_features()`` returned, shape (batch_size, features_dim)
        :param actions: actions in [-1, 1], shape (batch_size, n_actions, action_dim)
        :return: shape (batch_size, n_actions)
        """
        q_net = self.q_networks[0]
        assert isinstance(q_net, nn.Sequential)
        first, *others = q_net
        assert isinstance(first, nn.Linear)
        layers = as_functions(others)
        features_weight, actions_weight = first.weight.split([features.shape[1], actions.shape[2]], dim=1)
        features_part = F.linear(features, features_weight, first.bias).unsqueeze(1)
        # On a CPU, small pieces stay in its cache; an exported graph is for batches of any size
        is_chunked = features.device.type == "cpu" and not th.compiler.is_compiling()
        chunk_size = max(1, CPU_CHUNK_ROWS // len(features)) if is_chunked else actions.shape[1]
        values = []
        for chunk in actions.split(chunk_size, dim=1):
            hidden = F.linear(chunk, actions_weight).add_(features_part)
            for layer in layers:
                hidden = layer(hidden)
            values.append(hidden)
        return th.cat(values, dim=1).squeeze(2)


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
    :param diffusion_steps: Number of denoiser calls per action; ``DQS(diffusion_steps=...)`` sets it
    :param best_of_n_by_q: Let ``deterministic=True`` return the action of highest value (by the first of the critics) among
        this many, instead of the one that the actor alone finds
    """

    actor: Actor
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
        diffusion_steps: int = 8,
        best_of_n_by_q: int | None = None,
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
                warnings.warn(
                    f"policy_kwargs: `{name}={value}` is ignored, it shapes SAC's Gaussian and DQS has none; "
                    "remove it to silence this warning.",
                    stacklevel=2,
                )

        if net_arch is None:
            net_arch = [256, 256]

        actor_arch, critic_arch = get_actor_critic_arch(net_arch)

        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.best_of_n_by_q = best_of_n_by_q
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
        }
        self.critic_kwargs = {
            **net_kwargs,
            "net_arch": critic_arch,
            "n_critics": n_critics,
            "share_features_extractor": share_features_extractor,
        }

        self._build(lr_schedule)
        if best_of_n_by_q is not None:
            uniforms = th.quasirandom.SobolEngine(self.actor.action_dim, scramble=True, seed=0).draw(best_of_n_by_q)
            self.register_buffer("latent_bank", th.special.ndtri(uniforms.clamp(1e-4, 1 - 1e-4)), persistent=False)

    def _build(self, lr_schedule: Schedule) -> None:
        optimizer_kwargs = self.optimizer_kwargs
        if self.optimizer_class is th.optim.Adam and not {"foreach", "fused", "differentiable"} & set(optimizer_kwargs):
            optimizer_kwargs = {"fused": True, **optimizer_kwargs}  # the same numbers up to rounding, in a third of the time

        self.actor = self.make_actor()
        self.actor.optimizer = self.optimizer_class(
            self.actor.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **optimizer_kwargs,
        )

        if self.share_features_extractor:
            self.critic = self.make_critic(features_extractor=self.actor.features_extractor)
            # The shared features extractor learns from the actor's loss only
            critic_parameters = [param for name, param in self.critic.named_parameters() if "features_extractor" not in name]
        else:
            self.critic = self.make_critic(features_extractor=None)
            critic_parameters = list(self.critic.parameters())

        # Critic target should not share the features extractor with critic
        self.critic_target = self.make_critic(features_extractor=None)
        self.critic_target.load_state_dict(self.critic.state_dict())

        self.critic.optimizer = self.optimizer_class(
            critic_parameters,
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **optimizer_kwargs,
        )

        # Target networks should always be in eval mode
        self.critic_target.set_training_mode(False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()

        data.update(
            dict(
                net_arch=self.net_arch,
                activation_fn=self.activation_fn,
                use_sde=self.actor_kwargs["use_sde"],
                diffusion_steps=self.actor_kwargs["diffusion_steps"],
                best_of_n_by_q=self.best_of_n_by_q,
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

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return Actor(**actor_kwargs).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return Critic(**critic_kwargs).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As SB3's, and checks the observation, because the sampler is finite whatever comes in.

        :param observation: the input observation
        :param state: not used
        :param episode_start: not used
        :param deterministic: Whether or not to return deterministic actions
        :return: the action in the action space, and ``state``
        :raises ValueError: if the observation is not finite
        """
        for part in observation.values() if isinstance(observation, dict) else [observation]:
            if not np.isfinite(part).all():
                raise ValueError(
                    f"observation={part} is not finite; check the environment, or what prepares its observations."
                )
        with th.inference_mode():  # less to keep track of than in SB3's no_grad()
            return super().predict(observation, state, episode_start, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if deterministic and self.best_of_n_by_q is not None:
            embedding = self.actor.embed(observation)
            actions = self.actor.sample(embedding.unsqueeze(1), self.latent_bank.expand(embedding.shape[0], -1, -1))
            features = self.critic.extract_features(observation, self.critic.features_extractor)
            best = self.critic.q1_values(features, actions).argmax(dim=1)
            return actions.gather(1, best.reshape(-1, 1, 1).expand(-1, 1, actions.shape[2])).squeeze(1)
        return self.actor(observation, deterministic)

    @th.no_grad()
    def log_prob(self, obs: PyTorchObs, actions: th.Tensor, n_probes: int = 16) -> th.Tensor:
        """
        Log-density of the policy, from the sampler run backwards; see :mod:`sb3_dqs.entropy` for the formula and its
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
                f"actions={actions!r} will not do: pass a tensor of shape {shape} on {embedding.device}, one action per "
                "observation, in [-1, 1]: "
                "torch.as_tensor(policy.scale_action(actions), dtype=torch.float32, device=policy.device)."
            )
        unsquashed = TanhBijector.inverse(actions.to(embedding.dtype).flatten(start_dim=1))
        repeated = unsquashed.clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED).unsqueeze(1).expand(-1, n_probes, -1)
        return self.actor.log_prob(embedding.unsqueeze(1), repeated).mean(dim=1)

    @th.no_grad()
    def entropy(self, obs: PyTorchObs, n_actions: int = 64) -> th.Tensor:
        """
        Entropy of the policy, the mean of minus the log-density of its actions; see
        :func:`sb3_dqs.entropy.flow_log_density`.

        :param obs: Observation
        :param n_actions: number of actions per state
        :return: entropy of the action in [-1, 1]^d, in nats, shape (batch_size,)
        """
        self.set_training_mode(False)  # as predict()
        embedding = self.actor.embed(obs).unsqueeze(1)
        latents = th.randn(len(embedding), n_actions, self.actor.action_dim, device=embedding.device)
        _, log_prob = self.actor.sample_with_log_prob(embedding, latents, range(1, len(self.actor.levels)))
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
        if self.actor.training == self.critic.training == self.training == mode:
            return  # predict() asks for every observation
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
