#!/usr/bin/env bash
# Measures how plans and predictions hold on small trained models that PyPI packages carry, and writes the tables of
# kvprof/evaluate/README.md. Outside CI. Two hours on two cores; a stopped run goes on, and what is measured stays.
#
#     bash tests/benchmarks/models.sh                           # everything
#     bash tests/benchmarks/models.sh --only gpt2 --text self   # one model, one kind of text
#     bash tests/benchmarks/models.sh --only demo --budget 2.5  # plans of one size, and single tensors
#     bash tests/benchmarks/models.sh --tables                  # measure nothing: the tables of what there is
#
# MODELS_WORK is where packages and measurements go, several gigabytes; it is kept.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipes/setup.sh"
install_kvprof gguf
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$ROOT/.venv/bin/python" "$ROOT/tests/benchmarks/models.py" \
    "${MODELS_WORK:-${TMPDIR:-/tmp}/kvprof-models}" "$@"
