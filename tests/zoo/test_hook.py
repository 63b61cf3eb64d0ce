"""The hook into RL Zoo, and the names of RL Zoo that it touches: an upstream change fails here and says why."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import optuna
import pytest
from gymnasium import spaces

from sb3_dqs import DQS, MlpPolicy
from sb3_dqs.checks.arguments import check_arguments
from sb3_dqs.checks.policy import check_policy
from sb3_dqs.rl_zoo import convert_dqs_params, get_hyperparams_path, register, sample_dqs_params

HOOK = Path(__file__).parents[2] / "rl_zoo_hook"


@pytest.fixture
def hook(monkeypatch):
    """The module of the hook, fresh, and its finder not yet in place."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "RegisteringFinder"])
    monkeypatch.syspath_prepend(HOOK)
    monkeypatch.delitem(sys.modules, "sb3_dqs_rl_zoo3", raising=False)
    monkeypatch.delenv("SB3_DQS_NO_RL_ZOO", raising=False)
    return importlib.import_module("sb3_dqs_rl_zoo3")


# --- names of RL Zoo that the hook relies on


def test_upstream_dictionaries():
    from rl_zoo3 import enjoy, exp_manager, hyperparams_opt, load_from_hub, record_video, train, utils

    for module in (enjoy, exp_manager, load_from_hub, record_video, train):
        assert module.ALGOS is utils.ALGOS, f"{module.__name__} no longer shares the dictionary ALGOS of rl_zoo3.utils"
    for name in ("HYPERPARAMS_SAMPLER", "HYPERPARAMS_CONVERTER"):
        assert isinstance(getattr(hyperparams_opt, name), dict), f"rl_zoo3.hyperparams_opt.{name} is no longer a dictionary"
        assert getattr(exp_manager, name) is getattr(hyperparams_opt, name)


def test_upstream_signatures():
    from rl_zoo3 import exp_manager, hyperparams_opt

    parameters = inspect.signature(exp_manager.ExperimentManager.__init__).parameters
    assert {"algo", "config"} <= set(parameters), "ExperimentManager no longer takes algo and config"
    assert parameters["config"].default is None
    source = inspect.getsource(inspect.unwrap(exp_manager.ExperimentManager.__init__))
    assert "self.config" in source and "self.algo" in source, "ExperimentManager no longer keeps algo and config"
    for sampler in (hyperparams_opt.sample_sac_params, sample_dqs_params):
        assert list(inspect.signature(sampler).parameters) == ["trial", "n_actions", "n_envs", "additional_args"]
    assert list(inspect.signature(hyperparams_opt.convert_offpolicy_params).parameters) == ["sampled_params"]
    assert list(inspect.signature(hyperparams_opt.sample_her_params).parameters) == ["trial", "hyperparams", "her_kwargs"]


def test_upstream_reads_modules_given_as_configuration():
    from rl_zoo3 import exp_manager

    source = inspect.getsource(exp_manager.ExperimentManager.read_hyperparameters)
    assert "importlib.import_module(self.config).hyperparams" in source, "--conf-file no longer takes a module"


# --- the hook


class Recorder:
    """In the place of ``sb3_dqs.rl_zoo``."""

    def __init__(self, error=None):
        self.names, self.error = [], error

    def register(self, module):
        self.names.append(module.__name__)
        if self.error is not None:
            raise self.error


@pytest.fixture
def recorder(hook, monkeypatch, tmp_path):
    """A stand-in for rl_zoo3 on the path, and a record of what the hook registers with."""
    package = tmp_path / "rl_zoo3"
    package.mkdir()
    for name in ("__init__", "utils", "hyperparams_opt", "exp_manager", "other"):
        (package / f"{name}.py").write_text("import rl_zoo3\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "rl_zoo3"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    recorder = Recorder()
    monkeypatch.setattr("sb3_dqs.rl_zoo.register", recorder.register)
    yield recorder
    for name in [name for name in sys.modules if name.split(".")[0] == "rl_zoo3"]:
        del sys.modules[name]


def test_hook_registers_with_three_modules_and_no_others(hook, recorder):
    hook.install()
    for name in ("utils", "other", "hyperparams_opt", "exp_manager"):
        module = importlib.import_module(f"rl_zoo3.{name}")
        assert type(module.__loader__) is SourceFileLoader
    assert recorder.names == ["rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"]
    importlib.reload(sys.modules["rl_zoo3.utils"])
    assert recorder.names.count("rl_zoo3.utils") == 2


def test_hook_is_idempotent(hook, recorder):
    n_finders = len(sys.meta_path)
    hook.install()
    hook.install()
    assert len(sys.meta_path) == n_finders + 1
    importlib.import_module("rl_zoo3.utils")
    hook.install()
    assert recorder.names == ["rl_zoo3.utils"]


@pytest.mark.parametrize("is_running", [False, True])
def test_hook_registers_with_modules_that_have_run_and_leaves_those_that_are_running(hook, recorder, is_running):
    importlib.import_module("rl_zoo3.utils").__spec__._initializing = is_running
    hook.install()
    assert recorder.names == ([] if is_running else ["rl_zoo3.utils"])


def test_opt_out(hook, recorder, monkeypatch):
    monkeypatch.setenv("SB3_DQS_NO_RL_ZOO", "1")
    finders = list(sys.meta_path)
    hook.install()
    assert sys.meta_path == finders
    importlib.import_module("rl_zoo3.utils")
    assert recorder.names == []


def test_hook_is_silent_without_rl_zoo(hook, recorder, monkeypatch):
    hook.install()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "rl_zoo3").exists()])
    with warnings.catch_warnings(), pytest.raises(ModuleNotFoundError, match="rl_zoo3"):
        warnings.simplefilter("error")
        importlib.import_module("rl_zoo3.utils")


