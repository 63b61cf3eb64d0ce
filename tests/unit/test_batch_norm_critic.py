"""Batch-normalised critic: joint pass, folding, targets."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_dqs import DQS, fast
from sb3_dqs.batch_norm import BatchNorm
from sb3_dqs.batch_norm_critic import BatchNormCritic, training_pass

OBS, ACTIONS = spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)


def make_critic(net_arch=(16, 16), share=False, activation_fn=nn.ReLU, **kwargs) -> BatchNormCritic:
    critic = BatchNormCritic(
        OBS, ACTIONS, list(net_arch), FlattenExtractor(OBS), 3, activation_fn, share_features_extractor=share, **kwargs
    )
    for module in critic.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return critic


def batch(n: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    return th.randn(n, 3), 2 * th.rand(n, 2) - 1, th.randn(n, 3), 2 * th.rand(n, 2) - 1


def rewards_and_discounts(reward: float, n: int = 8, discount: float = 0.5) -> tuple[th.Tensor, th.Tensor]:
    return th.full((n, 1), reward), th.full((n, 1), discount)


def reference(network: nn.Sequential) -> nn.Sequential:
    """The same network with the layers of torch, in training mode."""
    layers = []
    for layer in copy.deepcopy(network):
        if isinstance(layer, BatchNorm):
            norm = nn.BatchNorm1d(len(layer.bias), layer.eps, momentum=10 / 11).double()  # that of the first batch
            norm.load_state_dict(layer.state_dict(), strict=False)
            layer = norm
        layers.append(layer)
    return nn.Sequential(*layers).train()


def test_training_pass_is_that_of_batch_normalisation():
    network = make_critic().q_networks[0].double()
    x, other = th.randn(7, 5, dtype=th.double, requires_grad=True), reference(network)
    values, expected = training_pass(network, x), other(x)
    assert th.allclose(values, expected)
    for layer, same in zip(network, other, strict=True):
        if isinstance(layer, BatchNorm):
            assert th.allclose(layer.running_mean, same.running_mean) and th.allclose(layer.running_var, same.running_var)
    weights = th.randn_like(values)
    gradients = [th.autograd.grad(y, [x, *net.parameters()], weights) for y, net in ((values, network), (expected, other))]
    assert all(th.allclose(*pair) for pair in zip(*gradients, strict=True))


def products(monkeypatch) -> list[th.dtype]:
    """Precisions of the matrix products from now on."""
    dtypes, linear = [], nn.functional.linear

    def recorded(x, weight, bias=None):
        assert x.dtype == weight.dtype
        dtypes.append(x.dtype)
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", recorded)
    return dtypes


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Softsign])
@pytest.mark.parametrize(
    ("net_arch", "n_rounded"), [((), 0), ((256,), 0), ((256, 128), 1), ((128, 256, 128), 2), ((64, 64), 0)]
)
def test_training_pass_in_another_precision(monkeypatch, net_arch, n_rounded, activation_fn):
    """Of the large hidden layers."""
    network = make_critic(net_arch, activation_fn=activation_fn).q_networks[0]
    x = th.randn(64, 5, requires_grad=True)
    expected = training_pass(network, x)
    dtypes = products(monkeypatch)
    values = training_pass(network, x, th.bfloat16)
    n_hidden = max(len(net_arch) - 1, 0)
    hidden = [th.bfloat16] * n_rounded or [th.float32] * n_hidden
    assert dtypes == [th.float32, *hidden, th.float32][: len(net_arch) + 1]
    # A product of numbers that are rounded to 2^-9 of themselves: some thousandths of its spread, more after the ReLU
    assert values.dtype == th.float32 and (values - expected).std() <= 0.01 * n_rounded * expected.std()
    assert th.equal(values, expected) == (n_rounded == 0)
    weights, parameters = th.randn_like(values), list(network.parameters())
    gradient, exact = (th.cat([g.flatten() for g in th.autograd.grad(y, parameters, weights)]) for y in (values, expected))
    assert gradient.dtype == th.float32 and (gradient - exact).norm() <= 0.06 * n_rounded * exact.norm() + 1e-5


class Pair(nn.Module):
    def forward(self, x):
        return x, x.long()


class Join(nn.Module):
    def forward(self, pair):
        assert pair[0].dtype != th.bfloat16
        return pair[0] + pair[1]


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def test_other_precision_leaves_what_modules_of_the_user_get(monkeypatch):
    """Precise are the first and the last linear layer, whatever stands before and behind them."""
    network = make_critic((128, 256, 256), activation_fn=nn.Tanh).q_networks[0]
    own = nn.Sequential(nn.Dropout(0.0), *network[:5], Pair(), Join(), *network[5:], nn.Identity(), Double())
    x = th.randn(64, 5)
    dtypes = products(monkeypatch)
    assert training_pass(own, x, th.bfloat16).dtype == th.float64
    assert dtypes == [th.float32, th.bfloat16, th.bfloat16, th.float32]
    assert training_pass(own.double(), x.double(), th.bfloat16).dtype == th.float64 and dtypes[4:] == [th.float64] * 4


@pytest.mark.parametrize("is_fast", [True, False])
def test_critics_learn_in_bfloat16_where_it_is_fast(monkeypatch, is_fast):
    monkeypatch.setattr(fast, "training_dtype", lambda device: th.bfloat16 if is_fast else None)
    model = DQS("MlpPolicy", "Pendulum-v1", device="cpu")
    critic, (obs, actions) = model.critic, (th.randn(8, 3), th.rand(8, 1))
    dtypes = products(monkeypatch)
    critic.td_loss(critic, obs, actions, obs, actions, *rewards_and_discounts(1.0))
    assert dtypes == 2 * [th.float32, th.bfloat16 if is_fast else th.float32, th.float32]
    dtypes.clear()
    critic.energy(obs)(actions.unsqueeze(1))
    assert set(dtypes) == {th.float32}


def make_subclass(critic_class, **policy_kwargs):
    return DQS("MlpPolicy", "Pendulum-v1", policy_kwargs={"critic_class": critic_class, "net_arch": [8], **policy_kwargs})


def test_a_subclass_is_a_critic():
    class OwnCritic(BatchNormCritic):
        pass

    model = make_subclass(OwnCritic)
    assert type(model.critic) is OwnCritic and model.critic.unit == 1


def test_targets_and_errors_of_a_subclass():
    class OwnCritic(BatchNormCritic):
        def combine(self, q_values):
            return 0 * q_values[0] + 3

        def errors(self, q_values, targets):
            return targets.sum() + 0 * sum(values.sum() for values in q_values)

    critic, (obs, actions) = make_subclass(OwnCritic).critic, (th.randn(8, 3), th.rand(8, 1))
    assert critic.td_loss(critic, obs, actions, obs, actions, *rewards_and_discounts(2.0)).item() == 8 * (2 + 0.5 * 3)
    assert (critic.backup_values(obs, actions) == 3).all() and critic.loss(obs, actions, th.ones(8, 1)).item() == 8


class Networks(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("backup_values", lambda self, obs, actions: self(obs, actions)[0], "override combine"),
        ("loss", lambda self, obs, actions, targets: self(obs, actions)[0].sum(), "override errors"),
        ("change", lambda networks: networks[0].insert(2, nn.Dropout()), "averaged_networks` must be a copy"),
        ("change", lambda networks: networks[1].__setitem__(2, nn.Tanh()), "averaged_networks` must be a copy"),
        ("change", lambda networks: nn.init.zeros_(networks[1][-1].weight), "averaged_networks` must be a copy"),
        ("change", lambda networks: networks.__setitem__(0, Networks(networks[0])), "must be a torch.nn.Sequential"),
    ],
)
def test_a_subclass_that_does_not_fit_what_it_inherits(attribute, value, message):
    class OwnCritic(BatchNormCritic):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if attribute == "change":
                value(self.q_networks)

    if attribute != "change":
        setattr(OwnCritic, attribute, value)
    with pytest.raises(ValueError, match=f"`critic_class`=OwnCritic: .*{message}"):
        make_subclass(OwnCritic)


def test_a_layer_that_comes_twice():
    activation = nn.Tanh()
    twice, copies = make_critic(activation_fn=lambda: activation), make_critic(activation_fn=nn.Tanh)
    copies.load_state_dict(twice.state_dict())
    x = th.randn(7, 5)
    assert th.equal(training_pass(twice.q_networks[0], x), training_pass(copies.q_networks[0], x))


@pytest.mark.parametrize("mode", [True, False])
def test_as_a_layer_it_uses_its_running_means_and_leaves_them(mode):
    critic = make_critic().train(mode)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    obs, actions, _, _ = batch(6)
    values = critic(obs, actions)[0]
    assert th.allclose(values[:1], critic(obs[:1], actions[:1])[0], atol=1e-5)  # of one row, too
    assert all(th.equal(value, before[name]) for name, value in critic.state_dict().items())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=3), st.integers(1, 6))
def test_folded_network_is_the_network(net_arch, n):
    network = make_critic(net_arch).q_networks[0].double()
    folded = fast.fold_batch_norm(network)
    x = th.randn(n, 5, dtype=th.double, requires_grad=True)
    assert not any(isinstance(layer, BatchNorm) for layer in folded)
    assert th.allclose(folded(x), network(x))
    gradients = [th.autograd.grad(net(x).sum(), x)[0] for net in (folded, network)]
    assert th.allclose(*gradients)


def test_not_folded_where_it_would_change_the_function():
    network = make_critic().q_networks[0]
    network[0].register_forward_hook(lambda *_: None)
    assert not any(layer is network[1] for layer in fast.fold_batch_norm(make_critic().q_networks[0]))
    assert isinstance(fast.fold_batch_norm(network)[0], BatchNorm)
    activation_between = nn.Sequential(BatchNorm(2, 1e-3, 0.01, 10.0), nn.ReLU(), nn.Linear(2, 1))
    assert fast.fold_batch_norm(activation_between) is activation_between


def test_energy_is_the_mean_of_the_averaged_networks_by_their_running_statistics():
    critic = make_critic()
    obs, actions = th.randn(4, 3), (2 * th.rand(4, 6, 2) - 1).requires_grad_()
    values = critic.energy(obs)(actions)
    inputs = th.cat([obs.unsqueeze(1).expand(-1, 6, -1), actions], dim=2).flatten(0, 1)
    expected = th.cat([network(inputs) for network in critic.averaged_networks], dim=1).mean(dim=1).reshape(4, 6)
    assert th.allclose(values, expected, atol=1e-5)
    assert th.autograd.grad(values.sum(), actions)[0].all()


@pytest.mark.parametrize(
    ("lowest", "n_updates", "rate"), [(0.25, 1_000, 0.25), (1, 1_000, 1), (0.001, 0, 1), (0.001, 380, 0.05), (0.001, -1, 1)]
)
def test_averages_follow_the_networks_and_are_not_learned(lowest, n_updates, rate):
    critic = make_critic(averaging_rate=lowest)
    critic.q_networks[0][0].n_batches = n_updates
    for parameter in critic.averaged_networks.parameters():
        parameter.mul_(2)
    assert not any(parameter.requires_grad for parameter in critic.averaged_networks.parameters())
    before, networks = (copy.deepcopy(module).state_dict() for module in (critic.averaged_networks, critic.q_networks))
    critic.td_loss(critic, *batch(8), *rewards_and_discounts(0.0, discount=1.0)).backward()
    for name, value in critic.averaged_networks.state_dict().items():
        if not name.endswith("extra_state"):
            assert th.allclose(value, before[name] + rate * (networks[name] - before[name]), atol=1e-6), name
    assert all(parameter.grad is None for parameter in critic.averaged_networks.parameters())


@given(reward=st.floats(1e-6, 1e6), ratio=st.sampled_from([1.0, 2.0, 4.0]))
@settings(max_examples=50, deadline=None)
def test_the_unit_is_a_power_of_two_that_follows_the_rewards(reward, ratio):
    critic = make_critic(unit_ratio=ratio)
    networks = copy.deepcopy(critic.q_networks)
    critic.td_loss(critic, *batch(8), *rewards_and_discounts(reward))
    unit = float(critic.unit)
    assert np.log2(unit) == round(np.log2(unit))
    assert unit == 1 if ratio * reward >= 1 else unit == 2**-10 or 1 <= unit / (ratio * reward) * (1 + 1e-5) <= 2.001
    for network, before in zip(critic.q_networks, networks, strict=True):
        assert th.equal(network[-1].weight, before[-1].weight)  # the first update has no values to keep


@pytest.mark.parametrize("rewards", [[0.0], [0.05, 0.0], [0.0, 0.05], [0.0, 0.0, 0.05, 0.0]])
def test_rewards_that_are_all_zero_leave_the_unit(rewards):
    critic = make_critic(momentum=0.5, unit_ratio=2)
    for reward in rewards:
        critic.td_loss(critic, *batch(8), *rewards_and_discounts(reward))
    assert float(critic.unit) == (0.125 if any(rewards) else 1)


@pytest.mark.parametrize("is_first", [True, False])
def test_the_largest_finite_rewards_leave_the_running_mean_finite(is_first):
    critic = make_critic()
    critic.q_networks[0][0].n_batches = 0 if is_first else 1
    critic.td_loss(critic, *batch(8), *rewards_and_discounts(1e38))
    assert float(critic.unit) == 1 and critic.mean_square.value.isfinite()


@pytest.mark.parametrize("reward", [1.0, 0.05, 1e-6])
def test_values_stay_when_the_unit_changes(reward):
    critic = make_critic(momentum=0.5, warm_up=1e-9)
    critic.q_networks[0][0].n_batches = 1  # not the first update
    critic.unit.fill_(0.25)
    critic.mean_square.value.fill_(reward**2)
    for module in critic.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1e-12  # the running statistics stay
    obs, actions, *_ = inputs = batch(8)
    critic.averaged_networks.load_state_dict(critic.q_networks.state_dict())  # the averages stay
    before = th.cat(critic(obs, actions)), critic.energy(obs)(actions.unsqueeze(1))
    critic.td_loss(critic, *inputs, *rewards_and_discounts(reward))
    assert float(critic.unit) == {1.0: 1.0, 0.05: 0.125, 1e-6: 2**-10}[reward]
    after = th.cat(critic(obs, actions)), critic.energy(obs)(actions.unsqueeze(1))
    assert all(th.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(before, after, strict=True))


def not_linear(layer: nn.Linear) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh())


def with_hook(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("change", [not_linear, with_hook, nn.utils.spectral_norm])
def test_last_layers_of_the_user_keep_their_unit(change):
    critic = make_critic()
    critic.q_networks[0][-1] = change(critic.q_networks[0][-1])
    critic.averaged_networks = copy.deepcopy(critic.q_networks).requires_grad_(False)
    critic.td_loss(critic, *batch(8), *rewards_and_discounts(0.01))
    assert float(critic.unit) == 1


@pytest.mark.parametrize("reward", [1.0, 0.05])
def test_both_sides_of_the_bellman_equation_come_from_the_training_pass(reward):
    critic = make_critic().double()
    obs, actions, next_obs, next_actions = (tensor.double() for tensor in batch(8))
    both = th.cat([th.cat([obs, actions], dim=1), th.cat([next_obs, next_actions], dim=1)])
    joint = th.cat([reference(network)(both) for network in critic.q_networks], dim=1)
    joint = (1.0 if reward == 1 else 0.125) * joint  # the unit
    targets = reward + 0.5 * joint[8:].min(dim=1, keepdim=True).values.detach()
    expected = ((joint[:8] - targets) ** 2).mean(dim=0).sum() / 2
    loss = critic.td_loss(critic, obs, actions, next_obs, next_actions, *(t.double() for t in rewards_and_discounts(reward)))
    assert th.allclose(loss, expected)
    loss.backward()
    assert all(param.grad.any() for name, param in critic.q_networks.named_parameters() if not name.endswith("0.bias"))


@pytest.mark.parametrize("reward", [1.0, 0.05])
def test_learns_the_discounted_sum_of_a_constant_reward(reward):
    """Discount 0.5 everywhere: Q is twice the reward."""
    th.manual_seed(0)
    critic = BatchNormCritic(OBS, ACTIONS, [16], FlattenExtractor(OBS), 3)
    optimizer = th.optim.Adam(critic.parameters(), 1e-2, betas=(0.5, 0.999))
    for _ in range(300):
        loss = critic.td_loss(critic, *batch(32), *rewards_and_discounts(reward, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs, actions, _, _ = batch(200)
    values = critic.backup_values(obs, actions)
    values = values / reward
    assert abs(values.mean().item() - 2) < 0.1 and values.std() < 0.3


def test_has_what_pipelines_read_of_sb3s_critic():
    critic = make_critic(n_critics=3)
    critic.unit.fill_(0.25)
    obs, actions, _, _ = batch(5)
    assert critic.n_critics == 3 and th.equal(critic.q1_forward(obs, actions), critic(obs, actions)[0])


def test_all_that_get_parameters_gives_is_floating():
    """Pipelines add noise to it, or fill it with th.rand_like()."""
    critic = make_critic()
    critic.load_state_dict({name: th.rand_like(value) for name, value in critic.state_dict().items()})
    assert all(0 < module.get_extra_state() < 1 for module in critic.modules() if isinstance(module, BatchNorm))


def test_critics_do_not_train_a_shared_extractor():
    extractor = FlattenExtractor(OBS)
    extractor.linear = nn.Linear(3, 3)
    extractor.forward = lambda obs: extractor.linear(obs)
    for share in (False, True):
        critic = BatchNormCritic(OBS, ACTIONS, [8], extractor, 3, share_features_extractor=share)
        extractor.zero_grad()
        critic.td_loss(critic, *batch(6), *rewards_and_discounts(0.0, 6, 1.0)).backward()
        assert (extractor.linear.weight.grad is None) == share


def test_rate_of_the_running_means():
    """Batches of mean m: the distance of the running mean to m shrinks by the product of (1 - rate)."""
    norm = BatchNorm(1, 1e-3, momentum=0.25, warm_up=2.0)
    distances = []
    for _ in range(10):
        norm.normalize(th.tensor([[4.0], [6.0]]))
        distances.append(5 - norm.running_mean.item())
    rates = [1 - after / before for before, after in zip([5.0, *distances], distances, strict=False)]
    assert rates == pytest.approx([2 / 3, 2 / 4, 2 / 5, 2 / 6, 2 / 7, *[0.25] * 5], rel=1e-3)
    other = BatchNorm(1, 1e-3, momentum=0.25, warm_up=2.0)
    other.load_state_dict(norm.state_dict())
    assert other.n_batches == copy.deepcopy(norm).n_batches == 10


@pytest.mark.parametrize(
    "kwargs",
    [
        {"momentum": -0.1},
        {"momentum": 2.0},
        {"eps": 0.0},
        {"warm_up": 0.0},
        {"warm_up": float("inf")},
        {"eps": "x"},
        {"averaging_rate": 0},
        {"averaging_rate": 1.1},
        {"unit_ratio": 0.0},
    ],
)
def test_bad_arguments(kwargs):
    with pytest.raises(
        ValueError, match="`critic_kwargs` must have positive numbers, momentum and averaging_rate at most 1, got "
    ):
        BatchNormCritic(OBS, ACTIONS, [8], FlattenExtractor(OBS), 3, **kwargs)


def test_arguments_of_adam_of_the_user_win():
    policy_kwargs = dict(net_arch=[8], optimizer_kwargs=dict(betas=(0.8, 0.9)))
    model = DQS("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, buffer_size=10)
    assert model.critic.optimizer.defaults["betas"] == model.actor.optimizer.defaults["betas"] == (0.8, 0.9)


def test_parameters_have_one_name_and_can_be_set(tmp_path):
    model = DQS("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), buffer_size=10)
    parameters = model.get_parameters()
    assert not any("critic_target" in name for name in parameters["policy"])
    parameters["policy"]["critic.q_networks.0.1.weight"] = th.full((8, 4), 0.25)
    model.set_parameters(parameters)
    assert (model.critic_target.q_networks[0][1].weight == 0.25).all()


@pytest.mark.parametrize("share", [False, True])
def test_dqs_has_no_target_network_and_goes_on_as_it_was_saved(tmp_path, share):
    policy_kwargs = dict(critic_class=BatchNormCritic, net_arch=[8, 8], share_features_extractor=share)
    model = DQS("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=16, policy_kwargs=policy_kwargs, seed=0)
    model.learn(60)
    assert model.critic_target is model.critic
    assert model.critic.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    other = DQS.load(tmp_path / "model", env=model.get_env())
    other.load_replay_buffer(tmp_path / "buffer")
    for both in (model, other):
        both.set_random_seed(1)
        both._last_obs = None
        both.learn(4, reset_num_timesteps=False)
    expected = model.policy.state_dict()
    assert all(th.equal(value, expected[name]) for name, value in other.policy.state_dict().items())
