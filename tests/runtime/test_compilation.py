"""The kernels compile for the GPUs that they are made for, which need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(("arch", "pairs"), [(80, 1), (90, 3)])
def test_every_kernel_compiles_for_a_gpu(arch: int, pairs: int, tmp_path: Path) -> None:
    """Of an A100 and an H100. Codes are read 16 bytes at a time, and multiplied on tensor cores."""
    environment = {name: given for name, given in os.environ.items() if name != "TRITON_INTERPRET"}
    found = json.loads(
        subprocess.run(
            [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(arch)],
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert Counter(kernel["kernel"] for kernel in found) == {
        "attend_splits": pairs + 3, "merge_splits": pairs + 3, "unpack_rows": pairs, "pack_groups": 2, "pack_rotated": 1
    }  # fmt: skip
    for kernel in found:
        if kernel["kernel"] == "attend_splits":
            assert kernel["tensor_cores"] > 0
            assert kernel["wide_loads"] > 0
