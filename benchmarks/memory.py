"""
Memory of a process during many gradient steps: DQS beside SAC.

    python benchmarks/memory.py --gradient-steps 15000

One process per algorithm, small networks. Prints the resident memory after the first 500 gradient steps and at the end, and
the slope of the line through what lies between; every figure is in a row of ``benchmarks/results/memory.csv``. Ends with
status 1 if the slope of DQS is above the limit.
"""

import argparse
import gc
import os
import sys

import numpy as np
from common import RESULTS, append_rows, fresh_processes, print_provenance, print_table, use_one_thread
from returns import find_algorithm

EVERY = 500
# KiB per 1,000 gradient steps: 10 bytes per step, less than the smallest Python object
LIMIT = 10.0


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(name: str, gradient_steps: int) -> tuple[float, float, float]:
    """
    :return: memory after the first ``EVERY`` gradient steps and at the end in MiB, and the slope in KiB per thousand steps
    """
    use_one_thread()
    model = find_algorithm(name)(
        "MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [64, 64]}, buffer_size=2_000, seed=0, device="cpu"
    )
    model.learn(1_000)
    memory = []
    for _ in range(gradient_steps // EVERY):
        model.train(EVERY, 64)
        gc.collect()
        memory.append(resident_mib())
    slope = np.polyfit(EVERY / 1000 * np.arange(len(memory)), memory, 1)[0] * 1024
    return memory[0], memory[-1], float(slope)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algos", nargs="+", default=["SAC", "DQS"])
    parser.add_argument("--gradient-steps", type=int, default=15_000, help=f"at least {2 * EVERY}")
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest slope of DQS, for 15,000 gradient steps")
    args = parser.parse_args()
    if args.gradient_steps < 2 * EVERY:
        parser.error(f"--gradient-steps must be at least {2 * EVERY}, got {args.gradient_steps}")
    print_provenance()
    rows = []
    for name in args.algos:
        with fresh_processes(1) as pool:
            first, last, slope = (round(value, 1) for value in pool.submit(run, name, args.gradient_steps).result())
        row = {"algorithm": name, "gradient_steps": args.gradient_steps, "first_mib": first, "last_mib": last}
        rows.append({**row, "slope_kib_per_1000_steps": slope})
    append_rows(RESULTS / "memory.csv", rows)
    print_table(rows[0], [row.values() for row in rows])
    slopes = {row["algorithm"]: row["slope_kib_per_1000_steps"] for row in rows}
    if slopes.get("DQS", 0.0) > args.limit:
        print(f"DQS grows by {slopes['DQS']} KiB per 1,000 gradient steps, the limit is {args.limit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
