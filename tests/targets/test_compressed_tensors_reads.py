"""compressed-tensors itself reads what is written for it, where that is installed."""

from __future__ import annotations

import json

import pytest
from test_exports import everywhere, plan_of

from kvprof.targets.compressed_tensors import write

quantization = pytest.importorskip("compressed_tensors.quantization")


def test_its_config_is_valid_and_its_cache_in_8_bit_floats() -> None:
    written = json.loads(write(plan_of(everywhere("fp8_e4m3", "fp8_e4m3"))).text)["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(written).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
