"""A callback that diagnoses the policy during training."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure

from sb3_dqs.diagnostics.diagnose import check_ints, check_model, diagnose
from sb3_dqs.diagnostics.plot import check_dims, plot_policy
from sb3_dqs.dqs import DQS
from sb3_dqs.observations import select


class DiagnosticCallback(BaseCallback):
    """
    Callback that logs how far the policy is from ``exp(Q / ent_coef) / Z`` at states of the replay buffer: as
    ``diagnostics/...`` the :meth:`sb3_dqs.Diagnosis.scalars` of :func:`sb3_dqs.diagnose` and ``ent_coef``, and as
    ``diagnostics/policy`` the figure of :func:`sb3_dqs.plot_policy` at the first of the states, for TensorBoard. Nothing is
    logged before the first gradient step.

    Training goes as without it, bit for bit: the random streams of numpy and torch and the training mode of the policy are
    put back.

    :param eval_freq: Log every ``eval_freq`` calls of the callback
    :param n_states: number of states
    :param n_actions: number of actions per state
    :param log_figure: Whether to log the figure
    :param dims: the action dimensions of the figure
    :param verbose: Verbosity level: 0 for no output, 1 for a line per diagnosis
    :param n_candidates: number of candidates of importance sampling per state, with three action dimensions or more
    :raises ValueError: if a number is not a large enough integer; when training begins, if the model is none of DQS or has no
        such ``dims``
    """

    model: DQS

    def __init__(
        self,
        eval_freq: int,
        n_states: int = 16,
        n_actions: int = 256,
        log_figure: bool = True,
        dims: tuple[int, int] = (0, 1),
        verbose: int = 0,
        *,
        n_candidates: int = 4096,
    ):
        super().__init__(verbose)
        check_ints(eval_freq=(eval_freq, 1), n_states=(n_states, 1), n_actions=(n_actions, 2), n_candidates=(n_candidates, 2))
        self.eval_freq = eval_freq
        self.n_states = n_states
        self.n_actions = n_actions
        self.n_candidates = n_candidates
        self.log_figure = log_figure
        self.dims = dims
        self._n_updates_before = 0

    def _init_callback(self) -> None:
        check_model(self.model)
        check_dims(self.dims, self.model.actor.action_dim)

    def _on_training_start(self) -> None:
        # A gradient step in this call of learn() means that the replay buffer is not empty
        self._n_updates_before = self.model._n_updates

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq == 0 and self.model._n_updates > self._n_updates_before:
            with preserved_random_streams(self.model.device):
                self._log()
        return True

    def _log(self) -> None:
        model = self.model
        assert model.replay_buffer is not None  # for type checker
        obs = model.replay_buffer.sample(self.n_states, env=model._vec_normalize_env).observations
        diagnosis = diagnose(model, obs, self.n_actions, n_candidates=self.n_candidates)
        if self.verbose >= 1:
            print(f"DiagnosticCallback, step {self.num_timesteps}: {diagnosis}")
        for name, value in {**diagnosis.scalars(), "ent_coef": float(model.ent_coef_tensor)}.items():
            self.logger.record(f"diagnostics/{name}", value)
        if self.log_figure:
            figure = plot_policy(model, select(obs, slice(0, 1)), self.dims)
            exclude = ("stdout", "log", "json", "csv")
            self.logger.record("diagnostics/policy", Figure(figure, close=False), exclude=exclude)
        # As EvalCallback, so that each diagnosis is written, with its own step
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)


@contextlib.contextmanager
def preserved_random_streams(device: th.device) -> Iterator[None]:
    """Put the random streams of numpy and torch (of the CPU and of the given CUDA device) back afterwards."""
    numpy_state = np.random.get_state()
    try:
        with th.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)
