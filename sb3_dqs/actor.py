"""The actor: a denoiser run backwards."""

from collections.abc import Callable, Collection
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_dqs.density import flow_log_density, log_det_tanh, random_signs, with_traces
from sb3_dqs.fast import as_functions
from sb3_dqs.noise import SIGMA_BROAD, SIGMA_DATA, SIGMA_MIN, edm_scalings, sampling_levels
from sb3_dqs.solvers import find_mode, mode_latent, solve_forward_ode, solve_reverse_ode

# The noise level enters the network as sines and cosines of 2^0 ... 2^(N_FREQUENCIES - 1) times c_noise
N_FREQUENCIES = 8
# Rate of the running mean of the policy's variance
VARIANCE_UPDATE_RATE = 0.01


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
