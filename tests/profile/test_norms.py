"""Are the norms those of a float64 SVD, for every shape, scale and dtype that a checkpoint can bring?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor

from kvprof.errors import NonFiniteWeight
from kvprof.models.checkpoint.weights import LayerWeights
from kvprof.models.load import resolve
from kvprof.profile.matrix_norms import frobenius_norm, spectral_norm
from kvprof.profile.norms import layer_norms, measure_norms
from kvprof.records.geometry import KVLayer
from kvprof.records.scores import Scores, TensorScores

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def svd_norm(weight: Tensor) -> float:
    """Largest singular value by LAPACK in float64, of the matrix scaled to 1, so that it cannot under- or overflow."""
    scale = float(weight.double().abs().max())
    return scale * float(torch.linalg.svdvals(weight.double() / scale)[0]) if scale else 0.0


def exact_frobenius(weight: Tensor) -> float:
    """Root of the exactly rounded sum of squares, in units of the largest entry."""
    scale = float(weight.double().abs().max())
    if not scale:
        return 0.0
    return scale * math.sqrt(math.fsum(entry * entry for entry in (weight.double() / scale).flatten().tolist()))


def with_singular_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """Build a matrix whose singular values are known: orthonormal columns on both sides."""
    left = torch.linalg.qr(random_matrix(rows, len(values), seed))[0]
    right = torch.linalg.qr(random_matrix(columns, len(values), seed + 1))[0]
    return left * values @ right.T


def one_layer(key: Tensor, value: Tensor, heads: int, **more: Tensor | None) -> LayerWeights:
    layer = KVLayer(
        layer=0,
        kind="full",
        kv_heads=heads,
        key_head_dim=len(key) // heads,
        value_head_dim=len(value) // heads,
    )
    absent = dict.fromkeys(("key_bias", "value_bias", "key_gain"))
    return LayerWeights(layer, key, value, **{**absent, **more})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (24, 96), (96, 24), (64, 64), (255, 260), (257, 300), (300, 257)]
)
def test_spectral_norm_is_that_of_a_float64_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_matrix(*shape).to(dtype)
    assert spectral_norm(weight) == pytest.approx(svd_norm(weight), rel=1e-6)
    assert frobenius_norm(weight) == pytest.approx(exact_frobenius(weight), rel=1e-12)


@pytest.mark.parametrize("size", [255, 256, 257])
def test_both_sides_of_the_size_where_the_method_changes_agree_with_the_svd(size: int) -> None:
    weight = random_matrix(size, 2 * size).float()
    assert spectral_norm(weight) == pytest.approx(svd_norm(weight), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (300, 320), (320, 300)])
def test_spectral_norm_of_a_rank_one_matrix_is_the_product_of_the_lengths(shape: tuple[int, int]) -> None:
    left, right = random_matrix(shape[0], 1), random_matrix(1, shape[1], seed=1)
    expected = float(left.norm()) * float(right.norm())
    assert spectral_norm(left @ right) == pytest.approx(expected, rel=1e-6)
    assert spectral_norm((left @ right).float()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (300, 400), (400, 300)])
def test_a_matrix_of_zeros_has_norms_of_zero(shape: tuple[int, int]) -> None:
    assert spectral_norm(torch.zeros(shape)) == 0.0
    assert frobenius_norm(torch.zeros(shape)) == 0.0


@pytest.mark.parametrize("size", [60, 320])
@pytest.mark.parametrize(
    "top",
    [(5.0, 5.0), (5.0, 5.0, 5.0, 4.99), (5.0, 5.0 * (1 - 1e-7)), (5.0, 5.0 * (1 - 1e-4)), (5.0, 5.0 * (1 - 1e-2))],
)
def test_repeated_and_clustered_top_singular_values_do_not_mislead(size: int, top: tuple[float, ...]) -> None:
    values = torch.cat([torch.tensor(top, dtype=torch.float64), torch.linspace(4.9, 0.1, size - len(top)).double()])
    assert spectral_norm(with_singular_values(size, size + 64, values)) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("size", [32, 320])
def test_every_singular_value_alike_is_found_at_once(size: int) -> None:
    assert spectral_norm(3.0 * torch.eye(size)) == pytest.approx(3.0, rel=1e-12)
    assert spectral_norm(with_singular_values(size, size + 9, torch.full((size,), 7.0).double())) == pytest.approx(7.0)


def test_one_thousand_by_four_thousand_is_as_exact_as_a_small_one() -> None:
    values = torch.linspace(9.0, 0.01, 1024, dtype=torch.float64)
    values[0] = 9.001
    wide = with_singular_values(1024, 4096, values)
    assert spectral_norm(wide) == pytest.approx(9.001, rel=1e-6)
    assert spectral_norm(wide.T.contiguous()) == pytest.approx(9.001, rel=1e-6)
    assert frobenius_norm(wide) == pytest.approx(math.sqrt(float(values.square().sum())), rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 70), (300, 320)])
@pytest.mark.parametrize("scale", [1e-45, 1e-41, 1e-38, 1e-30, 1e-20, 1e20, 1e35])
def test_tiny_and_huge_entries_neither_vanish_nor_overflow(shape: tuple[int, int], scale: float) -> None:
    weight = (random_matrix(*shape).clamp(-3, 3) * scale).float()
    assert weight.any()
    assert spectral_norm(weight) == pytest.approx(svd_norm(weight), rel=1e-6)
    assert frobenius_norm(weight) == pytest.approx(exact_frobenius(weight), rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 70), (300, 320)])
def test_rows_forty_orders_of_magnitude_apart_do_not_disturb_the_norm(shape: tuple[int, int]) -> None:
    powers = torch.logspace(-20, 20, shape[0], dtype=torch.float64)
    weight = (random_matrix(*shape) * powers[:, None]).float()
    assert spectral_norm(weight) == pytest.approx(svd_norm(weight), rel=1e-6)
    assert spectral_norm(weight.T) == pytest.approx(svd_norm(weight), rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 200), (300, 320)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_huge_outlier_is_the_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (random_matrix(*shape) * 1e-3).to(dtype)
    weight[3, 5] = 6e4
    assert spectral_norm(weight) == pytest.approx(svd_norm(weight), rel=1e-6)
    assert spectral_norm(weight) == pytest.approx(6e4, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 40),
    exponent=st.integers(-40, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_norms_of_any_shape_rank_scale_and_dtype_are_the_svd_s(
    rows: int, columns: int, rank: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    weight = random_matrix(rows, rank, seed) @ random_matrix(rank, columns, seed + 1)
    limit = torch.finfo(dtype).max / 4
    weight = (weight * 10.0**exponent).clamp(-limit, limit).to(dtype)
    assert spectral_norm(weight) == pytest.approx(svd_norm(weight), rel=1e-6)
    assert frobenius_norm(weight) == pytest.approx(exact_frobenius(weight), rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [spectral_norm, frobenius_norm])
def test_a_matrix_that_is_not_finite_has_no_norm(norm: object, bad: float) -> None:
    weight = random_matrix(6, 9)
    weight[2, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        norm(weight)  # type: ignore[operator]


@pytest.mark.parametrize("columns", [12, 48, 400], ids=["tall", "square", "wide"])
def test_per_head_norms_are_the_norms_of_the_head_s_rows(columns: int) -> None:
    key, value = random_matrix(48, columns), random_matrix(24, columns, seed=1)
    key[16:32] *= 50
    scores = layer_norms(one_layer(key.float(), value.float(), heads=3))
    for weight, measured in ((key.float(), scores.key), (value.float(), scores.value)):
        heads = weight.chunk(3)
        assert measured.head_spectral_norm == pytest.approx([svd_norm(head) for head in heads], rel=1e-6)
        assert measured.head_frobenius_norm == pytest.approx([exact_frobenius(head) for head in heads], rel=1e-6)
        spectral, frobenius = svd_norm(weight), exact_frobenius(weight)
        assert measured.spectral_norm == pytest.approx(spectral, rel=1e-6)
        assert measured.frobenius_norm == pytest.approx(frobenius, rel=1e-6)
        assert measured.stable_rank == pytest.approx((frobenius / spectral) ** 2, rel=1e-6)


def test_stable_rank_counts_equal_directions_and_is_zero_for_a_matrix_of_zeros() -> None:
    five = with_singular_values(20, 30, torch.full((5,), 2.0, dtype=torch.float64))
    scores = layer_norms(one_layer(five, torch.zeros(20, 30), heads=2))
    assert scores.key.stable_rank == pytest.approx(5.0)
    assert scores.value == TensorScores(
        spectral_norm=0.0,
        frobenius_norm=0.0,
        stable_rank=0.0,
        head_spectral_norm=(0.0, 0.0),
        head_frobenius_norm=(0.0, 0.0),
    )


def test_bias_norms_and_gains_are_reported_beside_the_matrix() -> None:
    weight = random_matrix(4, 6)
    scores = layer_norms(
        one_layer(
            weight,
            weight,
            heads=1,
            key_bias=torch.tensor([3.0, 0.0, -4.0, 0.0]),
            value_bias=torch.tensor([0.0, 12.0, 0.0, 5.0]),
            key_gain=torch.tensor([1.0, -7.0, 1.0, 7.0]),
        )
    )
    assert (scores.key.bias_norm, scores.value.bias_norm) == (5.0, 13.0)
    assert (scores.key.gain_rms, scores.key.gain_max) == (5.0, 7.0)
    assert scores.value.gain_rms is None


def measured_tiny(name: str, folder: Path) -> Scores:
    tiny_model(name).save_pretrained(folder)
    return measure_norms(resolve(str(folder)))[0]


@pytest.mark.parametrize(("name", "offset"), [("qwen3", 0.0), ("gemma3", 1.0)])
def test_gains_of_the_norm_on_keys_are_those_that_the_model_applies(name: str, offset: float, tmp_path: Path) -> None:
    scores = measured_tiny(name, tmp_path)
    for entry, layer in zip(scores.layers, tiny_model(name).model.layers, strict=True):
        gains = layer.self_attn.k_norm.weight.double() + offset
        assert entry.key.gain_rms == pytest.approx(math.sqrt(float((gains**2).mean())))
        assert entry.key.gain_max == pytest.approx(float(gains.abs().max()))


def test_a_model_without_a_norm_on_keys_reports_no_gains(tmp_path: Path) -> None:
    assert all(entry.key.gain_rms is None for entry in measured_tiny("llama", tmp_path).layers)


def test_measured_norms_are_the_svds_of_the_model_s_own_matrices(tmp_path: Path) -> None:
    scores = measured_tiny("qwen2", tmp_path)
    assert scores.source == "norms"
    for entry, layer in zip(scores.layers, tiny_model("qwen2").model.layers, strict=True):
        for measured, projection in ((entry.key, layer.self_attn.k_proj), (entry.value, layer.self_attn.v_proj)):
            assert measured.spectral_norm == pytest.approx(svd_norm(projection.weight), rel=1e-6)
            assert measured.frobenius_norm == pytest.approx(exact_frobenius(projection.weight), rel=1e-6)
            assert measured.bias_norm == pytest.approx(float(projection.bias.double().norm()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_checkpoint_with_a_weight_that_is_not_finite_is_refused_by_tensor_name(bad: float, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    state[name][0, 0] = bad
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeight, match=name):
        measure_norms(resolve(str(tmp_path)))


def test_progress_counts_the_bytes_that_are_read(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    seen: list[tuple[int, int]] = []
    measure_norms(resolve(str(tmp_path)), lambda done, total: seen.append((done, total)))
    layer = 2 * (16 * 32 * 4)  # K and V, of 2 heads of 8 from 32 features, in float32
    assert seen == [(0, 2 * layer), (layer, 2 * layer), (2 * layer, 2 * layer)]


@pytest.mark.demo
def test_the_demo_model_s_norms_are_those_measured_before() -> None:
    layers = measure_norms(resolve("demo"))[0].layers
    first, last = layers[0], layers[29]
    assert (first.key.spectral_norm, first.value.spectral_norm) == pytest.approx((62.031, 3.443), rel=1e-4)
    assert (first.key.frobenius_norm, first.value.frobenius_norm) == pytest.approx((132.286, 15.566), rel=1e-4)
    assert (last.key.spectral_norm, last.value.spectral_norm) == pytest.approx((10.288, 10.145), rel=1e-4)
    assert (last.key.frobenius_norm, last.value.frobenius_norm) == pytest.approx((43.621, 95.854), rel=1e-4)
    spectral = [entry.layer for entry in layers if entry.key.spectral_norm > entry.value.spectral_norm]
    frobenius = [entry.layer for entry in layers if entry.key.frobenius_norm > entry.value.frobenius_norm]
    assert spectral == [layer for layer in range(30) if layer != 19]
    assert frobenius == list(range(19))
