#!/usr/bin/env bash
# Checks a GPU in under ten minutes: kernels' tests, then attention, decoding steps, throughput and gradients beside what
# each is measured against. Installs nothing: torch, Triton, transformers, pydantic and pytest must be there.
#
#     bash tests/benchmarks/gpu.sh                              # everything, into outputs/gpu/
#     bash tests/benchmarks/gpu.sh OUT --skip tests             # parts: tests attention step throughput gradients
#     bash tests/benchmarks/gpu.sh OUT --toy                    # every part at toy sizes, on a CPU
#
# PYTHON is the interpreter that has them. Each part is in OUT/benchmark.json as soon as it is measured.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
OUT="${1:-$ROOT/outputs/gpu}"
[ "$#" = 0 ] || shift
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$ROOT/tests/benchmarks/gpu.py" "$OUT" "$@"
