#!/usr/bin/env bash
# Installs the runtimes' releases one by one, without what they need to run, and records what kvprof's targets are held
# against. Not part of CI: it takes a gigabyte. CI reads tests/data/runtimes. Versions: kvprof/targets/versions.py.
#
#     bash tests/targets/run.sh [FOLDER]      # in kvprof's own environment; FOLDER: for the packages, by default a new one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder="${1:-$(mktemp -d)}"
checked() { python -c "from kvprof.targets.versions import CHECKED; print(CHECKED['$1'].version)"; }
into() { python -m pip install --quiet --no-deps --target "$folder/$1" "${@:2}"; }

for name in vllm sglang lmdeploy exllamav3; do
    into packages "$name==$(checked "$name")"
done
python tests/targets/seen/words.py "$folder/packages" tests/data/runtimes/words.json

# MLX runs on a CPU: what it gives back of numbers is recorded, and the module for mlx-lm runs in it.
into mlx mlx mlx-cpu "mlx-lm==$(checked mlx-lm)"
PYTHONPATH="$PWD:$folder/mlx" python tests/targets/seen/mlx_dequantized.py tests/data/runtimes/mlx_dequantized.npz
PYTHONPATH="$PWD:$folder/mlx" python -m pytest -q tests/targets/test_mlx_lm_runs.py

into compressed "compressed-tensors==$(checked compressed-tensors)" loguru
PYTHONPATH="$PWD:$folder/compressed" python -m pytest -q tests/targets/test_compressed_tensors_reads.py

git diff --stat tests/data/runtimes
