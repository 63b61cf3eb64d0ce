"""Latents of exploration: each standard normal, correlated over time as stated, independent otherwise."""

import math

import pytest
import torch as th

from sb3_dqs.exploration import PinkLatents

N_ENVS = 20_000
TIME_CONSTANTS = (0, 2, 8, 32, 128)


def run(n_steps: int, n_envs: int = N_ENVS) -> th.Tensor:
    """Latents of shape (n_steps, n_envs, 2)."""
    latents = PinkLatents(action_dim=2)
    return th.stack([latents(n_envs) for _ in range(n_steps)])


def test_every_latent_is_standard_normal():
    latents = run(40)[[0, 1, 39]].flatten(1)  # independent numbers per step
    n = latents.shape[1]
    assert (latents.mean(dim=1).abs() < 5 / math.sqrt(n)).all()
    assert ((latents.var(dim=1) - 1).abs() < 5 * math.sqrt(2 / n)).all()
    assert ((latents.pow(4).mean(dim=1) - 3).abs() < 5 * math.sqrt(96 / n)).all()


def test_correlation_over_time_is_the_mean_of_exponentials():
    latents = run(65)
    for lag in (1, 4, 16, 64):
        expected = sum(math.exp(-lag / time) if time else 0 for time in TIME_CONSTANTS) / 5
        assert abs((latents[0] * latents[lag]).mean() - expected) < 5 * math.sqrt(2 / (2 * N_ENVS))


def test_spectrum_is_that_of_pink_noise():
    """Power at frequency f proportional to 1/f: between the time constants, a slope of -1 on logarithmic axes."""
    latents = run(4096, 50).flatten(1)
    power = th.fft.rfft(latents, dim=0).abs().pow(2).mean(dim=1)
    octaves = [power[2**k : 2 ** (k + 1)].mean().log2() for k in range(6, 10)]  # periods from 64 to 4 steps
    slope = float(octaves[-1] - octaves[0]) / 3
    assert abs(slope + 1) < 0.08


def test_dimensions_and_environments_are_independent():
    latents = run(20)[-1]
    assert abs((latents[:, 0] * latents[:, 1]).mean()) < 5 / math.sqrt(N_ENVS)
    assert abs((latents[::2] * latents[1::2]).mean()) < 5 / math.sqrt(N_ENVS)


def test_begins_anew_for_another_number_of_environments():
    latents = PinkLatents(action_dim=2)
    before, after = latents(N_ENVS), latents(N_ENVS + 1)
    assert after.shape == (N_ENVS + 1, 2)
    assert abs((before * after[:-1]).mean()) < 5 / math.sqrt(2 * N_ENVS)
    assert abs((after[1:] * after[:-1]).mean()) < 5 / math.sqrt(2 * N_ENVS)


@pytest.mark.parametrize("states", [th.zeros(3, 1, 5), th.full((3, 2, 5), math.inf)])
def test_states_of_another_model_are_refused(states):
    with pytest.raises(RuntimeError, match="state of the pink latents"):
        PinkLatents(action_dim=2).set_extra_state(states)


def test_goes_on_as_it_was_saved():
    latents, loaded = PinkLatents(action_dim=2), PinkLatents(action_dim=2)
    latents(3)
    loaded.load_state_dict(latents.state_dict())
    states = th.get_rng_state()
    expected = latents(3)
    th.set_rng_state(states)
    assert th.equal(loaded(3), expected)
