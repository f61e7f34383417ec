"""Make references.safetensors: small matrices as each format's own package stores and dequantizes them.

Run by hand, where these packages are; the tests need none of them:
    python tests/models/quantized/make_references.py
autoawq's module of packing is loaded by itself, from AUTOAWQ (the folder of its sources), since the package no longer
imports beside a current transformers. Versions are noted in references.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {}
TENSORS: dict[str, Tensor] = {}


def add(name: str, parts: dict[str, Tensor], expected: Tensor, settings: dict[str, Any]) -> None:
    """Keep a case. expected: (out_features, in_features), in the dtype that the package returned."""
    CASES[name] = settings
    TENSORS.update({f"{name}/{leaf}": tensor.detach().clone().contiguous() for leaf, tensor in parts.items()})
    TENSORS[f"{name}/expected"] = expected.detach().clone().contiguous()


def weights(rows: int = 8, columns: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def one(name: str, form: str, dtype: torch.dtype, shape: tuple[int, int] = (8, 64), **args: Any) -> None:
        arguments = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        weight = weights(*shape).to(dtype)
        rows, columns = shape
        grid: Tensor = weight
        if arguments.strategy in ("group", "tensor_group"):
            grid = weight.reshape(rows, -1, arguments.group_size)
            low, high = grid.amin(-1), grid.amax(-1)
        elif arguments.strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        elif arguments.strategy == "block":
            tall, wide = arguments.block_structure
            padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % tall))
            grid = padded.reshape(-(-rows // tall), tall, -1, wide)
            low, high = grid.amin((1, 3)), grid.amax((1, 3))
        else:
            low, high = weight.amin().reshape(1), weight.amax().reshape(1)
        parts: dict[str, Tensor] = {"weight": weight}
        whole = None
        if form == "nvfp4-pack-quantized":
            whole = (448 * 6 / weight.abs().max()).float().reshape(1)
            parts["weight_global_scale"] = whole
        scale, zero = calculate_qparams(low, high, arguments, global_scale=whole)
        parts |= {
            "weight_scale": scale if form.startswith(("nvfp4", "mx")) else scale.to(dtype),
            "weight_zero_point": zero,
        }
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(parts, scheme)
        expected = compressor.decompress(stored, scheme)["weight"]
        weight_args = arguments.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        group = {"targets": ["Linear"], "weights": weight_args}
        settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        add(f"compressed-tensors {name}", stored, expected, settings)

    for dtype in (torch.bfloat16, torch.float32):
        word = str(dtype).removeprefix("torch.")
        one(f"int8 channel {word}", "int-quantized", dtype, num_bits=8, strategy="channel")
        one(f"int8 tensor {word}", "int-quantized", dtype, num_bits=8, strategy="tensor")
        one(
            f"int8 group asymmetric {word}",
            "int-quantized",
            dtype,
            num_bits=8,
            strategy="group",
            group_size=32,
            symmetric=False,
        )
        one(f"fp8 channel {word}", "float-quantized", dtype, num_bits=8, type="float", strategy="channel")
        one(f"fp8 tensor {word}", "float-quantized", dtype, num_bits=8, type="float", strategy="tensor")
        one(
            f"fp8 block {word}",
            "float-quantized",
            dtype,
            (12, 40),
            num_bits=8,
            type="float",
            strategy="block",
            block_structure=[8, 16],
        )
    for bits in range(2, 9):
        one(
            f"packed {bits} bits group",
            "pack-quantized",
            torch.bfloat16,
            num_bits=bits,
            strategy="group",
            group_size=32,
        )
        one(
            f"packed {bits} bits asymmetric",
            "pack-quantized",
            torch.float16,
            (12, 64),
            num_bits=bits,
            strategy="group",
            group_size=32,
            symmetric=False,
        )
    one("packed 4 bits channel", "pack-quantized", torch.float32, (5, 40), num_bits=4, strategy="channel")
    one(
        "packed 3 bits channel asymmetric",
        "pack-quantized",
        torch.float32,
        (5, 40),
        num_bits=3,
        strategy="channel",
        symmetric=False,
    )
    one(
        "nvfp4",
        "nvfp4-pack-quantized",
        torch.bfloat16,
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    )
    one(
        "mxfp4",
        "mxfp4-pack-quantized",
        torch.bfloat16,
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
    )
    one(
        "mxfp8",
        "mxfp8-quantized",
        torch.bfloat16,
        num_bits=8,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
    )


def gptq() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    outputs, inputs = 32, 64
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for ordered in (False, True):
                weight = weights(outputs, inputs, seed=bits)
                group_size = 32
                most = 2**bits - 1
                groups = weight.reshape(outputs, -1, group_size)
                high, low = groups.amax(-1), groups.amin(-1)
                high, low = (
                    (torch.maximum(high.abs(), low.abs()), -torch.maximum(high.abs(), low.abs()))
                    if symmetric
                    else (high, low)
                )
                scales = ((high - low) / most).half().float()
                zeros = (
                    torch.full_like(scales, (most + 1) // 2) if symmetric else (-low / scales).round().clamp(0, most)
                )
                if not symmetric:
                    zeros[0, 0] = 0  # less one, it is below what its bits hold
                g_idx = torch.arange(inputs) // group_size
                if ordered:
                    g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
                spread, moved = scales[:, g_idx], zeros[:, g_idx]
                codes = (weight / spread + moved).round().clamp(0, most)
                linear = torch.nn.Linear(inputs, outputs, bias=False)
                linear.weight.data = (codes - moved) * spread
                module = TorchLinear(
                    bits=bits,
                    group_size=group_size,
                    sym=symmetric,
                    desc_act=ordered,
                    in_features=inputs,
                    out_features=outputs,
                    bias=False,
                    pack_dtype=torch.int32,
                    register_buffers=True,
                )
                module.pack(linear, scales=scales.T.contiguous().T, zeros=zeros.T.contiguous().T, g_idx=g_idx.int())
                module.post_init()
                module.qzero_format(format=2)
                word = f"gptq {bits} bits {'symmetric' if symmetric else 'asymmetric'}{' act-order' if ordered else ''}"
                parts = {leaf: getattr(module, leaf) for leaf in ("qweight", "qzeros", "scales", "g_idx")}
                parts = {leaf: tensor.clone() for leaf, tensor in parts.items()}
                expected = module.dequantize_weight().T
                settings = {
                    "quant_method": "gptq",
                    "bits": bits,
                    "group_size": group_size,
                    "desc_act": ordered,
                    "sym": symmetric,
                }
                add(f"{word} v2", parts, expected, settings | {"checkpoint_format": "gptq_v2"})
                convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
                add(f"{word} v1", parts | {"qzeros": module.qzeros.clone()}, expected, settings)


def awq() -> None:
    path = Path(os.environ["AUTOAWQ"]) / "awq" / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    assert spec is not None
    assert spec.loader is not None
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, size = 64, 16, 32

    def packed(codes: Tensor) -> Tensor:
        """Pack as WQLinear_GEMM.from_linear does."""
        words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
        for place, output in enumerate(packing.AWQ_ORDER):
            words |= codes[:, output::8] << (4 * place)
        return words

    codes = torch.randint(0, 16, (inputs, outputs), generator=generator, dtype=torch.int32)
    zeros = torch.randint(0, 16, (inputs // size, outputs), generator=generator, dtype=torch.int32)
    for dtype in (torch.float16, torch.bfloat16):
        scales = (torch.rand(inputs // size, outputs, generator=generator) / 10).to(dtype)
        parts = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
        expected = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], scales, 4, size).T
        settings = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
        add(f"awq {str(dtype).removeprefix('torch.')}", parts, expected, settings)


def bitsandbytes() -> None:
    from bitsandbytes import functional

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for kind in ("nf4", "fp4"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for block, shape in ((64, (8, 64)), (128, (6, 50))):
                for nested in (False, True):
                    weight = weights(*shape).to(dtype)
                    codes, state = functional.quantize_4bit(
                        weight, blocksize=block, quant_type=kind, compress_statistics=nested
                    )
                    parts = {"weight": codes} | {
                        f"weight.{leaf}": part for leaf, part in state.as_dict(packed=True).items()
                    }
                    word = f"{kind} {str(dtype).removeprefix('torch.')} {block}{' nested' if nested else ''}"
                    add(f"bitsandbytes {word}", parts, functional.dequantize_4bit(codes, state), settings)
    codes, scales, _ = functional.int8_vectorwise_quant(weights(8, 64).half())
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    add("bitsandbytes int8", parts, functional.int8_vectorwise_dequant(codes, scales), settings)


def mlx() -> None:
    import mlx.core as mx

    def torch_of(array: Any) -> Tensor:
        if array.dtype in (mx.uint32, mx.uint8):
            kind = torch.uint32 if array.dtype == mx.uint32 else torch.uint8
            return torch.tensor(memoryview(array).tolist(), dtype=kind)
        wide = torch.tensor(memoryview(array.astype(mx.float32)).tolist())
        return wide.to(getattr(torch, str(array.dtype).removeprefix("mlx.core.")))

    mx.set_default_device(mx.cpu)
    for bits in (2, 3, 4, 5, 6, 8):
        for size, dtype in ((32, mx.float32), (64, mx.bfloat16), (128, mx.float16)):
            weight = mx.array(weights(4, 128, seed=bits).numpy()).astype(dtype)
            codes, scales, biases = mx.quantize(weight, group_size=size, bits=bits)
            parts = {"weight": torch_of(codes), "scales": torch_of(scales), "biases": torch_of(biases)}
            expected = mx.dequantize(codes, scales, biases, group_size=size, bits=bits)
            word = str(dtype).removeprefix("mlx.core.")
            add(f"mlx {bits} bits {size} {word}", parts, torch_of(expected), {"bits": bits, "group_size": size})
    for mode, size, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
        weight = mx.array(weights(4, 128).numpy()).astype(mx.bfloat16)
        codes, scales = mx.quantize(weight, group_size=size, bits=bits, mode=mode)
        expected = mx.dequantize(codes, scales, group_size=size, bits=bits, mode=mode, dtype=mx.bfloat16)
        parts = {"weight": torch_of(codes), "scales": torch_of(scales)}
        add(f"mlx {mode}", parts, torch_of(expected), {"bits": bits, "group_size": size, "mode": mode})


def modelopt() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = weights(8, 64)
    codes, scales, whole = NVFP4QTensor.quantize(weight, block_size=16)
    options = {"scale": scales, "double_scale": whole, "block_sizes": {-1: 16}}
    parts = {"weight": codes._quantized_data, "weight_scale": scales, "weight_scale_2": whole}
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    add("modelopt nvfp4", parts, codes.dequantize(dtype=torch.float32, **options), settings)


def main() -> None:
    torch.manual_seed(0)
    for make in (compressed_tensors, gptq, awq, bitsandbytes, mlx, modelopt):
        make()
    names = ("compressed-tensors", "bitsandbytes", "mlx", "nvidia-modelopt", "torch")
    versions = {name: metadata.version(name) for name in names}
    versions |= {"gptqmodel": os.environ["GPTQMODEL_VERSION"], "autoawq": os.environ["AUTOAWQ_VERSION"]}
    save_file(TENSORS, HERE / "references.safetensors")
    document = {"made_with": versions, "settings": CASES}
    (HERE / "references.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
