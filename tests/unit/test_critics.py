"""The twin critics, and what a critic of the user's must have."""

import pytest
import torch as th
from networks import OBS, make_critic
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_dqs.critics import Critic, MlpCritic


@pytest.fixture
def critic() -> MlpCritic:
    return make_critic(n_critics=3)


def test_target_is_made_of_the_minimum_over_the_networks(critic):
    obs, actions = th.randn(50, 3), 2 * th.rand(50, 2) - 1
    q_values = th.cat(critic(obs, actions), dim=1)
    values = critic.backup_values(obs, actions)
    assert values.shape == (50, 1) and th.equal(values.squeeze(1), q_values.min(dim=1).values)
    assert len(q_values.argmin(dim=1).unique()) > 1  # not always of the same network


def test_loss_is_that_of_sac_and_td3(critic):
    obs, actions, targets = th.randn(5, 3), th.rand(5, 2), th.randn(5, 1)
    loss = critic.loss(obs, actions, targets)
    expected = sum(((q_values - targets) ** 2).mean() / 2 for q_values in critic(obs, actions))
    assert loss.shape == () and th.allclose(loss, expected)
    loss.backward()
    assert all(param.grad.any() for param in critic.parameters())


@pytest.mark.parametrize("n_actions", [1, 7, 600])
def test_energy_is_the_mean_of_the_networks_with_features_computed_once(critic, n_actions):
    obs, actions = th.randn(4, 3), 2 * th.rand(4, n_actions, 2) - 1
    calls = []
    critic.features_extractor.register_forward_hook(lambda *call: calls.append(call))
    energy = critic.energy(obs)
    values = energy(actions)
    assert values.shape == (4, n_actions)
    assert th.equal(energy(actions), values) and len(calls) == 1
    for k in range(0, n_actions, 50):
        assert th.allclose(values[:, k], th.cat(critic(obs, actions[:, k]), dim=1).mean(dim=1), atol=1e-5)


@pytest.mark.parametrize("missing", ["backup_values", "loss", "energy"])
def test_critic_needs_its_three_methods(missing):
    methods = {name: vars(MlpCritic)[name] for name in ("backup_values", "loss", "energy") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (ContinuousCritic, Critic), methods)(OBS, OBS, [4], FlattenExtractor(OBS), 3)
