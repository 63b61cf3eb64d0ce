"""Diagnostics: closed forms, what they notice, the callback that changes nothing, figures, errors."""

import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_dqs import DiagnosticCallback, diagnose, plot_policy

SLOPE, WIDTH = 2.0, 0.1


class ToyEnv(gym.Env):
    """Any number of action dimensions; observations drawn from their space."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_dim: int):
        self.action_space = spaces.Box(-2, 2, (action_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(action.sum()), bool(self.np_random.random() < 0.2), False, {}


class DictEnv(ToyEnv):
    """A vector and a number."""

    observation_space = spaces.Dict({"vector": ToyEnv.observation_space, "number": spaces.Discrete(4)})


def exponential_energy(actions: th.Tensor) -> th.Tensor:
    return SLOPE * actions.sum(dim=-1)


def exponential(latents: th.Tensor) -> th.Tensor:
    """Exact draws from exp(SLOPE * sum(a)) on the box, by inversion."""
    low, high = math.exp(-SLOPE), math.exp(SLOPE)
    return (low + th.special.ndtr(latents) * (high - low)).log() / SLOPE


EXPONENTIAL_MEAN = 1 / math.tanh(SLOPE) - 1 / SLOPE
EXPONENTIAL_STD = math.sqrt(1 / SLOPE**2 - 1 / math.sinh(SLOPE) ** 2)
# Per dimension: log Z - SLOPE * mean
EXPONENTIAL_ENTROPY = math.log(2 * math.sinh(SLOPE) / SLOPE) - SLOPE * EXPONENTIAL_MEAN


def flat_energy(actions: th.Tensor) -> th.Tensor:
    return 0 * actions.sum(dim=-1)


def uniform(latents: th.Tensor) -> th.Tensor:
    return 2 * th.special.ndtr(latents) - 1


def two_modes_energy(actions: th.Tensor) -> th.Tensor:
    """Normals of standard deviation WIDTH around 0.5 and -0.5 in the first dimension; uniform in the others."""
    return th.logaddexp(*(-((actions[..., 0] - mode) ** 2) / (2 * WIDTH**2) for mode in (0.5, -0.5)))


ONE_MODE_ENTROPY = 0.5 * math.log(2 * math.pi * math.e * WIDTH**2)


def two_modes(latents: th.Tensor, share: float = 0.5, width: float = WIDTH) -> th.Tensor:
    signs = th.where(th.rand(len(latents), 1) < share, 1.0, -1.0)
    return th.cat([0.5 * signs + width * latents[:, :1], uniform(latents[:, 1:])], dim=1)


def well_energy(actions: th.Tensor) -> th.Tensor:
    """A normal of standard deviation WIDTH around 0.3."""
    return -((actions - 0.3) ** 2).sum(dim=-1) / (2 * WIDTH**2)


@pytest.fixture
def make_stub(make_model, monkeypatch):
    """Factory of models whose critic, actor and entropy are replaced by known ones."""

    def make(dim, energy, sample, entropy=0.0):
        model = make_model(env=ToyEnv(dim), ent_coef=0.3)
        monkeypatch.setattr(model.critic, "energy", lambda obs: lambda actions: 0.3 * energy(actions))
        unsquashed = 1 - 1e-6  # th.atanh(1) is not finite
        monkeypatch.setattr(
            model.actor, "sample", lambda embedding, latents: th.atanh(sample(latents).clamp(-unsquashed, unsquashed))
        )
        monkeypatch.setattr(model.policy, "entropy", lambda obs, n_actions=64: th.full((len(obs),), entropy))
        return model

    return make


OBS = np.zeros((8, 3), np.float32)


class TestDiagnose:
    # Standard deviation of the distance of one state: up to 0.35; of the mean over 8: 0.12
    @pytest.mark.parametrize("dim", [1, 2])
    @pytest.mark.parametrize(
        ("energy", "sample", "entropy"),
        [
            (exponential_energy, exponential, lambda dim: dim * EXPONENTIAL_ENTROPY),
            (two_modes_energy, two_modes, lambda dim: ONE_MODE_ENTROPY + math.log(2) + (dim - 1) * math.log(2)),
        ],
    )
    def test_of_the_exact_policy(self, make_stub, dim, energy, sample, entropy):
        result = diagnose(make_stub(dim, energy, sample, entropy(dim)), OBS)
        assert result.distance == pytest.approx(1, abs=0.5)
        assert result.entropy_gap == pytest.approx(0, abs=1e-3)
        assert result.ess is None and result.ess_shares is None and result.mean_errors is None
        for values in (result.distances, result.policy_entropies, result.entropy_gaps, result.mean_gaps, result.spread_ratios):
            assert values.shape == (8,)
        assert result.policy_means.shape == result.boltzmann_stds.shape == (8, dim)

    def test_of_the_exact_policy_in_six_dimensions(self, make_stub):
        result = diagnose(make_stub(6, exponential_energy, exponential, 6 * EXPONENTIAL_ENTROPY), OBS)
        assert result.distance is None and result.distances is None
        assert 0.2 < result.ess < 1 and result.ess_shares.shape == result.mean_errors.shape == (8,)
        assert result.entropy_gap == pytest.approx(0, abs=0.05)

    @pytest.mark.parametrize("dim", [1, 2, 6, 17])
    @pytest.mark.parametrize(
        ("energy", "mean", "std"),
        [
            (exponential_energy, EXPONENTIAL_MEAN, EXPONENTIAL_STD),
            (flat_energy, 0, 1 / math.sqrt(3)),
            (well_energy, 0.3, WIDTH),
        ],
    )
    @pytest.mark.parametrize(("policy_mean", "policy_std"), [(0.0, 0.05), (-0.2, 0.15)])
    def test_means_and_spreads_of_a_wrong_policy(self, make_stub, dim, energy, mean, std, policy_mean, policy_std):
        model = make_stub(dim, energy, lambda latents: policy_mean + policy_std * latents)
        result = diagnose(model, OBS[:2], n_actions=1000)
        np.testing.assert_allclose(result.policy_means, policy_mean, atol=5 * policy_std / math.sqrt(1000))
        np.testing.assert_allclose(result.policy_stds, policy_std, rtol=5 / math.sqrt(2000))
        # Of importance sampling the mean errors are root mean squares over the dimensions, which here are alike
        errors = 1e-3 if dim <= 2 else 5 * result.mean_errors[:, None]
        assert (np.abs(result.boltzmann_means - mean) < errors).all()
        np.testing.assert_allclose(result.boltzmann_stds, std, rtol=1e-3 if dim <= 2 else 0.3)
        if dim > 2:
            # Not larger than the standard error of as many draws as the effective sample size, by much
            np.testing.assert_array_less(result.mean_errors, 3 * std / np.sqrt(4096 * result.ess_shares))
        tolerance = 5 * policy_std / math.sqrt(1000 * dim) + (0.001 if dim <= 2 else result.mean_errors.max())
        assert result.mean_gap == pytest.approx(abs(policy_mean - mean) or policy_std / math.sqrt(1000), abs=tolerance)
        assert result.spread_ratio == pytest.approx(policy_std / std, rel=0.15)

    def test_gap_and_ratio_are_root_mean_squares(self, make_stub):
        """A gap in one of four dimensions, and spreads that differ."""
        stds = th.tensor([0.05, 0.05, 0.05, 0.2])
        means = th.tensor([0.3, 0.3, 0.3, 0.0])
        result = diagnose(make_stub(4, well_energy, lambda latents: means + stds * latents), OBS, n_actions=4000)
        assert result.mean_gap == pytest.approx(0.3 / math.sqrt(4), abs=0.01)
        rms = math.sqrt((3 * 0.05**2 + 0.2**2) / 4)
        assert result.spread_ratio == pytest.approx(rms / WIDTH, rel=0.05)
        np.testing.assert_allclose(result.policy_means[:, 3] - result.boltzmann_means[:, 3], -0.3, atol=0.03)

    def test_mean_gap_of_the_exact_policy_falls_with_the_number_of_actions(self, make_stub):
        model = make_stub(1, exponential_energy, exponential)
        # Mean of the absolute value of a normal, whose standard deviation is 0.75 of it; 64 states
        for n in (100, 2500):
            result = diagnose(model, OBS.repeat(8, 0), n_actions=n, n_exact_sets=2)
            assert result.mean_gap == pytest.approx(EXPONENTIAL_STD * math.sqrt(2 / math.pi / n), rel=5 * 0.75 / math.sqrt(64))
            assert result.spread_ratio == pytest.approx(1, abs=0.5 / math.sqrt(n))

    @pytest.mark.parametrize("dim", [1, 2])
    def test_notices_a_lost_mode(self, make_stub, dim):
        entropy = ONE_MODE_ENTROPY + (dim - 1) * math.log(2)
        result = diagnose(make_stub(dim, two_modes_energy, lambda latents: two_modes(latents, share=1.0), entropy), OBS)
        assert result.distance > 5
        assert result.entropy_gap == pytest.approx(-math.log(2), abs=1e-3)
        assert result.mean_gap == pytest.approx(0.5 / math.sqrt(dim), abs=0.05)

    def test_notices_wrong_shares_and_narrow_modes(self, make_stub):
        shares = make_stub(1, two_modes_energy, lambda latents: two_modes(latents, share=0.7))
        assert diagnose(shares, OBS, n_actions=1000).distance > 3
        narrow = make_stub(1, two_modes_energy, lambda latents: two_modes(latents, width=WIDTH / 2))
        assert diagnose(narrow, OBS, n_actions=4000).distance > 1.5

    def test_notices_a_narrow_policy_in_six_dimensions(self, make_stub):
        """The policy is half as wide in every dimension, and its entropy 6 log 2 lower."""
        half = diagnose(make_stub(6, flat_energy, lambda latents: uniform(latents) / 2, 0.0), OBS)
        assert half.entropy_gap == pytest.approx(-6 * math.log(2), abs=0.1)
        assert half.spread_ratio == pytest.approx(0.5, rel=0.05)

    def test_temperature_is_the_present_one(self, make_stub):
        model = make_stub(1, exponential_energy, exponential)
        model.temperature = lambda progress_remaining: 0.3e6  # so high that the distribution is uniform
        assert diagnose(model, OBS).entropy_gap == pytest.approx(-math.log(2), abs=1e-3)

    def test_a_finer_grid_resolves_a_narrower_density(self, make_stub):
        width = 0.002
        model = make_stub(2, lambda actions: -((actions - 0.3) ** 2).sum(dim=-1) / (2 * width**2), uniform)
        coarse, fine = (diagnose(model, OBS[:1], n_cells=n_cells) for n_cells in (128, 1500))
        np.testing.assert_allclose(fine.boltzmann_stds, width, rtol=1e-3)
        assert coarse.boltzmann_stds.max() < width / 2

    def test_settings_of_importance_sampling(self, make_stub):
        model = make_stub(6, well_energy, lambda latents: -0.3 + 0.1 * latents)
        small, large = (diagnose(model, OBS[:2], n_candidates=n) for n in (500, 20_000))
        assert large.mean_errors.max() < small.mean_errors.min() / 3
        assert diagnose(model, OBS[:2], max_rounds=0).ess < 0.01 < 0.1 < small.ess

    def test_number_of_actions_for_the_entropy(self, make_model, monkeypatch):
        model, seen = make_model(), []
        entropy = model.policy.entropy
        monkeypatch.setattr(model.policy, "entropy", lambda obs, n_actions: seen.append(n_actions) or entropy(obs, n_actions))
        diagnose(model, OBS[:2], n_actions=2, n_entropy_actions=5)
        assert seen == [5, 5]

    def test_leaves_the_training_mode(self, make_model):
        for mode in (True, False):
            model = make_model()
            model.policy.set_training_mode(mode)
            diagnose(model, OBS, n_actions=2)
            plot_policy(model, OBS[0], n_actions=2)
            assert model.policy.training == model.actor.training == model.critic.training == mode

    def test_dictionaries_single_observations_and_text(self, make_model):
        model = make_model("MultiInputPolicy", DictEnv(1))
        result = diagnose(model, model.env.reset(), n_actions=8)
        assert result.entropy_gaps.shape == (1,) and np.isfinite(result.distance)
        assert all(name in str(result) for name in ("1 state)", "distance", "mean_gap", "spread_ratio", "entropy_gap"))
        assert diagnose(make_model(), OBS[0], n_actions=8).entropy_gaps.shape == (1,)

    @pytest.mark.parametrize(("policy", "env"), [("MlpPolicy", ToyEnv(1)), ("MultiInputPolicy", DictEnv(1))])
    def test_observations_of_a_replay_buffer(self, make_model, policy, env):
        model = make_model(policy, env)
        model.learn(25)
        obs = model.replay_buffer.sample(5).observations
        th.manual_seed(1)
        result = diagnose(model, obs, n_actions=8)
        th.manual_seed(1)
        if policy == "MlpPolicy":
            assert (diagnose(model, obs.numpy(), n_actions=8).mean_gaps == result.mean_gaps).all()
        assert result.mean_gaps.shape == (5,) and np.isfinite(result.mean_gap)

    def test_matrix_actions(self, make_model):
        env = ToyEnv(2)
        env.action_space = spaces.Box(-1, 1, (3, 1), np.float32)
        assert diagnose(make_model(env=env), OBS[:2], n_actions=8).policy_means.shape == (2, 3)


def run(make_model, callback=None, **kwargs):
    if "env" in kwargs:
        kwargs["env"] = kwargs["env"]()
    model = make_model(**kwargs)
    model.learn(60, callback=callback)
    return model


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_sde": True, "sde_sample_freq": 4},
        {"env": lambda: VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))},
        {
            "policy": "MultiInputPolicy",
            "env": lambda: DictEnv(2),
        },
    ],
)
def test_callback_does_not_change_training(make_model, kwargs):
    callback = DiagnosticCallback(7, n_states=2, n_actions=4)
    without, with_callback = run(make_model, None, **kwargs), run(make_model, callback, **kwargs)
    assert callback.n_calls > 7
    assert np.array_equal(without.replay_buffer.actions, with_callback.replay_buffer.actions)
    for first, second in zip(without.policy.parameters(), with_callback.policy.parameters(), strict=True):
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
    model = make_model(env=ToyEnv(3))
    energy, sample, n_candidates, n_actions = model.critic.energy, model.actor.sample, set(), set()

    def record_energy(obs):
        values = energy(obs)
        return lambda actions: n_candidates.add(actions.shape[1]) or values(actions)

    def record_sample(embedding, latents, *args):
        n_actions.add(len(latents))
        return sample(embedding, latents, *args)

    monkeypatch.setattr(model.critic, "energy", record_energy)
    monkeypatch.setattr(model.actor, "sample", record_sample)
    model.learn(40, callback=DiagnosticCallback(40, n_states=1, n_actions=37, n_candidates=66, log_figure=False))
    assert 66 in n_candidates and 37 in n_actions


def test_callback_logs_scalars_and_a_figure(make_model, tmp_path, capsys):
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(60, callback=DiagnosticCallback(20, n_states=3, n_actions=16, verbose=1), tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1")).Reload()
    for name in ("distance", "mean_gap", "spread_ratio", "entropy_gap", "ent_coef"):
        values = events.Scalars(f"diagnostics/{name}")
        assert [value.step for value in values] == [40, 60]  # learning starts after 20 steps
        assert all(math.isfinite(value.value) for value in values)
    assert [image.step for image in events.Images("diagnostics/policy")] == [40, 60]
    assert "diagnostics/ess" not in events.Tags()["scalars"]
    assert capsys.readouterr().out.count("distance") == 2


def test_callback_without_figure_and_in_three_dimensions(make_model, tmp_path):
    model = make_model(env=ToyEnv(3))
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))  # the figure is excluded, or these would fail
    model.learn(40, callback=DiagnosticCallback(40, n_states=1, n_actions=8, dims=(2, 0)))
    header = (Path(tmp_path) / "progress.csv").read_text().splitlines()[0]
    assert "diagnostics/ess" in header and "diagnostics/distance" not in header and "diagnostics/policy" not in header
    recorded, record = [], model.logger.record
    model.logger.record = lambda name, *args, **kwargs: (recorded.append(name), record(name, *args, **kwargs))
    model.learn(40, callback=DiagnosticCallback(40, n_states=1, n_actions=8, log_figure=False))
    assert "diagnostics/ess" in recorded and "diagnostics/policy" not in recorded


class TestPlot:
    def test_curve_of_one_dimension(self, make_stub):
        figure = plot_policy(make_stub(1, exponential_energy, exponential), OBS[0])
        assert isinstance(figure, Figure)
        (line,) = figure.axes[0].lines
        action, density = line.get_data()
        expected = SLOPE * np.exp(SLOPE * action) / (2 * math.sinh(SLOPE))
        np.testing.assert_allclose(density, expected, rtol=1e-3)
        heights = np.array([patch.get_height() for patch in figure.axes[0].patches])
        assert heights.mean() * 2 == pytest.approx(1)  # a density, too
        assert figure.axes[0].get_xlabel() == "action, scaled to [-1, 1]"

    @pytest.mark.parametrize(("dim", "dims"), [(2, (0, 1)), (2, (1, 0)), (4, (0, 2)), (4, (2, 0))])
    def test_density_and_actions_are_in_the_same_places(self, make_stub, dim, dims):
        """All actions are in the right half of the first dimension, where the density is higher, too."""

        def energy(actions):
            return 4 * actions[..., 0]

        def sample(latents):
            return th.cat([th.special.ndtr(latents[:, :1]), uniform(latents[:, 1:])], dim=1)

        ax = plot_policy(make_stub(dim, energy, sample), OBS[:1], dims).axes[0]
        density = np.asarray(ax.images[0].get_array())  # rows: vertical axis, upwards
        marginal = density.mean(axis=0 if dims[0] == 0 else 1)
        assert density.mean() * 4 == pytest.approx(1)
        # mass of the half: e^4 (1 - e^-4) / (e^4 - e^-4)
        half = marginal[len(marginal) // 2 :].sum() / marginal.sum()
        assert half == pytest.approx((math.exp(4) - 1) / (math.exp(4) - math.exp(-4)), abs=0.02)
        points = ax.lines[0].get_data()[0 if dims[0] == 0 else 1]
        assert (points >= 0).all() and len(points) == 1000
        assert str(dims[0]) in ax.get_xlabel() and str(dims[1]) in ax.get_ylabel()

    def test_saves_without_pyplot(self, make_model, tmp_path):
        plot_policy(make_model(env=ToyEnv(3)), OBS[0], dims=(2, 1)).savefig(tmp_path / "policy.png")
        assert (tmp_path / "policy.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("observations", "kwargs", "message"),
    [
        (OBS, {"n_actions": 1}, "`n_actions` must be an integer >= 2, got 1"),
        (OBS, {"n_actions": 2.5}, "`n_actions` must .* got 2.5"),
        (OBS, {"n_actions": True}, "`n_actions` must .* got True"),
        (OBS, {"n_entropy_actions": 0}, "`n_entropy_actions` must .* got 0"),
        (OBS, {"n_cells": 0}, "`n_cells` must .* got 0"),
        (OBS, {"n_exact_sets": 1}, "`n_exact_sets` must .* got 1"),
        (OBS, {"n_candidates": 1}, "`n_candidates` must .* got 1"),
        (OBS, {"max_rounds": -1}, "`max_rounds` must .* got -1"),
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
        diagnose(make_model(env=ToyEnv(1)), observations, **kwargs)


def test_errors_of_models_and_dictionaries(make_model):
    sac = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu", policy_kwargs={"net_arch": [4]})
    with pytest.raises(ValueError, match=r"`model` must be .*DQS.load"):
        diagnose(sac, OBS)
    with pytest.raises(ValueError, match=r"`model` must be .*DQS.load"):
        sac.learn(10, callback=DiagnosticCallback(1))

    model = make_model("MultiInputPolicy", DictEnv(1))
    obs = model.env.reset()
    for wrong in (
        {},
        {"vector": obs["vector"]},
        obs | {"vector": np.concatenate([obs["vector"]] * 2)},
        obs | {"other": obs["vector"]},
    ):
        with pytest.raises(ValueError, match=r"(?s)`observations` must be .*one array per key"):
            diagnose(model, wrong)


def test_errors_of_callbacks_and_plots(make_model):
    for argument in ("eval_freq", "n_states", "n_actions", "n_candidates"):
        with pytest.raises(ValueError, match=f"`{argument}` must be an integer .* got 0"):
            DiagnosticCallback(**{"eval_freq": 1, argument: 0})

    model = make_model(env=ToyEnv(2))
    for dims in ((0, 2), (0, 0), (0,), (-1, 0), (0.0, 1), 0):
        with pytest.raises(ValueError, match=r"`dims` must be .*action dimensions 0 to 1"):
            plot_policy(model, OBS[0], dims)
    with pytest.raises(ValueError, match=r"`dims` must be .*action dimensions 0 to 1"):
        model.learn(10, callback=DiagnosticCallback(5, dims=(0, 2)))
    with pytest.raises(ValueError, match=r"`observation` must be one .*got 8"):
        plot_policy(model, OBS)
    for name in ("n_actions", "n_cells", "n_candidates", "n_bins"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer .* got 0"):
            plot_policy(model, OBS[0], **{name: 0})
