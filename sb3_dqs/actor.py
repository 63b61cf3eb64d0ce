"""The actor: a denoiser run backwards."""

import contextlib
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_dqs import fast
from sb3_dqs.averaging import RunningAverage
from sb3_dqs.batch_norm import BatchNorm
from sb3_dqs.density import PathDensity, log_det_tanh, trace_steps
from sb3_dqs.noise import NoiseLevels, c_in, c_noise, c_out, c_skip
from sb3_dqs.solvers import Solver, dpm_solver_2m, find_mode, invert, mode_latent
from sb3_dqs.warn_once import warn_once

# What SAC's actor has and this one has not: a Gaussian
GAUSSIAN_PARTS = ("latent_pi", "mu", "log_std", "action_dist", "get_action_dist_params")
NO_GAUSSIAN = (
    "the policy of DQS is no Gaussian. Entropy: policy.entropy(obs); density: policy.log_prob(obs, actions); mean and spread: "
    'of draws, actor(obs); coloured noise: DQS(exploration_noise="pink").'
)
# The Gaussian's standard deviation lies between sigma_data / 30 = 0.03, the least noise, and 30 sigma_data
MAX_LOG_SCALE = 3.4
# Features are cut at this absolute value, so that their squares stay finite in single precision
MAX_FEATURE = 1e15


SelfActor = TypeVar("SelfActor", bound="Actor")


