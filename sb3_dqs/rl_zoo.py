"""Registration of DQS with RL Zoo (rl_zoo3): class, hyperparameters, search space. Called by ``sb3_dqs_rl_zoo3``."""

import functools
import inspect
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sb3_dqs.checks.arguments import BACKUPS, EXPLORATION_NOISES
from sb3_dqs.denoiser_targets import DENOISER_TARGETS
from sb3_dqs.dqs import DQS
from sb3_dqs.policies import CRITICS

if TYPE_CHECKING:
    import optuna


def register(module: ModuleType) -> None:
    """
    Add DQS to a module of RL Zoo that has just run.

    :param module: ``rl_zoo3.utils``, ``rl_zoo3.hyperparams_opt`` or ``rl_zoo3.exp_manager``
    """
    {
        "rl_zoo3.utils": _register_algorithm,
        "rl_zoo3.hyperparams_opt": _register_search_space,
        "rl_zoo3.exp_manager": _register_hyperparams,
    }[module.__name__](module)


def get_hyperparams_path() -> Path:
    """
    Where the hyperparameters of DQS are: in the package, or beside it in an editable installation.

    :return: path of ``dqs.yml``
    """
    package = Path(__file__).parent
    packaged = package / "hyperparams" / "dqs.yml"
    return packaged if packaged.exists() else package.parent / "hyperparams" / "dqs.yml"


def _register_algorithm(utils: ModuleType) -> None:
    utils.ALGOS.setdefault("dqs", DQS)


def _register_hyperparams(exp_manager: ModuleType) -> None:
    """``ExperimentManager`` looks for ``dqs.yml`` among the Zoo's own files; where there is none, ours is used."""
    original_init = exp_manager.ExperimentManager.__init__
    signature = inspect.signature(original_init)
    if not {"algo", "config"} <= set(signature.parameters):
        raise TypeError("ExperimentManager has no arguments named algo and config")

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        if self.algo == "dqs" and not arguments.get("config") and not Path(self.config).exists():
            self.config = str(get_hyperparams_path())

    exp_manager.ExperimentManager.__init__ = init


def _register_search_space(hyperparams_opt: ModuleType) -> None:
    hyperparams_opt.HYPERPARAMS_SAMPLER.setdefault("dqs", sample_dqs_params)
    hyperparams_opt.HYPERPARAMS_CONVERTER.setdefault("dqs", convert_dqs_params)


def sample_dqs_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Search space of DQS, for ``-optimize``.

    :param trial: trial of Optuna
    :param n_actions: number of action dimensions
    :param n_envs: number of environments
    :param additional_args: whether hindsight experience replay is used, and its arguments
    :return: arguments of DQS
    """
    params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        # From 2**5=32 to 2**10=1024
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "train_freq": trial.suggest_int("train_freq", 1, 10),
        "critic_class": trial.suggest_categorical("critic_class", list(CRITICS)),
        "policy_delay": trial.suggest_int("policy_delay", 1, 3),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "big"]),
        "ent_coef": trial.suggest_categorical(
            "ent_coef", ["auto", "auto_0.1", "log_linear_1.0_0.01", "log_linear_0.3_0.003", 0.3, 0.1, 0.03, 0.01]
        ),
        # From 2**2=4 to 2**5=32
        "n_mc_samples_pow": trial.suggest_int("n_mc_samples_pow", 2, 5),
        "diffusion_steps": trial.suggest_int("diffusion_steps", 4, 16),
        "denoiser_target": trial.suggest_categorical("denoiser_target", list(DENOISER_TARGETS)),
        "backup": trial.suggest_categorical("backup", BACKUPS),
        "exploration_noise": trial.suggest_categorical("exploration_noise", EXPLORATION_NOISES),
    }
    if params["critic_class"] == "mlp":  # the other has no target network
        params["tau"] = trial.suggest_float("tau", 0.001, 0.08, log=True)
    if additional_args["using_her_replay_buffer"]:
        from rl_zoo3.hyperparams_opt import sample_her_params

        params = sample_her_params(trial, params, additional_args["her_kwargs"])

    # Display true values
    trial.set_user_attr("gamma", 1 - params["one_minus_gamma"])
    trial.set_user_attr("batch_size", 2 ** params["batch_size_pow"])
    trial.set_user_attr("n_mc_samples", 2 ** params["n_mc_samples_pow"])
    return convert_dqs_params(params)


def convert_dqs_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    From the numbers of a trial to arguments of DQS, for ``-optimize`` and ``--trial-id``.

    :param sampled_params: what :func:`sample_dqs_params` suggested
    :return: arguments of DQS
    """
    from rl_zoo3.hyperparams_opt import convert_offpolicy_params

    params = convert_offpolicy_params(sampled_params)
    params["n_mc_samples"] = 2 ** params.pop("n_mc_samples_pow")
    for name in ("diffusion_steps", "critic_class"):
        params["policy_kwargs"][name] = params.pop(name)
    if "n_sampled_goal" in params:
        # A trial with hindsight experience replay, loaded by its number: these replace those of the entry, as upstream
        params["replay_buffer_kwargs"] = {name: params.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy")}
    return params
