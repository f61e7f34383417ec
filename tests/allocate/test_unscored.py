"""A plan from a geometry and two formats alone: what it stores, what it costs, and what cannot be."""

from __future__ import annotations

import pytest

from kvprof.allocate.unscored import uniform_plan
from kvprof.errors import UsageError
from kvprof.records.document import ModelInfo
from kvprof.records.formats import parse_formats
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import BitPlan

SLIDES = KVLayer(layer=1, kind="sliding", kv_heads=2, key_head_dim=8, value_head_dim=8, window=16, skipped="it slides")
GEOMETRY = CacheGeometry(
    dtype="bfloat16",
    layers=(
        KVLayer(layer=0, kind="full", kv_heads=2, key_head_dim=64, value_head_dim=32),
        SLIDES,
        KVLayer(layer=2, kind="full", kv_heads=2, key_head_dim=64, value_head_dim=32),
    ),
)
MODEL = ModelInfo(id="m", num_layers=3)


def planned(text: str) -> BitPlan:
    return uniform_plan(parse_formats(text), MODEL, GEOMETRY)


def test_every_planned_layer_has_the_two_formats() -> None:
    plan = planned("key:int4g64,value:rot2")
    assert [(entry.layer, entry.key.name, entry.value.name) for entry in plan.layers] == [
        (0, "int4g64", "rot2"),
        (2, "int4g64", "rot2"),
    ]
    assert [entry.layer for entry in plan.skipped] == [1]
    assert plan.layers[0].value.group_size == 32  # a rotated group is a head
    assert (plan.window.sink_tokens, plan.window.recent_tokens) == (4, 128)
    # Keys of 64 channels at 4 + 32/64 bits, values of 32 at 2 + 16/32.
    assert plan.budget.stored_bits == pytest.approx((64 * 4.5 + 32 * 2.5) / 96)


def test_one_format_serves_both() -> None:
    plan = planned("int3g128")
    assert {entry.key.group_size for entry in plan.layers} == {128}
    assert {entry.value.group_size for entry in plan.layers} == {32}  # a group of channels ends with its head


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4g64,int2g64", "one format for the keys, not int4g64, int2g64"),
        ("key:int4g64", "one format for the values, not none"),
    ],
)
def test_none_and_several_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        planned(text)


def test_a_model_with_nothing_to_plan_is_refused() -> None:
    bare = CacheGeometry(dtype="bfloat16", layers=(SLIDES.model_copy(update={"layer": 0}),))
    with pytest.raises(UsageError, match="m has no layer that a plan covers"):
        uniform_plan(parse_formats("int4g64"), ModelInfo(id="m", num_layers=1), bare)
