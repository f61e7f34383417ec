"""Time the solver on 252 items of 20 choices (126 layers) against SciPy's MILP, and 200 budgets at once.

python tests/benchmarks/bench_solver.py
"""

from __future__ import annotations

import sys
import time

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from kvprof.allocate.solver import frontier, solve

ITEMS, CHOICES, BUDGETS = 252, 20, 200
SOLVE_SECONDS, FRONTIER_SECONDS = 1.0, 2.0


def main() -> int:
    faster, soon, all_soon = True, True, True
    print(f"seed   solver s   milp s   milp / solver   loss, solver / milp - 1   {BUDGETS} budgets s")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        costs = np.sort(rng.integers(1, 4097, (ITEMS, CHOICES)), axis=1)
        losses = -np.sort(-rng.lognormal(0, 1, (ITEMS, CHOICES)), axis=1)
        low, high = int(costs[:, 0].sum()), int(costs[:, -1].sum())
        capacity = (low * 2 + high) // 3
        items = [list(zip(*item, strict=True)) for item in zip(costs.tolist(), losses.tolist(), strict=True)]

        start = time.perf_counter()
        solution = solve(items, capacity)
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

        start = time.perf_counter()
        solutions = frontier(items, [low + (high - low) * step // (BUDGETS - 1) for step in range(BUDGETS)])
        frontier_seconds = time.perf_counter() - start

        excess = solution.loss / (result.fun / 1e3) - 1
        ratio = milp_seconds / solver_seconds
        faster = faster and ratio > 1 and abs(excess) < 1e-9
        soon = soon and solver_seconds < SOLVE_SECONDS and solution.optimal
        all_soon = all_soon and frontier_seconds < FRONTIER_SECONDS and all(each.optimal for each in solutions)
        print(
            f"{seed:4}   {solver_seconds:8.3f}   {milp_seconds:6.2f}   {ratio:13.1f}   {excess:23.1e}   "
            f"{frontier_seconds:13.2f}"
        )
    claims = {
        "faster than milp, at the same loss": faster,
        f"one budget in less than {SOLVE_SECONDS:g} s, proven optimal": soon,
        f"{BUDGETS} budgets from one preparation in less than {FRONTIER_SECONDS:g} s, each proven optimal": all_soon,
    }
    for claim, holds in claims.items():
        print(f"{claim} - {'holds' if holds else 'does not hold'}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
