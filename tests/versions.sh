#!/usr/bin/env bash
# Tests what pyproject.toml allows: installs the lowest or the newest versions that resolve, or the newest with one version
# of transformers, into a virtual environment of their own, and runs a part of the tests with them: what each dependency
# does for kvprof, but not the demo model.
#
#     bash tests/versions.sh lowest            # the bounds of pyproject.toml, no higher
#     bash tests/versions.sh newest            # but torch as recipes/constraints.txt has it, whose newest is gigabytes
#     bash tests/versions.sh 5.20.0            # the same with this version of transformers
#     bash tests/versions.sh all               # lowest, 5.20.0, 5.22.2 and newest, one after the other
#     bash tests/versions.sh lowest tests/api  # other tests: the rest goes to pytest
#
# VERSIONS_VENV is where the environment goes; it is kept.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
WHICH="${1:-}"
BETWEEN="5.20.0 5.22.2"
case "$WHICH" in
    lowest) resolution=lowest-direct ;;
    newest | [0-9]*.[0-9]*.[0-9]*) resolution=highest ;;
    all)
        shift
        for each in lowest $BETWEEN newest; do bash "${BASH_SOURCE[0]}" "$each" "$@"; done
        exit
        ;;
    *) echo "usage: bash tests/versions.sh lowest|newest|all|VERSION_OF_TRANSFORMERS [what goes to pytest]" >&2; exit 2 ;;
esac
shift
VENV="${VERSIONS_VENV:-${TMPDIR:-/tmp}/kvprof-$WHICH}"
PYTHON="${PYTHON:-python3}"

"$PYTHON" -m venv "$VENV-tools"
"$VENV-tools/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv="$VENV-tools/bin/uv"
# uv reads no settings of pip's: where wheels lie on the disk, it is told.
links="$("$PYTHON" -m pip config get global.find-links 2>/dev/null || true)"
export UV_FIND_LINKS="${UV_FIND_LINKS:-$links}"
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS

grep '^torch==' "$ROOT/recipes/constraints.txt" > "$VENV-tools/held.txt"
case "$WHICH" in [0-9]*) echo "transformers==$WHICH" >> "$VENV-tools/held.txt" ;; esac
"$uv" pip compile --quiet --resolution "$resolution" --constraint "$VENV-tools/held.txt" --python "$PYTHON" \
    --extra dev "$ROOT/pyproject.toml" --output-file "$VENV-tools/versions.txt"
"$uv" venv --quiet --clear --seed --python "$PYTHON" "$VENV"
"$uv" pip install --quiet --python "$VENV/bin/python" --requirement "$VENV-tools/versions.txt"
"$uv" pip install --quiet --python "$VENV/bin/python" --no-deps --editable "$ROOT"

# What is declared and what was installed: a bound below the lowest is one that no resolver can reach.
"$VENV/bin/python" "$ROOT/tests/version_bounds.py" "$ROOT/pyproject.toml" "$WHICH"

cd "$ROOT"
export PATH="$VENV/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$#" = 0 ]; then
    set -- tests/storage tests/workspace tests/records tests/allocate tests/analysis tests/targets tests/api \
        tests/calibration tests/report tests/cli/test_manner.py \
        tests/models/test_load.py tests/models/test_streaming.py tests/models/test_inventory.py \
        tests/models/test_wrappers.py tests/models/test_weights.py tests/models/test_gguf.py \
        tests/profile/test_gradients.py tests/profile/test_loss_increase.py tests/runtime/test_cache.py \
        tests/runtime/test_packing.py \
        tests/evaluate/test_harness.py tests/test_public_names.py tests/test_packaging.py \
        -m "not demo"
fi
exec "$VENV/bin/python" -m pytest -q -n 2 --dist loadfile -p no:cacheprovider "$@"
