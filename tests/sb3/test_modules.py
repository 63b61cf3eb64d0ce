"""Modules of the user may do what SB3 lets them."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.func import functional_call, jacrev, vmap

from sb3_dqs import DQS
from sb3_dqs.policies import DQSPolicy

ZEROS = np.zeros(3, np.float32)


class Fourier(BaseFeaturesExtractor):
    """Complex parameters, one of them frozen."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 6)
        self.weight = nn.Parameter(th.randn(3, 6, dtype=th.complex64))
        self.phase = nn.Parameter(th.randn(6, dtype=th.complex64), requires_grad=False)

    def forward(self, obs):
        return th.view_as_real(obs.to(th.complex64) @ self.weight * self.phase).sum(dim=2)


class Keeps(BaseFeaturesExtractor):
    """Keeps what it computed at the last call, while acting too, and uses it at the next."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.scale, self.last = nn.Parameter(th.ones(3)), None

    def forward(self, obs):
        last = 0 if self.last is None else self.last.mean(dim=0)
        self.last = th.linspace(0, 1, 3) * obs.detach()
        return obs * self.scale + last * self.scale


class Potential(BaseFeaturesExtractor):
    """Takes gradients."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.net = nn.Linear(3, 1)

    def forward(self, obs):
        return vmap(jacrev(lambda x: self.net(x).tanh()[0]))(obs)


@pytest.mark.parametrize("extractor", [Fourier, Keeps, Potential])
@pytest.mark.parametrize("shared", [False, True])
def test_features_extractors(make_model, tmp_path, extractor, shared):
    kwargs = {"features_extractor_class": extractor, "share_features_extractor": shared}
    model = make_model(policy_kwargs=kwargs).learn(40)
    model.set_parameters(model.get_parameters())
    model.save(tmp_path / "model")
    DQS.load(tmp_path / "model").predict(ZEROS)


@pytest.mark.parametrize(
    "activation_fn",
    [
        functools.partial(nn.Softmax, dim=1),
        functools.partial(nn.PReLU, 8),
        functools.partial(nn.GroupNorm, 2, 8),
        lambda: nn.Unflatten(1, (8,)),
        nn.Flatten,
        functools.partial(nn.BatchNorm1d, 8),
        functools.partial(nn.Dropout, 0.2),
        nn.Softplus,
    ],
)
def test_activations_that_see_two_dimensions(make_model, activation_fn):
    model = make_model(policy_kwargs={"activation_fn": activation_fn, "net_arch": [8, 8], "best_of_n_by_q": 3}).learn(30)
    for deterministic in (True, False):
        model.predict(np.zeros((2, 3), np.float32), deterministic=deterministic)
    model.policy.entropy(th.zeros(2, 3), 4)


def test_hooks_while_acting(make_model):
    model, seen = make_model(), []
    model.actor.embed_features.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.predict(ZEROS)
    model.learn(30)
    assert seen and not seen[0].is_inference()
    (seen[0] * nn.Parameter(th.ones(1))).sum().backward()


class Guided(DQSPolicy):
    """Moves the action along the gradient of the critic."""

    def _predict(self, observation, deterministic=False):
        action = super()._predict(observation, deterministic)
        with th.enable_grad():
            action.requires_grad_()
            values = self.critic.energy(observation)(action.unsqueeze(1))
            return (action + 0.01 * th.autograd.grad(values.sum(), action)[0]).detach().clamp(-1, 1)


def test_gradients_while_acting(make_model):
    make_model(Guided).learn(30).predict(ZEROS)


@pytest.mark.parametrize("deterministic", [True, False])
def test_vmap_over_states_and_over_policies(make_model, deterministic):
    first, second = make_model(seed=1).actor, make_model(seed=2).actor
    obs = th.randn(4, 3)

    def act(parameters, obs):
        return functional_call(first, parameters, (obs.unsqueeze(0), deterministic))[0]

    jacobians = vmap(jacrev(act, argnums=1), in_dims=(None, 0), randomness="same")(dict(first.named_parameters()), obs)
    assert jacobians.shape == (4, 1, 3) and jacobians.isfinite().all()
    stacked = {name: th.stack([param, dict(second.named_parameters())[name]]) for name, param in first.named_parameters()}
    actions = vmap(act, in_dims=(0, None), randomness="same")(stacked, obs[0])
    if deterministic:
        expected = th.stack([actor(obs[:1], True)[0] for actor in (first, second)])
        th.testing.assert_close(actions, expected)


def test_policies_are_copied_and_pickled(make_model):
    policy = make_model().policy
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other.lock is not policy.lock
        assert np.array_equal(other.predict(ZEROS, deterministic=True)[0], policy.predict(ZEROS, deterministic=True)[0])


def test_frozen_actor_part(make_model):
    model = make_model()
    model.actor.embed_features.requires_grad_(False)
    before = model.actor.embed_features.weight.clone()
    model.learn(40)
    assert th.equal(before, model.actor.embed_features.weight)
