"""FP8 weights as they are published, against transformers' own dequantization and against one loop over all entries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from coded import KEY, Coding, code_folder, edit_file, read_weight, same_bits, stored
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.records.scores import Scores

BLOCK = (16, 8)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
LAST = ["--data", "builtin", "--sequences", "1", "--sequence-length", "32", "--formats", "none"]


def coding(
    block: tuple[int, int] = BLOCK,
    leaf: str = "weight_scale_inv",
    scale_dtype: torch.dtype = torch.float32,
    code_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Coding:
    """Quantize in blocks, the last of which the matrix may cut off."""

    def code(module: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        high, wide = min(block[0], rows), min(block[1], columns)
        scales = torch.empty(-(-rows // high), -(-columns // wide))
        codes = torch.empty(rows, columns, dtype=code_dtype)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
                scales[i, j] = weight[part].abs().max() / 200
                if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
                    scales[i, j] = scales[i, j].log2().ceil().exp2()
                codes[part] = (weight[part] / scales[i, j]).to(code_dtype)
        exponent = (scales.log2() + 127).to(torch.uint8) if scale_dtype == torch.uint8 else None
        return {"weight": codes, leaf: scales.to(scale_dtype) if exponent is None else exponent}

    return code


def one_by_one(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply entry by entry, each with the scale of the block that it is in."""
    result = torch.empty(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            result[row, column] = codes[row, column].float() * scales[row // block[0], column // block[1]].float()
    return result


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [BLOCK, (1, 32), (16, 32), (1, 8)], ids=["block", "row", "one", "columns"])
@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_a_weight_is_what_transformers_dequantizes(
    tmp_path: Path, leaf: str, block: tuple[int, int], scale_dtype: torch.dtype
) -> None:
    folder = code_folder(tmp_path, coding(block, leaf, scale_dtype), FP8)
    parts = stored(folder)
    codes, scales = parts[f"{KEY}.weight"], parts[f"{KEY}.{leaf}"]
    reference = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    assert same_bits(read_weight(folder), reference)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str
)
@pytest.mark.parametrize("block", [(12, 20), (5, 7), (128, 128)], ids=str)
def test_blocks_that_the_edge_cuts_off_have_scales_of_their_own(
    tmp_path: Path, block: tuple[int, int], dtype: torch.dtype
) -> None:
    folder = code_folder(tmp_path, coding(block, code_dtype=dtype), FP8 | {"weight_block_size": list(block)})
    parts = stored(folder)
    expected = one_by_one(parts[f"{KEY}.weight"], parts[f"{KEY}.weight_scale_inv"], block)
    assert same_bits(read_weight(folder), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (16,), (16, 1)], ids=str)
def test_a_scale_may_be_one_number_or_one_a_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = code_folder(tmp_path, coding((1, 32), "weight_scale"), {"quant_method": "fbgemm_fp8"})

    def reshape(state: dict[str, Tensor]) -> None:
        scales = state[f"{KEY}.weight_scale"]
        state[f"{KEY}.weight_scale"] = (scales if 16 in shape else scales[3]).reshape(shape).clone()

    edit_file(folder, reshape)
    parts = stored(folder)
    scales = parts[f"{KEY}.weight_scale"].reshape(-1, 1)
    assert same_bits(read_weight(folder), parts[f"{KEY}.weight"].float() * scales)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt-neox"])
@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_the_two_commands_agree_on_one_folder(in_tmp: Path, name: str, shard: str) -> None:
    code_folder(in_tmp / "model", coding((8, 8)), FP8 | {"weight_block_size": [8, 8]}, name, max_shard_size=shard)
    first = run("norms", "model", "--out", "out")
    assert first.exit_code == 0, first.output
    assert "quantized: FP8, a scale a block of 8x8 (weight_scale_inv)" in first.output
    second = run("gradients", "model", *LAST, "--out", "out")
    assert second.exit_code == 0, second.output
    norms, gradients = Scores.load("out/norms.json"), Scores.load("out/gradients.json")
    assert norms.model is not None
    assert gradients.model is not None
    assert norms.model.fingerprint == gradients.model.fingerprint
    live = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).requires_grad_(False)
    if name == "llama":
        for layer, block in zip(norms.layers, live.model.layers, strict=True):
            truth = torch.linalg.svdvals(block.self_attn.k_proj.weight.double())
            assert layer.key.spectral_norm == pytest.approx(float(truth[0]), rel=1e-6)
            assert layer.key.frobenius_norm == pytest.approx(float(truth.norm()), rel=1e-6)


def test_streaming_dequantizes_as_loading_does(in_tmp: Path) -> None:
    code_folder(in_tmp / "model", coding(), FP8)
    for out, extra in (("whole", []), ("streamed", ["--stream"])):
        result = run("gradients", "model", *LAST, "--out", out, *extra)
        assert result.exit_code == 0, result.output
    assert Scores.load("whole/gradients.json").layers == Scores.load("streamed/gradients.json").layers


