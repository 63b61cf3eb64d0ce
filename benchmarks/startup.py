"""
What the start-up file for RL Zoo adds to the start of an interpreter.

    python benchmarks/startup.py

Starts an interpreter with and without the hook, in turns, and prints the median of the differences (wall clock).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HOOK = Path(__file__).parent.parent / "rl_zoo_hook"
BARE = "import os, sys"
# -S: without the start-up files of this environment, so that the hook's own cost is all of the difference
COMMANDS = {
    "without the hook": [sys.executable, "-S", "-c", f"{BARE}; sys.path.insert(0, {str(HOOK)!r})"],
    "with the hook": [
        *[sys.executable, "-S", "-c"],
        f"{BARE}; sys.path.insert(0, {str(HOOK)!r}); import sb3_dqs_rl_zoo3; sb3_dqs_rl_zoo3.install()",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()

    # With compiled modules, as pip leaves them
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    milliseconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(args.repeats + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, env=env)
            if repeat > 0:  # the first run compiles the module
                milliseconds[name].append(1000 * (time.perf_counter() - start))
    differences = np.subtract(milliseconds["with the hook"], milliseconds["without the hook"])
    error = 1.25 * differences.std() / np.sqrt(args.repeats)
    for name, values in milliseconds.items():
        print(
            f"{name}: {np.median(values):.2f} ms (quartiles {np.quantile(values, 0.25):.2f}-{np.quantile(values, 0.75):.2f})"
        )
    print(f"median difference: {np.median(differences):.2f} ms (standard error {error:.2f})")


if __name__ == "__main__":
    main()
