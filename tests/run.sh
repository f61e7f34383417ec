#!/usr/bin/env bash
# Makes what the checks need in .venv, then runs lint, types, import contracts and tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/setup.sh"
install_kvprof dev
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH"

ruff format --check .
ruff check .
mypy
lint-imports --no-logo
# Two workers of a thread each: a file of tests goes to one of them as a whole, the pages' first (tests/conftest.py).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
