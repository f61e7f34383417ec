#!/usr/bin/env bash
# From nothing to a bit plan for a real model: installs kvprof into .venv, then measures and plans SmolLM2-135M.
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
run kvprof gradients
run kvprof allocate --budget 2.5
