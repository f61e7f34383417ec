#!/usr/bin/env bash
# From nothing to a bit plan for a real model: installs kvprof into .venv, then measures and plans SmolLM2-135M, on so
# little text that it takes a minute or two; the last lines say how more is measured.
# Results go to outputs/demo/ in the checkout. Can be run again, from any folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_kvprof gguf
cd "$ROOT"

run() {
    printf '\n$ %s\n' "$*"
    "$ROOT/.venv/bin/$1" "${@:2}"
}

run kvprof inspect
run kvprof norms
run kvprof gradients --data builtin --sequences 2
run kvprof allocate --budget 2.5

cat <<'END'

Two sequences of the built-in text make a first plan. The usual eight, half of them written by the model, take minutes:
    .venv/bin/kvprof gradients && .venv/bin/kvprof allocate --budget 2.5
END
