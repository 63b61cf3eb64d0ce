"""Parts of users: critics, estimators, temperatures, solvers, noise levels and augmentations, saved and loaded."""

import math
import sys
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from torch import nn
from toys import RandomEnv, Recorder, RecordingCritic, same

from sb3_dqs import DQS
from sb3_dqs.critics import MlpCritic
from sb3_dqs.denoiser_targets import EnergyGradient, GradientStep, PosteriorMean
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.solvers import dpm_solver_2m
from sb3_dqs.temperature import AutoTemperature, Temperature
from sb3_dqs.warn_once import warned_of

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from layer_norm_critic import LayerNormCritic
from own_estimator import ImportanceSampling
from own_temperature import OwnRateTemperature
from quantile_critic import QuantileCritic
from random_shift import RandomShift


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("n_calls", th.zeros(()))


class CountingTarget(Counting, Recorder):
    def forward(self, density, draws):
        self.n_calls += 1
        return draws.u, {"calls": self.n_calls.clone()}


class CountingTemperature(Counting, Temperature):
    """Falls with its updates; remembers them."""

    seen = ()

    def forward(self, progress_remaining):
        return 1 / (1 + self.n_calls)

    def update(self, entropy, learning_rate):
        self.n_calls += 1
        self.seen = [*self.seen, (entropy, learning_rate)]


class CountingAugmentation(Counting):
    """Adds 100 to the observations."""

    def forward(self, obs):
        self.n_calls += 1
        return obs + 100


def own_solver(*args):
    return dpm_solver_2m(*args)


QUANTILES = {"critic_class": QuantileCritic, "critic_kwargs": {"n_quantiles": 5, "n_dropped": 1}}
PARTS = {
    "default": {},
    "fixed number": {"ent_coef": 0.1},
    "scheduled temperature": {"ent_coef": "log_linear_1.0_0.1"},
    "critic of quantiles": {"policy_kwargs": QUANTILES},
    "critic with layer normalisation": {"policy_kwargs": {"critic_class": LayerNormCritic}},
    "estimator": {"denoiser_target": ImportanceSampling(8)},
    "estimator of fields": {"denoiser_target": PosteriorMean(6, enough_samples=3.0, too_few_samples=1.0, weighed_share=1.0)},
    "estimator of estimators": {"denoiser_target": PosteriorMean(pooled=EnergyGradient(8), gradient=GradientStep(1.0, 2.0))},
    "estimator with a buffer": {"denoiser_target": CountingTarget()},
    "temperature": {"ent_coef": OwnRateTemperature(1.0, -1.0)},
    "temperature of fields": {"ent_coef": AutoTemperature(0.5, -2.0, 1, gain=1.0, max_rise=1.0)},
    "temperature with a buffer": {"ent_coef": CountingTemperature()},
    "solver": {"policy_kwargs": {"solver": own_solver}},
    "noise levels": {"policy_kwargs": {"noise": NoiseLevels(0.1, 2.0, 10.0), "n_frequencies": 3}},
    "augmentation": {"augmentation": CountingAugmentation()},
}


def fields(model: DQS) -> list:
    """Numbers, noise levels and functions that are attributes of the parts."""
    parts = [model.policy, model.target_estimator, model.temperature]
    attributes = [item for part in parts for module in part.modules() for item in sorted(vars(module).items())]
    kinds = (int, float, NoiseLevels, FunctionType)
    return [(name, value) for name, value in attributes if isinstance(value, kinds)]


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_trained_with_saved_and_loaded(make_model, tmp_path, name):
    model = make_model(**PARTS[name]).learn(60)
    assert all(np.isfinite(value) for key, value in model.logger.name_to_value.items() if key.startswith("train/"))
    model.save(tmp_path / "model")
    loaded = DQS.load(tmp_path / "model", env=model.get_env())
    assert same(model.get_parameters(), loaded.get_parameters()) and loaded.ent_coef_tensor == model.ent_coef_tensor
    assert (loaded.num_timesteps, loaded._n_updates) == (model.num_timesteps, model._n_updates)
    obs = np.zeros((2, 3), np.float32)
    assert np.array_equal(*(each.predict(obs, deterministic=True)[0] for each in (model, loaded)))
    assert fields(model) == fields(loaded)
    if model.augmentation is not None:
        assert model.augmentation.n_calls == loaded.augmentation.n_calls > 0
    other = make_model(**PARTS[name], seed=1)
    other.set_parameters(tmp_path / "model")
    assert same(model.get_parameters(), other.get_parameters())
    loaded.learn(30, reset_num_timesteps=False)


def test_random_shift_of_images(make_model):
    env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False)
    kwargs = {"features_extractor_kwargs": {"features_dim": 8}}
    make_model("CnnPolicy", env, buffer_size=50, augmentation=RandomShift(), policy_kwargs=kwargs).learn(25)


