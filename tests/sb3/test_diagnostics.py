"""Diagnostics of a model: what they draw and leave alone, the callback that changes nothing, figures, errors."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import RandomEnv

from sb3_dqs import DiagnosticCallback, diagnose, plot_policy

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
DICT = spaces.Dict({"vector": VECTOR, "number": spaces.Discrete(4)})
OBS = np.zeros((8, 3), np.float32)
SLOPE = 2.0


def toy_env(action_dim: int, observation_space: spaces.Space = VECTOR) -> RandomEnv:
    return RandomEnv(observation_space, spaces.Box(-2, 2, (action_dim,), np.float32))


@pytest.fixture
def make_stub(make_model, monkeypatch):
    """Factory of models with a known Q / ent_coef, actions in [0, 1] x [-1, 1]^(dim - 1), and entropy 1."""

    def make(dim, tempered_q):
        model = make_model(env=toy_env(dim), ent_coef=0.3)
        signs = th.ones(dim).index_fill(0, th.tensor(0), 0.0)  # the first dimension is positive
        monkeypatch.setattr(model.critic, "energy", lambda obs: lambda actions: 0.3 * tempered_q(actions))
        monkeypatch.setattr(model.actor, "sample", lambda _, x: th.where(signs == 1, x, x.abs()))
        monkeypatch.setattr(model.policy, "entropy", lambda obs, n_actions: th.ones(len(obs)))
        return model

    return make


class TestDiagnose:
    @pytest.mark.parametrize("dim", [1, 2, 3])
    def test_of_a_known_policy_and_density(self, make_stub, dim):
        result = diagnose(make_stub(dim, lambda actions: SLOPE * actions.sum(dim=-1)), OBS, n_actions=4000)
        mean = 1 / math.tanh(SLOPE) - 1 / SLOPE
        entropy = dim * (math.log(2 * math.sinh(SLOPE) / SLOPE) - SLOPE * mean)
        # On a grid exact to 0.01; else six standard errors, because the largest weights, where no action is, have a long tail
        assert (np.abs(result.boltzmann_means - mean) < 0.01 + 6 * result.mean_errors[:, None]).all()
        np.testing.assert_allclose(result.entropy_gaps, 1 - entropy, atol=0.1)
        assert (result.policy_means[:, 0] > 0.3).all() and (np.abs(result.policy_means[:, 1:]) < 0.1).all()
        for values in (result.mean_gaps, result.spread_ratios, result.mean_errors):
            assert values.shape == (8,)
        assert (result.distance is None) == (result.distances is None) == (dim == 3)
        assert (result.ess is None) == (result.ess_shares is None) == (dim < 3)

    def test_temperature_is_the_present_one(self, make_stub):
        model = make_stub(1, lambda actions: SLOPE * actions.sum(dim=-1))
        model.temperature = lambda progress_remaining: 0.3e6  # so high that the distribution is uniform
        assert diagnose(model, OBS).entropy_gap == pytest.approx(1 - math.log(2), abs=1e-3)

    def test_number_of_actions_for_the_entropy(self, make_model, monkeypatch):
        model, seen = make_model(), []
        entropy = model.policy.entropy
        monkeypatch.setattr(model.policy, "entropy", lambda obs, n_actions: seen.append(n_actions) or entropy(obs, n_actions))
        diagnose(model, OBS[:2], n_actions=2, n_entropy_actions=5)
        assert seen == [5, 5]

    @pytest.mark.parametrize("mode", [True, False])
    def test_leaves_the_training_mode(self, make_model, mode):
        model = make_model()
        model.policy.set_training_mode(mode)
        diagnose(model, OBS, n_actions=2)
        plot_policy(model, OBS[0], n_actions=2)
        assert model.policy.training == model.actor.training == model.critic.training == mode

    @pytest.mark.parametrize(("policy", "space"), [("MlpPolicy", VECTOR), ("MultiInputPolicy", DICT)])
    def test_kinds_of_observations(self, make_model, policy, space):
        """Of a reset, one alone, and of a replay buffer as tensors."""
        model = make_model(policy, toy_env(1, space))
        model.learn(25)
        single = diagnose(model, space.sample(), n_actions=8)
        assert single.entropy_gaps.shape == (1,) and "1 state)" in str(single) and "distance" in str(single)
        assert diagnose(model, model.env.reset(), n_actions=8).entropy_gaps.shape == (1,)
        obs = model.replay_buffer.sample(5).observations
        if isinstance(obs, dict):
            arrays = {key: part.numpy().reshape(5, *space[key].shape) for key, part in obs.items()}
        else:
            arrays = obs.numpy()
        results = []
        for batch in (obs, arrays):
            th.manual_seed(1)
            results.append(diagnose(model, batch, n_actions=8).mean_gaps)
        assert np.array_equal(*results) and results[0].shape == (5,) and np.isfinite(results[0]).all()

    def test_matrix_actions(self, make_model):
        env = RandomEnv(VECTOR, spaces.Box(-1, 1, (3, 1), np.float32))
        assert diagnose(make_model(env=env), OBS[:2], n_actions=8).policy_means.shape == (2, 3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_sde": True, "sde_sample_freq": 4},
        {"env": lambda: VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))},
        {"policy": "MultiInputPolicy", "env": lambda: toy_env(2, DICT)},
    ],
)
def test_callback_does_not_change_training(make_model, kwargs):
    callback, models = DiagnosticCallback(7, n_states=2, n_actions=4), []
    for used in (None, callback):
        model = make_model(**(kwargs | ({"env": kwargs["env"]()} if "env" in kwargs else {})))
        models.append(model.learn(60, callback=used))
    assert callback.n_calls > 7
    assert np.array_equal(*(model.replay_buffer.actions for model in models))
    for first, second in zip(*(model.policy.parameters() for model in models), strict=True):
        assert th.equal(first, second)


def test_callback_draws_normalised_states(make_model, monkeypatch):
    model = make_model(env=VecNormalize(make_vec_env("Pendulum-v1", 1)), batch_size=64)
    energy, seen = model.critic.energy, []

    def record(obs):
        if len(obs) == 1:  # the actor's update asks for more than one state
            seen.append((obs[0], model.policy.training))
        return energy(obs)

    monkeypatch.setattr(model.critic, "energy", record)
    model.learn(60, callback=DiagnosticCallback(50, n_states=40, n_actions=2, log_figure=False))
    assert len(seen) == 40
    raw = th.as_tensor(model.replay_buffer.observations[:50, 0])
    assert not any(th.isclose(obs, raw, atol=1e-6).all(dim=1).any() for obs, _ in seen)
    assert not any(training for _, training in seen)


def test_callback_passes_its_numbers_on(make_model, monkeypatch):
    model = make_model(env=toy_env(3))
    energy, sample, n_candidates, n_actions = model.critic.energy, model.actor.sample, set(), set()

    def record_energy(obs):
        values = energy(obs)
        return lambda actions: n_candidates.add(actions.shape[1]) or values(actions)

    def record_sample(embedding, latents, *args):
        n_actions.add(len(latents))
        return sample(embedding, latents, *args)

    monkeypatch.setattr(model.critic, "energy", record_energy)
    monkeypatch.setattr(model.actor, "sample", record_sample)
    model.learn(40, callback=DiagnosticCallback(40, n_states=1, n_actions=37, n_candidates=64, log_figure=False))
    assert 64 in n_candidates and 37 in n_actions


@pytest.mark.parametrize("dim", [1, 3])
def test_callback_logs_what_diagnose_returns_and_a_figure(make_model, tmp_path, capsys, dim):
    model = make_model(env=toy_env(dim), tensorboard_log=str(tmp_path))
    callback = DiagnosticCallback(20, n_states=3, n_actions=16, dims=(2, 0), verbose=1, n_candidates=500)
    model.learn(60, callback=callback, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1")).Reload()
    logged = {tag for tag in events.Tags()["scalars"] if tag.startswith("diagnostics/")}
    scalars = diagnose(model, OBS[:1], n_actions=4).scalars()
    assert logged == {f"diagnostics/{name}" for name in (*scalars, "ent_coef")}
    assert ("diagnostics/ess" in logged, "diagnostics/distance" in logged) == (dim == 3, dim == 1)
    for name in logged:
        values = events.Scalars(name)
        assert [value.step for value in values] == [40, 60]  # learning starts after 20 steps
        assert all(math.isfinite(value.value) for value in values)
    assert [image.step for image in events.Images("diagnostics/policy")] == [40, 60]
    assert capsys.readouterr().out.count("entropy_gap") == 2


@pytest.mark.parametrize("log_figure", [True, False])
def test_callback_figure_is_for_tensorboard(make_model, tmp_path, monkeypatch, log_figure):
    model = make_model(env=toy_env(3))
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))  # the figure is excluded, or these would fail
    recorded, record = [], model.logger.record
    monkeypatch.setattr(model.logger, "record", lambda name, *args, **kw: (recorded.append(name), record(name, *args, **kw)))
    model.learn(40, callback=DiagnosticCallback(40, n_states=1, n_actions=8, log_figure=log_figure))
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert "diagnostics/ess" in header and "diagnostics/policy" not in header
    assert ("diagnostics/policy" in recorded) == log_figure


class TestPlot:
    def test_curve_of_one_dimension(self, make_stub):
        ax = plot_policy(make_stub(1, lambda actions: SLOPE * actions[..., 0]), OBS[0]).axes[0]
        action, density = ax.lines[0].get_data()
        np.testing.assert_allclose(density, SLOPE * np.exp(SLOPE * action) / (2 * math.sinh(SLOPE)), rtol=1e-3)
        assert np.mean([patch.get_height() for patch in ax.patches]) * 2 == pytest.approx(1)  # a density, too
        assert ax.get_xlabel() == "action, scaled to [-1, 1]"

    @pytest.mark.parametrize(("dim", "dims"), [(2, (0, 1)), (2, (1, 0)), (4, (0, 2)), (4, (2, 0))])
    def test_density_and_actions_are_in_the_same_places(self, make_stub, tmp_path, dim, dims):
        """All actions are in the right half of the first dimension, where the density is higher, too."""
        figure = plot_policy(make_stub(dim, lambda actions: 4 * actions[..., 0]), OBS[:1], dims)
        ax = figure.axes[0]
        density = np.asarray(ax.images[0].get_array())  # rows: vertical axis, upwards
        marginal = density.mean(axis=0 if dims[0] == 0 else 1)
        assert density.mean() * 4 == pytest.approx(1)
        # mass of the half: e^4 (1 - e^-4) / (e^4 - e^-4)
        half = marginal[len(marginal) // 2 :].sum() / marginal.sum()
        assert half == pytest.approx((math.exp(4) - 1) / (math.exp(4) - math.exp(-4)), abs=0.02)
        points = ax.lines[0].get_data()[0 if dims[0] == 0 else 1]
        assert (points >= 0).all() and len(points) == 1000
        assert str(dims[0]) in ax.get_xlabel() and str(dims[1]) in ax.get_ylabel()
        figure.savefig(tmp_path / "policy.png")  # without pyplot
        assert (tmp_path / "policy.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("observations", "kwargs", "message"),
    [
        (OBS, {"n_actions": 1}, "`n_actions` must be an integer >= 2, got 1"),
        (OBS, {"n_actions": 2.5}, "`n_actions` must .* got 2.5"),
        (OBS, {"n_actions": True}, "`n_actions` must .* got True"),
        (OBS, {"n_entropy_actions": 0}, "`n_entropy_actions` must .* got 0"),
        (OBS, {"n_cells": 0}, "`n_cells` must .* got 0"),
        (OBS, {"n_candidates": 1}, "`n_candidates` must .* got 1"),
        (OBS[:0], {}, "`observations` must be at least one"),
        (th.zeros(0, 3), {}, "`observations` must be at least one"),
        (OBS[:, :2], {}, "`observations` must be a batch of observations of Box"),
        (th.zeros(8, 2), {}, "`observations` must be a batch of observations of Box"),
        (None, {}, "`observations` must be a batch of observations of Box.*got None"),
        ({"vector": OBS}, {}, "`observations` must be a batch of observations of Box"),
        (np.full((2, 3), np.nan), {}, "`observations` must be finite"),
    ],
)
def test_errors_of_diagnose(make_model, observations, kwargs, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        diagnose(make_model(env=toy_env(1)), observations, **kwargs)


def test_errors_of_models_and_dictionaries(make_model):
    sac = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu", policy_kwargs={"net_arch": [4]})
    with pytest.raises(ValueError, match=r"`model` must be .*DQS.load"):
        diagnose(sac, OBS)
    with pytest.raises(ValueError, match=r"`model` must be .*DQS.load"):
        sac.learn(10, callback=DiagnosticCallback(1))
    model = make_model("MultiInputPolicy", toy_env(1, DICT))
    obs = model.env.reset()
    vector = obs["vector"]
    for wrong in ({}, {"vector": vector}, obs | {"vector": np.concatenate([vector] * 2)}, obs | {"other": vector}):
        with pytest.raises(ValueError, match=r"(?s)`observations` must be .*one array per key"):
            diagnose(model, wrong)


def test_errors_of_callbacks_and_plots(make_model):
    for argument in ("eval_freq", "n_states", "n_actions", "n_candidates"):
        with pytest.raises(ValueError, match=f"`{argument}` must be an integer .* got 0"):
            DiagnosticCallback(**{"eval_freq": 1, argument: 0})
    model = make_model(env=toy_env(2))
    for dims in ((0, 2), (0, 0), (0,), (-1, 0), (0.0, 1), 0):
        with pytest.raises(ValueError, match=r"`dims` must be .*action dimensions 0 to 1"):
            plot_policy(model, OBS[0], dims)
    with pytest.raises(ValueError, match=r"`dims` must be .*action dimensions 0 to 1"):
        model.learn(10, callback=DiagnosticCallback(5, dims=(0, 2)))
    with pytest.raises(ValueError, match=r"`observation` must be one .*got 8"):
        plot_policy(model, OBS)
    for name in ("n_actions", "n_cells", "n_candidates"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer .* got 0"):
            plot_policy(model, OBS[0], **{name: 0})
