"""
What the start-up file for RL Zoo adds to the start of an interpreter.

    python benchmarks/startup.py

Starts an interpreter that reads the start-up files of a folder, with ours and with none in it, in turns, and prints the
median of the differences of CPU time.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HOOK = Path(__file__).parent.parent / "rl_zoo_hook"


def cpu_milliseconds(folder: Path | str, env: dict[str, str]) -> float:
    """CPU time of an interpreter that treats the folder as ``site-packages``."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = used()
    # -S: without the start-up files of this environment
    command = [sys.executable, "-S", "-c", f"import site; site.addsitedir({str(folder)!r})"]
    subprocess.run(command, check=True, env=env)
    return 1000 * (used() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()

    # With compiled modules, as pip leaves them
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as empty:
        cpu_milliseconds(HOOK, env)  # compiles the module
        pairs = np.array([[cpu_milliseconds(HOOK, env), cpu_milliseconds(empty, env)] for _ in range(args.repeats)])
    differences = pairs[:, 0] - pairs[:, 1]
    error = 1.25 * differences.std() / np.sqrt(args.repeats)
    print(f"with and without the start-up file: {np.median(pairs[:, 0]):.2f} and {np.median(pairs[:, 1]):.2f} ms")
    print(f"median difference: {np.median(differences):.2f} ms (standard error {error:.2f})")


if __name__ == "__main__":
    main()
