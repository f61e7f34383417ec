"""Time the solver on 252 items of 20 choices (126 layers) against SciPy's MILP, in the same run.

python tests/benchmarks/bench_solver.py
"""

from __future__ import annotations

import sys
import time

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from kvprof.allocate.solver import solve

ITEMS, CHOICES = 252, 20


def main() -> int:
    holds = True
    print("seed   solver s   milp s   milp / solver   loss, solver / milp - 1")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        costs = np.sort(rng.integers(1, 4097, (ITEMS, CHOICES)), axis=1)
        losses = -np.sort(-rng.lognormal(0, 1, (ITEMS, CHOICES)), axis=1)
        capacity = int(costs[:, 0].sum() * 2 + costs[:, -1].sum()) // 3

        start = time.perf_counter()
        solution = solve(
            [list(zip(*item, strict=True)) for item in zip(costs.tolist(), losses.tolist(), strict=True)], capacity
        )
        solver_seconds = time.perf_counter() - start

        start = time.perf_counter()
        columns = np.arange(ITEMS * CHOICES)
        one_each = coo_array((np.ones(len(columns)), (columns // CHOICES, columns)))
        result = milp(
            losses.ravel() * 1e3,  # far above HiGHS's absolute gap of 1e-6
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs.reshape(1, -1), -np.inf, capacity)],
            options={"mip_rel_gap": 1e-9},
        )
        milp_seconds = time.perf_counter() - start
        excess = solution.loss / (result.fun / 1e3) - 1
        ratio = milp_seconds / solver_seconds
        holds = holds and ratio > 1 and abs(excess) < 1e-9
        print(f"{seed:4}   {solver_seconds:8.3f}   {milp_seconds:6.2f}   {ratio:13.1f}   {excess:23.1e}")
    print(f"faster than milp, at the same loss - {'holds' if holds else 'does not hold'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
