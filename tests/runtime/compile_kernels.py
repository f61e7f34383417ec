"""Compile kernels for a GPU that need not be there: what each is made of, as JSON. Run by test_compilation.

python compile_kernels.py ARCH      such as 90, of an H100
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from packed import form_of, history, random_tokens
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kvprof.records.plan import Quantizer
from kvprof.runtime.kernels.triton_kernels import attend, attention, attention_kernels, pack_tokens, packing_kernels
from kvprof.runtime.kernels.triton_kernels import unpack_tokens as unpack

ATTENDED = (
    (("int4g64", "channel"), ("int4g128", "token"), 128),
    (("int3g32", "channel"), ("int2g32", "token"), 128),
    (("rot2", "token"), ("rot3", "token"), 128),
)
PACKED = (("int3g64c", "channel"), ("int4g32", "token"), ("rot3", "token"))


class NoGPU:
    """Says which GPU to compile for, and nothing else."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands for a kernel: where that would be launched, it is only compiled."""

    def __init__(self, kernel: Any, found: list[dict[str, Any]]) -> None:
        self.kernel = kernel
        self.found = found
        self.what = ""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*arguments: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            ptx = compiled.asm["ptx"]
            self.found.append(
                {
                    "key": compiled.hash,
                    "kernel": self.kernel.__name__,
                    "tensor_cores": len(re.findall(r"mma\.sync", ptx)),
                    "wide_loads": len(
                        re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[[^\]]*\], *\[[^\]]*\], *(?:16|0x10)", ptx)
                    ),
                }
            )

        return compile_only


def main(arch: int) -> None:
    driver.set_active(NoGPU(arch))
    found: list[dict[str, Any]] = []
    for module, names in (
        (attention_kernels, ("attend_splits", "merge_splits")),
        (packing_kernels, ("pack_groups", "pack_rotated", "unpack_rows")),
    ):
        for name in names:
            setattr(module, name, Compiled(getattr(module, name), found))
    attention._programs = lambda device: 16 * 132
    for key, value, head_dim in ATTENDED if arch == 90 else ATTENDED[:1]:
        read = history(form_of(*key, head_dim), form_of(*value, head_dim), T=700, key_D=head_dim, value_D=head_dim,
                       dtype=torch.bfloat16)  # fmt: skip
        attend(torch.zeros(1, 4, 1, head_dim, dtype=torch.bfloat16), read, 0.1)
        unpack(read.value, torch.empty(1, 1, read.value.coded_tokens, head_dim, dtype=torch.bfloat16))
    for tokens in (3, 20, 60) if arch == 90 else ():  # sinks alone; codes of values, and none of keys yet; of both
        read = history(form_of("int3g32", "channel", 64), form_of("rot2", "token", 64), T=tokens, dtype=torch.bfloat16)
        attend(torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16), read, 0.1)
    if arch == 90:
        compiled = {kernel["key"] for kernel in found[-6:]}
        assert len(compiled) == 2, f"a kernel is compiled anew as the context grows: {found[-6:]}"
    for name, axis in PACKED:
        pack_tokens(random_tokens(1, 1, 64, 128, torch.bfloat16), form_of(name, axis, 128), Quantizer())
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
