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

PAIRS = {80: (1, 0), 90: (3, 3)}
"""Of an A100 and an H100, the pairs of formats that are compiled, and the lengths of a context of one more."""


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Codes are read 16 bytes at a time, and multiplied on tensor cores."""
    environment = {name: given for name, given in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_kernels.py")
    started = {
        arch: subprocess.Popen(
            [sys.executable, script, str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in PAIRS
    }
    for arch, process in started.items():
        told, errors = process.communicate()
        assert process.returncode == 0, errors
        found, (pairs, lengths) = json.loads(told), PAIRS[arch]
        assert Counter(kernel["kernel"] for kernel in found) == {
            "attend_splits": pairs + lengths, "merge_splits": pairs + lengths, "unpack_rows": pairs,
            "pack_groups": 2, "pack_rotated": 1,
        }  # fmt: skip
        for kernel in found:
            if kernel["kernel"] == "attend_splits":
                assert kernel["tensor_cores"] > 0
                assert kernel["wide_loads"] > 0
