"""The time that the rule for n groups takes by itself, and how many quadratic programs it solves.

python benchmarks/solver.py

Prints two tables: one problem of n groups, feasible and infeasible; and many blocks, solved together or one by one.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from hamu_lightning.rules import FixedRadius
from hamu_lightning.solvers import FeasibleDirection, SolveStatus
from hamu_lightning.solvers._backend import Backend
from hamu_lightning.solvers._problem import GroupProblem, make_problem, search
from hamu_lightning.solvers._together import run_searches

PROBLEMS = 200


def time_groups(n: int, is_feasible: bool) -> str:
    """A row: milliseconds of `coefficients` (median, 99th percentile), and the programs solved."""
    generator = torch.Generator().manual_seed(n)
    n_floors = (n - 1) // 2
    names = [f"group{k}" for k in range(1, n)]
    share = 0.3 / n if is_feasible else 1.5
    times, solves = [], []
    while len(times) < PROBLEMS:
        grads = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
        quota = {name: share * float(grads[k].norm()) for k, name in enumerate(names, 1) if k > n_floors}
        rule = FeasibleDirection(quota, dict.fromkeys(names[:n_floors], 0.0), radius=FixedRadius(1.0))
        gramian = (grads @ grads.T).unsqueeze(0)
        start = time.perf_counter()
        step = rule.coefficients(gramian, lr=0.1)
        elapsed = time.perf_counter() - start
        if (int(step.status) == SolveStatus.INFEASIBLE) != is_feasible:
            times.append(1e3 * elapsed)
            solves.append(step.solutions[0].solves)
    kind = "feasible" if is_feasible else "infeasible"
    middle, late = np.percentile(times, (50, 99))
    return f"| {n} | {kind} | {middle:.2f} | {late:.2f} | {np.median(solves):.0f} | {max(solves)} |"


def draw_blocks(count: int, share: float) -> list[GroupProblem]:
    """Blocks of 4 groups, one protected, quotas at a share of the capacity."""
    rng = np.random.default_rng(count)
    grads = rng.normal(size=(count, 4, 8))
    return [make_problem(g @ g.T, 1.0, np.array([0.0, share, share]), 1, 1e-10) for g in grads]


def time_blocks(count: int, is_feasible: bool, repeats: int = 7) -> str:
    """A row: milliseconds for all blocks, together and one by one."""
    problems, backend = draw_blocks(count, 0.1 if is_feasible else 0.9), Backend("osqp")
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for together, taken in times.items():
            start = time.perf_counter()
            run_searches([search(problem, True) for problem in problems], backend, together=together)
            taken.append(1e3 * (time.perf_counter() - start))
    kind = "feasible" if is_feasible else "mostly infeasible"
    return f"| {count} | {kind} | {np.median(times[True]):.1f} | {np.median(times[False]):.1f} |"


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    print("| groups | problems | median ms | p99 ms | programs, median | most |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for n in (2, 4, 8, 16):
        for is_feasible in (True, False):
            print(time_groups(n, is_feasible), flush=True)
    print("\n| blocks of 4 groups | problems | together, ms | one by one, ms |")
    print("| ---: | --- | ---: | ---: |")
    for is_feasible in (True, False):
        for count in (4, 16, 64, 256):
            print(time_blocks(count, is_feasible), flush=True)


if __name__ == "__main__":
    main()
