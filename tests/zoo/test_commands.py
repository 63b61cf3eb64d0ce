"""
The commands of RL Zoo as a user types them, in an environment that holds the wheel of this package: neither the source
tree nor an editable installation is on the path. Its other packages are those of the environment that runs the tests.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import optuna
import pytest
import yaml

pytestmark = pytest.mark.xdist_group("commands")  # in one process, which makes the environment once
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BORROWED = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
PIP_INSTALL = ["-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
TIMEOUT = 600  # seconds, against a command that hangs
# Small enough for a test, by the Zoo's own switches
SHORT = ["-n", "130", "--eval-freq", "-1", "--num-threads", "1", "--hyperparams", "learning_starts:120", "batch_size:16"]
SHORT_PENDULUM = ["--env", "ShortPendulum-v0", "--gym-packages", "zoo_envs"]
GOAL = ["--env", "Goal-v0", "--gym-packages", "zoo_envs"]
HER = ["replay_buffer_class:'HerReplayBuffer'", "policy:'MultiInputPolicy'"]
OPTIMIZE = ["-optimize", "--n-evaluations", "1", "--eval-episodes", "1", "--sampler", "random", "--no-optim-plots"]


class Environment:
    """A virtual environment, and how to run commands in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    def run(self, *arguments: object, cwd: Path) -> str:
        """Run Python, print what it prints, and return it; a failing command fails the test."""
        with self.start(*arguments, cwd=cwd) as process:
            output, _ = process.communicate(timeout=TIMEOUT)
        print(output)
        assert process.returncode == 0, output
        return output

    def start(self, *arguments: object, cwd: Path) -> subprocess.Popen:
        dropped = ("COV_", "PYTEST", "PYTHON", "SB3_DQS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        env |= {"PYTHONPATH": str(HERE), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy"}
        command = [str(self.python), *map(str, arguments)]
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def make_environment(folder: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (purelib,) = folder.glob("lib/python*/site-packages") if os.name != "nt" else [folder / "Lib" / "site-packages"]
    # Plain lines: the start-up files of those folders, and so their copy of this package's, are not run. Their pip is used
    (purelib / "borrowed.pth").write_text("\n".join(BORROWED))
    return Environment(folder)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run([sys.executable, *build], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def zoo(wheel):
    """Environment with the wheel."""
    environment = make_environment(wheel.parent / "zoo")
    environment.run(*PIP_INSTALL, wheel, cwd=wheel.parent)
    return environment


@pytest.fixture(scope="session")
def trained(tmp_path_factory, zoo):
    """Folder in which the main command has been run."""
    folder = tmp_path_factory.mktemp("trained")
    main = ["-m", "rl_zoo3.train", "--algo", "dqs", "--env", "Pendulum-v1", "-n", 200, "--eval-freq", 80]
    options = ["--eval-episodes", 1, "--tensorboard-log", "tb", "-P", "--num-threads", 1, "--save-replay-buffer"]
    (folder / "output.txt").write_text(zoo.run(*main, *options, cwd=folder))
    return folder


RUN = Path("logs/dqs/Pendulum-v1_1")


def read_config(folder: Path) -> dict:
    (path,) = folder.glob("logs/dqs/*/*/config.yml")
    return dict(yaml.load(path.read_text(), yaml.UnsafeLoader))


def test_train(trained, zoo):
    output = (trained / "output.txt").read_text()
    (line,) = [line for line in output.splitlines() if line.startswith("Loading hyperparameters from")]
    assert Path(line.split(": ")[1]).is_relative_to(zoo.folder)
    assert "RuntimeWarning" not in output and "200/200" in output
    for name in ("Pendulum-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv", "replay_buffer.pkl"):
        assert (trained / RUN / name).exists()
    assert (trained / RUN / "Pendulum-v1" / "args.yml").exists()
    # The arguments as in dqs.yml, none of DQS's own making
    assert read_config(trained) == yaml.safe_load((ROOT / "hyperparams" / "dqs.yml").read_text())["Pendulum-v1"]
    assert list((trained / "tb" / "Pendulum-v1" / "DQS_1").glob("events*"))


def test_enjoy(trained, zoo):
    options = ["--load-best", "--stochastic", "--custom-objects", "-n", 201, "--no-render"]
    output = zoo.run("-m", "rl_zoo3.enjoy", "--algo", "dqs", "--env", "Pendulum-v1", "-f", "logs", *options, cwd=trained)
    assert "Mean reward" in output


def test_script_and_continued_training(trained, zoo, tmp_path):
    model = trained / RUN / "Pendulum-v1.zip"
    options = ["--env", "Pendulum-v1", "-i", model, "-n", 20, "--eval-freq", -1, "--num-threads", 1]
    # rl_zoo3.cli is what the script rl_zoo3 runs
    output = zoo.run("-m", "rl_zoo3.cli", "train", "--algo", "dqs", *options, cwd=tmp_path)
    assert "Loading pretrained agent" in output and "Loading replay buffer" in output
    assert (tmp_path / RUN / "Pendulum-v1.zip").exists()


def test_plots(trained, zoo, tmp_path):
    for number in (1, 2):  # one run is not plotted
        shutil.copytree(trained / RUN, tmp_path / f"logs/dqs/Pendulum-v1_{number}")
    options = ["-e", "Pendulum-v1", "-f", "logs", "--no-display", "-o", "results"]
    output = zoo.run("-m", "rl_zoo3.plots.all_plots", "-a", "dqs", *options, cwd=tmp_path)
    assert "DQS" in output and "0.0 +/- 0.0" not in output


def test_paper_setting_in_two_environments(zoo, tmp_path):
    options = ["n_envs:2", "train_freq:5", "gradient_steps:2", "--conf-file", "sb3_dqs.dqs_paper"]
    zoo.run("-m", "rl_zoo3.train", "--algo", "dqs", *SHORT_PENDULUM, *SHORT, *options, cwd=tmp_path)
    assert read_config(tmp_path)["denoiser_target"] == "energy_gradient"
    assert (tmp_path / "logs/dqs/ShortPendulum-v0_1/ShortPendulum-v0.zip").exists()


@pytest.mark.parametrize(("env", "options", "storage"), [(SHORT_PENDULUM, [], "sqlite:///study.db"), (GOAL, HER, "study.log")])
def test_search_and_training_with_its_trial(zoo, tmp_path, env, options, storage):
    """Counted from the end, because RL Zoo reads 0 as none; also with hindsight experience replay and its arguments."""
    study = ["--storage", storage, "--study-name", "dqs"]
    command = ["-m", "rl_zoo3.train", "--algo", "dqs", *env, *SHORT, *options, *study]
    zoo.run(*command, *OPTIMIZE, "--n-trials", 1, "--log-folder", "search", cwd=tmp_path)
    assert list((tmp_path / "search/dqs").glob("report_*.csv"))
    output = zoo.run(*command, "--trial-id=-1", cwd=tmp_path)
    assert "Loading from Optuna study" in output
    config = read_config(tmp_path)
    assert {"n_mc_samples", "denoiser_target", "backup"} <= set(config) and "diffusion_steps" not in config
    assert set(config["policy_kwargs"]) == {"net_arch", "diffusion_steps", "critic_class"}
    if options:
        assert set(config["replay_buffer_kwargs"]) == {"n_sampled_goal", "goal_selection_strategy"}


@pytest.fixture
def postgresql():
    """Address of a database in a throw-away cluster on the loopback address, started here and stopped in the end."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("no PostgreSQL server here: initdb is neither on PATH nor in /usr/lib/postgresql (package postgresql)")
    programs = Path(found).resolve().parent
    # The server refuses to run as root
    user = {"user": "postgres", "group": "postgres"} if os.name == "posix" and os.getuid() == 0 else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        if user:
            shutil.chown(folder, **user)
        data, quiet = f"{folder}/data", {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, **user}
        subprocess.run([programs / "initdb", "--auth=trust", "--username=zoo", "--no-sync", "-D", data], **quiet)
        server = f"-h 127.0.0.1 -p {port} -k {folder}"
        subprocess.run([programs / "pg_ctl", "-D", data, "-l", f"{folder}/log", "-w", "-o", server, "start"], **quiet)
        try:
            yield f"postgresql://zoo@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)


@pytest.mark.postgresql
def test_two_processes_search_in_one_study(zoo, tmp_path, postgresql):
    study = ["--storage", postgresql, "--study-name", "dqs"]
    # Once, before the workers: two that make the tables at the same moment would collide. It is the script `optuna`
    optuna_script = "import sys; from optuna.cli import main; sys.exit(main())"
    zoo.run("-c", optuna_script, "create-study", *study, "--direction", "maximize", cwd=tmp_path)
    command = ["-m", "rl_zoo3.train", "--algo", "dqs", *SHORT_PENDULUM, *SHORT, *study, *OPTIMIZE, "--n-trials", 1]
    workers = [zoo.start(*command, "--log-folder", f"worker_{i}", cwd=tmp_path) for i in range(2)]
    outputs = [worker.communicate(timeout=TIMEOUT)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    trials = optuna.load_study(study_name="dqs", storage=postgresql).trials
    assert len(trials) == 2
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
    assert all(f"Trial {trial.number} finished" in "".join(outputs) for trial in trials if trial.state.name == "COMPLETE")
    # Each of the two did one of them
    assert all("finished with" in output for output in outputs)


def test_other_algorithms_are_as_without_this_package(zoo, tmp_path):
    command = ["-m", "rl_zoo3.train", "--algo", "sac", *SHORT_PENDULUM, *SHORT, "--seed", 1]
    results = []
    for environment in (make_environment(tmp_path / "without"), zoo):
        folder = tmp_path / f"run_{len(results)}"
        folder.mkdir()
        environment.run(*command, cwd=folder)
        files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
        contents = {name: path.read_bytes() for name, path in files.items() if path.suffix in (".yml", ".txt")}
        contents = {name: text.replace(str(environment.folder).encode(), b"") for name, text in contents.items()}
        model = zipfile.ZipFile(folder / "logs/sac/ShortPendulum-v0_1/ShortPendulum-v0.zip")
        weights = {name: model.read(name) for name in model.namelist() if name.endswith(".pth")}
        results.append((set(files), contents, weights))
    assert results[0] == results[1]


def test_every_way_to_install_registers_dqs_and_uninstalling_leaves_nothing(wheel, tmp_path):
    environment = make_environment(tmp_path / "environment")

    def files():
        paths = environment.folder.rglob("*")
        return {path for path in paths if path.is_file() and "__pycache__" not in path.parts}

    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "results", "logs", "venv", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = f"import hatchling.build; hatchling.build.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    before = files()
    code = "from rl_zoo3.utils import ALGOS; from sb3_dqs.rl_zoo import get_hyperparams_path as path; "
    code += "print(ALGOS['dqs'].__module__, path().exists())"
    for target in ([wheel], [sdist], ["--editable", source]):
        environment.run(*PIP_INSTALL, "--no-build-isolation", *target, cwd=tmp_path)
        assert len(files()) > len(before)
        if target != [wheel]:  # that of the other tests
            assert environment.run("-c", code, cwd=tmp_path).split()[-2:] == ["sb3_dqs.dqs", "True"]
        environment.run("-m", "pip", "uninstall", "--quiet", "--yes", "sb3-dqs", cwd=tmp_path)
        assert files() == before


def test_clone_of_the_zoo(zoo, tmp_path):
    """A clone keeps its hyperparameters beside the package, and is run from its folder."""
    package = Path(importlib.util.find_spec("rl_zoo3").submodule_search_locations[0])
    shutil.copytree(package, tmp_path / "rl_zoo3", ignore=shutil.ignore_patterns("hyperparams", "__pycache__"))
    shutil.copytree(package / "hyperparams", tmp_path / "hyperparams")
    (tmp_path / "train.py").write_text("from rl_zoo3.train import train\n\ntrain()\n")
    output = zoo.run("train.py", "--algo", "dqs", *SHORT_PENDULUM, *SHORT, cwd=tmp_path)
    assert f"Loading hyperparameters from: {zoo.folder}" in output
