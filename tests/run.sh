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
if (($#)); then
    exec python -m pytest "$@"
fi

# Side by side, since hardly a test keeps two cores busy: those on the demo model, told at the end, and all others.
set -m # what runs in the background may be interrupted, too
log="$(mktemp)"
python -m pytest -m demo >"$log" 2>&1 &
demo=$!
trap 'kill "$demo" 2>/dev/null || true; rm -f "$log"' EXIT
failed=0
python -m pytest -m "not demo" || failed=1
wait "$demo" || failed=1
cat "$log"
exit "$failed"
