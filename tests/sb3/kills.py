"""
A child process saves model and replay buffer again and again, and is killed (SIGKILL) at a random moment. What it has reported
as saved must be there, and each file must be of one save.

    python tests/sb3/kills.py --kills 200 --inside 100

goes on until there were so many kills, and so many of them inside a write, and prints both numbers. It ends with status 1 if
something is lost, if a child fails, or if there were too few kills inside a write after 20 times as many children.
"""

import argparse
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch as th

from sb3_dqs import DQS, saving

REPORT = struct.Struct("qq")
MODEL, BUFFER = 0, 1
CHILDREN_PER_KILL = 20


def mark(model: DQS, count: int) -> None:
    """
    Write the number of a save into a counter, a weight of the actor and one of the critic, and into every row of the buffer.

    :param model: is changed
    :param count: below 2**24, so that single precision holds it
    """
    model.num_timesteps = count
    for weight in (model.actor.embed_features.weight, model.critic.q_networks[1][-1].weight):
        weight.data.fill_(count)
    buffer = model.replay_buffer
    buffer.observations[:] = buffer.rewards[:] = buffer.count = count


def read_marks(model: DQS) -> list[int]:
    """
    :param model: as loaded
    :return: numbers of the saves of model and buffer
    :raises AssertionError: if a file is of two saves
    """
    buffer = model.replay_buffer
    weights = [model.actor.embed_features.weight, model.critic.q_networks[1][-1].weight]
    marks = {model.num_timesteps}.union(*(weight.unique().tolist() for weight in weights))
    assert len(marks) == 1, f"the model is of the saves {sorted(marks)}"
    rows = {buffer.count}.union(np.unique(buffer.observations).tolist(), np.unique(buffer.rewards).tolist())
    assert len(rows) == 1, f"the replay buffer is of the saves {sorted(rows)}"
    return [model.num_timesteps, buffer.count]


def save_for_ever(model: DQS, folder: Path, report: int) -> None:
    """
    Counts, saves the count with model and buffer, and reports (count, 0) and (count, 1) when they are saved. Every second
    flush to the disk takes long, so that kills come inside a write.
    """
    fsync = os.fsync
    while True:
        mark(model, model.num_timesteps + 1)
        saving.os.fsync = fsync if model.num_timesteps % 2 else lambda file: (time.sleep(0.01), fsync(file))
        model.save(folder / "model")
        os.write(report, REPORT.pack(model.num_timesteps, MODEL))
        model.save_replay_buffer(folder / "buffer")
        os.write(report, REPORT.pack(model.num_timesteps, BUFFER))


def kill_once(model: DQS, folder: Path, saved: list[int]) -> bool:
    """
    One child, killed.

    :param model: counts on from the count that is on the disk
    :param folder: where the files are
    :param saved: last counts that were reported as saved, of model and buffer; updated
    :return: whether it was inside a write, so that a temporary file is left
    :raises AssertionError: if what was reported as saved is not there, a file is of two saves, or the child failed
    """
    reports, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(model, folder, report)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)  # nothing of the parent may run here
    time.sleep(random.uniform(0.02, 0.12))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(report)
    is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert is_killed, (
        f"the child was not killed, it ended with status {os.waitstatus_to_exitcode(status)}: see its error above"
    )
    with open(reports, "rb") as file:
        for count, part in REPORT.iter_unpack(file.read()):
            saved[part] = count
    left_overs = list(folder.glob(f".*{saving.SUFFIX}"))
    for path in left_overs:
        path.unlink()
    loaded = DQS.load(folder / "model", device="cpu")
    loaded.load_replay_buffer(folder / "buffer")
    found = read_marks(loaded)
    # A file that was renamed and not reported is newer
    assert all(there >= reported for there, reported in zip(found, saved, strict=True)), f"{saved=}, {found=}"
    model.num_timesteps = found[MODEL]
    saved[:] = found
    return bool(left_overs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside", type=int, default=100)
    args = parser.parse_args()
    th.set_num_threads(1)
    model = DQS("MlpPolicy", "Pendulum-v1", buffer_size=20, device="cpu", policy_kwargs={"net_arch": [32]}, seed=0)
    kills, inside, saved = 0, 0, [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        mark(model, 0)
        model.save(Path(folder) / "model")
        model.save_replay_buffer(Path(folder) / "buffer")
        while kills < args.kills or inside < args.inside:
            if kills >= CHILDREN_PER_KILL * max(args.kills, args.inside):
                print(f"{kills} kills, only {inside} of them inside a write", file=sys.stderr)
                return 1
            inside += kill_once(model, Path(folder), saved)
            kills += 1
    print(f"{kills} kills, {inside} of them inside a write: nothing that was saved is lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
