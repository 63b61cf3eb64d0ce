"""Diagnostics: closed forms, what they notice, the callback that changes nothing, figures, errors."""

import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_dqs import DiagnosticCallback, diagnose, plot_policy
from sb3_dqs.diagnostics import (
    N_CANDIDATES,
    grid_entropy,
    grid_probabilities,
    importance_sample,
    proposal_log_density,
    sample_grid,
    sample_proposals,
    sample_truncated_normal,
    sliced_wasserstein,
)

SLOPE, WIDTH = 2.0, 0.1


class ToyEnv(gym.Env):
    """Any number of action dimensions."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_dim: int):
        self.action_space = spaces.Box(-2, 2, (action_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, True, False, {}


class DictEnv(ToyEnv):
    """A vector and a number, drawn at random."""

    observation_space = spaces.Dict({"vector": ToyEnv.observation_space, "number": spaces.Discrete(4)})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.draw(), {}

    def step(self, action):
        return self.draw(), float(action.sum()), bool(self.np_random.random() < 0.2), False, {}

    def draw(self):
        return {"vector": self.np_random.uniform(-1, 1, 3).astype(np.float32), "number": self.np_random.integers(4)}


def exponential(latents: th.Tensor) -> th.Tensor:
    """Exact draws from exp(SLOPE * sum(a)) on the box, by inversion."""
    low, high = math.exp(-SLOPE), math.exp(SLOPE)
    return (low + th.special.ndtr(latents) * (high - low)).log() / SLOPE


# Per dimension: log Z - SLOPE * mean
EXPONENTIAL_ENTROPY = math.log(2 * math.sinh(SLOPE) / SLOPE) - SLOPE * (1 / math.tanh(SLOPE) - 1 / SLOPE)


def exponential_energy(actions: th.Tensor) -> th.Tensor:
    return SLOPE * actions.sum(dim=-1)


def two_modes_energy(actions: th.Tensor) -> th.Tensor:
    """Normals of standard deviation WIDTH around 0.5 and -0.5 in the first dimension; uniform in the others."""
    return th.logaddexp(*(-((actions[..., 0] - mode) ** 2) / (2 * WIDTH**2) for mode in (0.5, -0.5)))


ONE_MODE_ENTROPY = 0.5 * math.log(2 * math.pi * math.e * WIDTH**2)


def two_modes(latents: th.Tensor, share: float = 0.5, width: float = WIDTH) -> th.Tensor:
    signs = th.where(th.rand(len(latents), 1) < share, 1.0, -1.0)
    return th.cat([0.5 * signs + width * latents[:, :1], 2 * th.special.ndtr(latents[:, 1:]) - 1], dim=1)


@pytest.fixture
def make_stub(make_model, monkeypatch):
    """Factory of models whose critic, actor and entropy are replaced by known ones."""

    def make(dim, energy, sample, entropy):
        model = make_model(env=ToyEnv(dim), ent_coef=0.3)
        monkeypatch.setattr(model.critic, "q1_values", lambda features, actions: 0.3 * energy(actions))
        monkeypatch.setattr(model.actor, "sample", lambda embedding, latents: sample(latents))
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
        assert 0.3 < result.ess < 1
        for values in (result.distances, result.ess_shares, result.policy_entropies, result.entropy_gaps):
            assert values.shape == (8,)

    def test_of_the_exact_policy_in_six_dimensions(self, make_stub):
        result = diagnose(make_stub(6, exponential_energy, exponential, 6 * EXPONENTIAL_ENTROPY), OBS)
        assert result.distance is None and result.distances is None
        assert result.ess > 0.05
        assert result.entropy_gap == pytest.approx(0, abs=0.1)

    @pytest.mark.parametrize("dim", [1, 2])
    def test_notices_a_lost_mode(self, make_stub, dim):
        entropy = ONE_MODE_ENTROPY + (dim - 1) * math.log(2)
        exact = diagnose(make_stub(dim, two_modes_energy, two_modes, entropy), OBS)
        result = diagnose(make_stub(dim, two_modes_energy, lambda latents: two_modes(latents, share=1.0), entropy), OBS)
        assert result.distance > 5
        assert result.entropy_gap == pytest.approx(-math.log(2), abs=1e-3)
        assert result.ess < exact.ess / 2

    def test_notices_wrong_shares_and_narrow_modes(self, make_stub):
        shares = make_stub(1, two_modes_energy, lambda latents: two_modes(latents, share=0.7), 0.0)
        assert diagnose(shares, OBS, n_actions=1000).distance > 3
        narrow = make_stub(1, two_modes_energy, lambda latents: two_modes(latents, width=WIDTH / 2), 0.0)
        assert diagnose(narrow, OBS, n_actions=4000).distance > 1.5

    def test_notices_a_narrow_policy_in_six_dimensions(self, make_stub):
        """The policy is half as wide in every dimension, and its entropy 6 log 2 lower."""
        entropy = 6 * math.log(2 * 0.5)
        half = diagnose(make_stub(6, lambda a: a[..., 0] * 0, lambda latents: th.special.ndtr(latents) - 0.5, entropy), OBS)
        assert half.entropy_gap == pytest.approx(-6 * math.log(2), abs=0.1)

    def test_temperature_is_the_present_one(self, make_stub):
        model = make_stub(1, exponential_energy, exponential, 0.0)
        model.temperature = lambda progress_remaining: 0.3e6  # so high that the distribution is uniform
        assert diagnose(model, OBS).entropy_gap == pytest.approx(-math.log(2), abs=1e-3)

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
        assert result.ess_shares.shape == (1,) and "1 states" in str(result) and np.isfinite(result.distance)
        assert diagnose(make_model(), OBS[0], n_actions=8).entropy_gaps.shape == (1,)

    def test_matrix_actions(self, make_model):
        env = ToyEnv(2)
        env.action_space = spaces.Box(-1, 1, (3, 1), np.float32)
        assert diagnose(make_model(env=env), OBS[:2], n_actions=8).distance is None


class TestMathematics:
    @pytest.mark.parametrize("mean", [-6.0, -1.0, 0.0, 0.4, 3.0])
    @pytest.mark.parametrize("std", [0.05, 0.5, 20.0])
    def test_truncated_normal_against_scipy(self, mean, std):
        mean = max(-1 - 3 * std, min(mean, 1 + 3 * std))
        samples = sample_truncated_normal(th.full((20_000,), mean), th.full((20_000,), std), th.rand(20_000)).numpy()
        exact = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, loc=mean, scale=std)
        assert stats.kstest(samples, exact.cdf).pvalue > 1e-4

    @given(st.floats(-100, 100), st.floats(0.001, 50), st.floats(0, 1))
    def test_truncated_normal_stays_in_the_box(self, mean, std, uniform):
        value = sample_truncated_normal(th.tensor(mean), th.tensor(std), th.tensor(uniform))
        assert value.isfinite() and -1 <= value <= 1

    def test_sliced_wasserstein_of_a_shift(self):
        points = th.randn(50, 1, dtype=th.float64)
        assert sliced_wasserstein(points, points.flip(0) + 0.3).item() == pytest.approx(0.3)
        points = th.randn(3, 50, 2, dtype=th.float64)
        shifts = sliced_wasserstein(points, points + th.tensor([0.3, 0.4]))
        assert shifts.numpy() == pytest.approx([0.5 * 2 / math.pi] * 3, rel=0.01)

    @pytest.mark.parametrize("dim", [1, 2])
    def test_grid(self, dim):
        midpoints, log_probs = grid_probabilities(exponential_energy, th.zeros(1, dim, dtype=th.float64))
        assert grid_entropy(log_probs, dim) == pytest.approx(dim * EXPONENTIAL_ENTROPY, abs=1e-3)
        draws = sample_grid(midpoints, log_probs, 20_000)
        mean, std = 1 / math.tanh(SLOPE) - 1 / SLOPE, math.sqrt(1 / SLOPE**2 - 1 / math.sinh(SLOPE) ** 2)
        assert draws.mean(dim=0).numpy() == pytest.approx([mean] * dim, abs=5 * std / math.sqrt(20_000))
        assert draws.abs().max() <= 1 and len(draws.unique(dim=0)) == 20_000

    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_proposals_have_the_density_that_is_claimed(self, dim):
        """The mean of f / q over draws from q is the integral of f; f / q is bounded by the uniform share."""
        centers = th.cat([0.9 + 0.05 * th.randn(30, dim), -0.3 + 0.2 * th.randn(30, dim)]).clamp(-1, 1).double()
        draws = sample_proposals(centers, 40_000)
        assert draws.abs().max() <= 1
        weights = th.exp(-proposal_log_density(draws, centers))
        for f, integral in ((th.ones(40_000), 2**dim), ((draws[:, 0] > 0.8).double(), 0.1 * 2**dim)):
            values = f * weights
            assert values.mean().item() == pytest.approx(integral, abs=5 * values.std().item() / 200)

    def test_importance_sampling(self):
        centers = exponential(th.randn(200, 3)).double()
        candidates, log_weights, entropy = importance_sample(exponential_energy, centers, 4 * N_CANDIDATES)
        assert entropy == pytest.approx(3 * EXPONENTIAL_ENTROPY, abs=0.1)
        mean = 1 / math.tanh(SLOPE) - 1 / SLOPE
        assert (log_weights.exp() @ candidates).numpy() == pytest.approx([mean] * 3, abs=0.05)
        assert log_weights.exp().sum().item() == pytest.approx(1)


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
    model = make_model(env=VecNormalize(make_vec_env("Pendulum-v1", 1)))
    seen = []
    monkeypatch.setattr("sb3_dqs.diagnostics._diagnose", lambda model, obs, n_actions: seen.append(obs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.learn(60, callback=DiagnosticCallback(50, n_states=400))
    raw = th.as_tensor(model.replay_buffer.observations[:49, 0])
    assert not any(th.isclose(row, raw, atol=1e-6).all(dim=1).any() for row in seen[0])
    assert model.policy.training is False  # as during a rollout


def test_callback_logs_scalars_and_a_figure(make_model, tmp_path, capsys):
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(60, callback=DiagnosticCallback(20, n_states=3, n_actions=16, verbose=1), tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1")).Reload()
    for name in ("distance", "ess", "entropy_gap", "ent_coef"):
        values = events.Scalars(f"diagnostics/{name}")
        assert [value.step for value in values] == [40, 60]  # learning starts after 20 steps
        assert all(math.isfinite(value.value) for value in values)
    assert [image.step for image in events.Images("diagnostics/policy")] == [40, 60]
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
        figure = plot_policy(make_stub(1, exponential_energy, exponential, 0.0), OBS[0])
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
            return th.cat([th.special.ndtr(latents[:, :1]), 2 * th.special.ndtr(latents[:, 1:]) - 1], dim=1)

        ax = plot_policy(make_stub(dim, energy, sample, 0.0), OBS[:1], dims).axes[0]
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
    ("observations", "n_actions", "message"),
    [
        (OBS, 1, "n_actions=1 .*integer >= 2"),
        (OBS, 2.5, "n_actions=2.5"),
        (OBS, True, "n_actions=True"),
        (OBS[:0], 8, "observations=.*empty.*at least one"),
        (OBS[:, :2], 8, "observations=.*observation space is Box"),
        (None, 8, "observations=None.*observation space is Box"),
        ({"vector": OBS}, 8, "observations=.*observation space is Box"),
        (np.full((2, 3), np.nan), 8, "observations=.*not finite"),
    ],
)
def test_errors_of_diagnose(make_model, observations, n_actions, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        diagnose(make_model(env=ToyEnv(1)), observations, n_actions)


def test_errors_of_models_dictionaries_plots_and_callbacks(make_model):
    sac = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu", policy_kwargs={"net_arch": [4]})
    with pytest.raises(ValueError, match=r"model=.*DQS.load"):
        diagnose(sac, OBS)
    with pytest.raises(ValueError, match=r"model=.*DQS.load"):
        sac.learn(10, callback=DiagnosticCallback(1))
    for argument in ("eval_freq", "n_states", "n_actions"):
        with pytest.raises(ValueError, match=f"{argument}=0 .*integer"):
            DiagnosticCallback(**{"eval_freq": 1, argument: 0})

    model = make_model("MultiInputPolicy", DictEnv(1))
    obs = model.env.reset()
    for wrong in (
        {},
        {"vector": obs["vector"]},
        obs | {"vector": np.concatenate([obs["vector"]] * 2)},
        obs | {"other": obs["vector"]},
    ):
        with pytest.raises(ValueError, match=r"(?s)observations=.*one array per key"):
            diagnose(model, wrong)

    model = make_model(env=ToyEnv(2))
    for dims in ((0, 2), (0, 0), (0,), (-1, 0), (0.0, 1), 0):
        with pytest.raises(ValueError, match=r"dims=.*action dimensions 0 to 1"):
            plot_policy(model, OBS[0], dims)
    with pytest.raises(ValueError, match=r"dims=.*action dimensions 0 to 1"):
        model.learn(10, callback=DiagnosticCallback(5, dims=(0, 2)))
    with pytest.raises(ValueError, match=r"observation: 8 of them.*observations\[0\]"):
        plot_policy(model, OBS)
    with pytest.raises(ValueError, match="n_actions=0"):
        plot_policy(model, OBS[0], n_actions=0)