class TestInstances:
    def test_are_copied(self, make_model):
        """Two models of one instance do not share it, and it is as the user made it."""
        kwargs = {"denoiser_target": CountingTarget(), "ent_coef": CountingTemperature(), "policy_delay": 1}
        first, second = make_model(**kwargs).learn(30), make_model(**kwargs)
        assert first.target_estimator.n_calls == first.temperature.n_calls == 10
        for part in (kwargs["denoiser_target"], kwargs["ent_coef"], second.target_estimator, second.temperature):
            assert part.n_calls == 0

    def test_metrics_of_an_estimator_are_logged(self, make_model):
        model = make_model(denoiser_target=CountingTarget(), policy_delay=2).learn(30)
        model.train(4, 16)
        assert model.logger.name_to_value["train/calls"] == pytest.approx((6 + 7) / 2)
        assert "train/ess" not in model.logger.name_to_value

    @pytest.mark.parametrize("shape", [(1,), (3, 2)])
    def test_metrics_that_are_no_scalars_are_averaged(self, make_model, shape):
        class OwnTarget(CountingTarget):
            def forward(self, density, draws):
                targets, _ = super().forward(density, draws)
                return targets, {"calls": th.full(shape, self.n_calls)}  # integers

        model = make_model(denoiser_target=OwnTarget(), policy_delay=2).learn(30)
        model.train(4, 16)
        assert model.logger.name_to_value["train/calls"] == pytest.approx((6 + 7) / 2)

    def test_temperature_is_told_entropy_and_learning_rate_at_every_step(self, make_model):
        model = make_model(ent_coef=CountingTemperature(), learning_rate=lambda progress: 1e-3 * progress).learn(30)
        before = len(model.temperature.seen)
        model.train(3, 16)
        logged = model.logger.name_to_value
        entropies, rates = zip(*model.temperature.seen[before:], strict=True)
        assert logged["train/entropy"] == pytest.approx(th.stack(entropies).mean().item(), rel=1e-5)
        assert set(rates) == {1e-3 * model._current_progress_remaining}
        assert logged["train/ent_coef"] == pytest.approx(np.mean([1 / (1 + n) for n in (10, 11, 12)]))
        assert "train/ent_coef_loss" not in logged


class TestCritic:
    def test_gets_the_arguments_of_sb3_and_its_own(self, make_model):
        policy_kwargs = {**QUANTILES, "n_critics": 3, "net_arch": {"pi": [4], "qf": [6]}, "activation_fn": nn.Tanh}
        critic = make_model(policy_kwargs=policy_kwargs).critic
        assert (critic.n_critics, critic.n_quantiles, critic.n_kept) == (3, 5, 12)
        assert [type(layer) for layer in critic.q_networks[2]] == [nn.Linear, nn.Tanh, nn.Linear]
        assert critic.q_networks[2][0].out_features == 6
        assert critic.backup_values(th.zeros(2, 3), th.zeros(2, 1)).shape == (2, 12)

    def test_energy_defines_the_policy(self, make_model):
        """Trained on the energy 5 a alone, the policy leaves the middle."""

        class Slope(MlpCritic):
            def energy(self, obs):
                return lambda actions: 5 * actions.sum(dim=2)

        model = make_model(policy_kwargs={"critic_class": Slope}, ent_coef=1.0, learning_rate=3e-3, policy_delay=1).learn(30)
        model.train(600, 64)
        obs = model.replay_buffer.sample(500).observations.numpy()
        actions = model.policy.scale_action(model.predict(obs)[0])
        # The density is proportional to exp(5 a): mean 1 / tanh(5) - 1/5
        assert actions.mean() == pytest.approx(0.8, abs=0.1)


def test_augmentation_is_applied_once_to_obs_and_once_to_next_obs_and_never_in_predict(make_model):
    kwargs = {"denoiser_target": Recorder(), "policy_kwargs": {"critic_class": RecordingCritic}}
    model = make_model(augmentation=CountingAugmentation(), **kwargs).learn(30)
    model.augmentation.n_calls.zero_()
    for deterministic in (True, False):
        model.predict(np.zeros(3, np.float32), deterministic=deterministic)
    assert model.augmentation.n_calls == 0
    model.train(4, 16)
    assert model.augmentation.n_calls == 8
    # What it gives is what all networks see
    density, _ = model.target_estimator.seen[-1]
    seen = [density.obs, model.critic.seen[-1][0], model.critic_target.seen[-1][0]]
    assert all((obs > 90).all() for obs in seen) and not th.equal(*seen[1:])
    assert np.abs(model.replay_buffer.observations).max() < 90


def test_augmentation_with_parameters_is_not_trained(make_model):
    model = make_model(augmentation=nn.Linear(3, 3)).learn(30)
    assert all(param.grad is None for param in model.augmentation.parameters())


class StatedTemperature(Temperature):
    """Returns what it is told to, and from the update on something else."""

    def __init__(self, value, later):
        super().__init__()
        self.value, self.later = value, later

    def forward(self, progress_remaining):
        return self.value

    def update(self, entropy, learning_rate):
        self.value = self.later


@pytest.mark.parametrize("value", [th.tensor(-0.1), th.tensor(0.0), th.tensor(math.nan), th.ones(1), 0.1])
def test_temperatures_that_cannot_work_are_refused_before_training_and_stop_it(make_model, value):
    message = r"`ent_coef`: StatedTemperature\.forward\(.*\) must return a positive, finite 0-d tensor"
    with pytest.raises(ValueError, match=message):
        make_model(ent_coef=StatedTemperature(value, value))
    if isinstance(value, th.Tensor):
        with pytest.raises(ValueError, match=message):
            make_model(ent_coef=StatedTemperature(th.tensor(0.1), value)).learn(40)


class TestBoundsOfTheTemperature:
    def test_spread_of_q_is_that_of_uniform_actions(self, make_model):
        """The standard deviation of U(-1, 1) is 1 / sqrt(3); that of its estimate from 20,000 pairs is 1 %."""
        model = make_model(env=RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))))
        model.critic.energy = lambda obs: lambda actions: 3 * actions[..., 0] + obs[:, :1]
        assert model.q_spread(th.randn(20_000, 3)).item() == pytest.approx(math.sqrt(3), rel=0.05)

    def test_training_lifts_a_temperature_that_changes_nothing(self, make_model):
        warned_of.clear()
        model = make_model(ent_coef="auto_1e-30")
        with pytest.warns(UserWarning, match="at its bound"):
            model.learn(30)
        assert model.ent_coef_tensor > 1e-12
