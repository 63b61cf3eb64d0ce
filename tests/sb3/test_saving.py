"""A kill, an exception or a full disk at any moment leaves the old file or the new one."""

import copy
import errno
import io
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback
from toys import OneStepEnv, same

from sb3_dqs import DQS, saving
from sb3_dqs.policies import DQSPolicy


class Unpicklable:
    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["model", "replay buffer"])
def test_exception_in_the_middle(make_model, tmp_path, what):
    model, path = make_model().learn(30), tmp_path / "file.zip"
    save = model.save if what == "model" else model.save_replay_buffer
    save(path)
    good = path.read_bytes()
    model.own = model.replay_buffer.own = Unpicklable()
    with pytest.raises(KeyboardInterrupt):
        save(path)
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["file.zip"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_full_disk(make_model, tmp_path, monkeypatch, place):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = make_model()
    model.policy.save(tmp_path / "policy")
    good = (tmp_path / "policy").read_bytes()
    monkeypatch.setattr(os, place, full)
    for save in (model.save, model.save_replay_buffer, model.policy.save):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "policy")
    assert (tmp_path / "policy").read_bytes() == good and os.listdir(tmp_path) == ["policy"]


def run_kills(*before: str) -> subprocess.CompletedProcess:
    """kills.py in a process of its own, after some lines of Python."""
    kills = Path(__file__).with_name("kills.py")
    code = "\n".join([*before, "import runpy, sys", "runpy.run_path(sys.argv[0], run_name='__main__')"])
    code = f"import sys; sys.argv = sys.argv[1:]\n{code}"
    command = [sys.executable, "-c", code, kills, "--kills", "12", "--inside", "4"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_kill():
    result = run_kills()
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("inside a write: nothing that was saved is lost\n")


# A package that writes in place, one that saves the weights of an earlier save, and one that fails
IN_PLACE = """
import contextlib, time
from sb3_dqs import dqs
@contextlib.contextmanager
def in_place(path, suffix):
    with open(f"{path}.{suffix}", "wb") as file:
        yield file
        time.sleep(0.01)
dqs.atomic = in_place
"""
OLD_WEIGHTS = """
from sb3_dqs import DQS
get_parameters, seen = DQS.get_parameters, {}
DQS.get_parameters = lambda model: seen.setdefault("first", __import__("copy").deepcopy(get_parameters(model)))
"""
FAILS = """
from sb3_dqs import DQS
save, calls = DQS.save, []
def fails(*args):
    calls.append(1)
    return save(*args) if len(calls) < 2 else 1 / 0
DQS.save = fails
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (IN_PLACE, "the file is truncated or corrupt"),
        (OLD_WEIGHTS, r"AssertionError: the model is of the saves \[\d+(\.0)?, \d+"),
        (FAILS, r"ZeroDivisionError[\s\S]*AssertionError: the child was not killed, it ended with status 1"),
    ],
)
def test_kill_finds_faults(fault, message):
    result = run_kills(fault)
    assert result.returncode == 1 and re.search(message, result.stderr), result.stderr


def test_left_overs_of_a_kill_are_swept(make_model, tmp_path):
    code = """
import os, sys
from pathlib import Path
from sb3_dqs import saving
folder = Path(sys.argv[1])
with saving.atomic(folder / "model", "zip") as model, saving.atomic(folder / "buffer", "pkl") as buffer:
    model.write(b"half")
    buffer.write(b"half")
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    left_overs = list(tmp_path.iterdir())
    assert len(left_overs) == 2
    for path in left_overs:
        os.utime(path, (time.time() - saving.ABANDONED_AFTER - 60,) * 2)
    make_model().save(tmp_path / "model")
    make_model().save_replay_buffer(tmp_path / "buffer")
    assert sorted(os.listdir(tmp_path)) == ["buffer.pkl", "model.zip"]


def test_a_file_that_another_process_writes_is_not_swept(tmp_path):
    with saving.atomic(tmp_path / "model", "zip") as first:
        first.write(b"first")
        with saving.atomic(tmp_path / "model", "zip") as second:
            second.write(b"second")
        assert (tmp_path / "model.zip").read_bytes() == b"second"
    assert (tmp_path / "model.zip").read_bytes() == b"first"


def test_callbacks_save_whole_files(make_model, tmp_path, monkeypatch):
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (written.append(target.name), replace(source, target)))
    make_model().learn(25, CheckpointCallback(20, tmp_path, "m", save_replay_buffer=True))
    assert written == ["m_20_steps.zip", "m_replay_buffer_20_steps.pkl"]


def test_where_sb3_writes(make_model, tmp_path):
    model = make_model()
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        model.save(tmp_path / "folder")
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        model.save(str(tmp_path / "new" / "model.v1"))
    long_name = "m" * 250
    model.save(tmp_path / long_name)
    model.save(tmp_path / "target")
    (tmp_path / "link.zip").symlink_to(tmp_path / "target.zip")
    os.chmod(tmp_path / "target.zip", 0o640)
    model.num_timesteps = 7
    model.save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink() and (tmp_path / "target.zip").stat().st_mode & 0o777 == 0o640
    for path in ("folder.zip_2", "new/model.v1", long_name, "target"):
        loaded = DQS.load(tmp_path / path)
    assert loaded.num_timesteps == 7
    model.save("/dev/null")
    for file in (io.BytesIO(), (tmp_path / "own").open("w+b")):
        with file:
            model.save(file)
            assert not file.closed
            DQS.load(file).set_parameters(file)
    with io.BytesIO() as file:
        model.save_replay_buffer(file)
        file.seek(0)
        model.load_replay_buffer(file)


