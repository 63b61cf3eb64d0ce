"""
A child process saves model and replay buffer again and again, and is killed (SIGKILL) at a random moment. What it has reported
as saved must be there.

    python tests/sb3/kills.py --kills 200 --inside 100

goes on until there were so many kills, and so many of them inside a write, and prints both numbers.
"""

import argparse
import os
import random
import signal
import struct
import tempfile
import time
from pathlib import Path

import torch as th

from sb3_dqs import DQS, saving

REPORT = struct.Struct("qq")


def save_for_ever(model: DQS, folder: Path, report: int) -> None:
    """
    Counts, saves the count with model and buffer, and reports (count, 0) and (count, 1) when they are saved. Every second
    flush to the disk takes long, so that kills come inside a write.
    """
    fsync = os.fsync
    while True:
        model.num_timesteps += 1
        saving.os.fsync = fsync if model.num_timesteps % 2 else lambda file: (time.sleep(0.01), fsync(file))
        model.replay_buffer.count = model.num_timesteps
        model.save(folder / "model")
        os.write(report, REPORT.pack(model.num_timesteps, 0))
        model.save_replay_buffer(folder / "buffer")
        os.write(report, REPORT.pack(model.num_timesteps, 1))


def kill_once(model: DQS, folder: Path, saved: list[int]) -> bool:
    """
    One child, killed.

    :param model: counts on from the count that is on the disk
    :param folder: where the files are
    :param saved: last counts that were reported as saved, of model and buffer; updated
    :return: whether it was inside a write, so that a temporary file is left
    :raises AssertionError: if what was reported as saved is not there
    """
    reports, report = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(model, folder, report)
    time.sleep(random.uniform(0.02, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(report)
    with open(reports, "rb") as file:
        for count, part in REPORT.iter_unpack(file.read()):
            saved[part] = count
    left_overs = list(folder.glob(f".*{saving.SUFFIX}"))
    for path in left_overs:
        path.unlink()
    loaded = DQS.load(folder / "model", device="cpu")
    loaded.load_replay_buffer(folder / "buffer")
    found = [loaded.num_timesteps, loaded.replay_buffer.count]
    # A file that was renamed and not reported is newer
    assert all(there >= reported for there, reported in zip(found, saved, strict=True)), f"{saved=}, {found=}"
    model.num_timesteps = loaded.num_timesteps
    saved[:] = found
    return bool(left_overs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside", type=int, default=100)
    args = parser.parse_args()
    th.set_num_threads(1)
    model = DQS("MlpPolicy", "Pendulum-v1", buffer_size=20, device="cpu", policy_kwargs={"net_arch": [32]}, seed=0)
    kills, inside, saved = 0, 0, [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        model.replay_buffer.count = 0
        model.save_replay_buffer(Path(folder) / "buffer")
        while kills < args.kills or inside < args.inside:
            inside += kill_once(model, Path(folder), saved)
            kills += 1
    print(f"{kills} kills, {inside} of them inside a write: nothing that was saved is lost")


if __name__ == "__main__":
    main()