def test_broken_registration_warns_once_and_breaks_nothing(hook, recorder):
    recorder.error = KeyError("changed upstream")
    hook.install()
    with pytest.warns(RuntimeWarning, match="SB3_DQS_NO_RL_ZOO=1") as caught:
        importlib.import_module("rl_zoo3.utils")
        importlib.import_module("rl_zoo3.exp_manager")
    assert len(caught) == 1
    assert recorder.names == ["rl_zoo3.utils", "rl_zoo3.exp_manager"]


def test_loader_that_cannot_be_wrapped_warns_and_breaks_nothing(hook, recorder, monkeypatch):
    monkeypatch.setattr(hook.FINDER, "wrap", lambda loader, name: setattr((), "exec_module", None))
    hook.install()
    with pytest.warns(RuntimeWarning, match="has no attribute 'exec_module'"):
        assert importlib.import_module("rl_zoo3.utils").__name__ == "rl_zoo3.utils"


def test_broken_registration_breaks_nothing_where_warnings_are_errors(hook, recorder, capsys):
    recorder.error = KeyError("changed upstream")
    hook.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module("rl_zoo3.utils").__name__ == "rl_zoo3.utils"
    assert "SB3_DQS_NO_RL_ZOO=1" in capsys.readouterr().err


class DelegatingFinder:
    """Asks the whole of sys.meta_path, as other hooks do."""

    is_busy = False

    def find_spec(self, *args):
        if self.is_busy:
            return None
        self.is_busy = True
        try:
            return next((spec for finder in sys.meta_path if (spec := finder.find_spec(*args))), None)
        finally:
            self.is_busy = False


@pytest.mark.parametrize("position", [0, 1])
def test_beside_another_delegating_finder(hook, recorder, position):
    hook.install()
    sys.meta_path.insert(position, DelegatingFinder())
    importlib.import_module("rl_zoo3.utils")
    assert recorder.names == ["rl_zoo3.utils"]


def test_start_up_files_call_install(hook):
    (line,) = (HOOK / "sb3_dqs_rl_zoo3.pth").read_text().splitlines()
    exec(line, {})
    assert hook.FINDER in sys.meta_path
    module, function = (HOOK / "sb3_dqs_rl_zoo3.start").read_text().strip().split(":")
    assert (module, function) == (hook.__name__, hook.install.__name__)


def test_start_up_imports_nothing(hook):
    """Neither torch nor anything else but the module itself and what every interpreter has loaded."""
    code = "import os, sys; before = set(sys.modules); import sb3_dqs_rl_zoo3; sb3_dqs_rl_zoo3.install(); "
    code += "print(sorted(set(sys.modules) - before)); import gymnasium; print('torch' in sys.modules)"
    # -S: without the start-up files of this environment; with them, os is loaded
    arguments = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(HOOK), *sys.path]!r}; {code}"]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == ["['sb3_dqs_rl_zoo3']", "False"]


# --- what is registered


def test_register_leaves_what_is_there():
    from rl_zoo3 import utils

    register(utils)
    assert utils.ALGOS["dqs"] is DQS and DQS.__name__ == "DQS"  # RL Zoo names folders after the class
    first = dict(utils.ALGOS)
    register(utils)
    assert utils.ALGOS == first


def test_hyperparameters_of_the_user_and_of_a_zoo_folder_come_first(tmp_path):
    class ExperimentManager:
        def __init__(self, args, algo, config=None, folder=tmp_path):
            self.algo, self.config = algo, config or str(folder / f"{algo}.yml")

    module = ModuleType("rl_zoo3.exp_manager")
    module.ExperimentManager = ExperimentManager
    register(module)
    assert ExperimentManager(None, "dqs").config == str(get_hyperparams_path())
    assert ExperimentManager(None, "dqs", "missing.yml").config == "missing.yml"
    assert ExperimentManager(None, algo="dqs", config="missing.yml").config == "missing.yml"
    assert ExperimentManager(None, "sac").config == str(tmp_path / "sac.yml")
    (tmp_path / "dqs.yml").touch()
    assert ExperimentManager(None, "dqs").config == str(tmp_path / "dqs.yml")


def test_changed_experiment_manager_is_reported():
    module = ModuleType("rl_zoo3.exp_manager")
    module.ExperimentManager = type("ExperimentManager", (), {"__init__": lambda self, settings: None})
    with pytest.raises(TypeError, match="no arguments named algo and config"):
        register(module)


# --- hyperparameters


def check(arguments: dict):
    assert set(arguments) <= set(inspect.signature(DQS).parameters)
    check_arguments(arguments)
    check_policy(MlpPolicy, arguments["policy_kwargs"], spaces.Box(-1, 1, (2,)))


# --- search space


@pytest.mark.parametrize("using_her", [False, True])
def test_search_space_gives_arguments_of_dqs(using_her):
    additional_args = {"using_her_replay_buffer": using_her, "her_kwargs": {"copy_info_dict": False}}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    diffusion_steps = set()
    for _ in range(20):
        trial = study.ask()
        sampled = sample_dqs_params(trial, 1, 1, additional_args)
        check(sampled)
        diffusion_steps.add(sampled["policy_kwargs"]["diffusion_steps"])
        converted = convert_dqs_params(trial.params)  # as --trial-id does
        if using_her:
            assert sampled["replay_buffer_kwargs"].pop("copy_info_dict") is False
        assert converted == sampled
    assert len(diffusion_steps) > 5
