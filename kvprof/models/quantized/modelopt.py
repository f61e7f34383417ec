"""NVFP4 weights of ModelOpt: 4-bit floats, an FP8 scale for 16 columns, and a number that multiplies all of these.

Under ModelOpt's names two codes a byte are `weight`, and both scales are multiplied by; compressed-tensors' NVFP4
divides by its number of the matrix. The reference is `NVFP4QTensor.dequantize` of nvidia-modelopt, in float32; FP8 of
ModelOpt is plain FP8 (fp8.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprof.models.quantized.matrix import CodedMatrix, Parts, Settings, text
from kvprof.models.quantized.scales import scaled, unpacked_float4

_GROUP = 16
_WHOLE = "weight_scale_2"


def modelopt_matrix(parts: Parts, settings: Settings) -> CodedMatrix | None:
    """Return how an NVFP4 weight is read; None for another weight. Raises ModelError for scales that do not fit it."""
    if parts.dtype("weight") != "uint8" or _WHOLE not in parts:
        return None
    rows, packed = parts.need("weight", "uint8", dimensions=2)
    shape = rows, 2 * packed
    if parts.need("weight_scale", "float8_e4m3fn") != (rows, shape[1] // _GROUP) or shape[1] % _GROUP:
        raise parts.wrong(
            f"{parts.name('weight_scale')} is {text(parts.shape('weight_scale'))}, which does not lie over a weight of "
            f"{text(shape)} in groups of {_GROUP}"
        )
    if parts.need(_WHOLE, "float32") not in ((), (1,), (1, 1)):
        raise parts.wrong(f"{parts.name(_WHOLE)} is {text(parts.shape(_WHOLE))}, not one number")

    def decode() -> Tensor:
        scales = parts.read("weight_scale").float() * parts.read(_WHOLE).reshape(1)
        codes = unpacked_float4(parts.read("weight"), torch.float32) + 0.0  # ModelOpt's code of -0.0 is 0.0
        return scaled(codes, scales, (1, _GROUP))

    kind = f"ModelOpt, NVFP4, a scale for {_GROUP} columns"
    return CodedMatrix(kind, shape, torch.float32, parts.names("weight", "weight_scale", _WHOLE), decode)
