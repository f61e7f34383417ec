"""Which layers cache what, in models that mix kinds of layer."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kvprof.records.geometry import CacheGeometry, KVLayer, check_same_model


@pytest.fixture
def hybrid(hybrid_geometry_json: dict[str, Any]) -> CacheGeometry:
    return CacheGeometry.model_validate(hybrid_geometry_json)


def test_a_plan_covers_the_layers_that_give_no_reason_to_be_skipped(hybrid: CacheGeometry) -> None:
    assert hybrid.num_layers == 5
    assert [layer.layer for layer in hybrid.planned] == [0, 4]


def test_a_sliding_layer_is_scored_although_no_plan_covers_it(hybrid: CacheGeometry) -> None:
    assert [layer.layer for layer in hybrid.scored] == [0, 1, 4]
    assert hybrid.sliding == ()


def test_a_sliding_layer_with_no_reason_to_be_skipped_is_planned_until_a_plan_leaves_it(
    hybrid_geometry_json: dict[str, Any],
) -> None:
    hybrid_geometry_json["layers"][1]["skipped"] = None
    geometry = CacheGeometry.model_validate(hybrid_geometry_json)
    assert [layer.layer for layer in geometry.planned] == [0, 1, 4]
    assert [layer.layer for layer in geometry.sliding] == [1]
    left = geometry.leaving({1: "it is short", 0: "it is full, and stays", 2: "another word for recurrent"})
    assert [layer.layer for layer in left.planned] == [0, 4]
    assert left.layers[1].skipped == "it is short"
    assert left.layers[2] == geometry.layers[2]
    assert [layer.layer for layer in left.scored] == [0, 1, 4]
    assert geometry.leaving({0: "it is full"}) == geometry
    assert left.leaving({1: "another word"}) == left


@pytest.mark.parametrize(
    ("kind", "text"), [("sliding", "sliding window of 512 tokens"), ("chunked", "attention chunk of 512 tokens")]
)
def test_a_window_is_named_by_its_kind(kind: str, text: str) -> None:
    shape = {"layer": 0, "kv_heads": 1, "key_head_dim": 8, "value_head_dim": 8}
    assert KVLayer.model_validate({**shape, "kind": kind, "window": 512}).window_text == text


def test_keys_and_values_of_one_layer_may_differ_in_width(hybrid: CacheGeometry) -> None:
    assert (hybrid.layers[4].key_width, hybrid.layers[4].value_width) == (128, 80)


def test_an_unquantized_cache_grows_with_full_layers_and_stops_growing_with_sliding_ones(hybrid: CacheGeometry) -> None:
    # bfloat16: layer 0 holds 2 * 64 keys and as many values, layer 1 the same for 512 tokens, layer 4 128 + 80.
    assert hybrid.bytes_at(0) == 0
    assert hybrid.bytes_at(100) == 100 * (256 + 256 + 208) * 2
    assert hybrid.bytes_at(4096, batch=3) == 3 * (4096 * (256 + 208) + 512 * 256) * 2


def test_layers_without_keys_and_values_of_their_own_add_no_bytes(hybrid: CacheGeometry) -> None:
    for layer in (2, 3):
        assert hybrid.layers[layer].tokens_kept(1000) == hybrid.bytes_per_token(hybrid.layers[layer]) == 0


@pytest.mark.parametrize(
    ("positions", "contexts"),
    [
        (None, (4096, 32768, 131072)),
        (512, (512,)),
        (4096, (4096,)),
        (8192, (4096, 8192)),
        (131072, (4096, 32768, 131072)),
        (2**20, (4096, 32768, 131072)),
    ],
)
def test_contexts_end_at_what_the_model_was_made_for(
    hybrid: CacheGeometry, positions: int | None, contexts: tuple[int, ...]
) -> None:
    assert hybrid.model_copy(update={"positions": positions}).contexts == contexts


def test_a_limit_of_positions_is_optional_and_makes_no_other_model(hybrid: CacheGeometry) -> None:
    assert "positions" not in hybrid.model_dump(mode="json")
    limited = CacheGeometry.model_validate(hybrid.model_dump(mode="json") | {"positions": 512})
    assert limited.model_dump(mode="json")["positions"] == 512
    check_same_model("plan", None, hybrid, limited)
    check_same_model("plan", None, limited, hybrid)


@pytest.mark.parametrize(("dtype", "size"), [("float64", 8), ("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_an_element_has_the_bytes_of_its_dtype(hybrid_geometry_json: dict[str, Any], dtype: str, size: int) -> None:
    assert CacheGeometry.model_validate({**hybrid_geometry_json, "dtype": dtype}).element_bytes == size


@pytest.mark.parametrize(
    ("layer", "changed", "words"),
    [
        (1, {"layer": 2}, "without a gap"),
        (1, {"layer": 0}, "without a gap"),
        (0, {"layer": 9}, "without a gap"),
        (0, {"kv_heads": 0}, "layer 0 caches nothing"),
        (0, {"value_head_dim": 0}, "layer 0 caches nothing"),
        (0, {"kind": "recurrent"}, "layer 0 .recurrent. keeps no tokens' own keys"),
        (0, {"kind": "other"}, "layer 0 .other. keeps no tokens' own keys"),
        (0, {"window": 0}, "window"),
        (0, {"kv_heads": -1}, "kv_heads"),
        (0, {"kv_heads": 2.0}, "kv_heads"),
        (0, {"kind": "dense"}, "kind"),
    ],
)
def test_a_geometry_that_contradicts_itself_is_refused(
    hybrid_geometry_json: dict[str, Any], layer: int, changed: dict[str, Any], words: str
) -> None:
    hybrid_geometry_json["layers"][layer].update(changed)
    with pytest.raises(ValidationError, match=words):
        CacheGeometry.model_validate(hybrid_geometry_json)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one layer"):
        CacheGeometry(dtype="float16", layers=())


def test_a_dtype_that_no_cache_has_is_refused(hybrid_geometry_json: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="dtype"):
        CacheGeometry.model_validate({**hybrid_geometry_json, "dtype": "int8"})


def test_a_window_longer_than_the_context_keeps_the_context() -> None:
    layer = KVLayer(
        layer=0, kind="chunked", kv_heads=1, key_head_dim=8, value_head_dim=8, window=100, skipped="chunks of 100"
    )
    assert [layer.tokens_kept(context) for context in (0, 99, 100, 101)] == [0, 99, 100, 100]