def test_a_file_fits_the_folder_that_it_was_measured_on_and_no_other(in_tmp: Path) -> None:
    code_folder(in_tmp / "model", coding(), FP8)
    code_folder(in_tmp / "other", coding(), FP8)
    edit_file(
        in_tmp / "other",
        lambda state: state.update(
            {f"{KEY}.weight": state[f"{KEY}.weight"].view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)}
        ),
    )
    assert run("norms", "model", "--out", "out").exit_code == 0
    assert run("validate", "out/norms.json", "model").exit_code == 0
    assert run("validate", "out/norms.json", "other").exit_code == 4


def test_a_tensor_without_quantization_in_the_config_is_dequantized_all_the_same(in_tmp: Path) -> None:
    """ModelOpt writes its settings into a file of its own, which no library reads."""
    code_folder(in_tmp / "model", coding((1, 32), "weight_scale"), None)
    assert "quantization_config" not in json.loads((in_tmp / "model" / "config.json").read_text())
    assert run("norms", "model", "--out", "out").exit_code == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state.pop(f"{KEY}.weight_scale_inv"), "no scale stands beside it"),
        (
            lambda state: state.update({f"{KEY}.weight_scale_inv": torch.ones(3, 4)}),
            "weight_scale_inv is 3x4, which does not lie over a weight of 16x32",
        ),
        (
            lambda state: state.update({f"{KEY}.weight_scale_inv": torch.ones(2**20)}),
            "weight_scale_inv is 1048576, which does not lie over a weight of 16x32",
        ),
        (
            lambda state: state.update({f"{KEY}.weight_scale_inv": torch.ones(1, 4, dtype=torch.int64)}),
            "weight_scale_inv is int64, not float32 or",
        ),
        (
            lambda state: state[f"{KEY}.weight_scale_inv"].fill_(float("nan")),
            f"{KEY}.weight_scale_inv holds NaN or infinite entries",
        ),
        (
            lambda state: state[f"{KEY}.weight_scale_inv"].fill_(float("inf")),
            f"{KEY}.weight_scale_inv holds NaN or infinite entries",
        ),
        (
            lambda state: state.update({f"{KEY}.weight_scale_inv": torch.full((1, 4), 255, dtype=torch.uint8)}),
            f"{KEY}.weight holds",
        ),
        (
            lambda state: state.update({f"{KEY}.weight": state[f"{KEY}.weight"].reshape(-1)}),
            f"{KEY}.weight is 512, no matrix",
        ),
    ],
    ids=["missing", "grid", "huge", "dtype", "nan", "infinite", "infinite exponent", "vector"],
)
def test_scales_that_do_not_fit_are_one_message(in_tmp: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    code_folder(in_tmp / "model", coding(), FP8)
    edit_file(in_tmp / "model", damage)
    result = run("norms", "model", "--out", "out")
    assert result.exit_code == 1
    assert said in " ".join(result.output.split()), result.output
    assert isinstance(result.exception, SystemExit)
    assert not Path("out/norms.json").exists()


@pytest.mark.parametrize("command", [["norms"], ["gradients", *LAST]], ids=lambda words: words[0])
def test_a_scale_that_is_missing_is_named_before_anything_is_loaded(in_tmp: Path, command: list[str]) -> None:
    code_folder(in_tmp / "model", coding(), FP8)
    edit_file(in_tmp / "model", lambda state: state.pop(f"{KEY}.weight_scale_inv"))
    result = run(command[0], "model", *command[1:], "--out", "out")
    assert result.exit_code == 1
    said = f"{KEY}.weight is quantized to float8_e4m3fn, and no scale stands beside it"
    assert said in " ".join(result.output.split()), result.output
    assert not Path("out").exists() or not any(Path("out").glob("*.json"))


@pytest.mark.parametrize("stated", [None, [0, 8], [16], "16x8", [2**40, 8], {"a": 1}, [True, 8]], ids=str)
def test_a_block_that_the_config_does_not_name_follows_from_the_scales(tmp_path: Path, stated: object) -> None:
    folder = code_folder(tmp_path, coding(), FP8 | {"weight_block_size": stated})
    parts = stored(folder)
    assert same_bits(read_weight(folder), one_by_one(parts[f"{KEY}.weight"], parts[f"{KEY}.weight_scale_inv"], BLOCK))


def test_the_weights_of_a_folder_saved_anew_are_not_mistaken_for_codes(tmp_path: Path) -> None:
    """A scale beside a plain weight, as a converter may leave it, is not multiplied by."""
    folder = code_folder(tmp_path, coding(), FP8)
    edit_file(folder, lambda state: state.update({f"{KEY}.weight": torch.full((16, 32), 0.5)}))
    save_file(stored(folder), folder / "model.safetensors")
    assert same_bits(read_weight(folder), torch.full((16, 32), 0.5))
