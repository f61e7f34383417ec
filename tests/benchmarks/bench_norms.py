"""Time the spectral norm of a 1024 x 4096 float32 matrix against a full SVD, in the same run.

python tests/benchmarks/bench_norms.py

On one thread, where processor time is what the clock shows on an idle machine; minima of interleaved rounds. The last
line of each claim says whether it holds; the exit status is 1 where one does not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from kvprof.profile.matrix_norms import spectral_norm

ROUNDS = 1 if "--quick" in sys.argv else 3
TIMES_FASTER = 5
RELATIVE_ERROR = 1e-6


def main() -> int:
    torch.set_num_threads(1)
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    methods: dict[str, Callable[[], float]] = {
        "kvprof spectral_norm": lambda: spectral_norm(weight),
        "torch.linalg.svd": lambda: float(torch.linalg.svd(weight, full_matrices=False).S[0]),
        "torch.linalg.svdvals": lambda: float(torch.linalg.svdvals(weight)[0]),
    }
    truth = float(torch.linalg.svdvals(weight.double())[0])
    seconds = dict.fromkeys(methods, float("inf"))
    norms = {}
    for _ in range(ROUNDS):
        for name, method in methods.items():
            start = time.process_time()
            norms[name] = method()
            seconds[name] = min(seconds[name], time.process_time() - start)

    ours = seconds["kvprof spectral_norm"]
    print(f"{'1024 x 4096 float32':<22}{'seconds':>9}{'times kvprof':>14}{'relative error':>17}")
    for name in methods:
        error = abs(norms[name] / truth - 1)
        print(f"{name:<22}{seconds[name]:9.3f}{seconds[name] / ours:14.1f}{error:17.1e}")
    ratio, error = seconds["torch.linalg.svd"] / ours, abs(norms["kvprof spectral_norm"] / truth - 1)
    claims = {
        f"at least {TIMES_FASTER} times faster than a full SVD: {ratio:.1f}": ratio >= TIMES_FASTER,
        f"relative error below {RELATIVE_ERROR}: {error:.1e}": error < RELATIVE_ERROR,
    }
    for claim, holds in claims.items():
        print(f"{claim} - {'holds' if holds else 'does not hold'}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