class Actor(BasePolicy):
    """
    Actor network (policy) for DQS: a denoiser ``D(s, x, sigma)`` that estimates ``E[u | s, x]`` from a noisy unsquashed
    action ``x = u + sigma * eps``. Run from pure noise to none, it draws u, and ``a = tanh(u)`` is the action.

    The denoiser is that of a Gaussian N(m(s), v(s)^2), whose mean and standard deviation are networks of the state, plus a
    residual F in units of its error (Karras et al. 2022, equation (7), with a ``sigma_data`` per state):

        D(s, x, sigma) = m + c_skip(sigma, v) (x - m) + c_out(sigma, v) F(s, c_in(sigma, v) (x - m), c_noise(sigma))

    The Gaussian follows a learning critic; the residual makes the policy any distribution. Both see the features of the
    observation normalised by their running means. Unless ``net_arch`` is empty, the Gaussian's network has one layer more than
    it, with layer normalisation, by which it follows faster. The residual's has none, because with it the policy lost modes in
    seventeen dimensions: see docs/ablations.md, "What lets the actor follow".

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Network architecture
    :param features_extractor: Network to extract features
        (a CNN when using images, a nn.Flatten() layer otherwise)
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param use_sde: Whether to hold the sampler's noise between two calls of ``reset_noise()``
    :param diffusion_steps: Number of denoiser calls per action, at least 3
    :param noise: Noise levels of sampler and training
    :param solver: Solver of the reverse process, see :mod:`sb3_dqs.solvers`
    :param n_frequencies: The noise level enters the network as sines and cosines of 1, 2, ... ``2**(n_frequencies - 1)`` times
        ``c_noise``. With 2 instead of 8 the entropy gap to exp(Q / ent_coef) on a reach task was 0.66
        instead of 0.98 nats
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    """

    action_space: spaces.Box
    mode_latent: th.Tensor
    held_latents: th.Tensor | None
    last_std: th.Tensor
    frequencies: th.Tensor
    step_sigmas: th.Tensor
    step_features: th.Tensor

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
        noise: NoiseLevels | None = None,
        solver: Solver = dpm_solver_2m,
        n_frequencies: int = 2,
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
        self.diffusion_steps = int(diffusion_steps)
        self.noise = noise or NoiseLevels()
        self.solver = solver
        self.n_frequencies = n_frequencies

        self.action_dim = get_action_dim(self.action_space)
        self.sigmas = self.noise.sampling(self.diffusion_steps)
        # Precision of the sampler's large hidden layers in training, see fast.training_dtype(); None is that of the weights
        self.training_dtype: th.dtype | None = None

        self.input_norm = BatchNorm(features_dim)
        # The residual's first layer is a sum of three: its observation part is computed once for all levels and all samples
        width = net_arch[0] if len(net_arch) > 0 else self.action_dim
        self.embed_features = nn.Linear(features_dim, width)
        self.embed_action = nn.Linear(self.action_dim, width, bias=False)
        self.embed_level = nn.Linear(2 * n_frequencies, width, bias=False)
        if len(net_arch) > 0:
            self.net = nn.Sequential(activation_fn(), *create_mlp(width, self.action_dim, net_arch[1:], activation_fn))
            self.gaussian = nn.Sequential(nn.Linear(features_dim, width))
            if width > 3:  # of few numbers, layer normalisation leaves little more than signs
                self.gaussian.append(nn.LayerNorm(width))
            self.gaussian.extend([activation_fn(), *create_mlp(width, 2 * self.action_dim, net_arch, activation_fn)])
        else:
            self.net = nn.Sequential()
            self.gaussian = nn.Sequential(nn.Linear(features_dim, 2 * self.action_dim))
        # At first F is zero and the Gaussian near N(0, sigma_data^2), which is near uniform after the tanh
        for net, factor in ((self.net, 0.0), (self.gaussian, 0.1)):
            for parameter in list(net.parameters())[-2:]:  # weight and bias of the last layer
                parameter.data.mul_(factor)

        # See get_std()
        self.register_buffer("last_std", th.full((self.action_dim,), self.noise.sigma_data), persistent=False)
        # Constants, rebuilt with the network and not saved
        self.register_buffer("frequencies", 2.0 ** th.arange(n_frequencies), persistent=False)
        step_sigmas = th.tensor(self.sigmas).unsqueeze(1)
        self.register_buffer("step_sigmas", step_sigmas, persistent=False)
        self.register_buffer("step_features", self.level_features(step_sigmas), persistent=False)
        self.register_buffer("mode_latent", mode_latent(self.action_dim), persistent=False)
        # Latents of the next stochastic actions, shape (n_envs, action_dim). If None, new ones are drawn at every call
        self.register_buffer("held_latents", th.randn(1, self.action_dim) if use_sde else None, persistent=False)

        # The running average that deterministic actions come from, see follow(); in a list, because the policy saves it
        self._averages: list[RunningAverage] = []
        self.average_is_current = False  # as far as was noticed

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in GAUSSIAN_PARTS:
                raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}': {NO_GAUSSIAN}") from error
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name in GAUSSIAN_PARTS:
            raise AttributeError(f"`{name}` cannot be set: {NO_GAUSSIAN}")
        super().__setattr__(name, value)

    def _apply(self: SelfActor, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> SelfActor:
        for average in self._averages:  # .to() and .double() of the actor convert the average, too
            average._apply(fn)
        return super()._apply(fn, recurse)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()

        data.update(
            dict(
                net_arch=self.net_arch,
                features_dim=self.features_dim,
                activation_fn=self.activation_fn,
                use_sde=self.use_sde,
                diffusion_steps=self.diffusion_steps,
                noise=self.noise,
                solver=self.solver,
                n_frequencies=self.n_frequencies,
                features_extractor=self.features_extractor,
            )
        )
        return data

    def get_std(self) -> th.Tensor:
        """
        Standard deviation of the Gaussian part of the policy, before the tanh, averaged over the states of the last update of
        the actor. Logged by SB3 as ``train/std`` with ``use_sde=True``.

        :return: shape (action_dim,)
        """
        return self.last_std

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
        What the denoiser needs of the observation; see ``split()``. In training mode, where gradients are enabled, the
        observations move the running means that normalise the features.

        :param obs: Observation
        :return: shape (batch_size, width of the first layer + 2 * action_dim)
        """
        features = self.extract_features(obs, self.features_extractor).clamp(-MAX_FEATURE, MAX_FEATURE)
        is_exported = th.jit.is_tracing() or th.compiler.is_compiling()
        is_trained = self.training and th.is_grad_enabled() and self.input_norm.weight.requires_grad
        if is_trained and not is_exported:
            self.input_norm.observe(features)
        if th.is_grad_enabled() and not is_exported:
            self.average_is_current = False  # gradients may change the parameters
        features = self.input_norm(features)
        hidden, gaussian = self.embed_features(features), self.gaussian(features)
        # Slices, because torch 2.13 makes invalid nodes of chunk() and split() in ONNX of version 17
        mean, log_scale = gaussian[..., : self.action_dim], gaussian[..., self.action_dim :]
        # At most sigma_data times or divided by exp(MAX_LOG_SCALE)
        std = self.noise.sigma_data * th.exp(MAX_LOG_SCALE * th.tanh(log_scale / MAX_LOG_SCALE))
        return th.cat([hidden, mean, std], dim=-1)

    def split(self, embedding: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        The parts of what ``embed()`` returned.

        :param embedding: shape (..., width + 2 * action_dim)
        :return: the observation's part of the sum that enters the residual, shape (..., width); mean and standard deviation of
            the Gaussian, shape (..., action_dim)
        """
        d = self.action_dim
        return embedding[..., : -2 * d], embedding[..., -2 * d : -d], embedding[..., -d:]

    def denoise(self, embedding: th.Tensor, x: th.Tensor, sigma: th.Tensor | float) -> th.Tensor:
        """
        The denoiser D.

        :param embedding: what ``embed()`` returned, shape (..., width + 2 * action_dim)
        :param x: noisy unsquashed actions, shape (..., action_dim)
        :param sigma: noise levels, shape (..., 1), or one number
        :return: estimate of E[u | s, x], of the shape of x
        """
        sigma = th.as_tensor(sigma, dtype=x.dtype, device=x.device)
        sigma = sigma.reshape(1, 1) if sigma.dim() == 0 else sigma  # quantised layers take no less than two dimensions
        hidden, mean, std = self.split(embedding)
        centered = x - mean
        first = self.embed_action(c_in(sigma, std) * centered) + self.embed_level(self.level_features(sigma))
        hidden = (hidden + first).flatten(end_dim=-2)  # some layers take no more than two dimensions
        return mean + c_skip(sigma, std) * centered + c_out(sigma, std) * self.net(hidden).reshape(x.shape)

    def level_features(self, sigma: th.Tensor) -> th.Tensor:
        """
        Input features of the noise level.

        :param sigma: noise levels, shape (..., 1)
        :return: sines and cosines, shape (..., 2 * n_frequencies)
        """
        phases = c_noise(sigma) * self.frequencies
        return th.cat([phases.sin(), phases.cos()], dim=-1)

    def sample(self, embedding: th.Tensor, latents: th.Tensor, dtype: th.dtype | None = None) -> th.Tensor:
        """
        Run the reverse process.

        :param embedding: what ``embed()`` returned, shape (..., width + 2 * action_dim)
        :param latents: standard normal numbers, shape (..., action_dim)
        :param dtype: precision of large hidden layers, see :func:`sb3_dqs.fast.as_functions`; by default that of the weights
        :return: unsquashed actions u, of the shape of ``latents``
        """
        return self.solver(fast.denoiser(self, embedding, dtype), self.sigmas[0] * latents, self.sigmas, None)

    def sample_log_prob(
        self,
        embedding: th.Tensor,
        latents: th.Tensor,
        steps: Collection[int] | None = None,
        dtype: th.dtype | None = None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Run the reverse process, and follow the density on its path; see :class:`sb3_dqs.density.PathDensity`.

        :param embedding: what ``embed()`` returned, shape (..., width + 2 * action_dim)
        :param latents: standard normal numbers, shape (..., action_dim)
        :param steps: of the sampler, after the first, at which the trace is taken, each for one more denoiser call;
            by default all
        :param dtype: precision of large hidden layers, see :func:`sb3_dqs.fast.as_functions`; by default that of the weights
        :return: unsquashed actions u, shape (..., action_dim), and log-densities of ``tanh(u)`` in nats, shape (...)
        """
        denoise = fast.denoiser(self, embedding, dtype)
        density = PathDensity(denoise, latents, self.sigmas, steps)
        u = self.solver(denoise, self.sigmas[0] * latents, self.sigmas, density)
        return u, density.log_density(latents) - log_det_tanh(u)

    def action_log_prob(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw one action per observation, and return its log-density; ``DQSPolicy.log_prob()`` is more accurate.

        :param obs: Observation
        :return: actions in [-1, 1], shape (batch_size, action_dim), and log-densities in nats, shape (batch_size,)
        """
        u, log_prob = self.draw(self.embed(obs))
        return th.tanh(u), log_prob

    def draw(self, embedding: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw one action per state, and return its log-density, as ``action_log_prob()`` does, but before the tanh.

        :param embedding: what ``embed()`` returned, shape (batch_size, width of the first layer + 2 * action_dim)
        :return: unsquashed actions u, shape (batch_size, action_dim), and log-densities of ``tanh(u)`` in nats,
            shape (batch_size,)
        """
        latents = th.randn(len(embedding), self.action_dim, device=embedding.device)
        return self.training_sample_log_prob(embedding, latents)

    def training_sample(self, embedding: th.Tensor, latents: th.Tensor) -> th.Tensor:
        """``sample()`` in the precision of the training."""
        return self.sample(embedding, latents, self.training_dtype)

    def training_sample_log_prob(self, embedding: th.Tensor, latents: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """``sample_log_prob()`` in the precision of the training, with fewer traces."""
        return self.sample_log_prob(embedding, latents, trace_steps(self.diffusion_steps), self.training_dtype)

    def log_prob(self, embedding: th.Tensor, u: th.Tensor) -> th.Tensor:
        """
        Log-density of the policy at the actions ``tanh(u)``, from the reverse process run backwards;
        see :class:`sb3_dqs.density.PathDensity`.

        :param embedding: what ``embed()`` returned, shape (..., width + 2 * action_dim)
        :param u: unsquashed actions, shape (..., action_dim)
        :return: estimate in nats, shape (...)
        """
        denoise = fast.denoiser(self, embedding)
        density = PathDensity(denoise, u, self.sigmas)
        latents = invert(denoise, u, self.sigmas, density)
        return density.log_density(latents) - log_det_tanh(u)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if deterministic:
            return self.deterministic_actor().mode(obs)
        embedding = self.embed(obs)
        return th.tanh(self.sample(embedding, self._acting_latents(embedding)))

    def mode(self, obs: PyTorchObs) -> th.Tensor:
        """
        Deterministic action of the parameters as the last update left them, whatever `deterministic_actor()` is.

        :param obs: Observation
        :return: actions in [-1, 1], shape (batch_size, action_dim)
        """
        embedding = self.embed(obs)
        latents = self.mode_latent.expand(embedding.shape[0], -1)
        return th.tanh(find_mode(fast.denoiser(self, embedding), self.sigmas[0] * latents, self.sigmas))

    def follow(self, average: RunningAverage | None) -> None:
        """
        Let deterministic actions come from a running average of this actor.

        :param average: of its parameters; None for none
        """
        self._averages = [] if average is None else [average]
        self.average_is_current = self.average_is_current and average is not None

    def deterministic_actor(self) -> "Actor":
        """
        The actor that deterministic actions come from.

        :return: this one with its running average for parameters; itself if there is none, if something else than
            ``DQS.train()`` changed its parameters, and if gradients are to reach them
        """
        if not self._averages:
            return self
        is_compiling = th.compiler.is_compiling()
        # torch before 2.7 cannot tell an export from a compilation
        is_exported = getattr(th.compiler, "is_exporting", lambda: is_compiling and not th.is_grad_enabled())()
        is_exported = is_exported or th.jit.is_tracing()  # values cannot be compared
        if th.is_grad_enabled() and not is_exported:
            if not is_compiling and self.average_is_current and self._averages[0].n_updates > 0:
                warn_once(
                    "Where gradients are enabled, deterministic actions are those of the actor's last update; predict() "
                    "uses its running average: call it under torch.no_grad() for the same actions."
                )
            return self
        if not is_compiling and not is_exported:
            try:
                self.notice_changes()
            except RuntimeError:  # torch.func.vmap over the parameters
                return self
        return self._averages[0].stand_in(self) if self.average_is_current else self  # type: ignore[return-value]

    def notice_changes(self) -> None:
        """Find out whether the running average follows the parameters."""
        self.average_is_current = bool(self._averages) and self._averages[0].is_current(self)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's. The running average does not follow what is loaded."""
        self.average_is_current = False
        return super().load_state_dict(*args, **kwargs)

    def train(self: SelfActor, mode: bool = True) -> SelfActor:
        """
        As torch's. Whether the running average follows the actor is found out here, too, for exports, which begin with
        ``eval()``.

        :param mode: whether to set training mode
        """
        super().train(mode)
        with contextlib.suppress(RuntimeError):  # parameters without values
            self.notice_changes()
        return self

    def set_training_mode(self, mode: bool) -> None:
        super().train(mode)  # predict() calls this, and notices changes itself

    def _acting_latents(self, embedding: th.Tensor) -> th.Tensor:
        n_envs = embedding.shape[0]
        if self.held_latents is None:
            return th.randn(n_envs, self.action_dim, device=embedding.device)
        # As gSDE: one noise per environment, or the first one for batches of another size
        return self.held_latents if len(self.held_latents) == n_envs else self.held_latents[:1].expand(n_envs, -1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)
