"""The actor: a denoiser run backwards."""

from collections.abc import Collection
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_dqs import fast
from sb3_dqs.density import PathDensity, log_det_tanh, trace_steps
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.running_mean import RunningMean
from sb3_dqs.solvers import Solver, dpm_solver_2m, find_mode, invert, mode_latent


class Actor(BasePolicy):
    """
    Actor network (policy) for DQS: a denoiser ``D(s, x, sigma)`` that estimates ``E[u | s, x]`` from a noisy unsquashed
    action ``x = u + sigma * eps``. Run from pure noise to none, it draws u, and ``a = tanh(u)`` is the action.

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
        ``c_noise``. Not measured on frozen energies; 2 follow a learning critic more closely
    :param std_update_rate: Rate of the running mean of the policy's variance, see ``get_std()``: a memory of 100 updates, not
        measured
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    """

    action_space: spaces.Box
    mode_latent: th.Tensor
    held_latents: th.Tensor
    frequencies: th.Tensor
    step_features: th.Tensor
    step_c_in: th.Tensor

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
        n_frequencies: int = 8,
        std_update_rate: float = 0.01,
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
        self.noise = noise or NoiseLevels()
        self.solver = solver
        self.n_frequencies = n_frequencies
        self.std_update_rate = std_update_rate

        self.action_dim = get_action_dim(self.action_space)
        self.sigmas = self.noise.sampling(diffusion_steps)
        # Precision of the sampler's hidden layers in training, see fast.training_dtype(); None is that of the weights
        self.training_dtype: th.dtype | None = None

        # The first layer is a sum of three: its observation part is computed once for all levels and all samples
        width = net_arch[0] if len(net_arch) > 0 else self.action_dim
        self.embed_features = nn.Linear(features_dim, width)
        self.embed_action = nn.Linear(self.action_dim, width, bias=False)
        self.embed_level = nn.Linear(2 * n_frequencies, width, bias=False)
        if len(net_arch) > 0:
            self.net = nn.Sequential(activation_fn(), *create_mlp(width, self.action_dim, net_arch[1:], activation_fn))
        else:
            self.net = nn.Sequential()

        # Variance of u per dimension given the state, averaged over states; at first that of the uniform policy
        self.variance = RunningMean(th.full((self.action_dim,), self.noise.sigma_data**2), std_update_rate)
        # Constants, rebuilt with the network and not saved
        self.register_buffer("frequencies", 2.0 ** th.arange(n_frequencies), persistent=False)
        step_sigmas = th.tensor(self.sigmas).unsqueeze(1)
        self.register_buffer("step_features", self.level_features(step_sigmas), persistent=False)
        self.register_buffer("step_c_in", self.noise.c_in(step_sigmas).unsqueeze(2), persistent=False)
        self.register_buffer("mode_latent", mode_latent(self.action_dim), persistent=False)
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
                noise=self.noise,
                solver=self.solver,
                n_frequencies=self.n_frequencies,
                std_update_rate=self.std_update_rate,
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
        return self.variance.value.sqrt().clamp(min=self.noise.sigma_min)

    def update_std(self, errors: th.Tensor, sigma: th.Tensor) -> None:
        """
        Update what ``get_std()`` returns, from the errors at high noise levels, where the denoiser answers the mean.

        :param errors: ``u - D(s, x, sigma)`` for actions u of the policy, shape (..., action_dim)
        :param sigma: noise levels, shape (..., 1)
        """
        is_high = (sigma >= self.noise.sigma_broad).to(errors.dtype)
        n_high = is_high.sum()
        variance = (is_high * errors.pow(2)).flatten(end_dim=-2).sum(dim=0) / n_high.clamp(min=1)
        self.variance.update(variance, weight=n_high.clamp(max=1))

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

    def denoise(self, embedding: th.Tensor, x: th.Tensor, sigma: th.Tensor | float) -> th.Tensor:
        """
        Denoiser ``D(s, x, sigma) = c_skip x + c_out F(s, c_in x, c_noise)`` (Karras et al. 2022, equation (7)).

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param x: noisy unsquashed actions, shape (..., action_dim)
        :param sigma: noise levels, shape (..., 1), or one number
        :return: estimate of E[u | s, x], of the shape of x
        """
        sigma = th.as_tensor(sigma, dtype=x.dtype, device=x.device)
        first = self.embed_action(self.noise.c_in(sigma) * x) + self.embed_level(self.level_features(sigma))
        hidden = (embedding + first).flatten(end_dim=-2)  # some layers take no more than two dimensions
        return self.noise.c_skip(sigma) * x + self.noise.c_out(sigma) * self.net(hidden).reshape(x.shape)

    def level_features(self, sigma: th.Tensor) -> th.Tensor:
        """
        The noise level as the network sees it.

        :param sigma: noise levels, shape (..., 1)
        :return: sines and cosines, shape (..., 2 * n_frequencies)
        """
        phases = self.noise.c_noise(sigma) * self.frequencies
        return th.cat([phases.sin(), phases.cos()], dim=-1)

    def sample(self, embedding: th.Tensor, latents: th.Tensor, dtype: th.dtype | None = None) -> th.Tensor:
        """
        Run the reverse process.

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param latents: standard normal numbers, shape (..., action_dim)
        :param dtype: precision of the hidden layers; by default that of the weights
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

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param latents: standard normal numbers, shape (..., action_dim)
        :param steps: of the sampler, after the first, at which the trace is taken, each for one more denoiser call;
            by default all
        :param dtype: precision of the hidden layers; by default that of the weights
        :return: unsquashed actions u, shape (..., action_dim), and log-densities of ``tanh(u)`` in nats, shape (...)
        """
        denoise = fast.denoiser(self, embedding, dtype)
        density = PathDensity(denoise, latents, self.sigmas, steps)
        u = self.solver(denoise, self.sigmas[0] * latents, self.sigmas, density)
        return u, density.log_density(latents) - log_det_tanh(u)

    def action_log_prob(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw one action per observation, and tell its log-density; ``DQSPolicy.log_prob()`` is more accurate.

        :param obs: Observation
        :return: actions in [-1, 1], shape (batch_size, action_dim), and log-densities in nats, shape (batch_size,)
        """
        embedding = self.embed(obs)
        latents = th.randn(len(embedding), self.action_dim, device=embedding.device)
        u, log_prob = self.training_sample_log_prob(embedding, latents)
        return th.tanh(u), log_prob

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

        :param embedding: what ``embed()`` returned, shape (..., width)
        :param u: unsquashed actions, shape (..., action_dim)
        :return: estimate in nats, shape (...)
        """
        denoise = fast.denoiser(self, embedding)
        density = PathDensity(denoise, u, self.sigmas)
        latents = invert(denoise, u, self.sigmas, density)
        return density.log_density(latents) - log_det_tanh(u)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        embedding = self.embed(obs)
        denoise = fast.denoiser(self, embedding)
        if deterministic:
            latents = self.mode_latent.expand(embedding.shape[0], -1)
            return th.tanh(find_mode(denoise, self.sigmas[0] * latents, self.sigmas))
        latents = self._acting_latents(embedding)
        return th.tanh(self.solver(denoise, self.sigmas[0] * latents, self.sigmas, None))

    def _acting_latents(self, embedding: th.Tensor) -> th.Tensor:
        n_envs = embedding.shape[0]
        if not self.use_sde:
            return th.randn(n_envs, self.action_dim, device=embedding.device)
        # As gSDE: one noise per environment, or the first one for batches of another size
        return self.held_latents if len(self.held_latents) == n_envs else self.held_latents[:1].expand(n_envs, -1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)
