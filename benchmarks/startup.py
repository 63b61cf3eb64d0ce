"""
What the start-up file for RL Zoo adds to the start of an interpreter.

    python benchmarks/startup.py

Starts an interpreter that reads the start-up files of a folder, with ours and with none in it, in turns, and prints the
median of the differences of CPU time. Adds a row to ``benchmarks/results/startup.csv``.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import RESULTS, append_rows, print_provenance

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
    print_provenance()

    # With compiled modules, as pip leaves them
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as empty:
        cpu_milliseconds(HOOK, env)  # compiles the module
        pairs = np.array([[cpu_milliseconds(HOOK, env), cpu_milliseconds(empty, env)] for _ in range(args.repeats)])
    differences = pairs[:, 0] - pairs[:, 1]
    values = {
        "with_ms": np.median(pairs[:, 0]),
        "without_ms": np.median(pairs[:, 1]),
        "difference_ms": np.median(differences),
        "standard_error_ms": 1.25 * differences.std() / np.sqrt(args.repeats),
    }
    row = {"repeats": args.repeats, **{name: f"{value:.2f}" for name, value in values.items()}}
    append_rows(RESULTS / "startup.csv", [row])
    print(row)


if __name__ == "__main__":
    main()
