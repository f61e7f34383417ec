"""Folders that compressed-tensors and bitsandbytes quantized, loaded by them: what norms reads is what gradients has.

Runs where these packages are installed; test_references.py holds the same dequantization against tensors of theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coded import Coding, code_folder
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import kvprof
from kvprof.cli.app import app
from kvprof.models.load import load_model, resolve
from kvprof.records.scores import Scores

LAST = [
    "--data",
    "builtin",
    "--sequences",
    "1",
    "--sequence-length",
    "32",
    "--formats",
    "int4g8",
    "--recent-tokens",
    "4",
]


def compressed(form: str, **given: Any) -> tuple[Coding, dict[str, Any]]:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**given)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)

    def code(module: str, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.bfloat16()
        grid = weight.unflatten(1, (-1, args.group_size)) if args.strategy == "group" else weight.unsqueeze(1)
        scale, zero = calculate_qparams(grid.amin(-1), grid.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        return compressor.compress(state, scheme)  # type: ignore[no-any-return]

    weights = args.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return code, settings | {"config_groups": groups, "ignore": ["lm_head"]}


def bitsandbytes(kind: str) -> tuple[Coding, dict[str, Any]]:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    def four_bits(module: str, weight: Tensor) -> dict[str, Tensor]:
        # Blocks no wider than a row: of others, bitsandbytes 0.50.2's AVX-512 kernel takes the wrong scale.
        nested = kind == "nf4"
        codes, state = functional.quantize_4bit(weight.bfloat16(), None, None, 32, nested, kind)
        return {"weight": codes} | {f"weight.{leaf}": part for leaf, part in state.as_dict(packed=True).items()}

    def eight_bits(module: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": scales}

    if kind == "int8":
        return eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return four_bits, settings | {"bnb_4bit_use_double_quant": kind == "nf4", "bnb_4bit_quant_storage": "uint8"}


KINDS = {
    "pack-quantized": lambda: compressed("pack-quantized", num_bits=4, strategy="group", group_size=16),
    "pack-quantized asymmetric": lambda: compressed(
        "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "float-quantized": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "int-quantized": lambda: compressed("int-quantized", num_bits=8, strategy="channel"),
    "nf4": lambda: bitsandbytes("nf4"),
    "fp4": lambda: bitsandbytes("fp4"),
    "int8": lambda: bitsandbytes("int8"),
}


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_two_commands_agree_on_one_folder(in_tmp: Path, kind: str) -> None:
    coding, settings = KINDS[kind]()
    code_folder(in_tmp / "model", coding, settings)
    first, second = run("norms", "model", "--out", "out"), run("gradients", "model", *LAST, "--out", "out")
    assert first.exit_code == 0, first.output
    assert second.exit_code == 0, second.output
    norms, gradients = Scores.load("out/norms.json"), Scores.load("out/gradients.json")
    assert norms.model is not None
    assert gradients.model is not None
    assert norms.model.fingerprint == gradients.model.fingerprint
    model = load_model(resolve("model"))
    for layer, block in zip(norms.layers, model.model.layers, strict=True):
        truth = torch.linalg.svdvals(block.self_attn.k_proj.weight.double())
        assert layer.key.frobenius_norm == pytest.approx(float(truth.norm()), rel=2e-4)  # bfloat16, once more rounded


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "float-quantized"])
def test_a_model_that_the_user_loaded_quantized_is_measured(in_tmp: Path, kind: str) -> None:
    coding, settings = KINDS[kind]()
    code_folder(in_tmp / "model", coding, settings)
    live = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    assert kvprof.norms(live).layers == kvprof.norms("model").layers
