"""The cache's three operations as Triton kernels: `torch_kernels` says what each one does.

Run on a GPU, or under Triton's interpreter on the CPU (TRITON_INTERPRET=1, set before this is imported).

    arithmetic, codes                     what all kernels share
    packing_kernels, attention_kernels    the kernels
    forms, packing, attention             how they are launched
"""

from kvprof.runtime.kernels.triton_kernels.arithmetic import INTERPRETED as _INTERPRETED
from kvprof.runtime.kernels.triton_kernels.attention import attend, why_not
from kvprof.runtime.kernels.triton_kernels.packing import pack_tokens, unpack_tokens

INTERPRETED = bool(_INTERPRETED.value)

__all__ = ["INTERPRETED", "attend", "pack_tokens", "unpack_tokens", "why_not"]