def test_policy_alone(make_model, tmp_path):
    model = make_model()
    model.policy.save(tmp_path / "policy")
    assert os.listdir(tmp_path) == ["policy"]
    loaded = DQSPolicy.load(tmp_path / "policy", device="cpu")
    obs = np.zeros(3, np.float32)
    assert np.array_equal(*(policy.predict(obs, deterministic=True)[0] for policy in (model.policy, loaded)))


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "text":
        content[:] = b"no model"
    else:
        del content[int(how * len(content)) :]
    path.write_bytes(content)


@pytest.mark.parametrize("how", [0.0, 0.1, 0.5, 0.99, "flipped", "text"])
def test_truncated_models(make_model, tmp_path, how):
    model, path = make_model(), tmp_path / "model.zip"
    model.save(path)
    spoil(path, how)
    before = model.actor.embed_features.weight.clone()
    for read in (DQS.load, model.set_parameters):
        with pytest.raises(ValueError, match=rf"path={path}: the file is truncated or corrupt"):
            read(path)
    assert th.equal(before, model.actor.embed_features.weight)


@pytest.mark.parametrize("how", [0.0, 0.5, 0.99, "text"])
def test_truncated_replay_buffers(make_model, tmp_path, how):
    model, path = make_model().learn(30), tmp_path / "buffer.pkl"
    model.save_replay_buffer(path)
    spoil(path, how)
    with pytest.raises(ValueError, match=rf"path={path}: the file is truncated or corrupt, or no replay buffer"):
        model.load_replay_buffer(path)
    assert model.replay_buffer.size() == 30
    model.learn(10)


def test_foreign_files(make_model, tmp_path):
    model = make_model()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.jpg", b"")
    message = r"photos: the file is truncated or corrupt, or no model that save\(\) wrote: it has no data"
    with pytest.raises(ValueError, match=message):
        DQS.load(tmp_path / "photos")
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save(tmp_path / "sac")
    with pytest.raises(ValueError, match=r"policy=SACPolicy is not a policy of DQS: .* load a file with the algorithm that"):
        DQS.load(tmp_path / "sac")
    make_model(policy_kwargs={"net_arch": {"pi": [8], "qf": [4]}}).save(tmp_path / "other")
    before = copy.deepcopy(model.get_parameters())
    for path, key in ((tmp_path / "sac", r"actor\.input_norm"), (tmp_path / "other", r"size mismatch for critic")):
        with pytest.raises(RuntimeError, match=rf"set_parameters\({path}\): nothing is changed, because .*{key}"):
            model.set_parameters(path)
    assert same(model.get_parameters(), before)
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    other = ReplayBuffer(5, OneStepEnv.observation_space, OneStepEnv.action_space)
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(other))
    for name, reason in (
        ("list", "must inherit from ReplayBuffer"),
        ("other", r"of shape \(\(2,\), 2\), where \(\(3,\), 1\)"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.pkl: .*{reason}"):
            model.load_replay_buffer(tmp_path / f"{name}.pkl")
    for read in (DQS.load, model.set_parameters, model.load_replay_buffer):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")


class Executes:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_loading_executes(make_model, tmp_path):
    model = make_model()
    model.own = Executes(tmp_path / "made")
    model.save(tmp_path / "model")
    make_model().set_parameters(tmp_path / "model")
    assert not (tmp_path / "made").exists()
    DQS.load(tmp_path / "model")
    assert (tmp_path / "made").exists()


def test_parameters_of_another_kind_are_named_at_load(make_model, tmp_path):
    """SB3 would say KeyError: 'policy.optimizer'."""
    model = make_model()
    get_parameters = model.get_parameters
    model.get_parameters = lambda: {name: value for name, value in get_parameters().items() if name != "temperature"}
    model.save(tmp_path / "model", exclude=["get_parameters"])
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        DQS.load(tmp_path / "model")


def test_load_in_inference_mode(make_model, tmp_path):
    model, obs = make_model().learn(40), np.ones(3, np.float32)
    model.save(tmp_path / "model")
    with th.inference_mode():
        loaded = DQS.load(tmp_path / "model")
        action, _ = loaded.predict(obs, deterministic=True)
    for other in (loaded, model):
        assert np.array_equal(other.predict(obs, deterministic=True)[0], action)
    assert loaded.actor.average_is_current
    loaded.set_env(model.get_env())
    loaded.learn(40)


def test_predict_from_a_thread_does_not_change_the_training_mode(make_model):
    modes, stop = [], threading.Event()
    model = make_model(gradient_steps=4, policy_kwargs={"activation_fn": th.nn.Dropout})
    model.actor.embed_features.register_forward_hook(lambda *args: modes.append(model.actor.training))

    def predict():
        while not stop.wait(0.0005):
            model.predict(np.zeros(3, np.float32))

    model.learn(30)
    modes.clear()
    thread = threading.Thread(target=predict)
    thread.start()
    seen = []
    for _ in range(15):
        with model.policy.lock:
            modes.clear()
            model.train(4, 16)
            seen += modes
        time.sleep(0.002)
    stop.set()
    thread.join()
    assert len(seen) >= 60 and all(seen)


def test_predict_from_a_thread_does_not_act_by_the_noise_of_rollouts(make_model):
    model = make_model(exploration_noise="pink", learning_starts=0)
    stop, spreads = threading.Event(), []

    def predict():
        while not stop.wait(0.0005):
            spreads.append(np.ptp(model.predict(np.zeros((8, 3), np.float32))[0]))

    thread = threading.Thread(target=predict)
    thread.start()
    model.learn(300)
    stop.set()
    thread.join()
    assert len(spreads) > 10 and min(spreads) > 0  # one latent for all eight would give one action


def test_models_can_be_loaded_in_the_environment_they_were_made_for(make_model, tmp_path):
    model = make_model(env=OneStepEnv())
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        DQS.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
