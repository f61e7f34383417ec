"""What a BitPlan file may say, which models it fits, and its bytes against a cache filled token by token."""

from __future__ import annotations

import copy
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvprof.errors import InvalidFile, KvprofError, Mismatch
from kvprof.records.formats import CODE_BITS
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, TensorPlan, Window, layers_left_alone, oldest_held


def read(value: dict[str, Any]) -> BitPlan:
    return BitPlan.from_json(value, "plan.json")


def refusal(value: dict[str, Any]) -> str:
    with pytest.raises(InvalidFile) as caught:
        read(value)
    return str(caught.value)


def geometry_of(value: dict[str, Any]) -> CacheGeometry:
    return CacheGeometry.model_validate(value)


@pytest.fixture
def small_geometry_json() -> dict[str, Any]:
    """Return a geometry that the minimal plan serves."""
    return {
        "dtype": "float16",
        "layers": [
            {"layer": layer, "kind": "full", "kv_heads": 2, "key_head_dim": 64, "value_head_dim": 64}
            for layer in range(2)
        ],
    }


@pytest.fixture
def hybrid_plan_json(plan_json: dict[str, Any]) -> dict[str, Any]:
    """Return a plan for the hybrid geometry: layers 0 and 4, the others skipped."""
    first, last = plan_json["layers"]
    return {
        **plan_json,
        "model": {"num_layers": 5},
        "layers": [first, {**last, "layer": 4}],
        "skipped": [{"layer": layer, "reason": "not planned"} for layer in (1, 2, 3)],
    }


# Written by hand


def test_a_file_of_the_required_fields_alone_is_valid_and_has_the_defaults(plan_json: dict[str, Any]) -> None:
    plan = read(plan_json)
    key, value = plan.layers[1].key, plan.layers[1].value
    assert (key.scheme, key.bits, key.group_size, key.axis, key.clip) == ("asymmetric", 4, 32, "channel", "none")
    assert (value.scheme, value.bits, value.group_size, value.axis, value.clip) == (
        "asymmetric", 2, 64, "token", "none",
    )  # fmt: skip
    assert key.recent_fraction == value.recent_fraction == 0
    absent = (plan.budget, plan.geometry, plan.skipped, plan.solver, plan.provenance, plan.model.id)
    assert all(field is None for field in absent)


@pytest.mark.parametrize("field", ["schema", "model", "quantizer", "window", "layers"])
def test_a_required_field_that_is_absent_is_named(plan_json: dict[str, Any], field: str) -> None:
    del plan_json[field]
    assert field in refusal(plan_json)


@pytest.mark.parametrize("field", ["sink_tokens", "recent_tokens"])
def test_both_numbers_of_the_window_are_required(plan_json: dict[str, Any], field: str) -> None:
    del plan_json["window"][field]
    assert f"missing key window.{field}" in refusal(plan_json)


@pytest.mark.parametrize("field", ["budget", "geometry", "skipped", "solver", "provenance", "kvprof_version"])
def test_any_other_field_may_be_null(plan_json: dict[str, Any], field: str) -> None:
    assert read({**plan_json, field: None}) == read(plan_json)


def test_the_example_of_the_design_is_valid(tmp_path: Path) -> None:
    value = {
        "schema": "kvprof.plan/1",
        "kvprof_version": "0.1.0",
        "model": {"id": "m", "fingerprint": "sha256:0", "architecture": "LlamaForCausalLM", "num_layers": 6},
        "budget": {
            "requested": 2.5, "unit": "nominal", "nominal_bits": 2.5, "stored_bits": 3.5, "bytes_per_token": 2520.0,
        },
        "quantizer": {"scale_dtype": "float16", "zero_dtype": "float16", "rotation_seed": 0},
        "window": {"sink_tokens": 4, "recent_tokens": 128},
        "layers": [
            {
                "layer": layer,
                "key": {
                    "scheme": "asymmetric", "bits": 4, "group_size": 32, "axis": "channel", "clip": "none",
                    "recent_fraction": 0.0,
                },
                "value": {
                    "scheme": "rotated", "bits": 2, "group_size": 64, "axis": "token", "clip": "none",
                    "recent_fraction": 0.0,
                },
            }
            for layer in range(5)
        ],
        "skipped": [{"layer": 5, "reason": "sliding window of 512 tokens"}],
        "solver": {
            "method": "exact", "metric": "loss_increase", "objective": 0.031, "optimal": True,
            "predicted_kl_nats": 0.031,
        },
        "provenance": {"scores": "sha256:1", "command": "kvprof allocate --budget 2.5"},
    }  # fmt: skip
    plan = read(value)
    assert BitPlan.load(plan.save(tmp_path / "plan.json")) == plan
    expected = {**value, "geometry": None, "provenance": {**value["provenance"], "request": None}}
    assert plan.model_dump(mode="json", by_alias=True) == expected


# Layers


def test_a_missing_layer_is_named(plan_json: dict[str, Any]) -> None:
    plan_json["model"]["num_layers"] = 3
    assert "layer 2 is missing" in refusal(plan_json)
    del plan_json["layers"][0]
    assert "layer 0 is missing" in refusal(plan_json)


def test_a_repeated_layer_is_named(plan_json: dict[str, Any]) -> None:
    twice = {**plan_json, "layers": [*plan_json["layers"], plan_json["layers"][1]]}
    assert "layer 1 stands 2 times" in refusal(twice)
    both = {**plan_json, "skipped": [{"layer": 0, "reason": "no"}]}
    assert "layer 0 stands 2 times" in refusal(both)


def test_a_layer_that_the_model_does_not_have_is_named(plan_json: dict[str, Any]) -> None:
    plan_json["model"]["num_layers"] = 1
    assert "layer 1 does not exist: model.num_layers is 1" in refusal(plan_json)


def test_layers_out_of_order_are_refused(plan_json: dict[str, Any]) -> None:
    plan_json["layers"].reverse()
    assert "ascending" in refusal(plan_json)


def test_a_plan_that_skips_every_layer_is_refused(plan_json: dict[str, Any]) -> None:
    value = {**plan_json, "layers": [], "skipped": [{"layer": layer, "reason": "no"} for layer in range(2)]}
    assert "gives bits to nothing" in refusal(value)


def test_a_hybrid_model_is_planned_where_nothing_is_skipped(
    hybrid_plan_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    hybrid_plan_json["geometry"] = hybrid_geometry_json
    assert [entry.layer for entry in read(hybrid_plan_json).layers] == [0, 4]
    assert "layer 1 is missing" in refusal({**hybrid_plan_json, "skipped": None})


def test_a_plan_that_contradicts_its_own_geometry_is_refused(
    hybrid_plan_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    value = {**hybrid_plan_json, "geometry": hybrid_geometry_json}
    bits = copy.deepcopy(value)
    bits["layers"].insert(1, {**bits["layers"][0], "layer": 1})
    del bits["skipped"][0]
    assert "gives bits to layer 1" in refusal(bits)
    fewer = copy.deepcopy(value)
    fewer["skipped"].append({"layer": fewer["layers"].pop()["layer"], "reason": "no"})
    assert "no bits to layer 4" in refusal(fewer)
    assert "6 layers" in refusal(
        {**value, "model": {"num_layers": 6}, "skipped": [*value["skipped"], {"layer": 5, "reason": "no"}]}
    )
    rotated = copy.deepcopy(value)
    rotated["layers"][1]["key"] = {"scheme": "rotated", "bits": 2, "group_size": 64, "axis": "token"}
    assert "layer 4 rotates its key in groups of 64, but the head dimension is 128" in refusal(rotated)


# Numbers and words


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("budget", "requested"), math.nan),
        (("budget", "stored_bits"), math.inf),
        (("budget", "bytes_per_token"), "2520"),
        (("budget", "unit"), "bits"),
        (("solver", "objective"), -math.inf),
        (("solver", "predicted_kl_nats"), math.nan),
        (("solver", "method"), None),
        (("window", "sink_tokens"), -1),
        (("window", "sink_tokens"), True),
        (("window", "recent_tokens"), 128.0),
        (("window", "recent_tokens"), "128"),
        (("window", "recent_tokens"), 10**400),
        (("quantizer", "scale_dtype"), "float32"),
        (("quantizer", "rotation_seed"), True),
        (("quantizer", "rotation_seed"), 2**63),
        (("layers", 0, "key", "bits"), 7),
        (("layers", 0, "key", "bits"), "4"),
        (("layers", 0, "key", "bits"), True),
        (("layers", 0, "key", "bits"), math.nan),
        (("layers", 0, "key", "group_size"), 0),
        (("layers", 0, "key", "group_size"), 10**4000),
        (("layers", 0, "key", "recent_fraction"), -0.1),
        (("layers", 0, "key", "recent_fraction"), 1.1),
        (("layers", 0, "key", "recent_fraction"), math.nan),
        (("layers", 0, "key", "recent_fraction"), "0.5"),
        (("layers", 0, "key", "axis"), None),
        (("layers", 0, "key", "scheme"), "symmetric"),
    ],
)
def test_a_value_of_the_wrong_kind_is_placed(
    plan_json: dict[str, Any], path: tuple[str | int, ...], wrong: Any
) -> None:
    plan_json.update(budget={}, solver={"method": "exact"})
    read(plan_json)
    place: Any = plan_json
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = wrong
    message = refusal(plan_json)
    assert ".".join(str(part) for part in path[:2]).replace(".0", "[0]") in message
    assert str(path[-1]) in message


def test_a_misspelt_key_of_a_tensor_is_refused_with_the_nearest_known_one(plan_json: dict[str, Any]) -> None:
    plan_json["layers"][0]["key"]["groupsize"] = 32
    assert "unknown key layers[0].key.groupsize: did you mean 'group_size'?" in refusal(plan_json)


# Which model a plan fits


def mismatch(plan: BitPlan, geometry: CacheGeometry, fingerprint: str | None = None) -> str:
    with pytest.raises(Mismatch) as caught:
        plan.check_fits(geometry, fingerprint)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_a_plan_without_geometry_and_fingerprint_fits_any_model_of_its_layers(
    plan_json: dict[str, Any], small_geometry_json: dict[str, Any]
) -> None:
    read(plan_json).check_fits(geometry_of(small_geometry_json), "sha256:0")
    read(plan_json).check_fits(geometry_of(small_geometry_json), None)


def test_a_plan_of_another_number_of_layers_does_not_fit(
    plan_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    message = mismatch(read(plan_json), geometry_of(hybrid_geometry_json))
    assert "it has 2 layers, the model 5" in message


def test_a_plan_of_another_fingerprint_does_not_fit(
    plan_json: dict[str, Any], small_geometry_json: dict[str, Any]
) -> None:
    plan_json["model"].update(id="org/name", fingerprint="sha256:aa")
    plan, geometry = read(plan_json), geometry_of(small_geometry_json)
    plan.check_fits(geometry, "sha256:aa")
    plan.check_fits(geometry, None)
    message = mismatch(plan, geometry, "sha256:bb")
    for word in ("sha256:aa", "sha256:bb", "org/name", "kvprof allocate"):
        assert word in message


@pytest.mark.parametrize("changed", [{"kv_heads": 4}, {"key_head_dim": 128}, {"value_head_dim": 80}])
def test_a_plan_of_another_shape_does_not_fit(
    plan_json: dict[str, Any], small_geometry_json: dict[str, Any], changed: dict[str, int]
) -> None:
    other = copy.deepcopy(small_geometry_json)
    other["layers"][1].update(changed)
    plan = read({**plan_json, "geometry": small_geometry_json})
    plan.check_fits(geometry_of(small_geometry_json), None)
    message = mismatch(plan, geometry_of(other))
    assert "layer 1" in message
    assert str(*changed.values()) in message


def test_a_plan_does_not_fit_a_model_with_another_window_in_a_skipped_layer(
    hybrid_plan_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    plan = read({**hybrid_plan_json, "geometry": copy.deepcopy(hybrid_geometry_json)})
    hybrid_geometry_json["layers"][1]["window"] = 1024
    message = mismatch(plan, geometry_of(hybrid_geometry_json))
    assert "layer 1" in message
    assert "window 512" in message
    assert "window 1024" in message


def test_a_plan_fits_whatever_the_words_for_skipping_a_layer_and_whatever_the_dtype_of_the_weights(
    hybrid_plan_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    plan = read({**hybrid_plan_json, "geometry": copy.deepcopy(hybrid_geometry_json)})
    hybrid_geometry_json["layers"][1]["skipped"] = "a window slides here"
    hybrid_geometry_json["dtype"] = "float32"
    plan.check_fits(geometry_of(hybrid_geometry_json), None)


def test_a_handwritten_plan_that_gives_bits_to_a_skipped_layer_does_not_fit(
    hybrid_plan_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    hybrid_plan_json["layers"].insert(1, {**hybrid_plan_json["layers"][0], "layer": 1})
    del hybrid_plan_json["skipped"][0]
    message = mismatch(read(hybrid_plan_json), geometry_of(hybrid_geometry_json))
    assert "layer 1" in message
    assert "sliding window of 512 tokens" in message


@pytest.fixture
def sliding_geometry_json(hybrid_geometry_json: dict[str, Any]) -> dict[str, Any]:
    """Return the hybrid geometry, of which a plan may cover the sliding layer too."""
    hybrid_geometry_json["layers"][1]["skipped"] = None
    return hybrid_geometry_json


def test_a_plan_may_cover_a_sliding_layer_or_leave_it_alone(
    hybrid_plan_json: dict[str, Any], sliding_geometry_json: dict[str, Any]
) -> None:
    geometry = geometry_of(sliding_geometry_json)
    read(hybrid_plan_json).check_fits(geometry, None)
    covering = copy.deepcopy(hybrid_plan_json)
    covering["layers"].insert(1, {**covering["layers"][0], "layer": 1})
    del covering["skipped"][0]
    read(covering).check_fits(geometry, None)
    read({**covering, "geometry": sliding_geometry_json}).check_fits(geometry, None)


def test_a_plan_cannot_leave_a_full_layer_alone(
    hybrid_plan_json: dict[str, Any], sliding_geometry_json: dict[str, Any]
) -> None:
    del hybrid_plan_json["layers"][1]
    hybrid_plan_json["skipped"].append({"layer": 4, "reason": "not planned"})
    assert "no bits to layer 4" in mismatch(read(hybrid_plan_json), geometry_of(sliding_geometry_json))


def test_sliding_layers_are_left_alone_where_their_window_is_all_in_full_precision(
    sliding_geometry_json: dict[str, Any],
) -> None:
    geometry = geometry_of(sliding_geometry_json)

    def left(recent: int, context: int | None = None, sinks: int = 4) -> list[int]:
        return list(layers_left_alone(geometry, "all", Window(sink_tokens=sinks, recent_tokens=recent), context))

    assert left(511) == []
    assert left(512) == [1]
    assert left(508) == left(508, 513) == []  # of a longer text the sinks are out of sight
    assert left(508, 512) == [1]
    assert left(507, 512) == []
    assert left(100, 104) == left(100, 50) == [1]
    assert left(100, 105) == []
    window = Window(sink_tokens=4, recent_tokens=512)
    reasons = layers_left_alone(geometry, "all", window)
    assert reasons == {1: "sliding window of 512 tokens, no more than stay in full precision"}
    assert layers_left_alone(geometry, "full", Window(sink_tokens=0, recent_tokens=0)) == {
        1: "sliding window of 512 tokens"
    }


@settings(max_examples=60, deadline=None)
@example(2, 0, 1, 2)
@given(st.integers(0, 9), st.integers(0, 40), st.integers(1, 50), st.integers(0, 130))
def test_what_is_left_alone_is_that_of_which_nothing_would_be_quantized(
    sinks: int, recent: int, span: int, context: int
) -> None:
    """In the finest format there is: a token by itself, in whole bytes."""
    form = {"bits": 8, "group_size": 8, "axis": "token", "recent_fraction": 0.0, "scheme": "asymmetric"}
    by_hand = TensorByHand(form, {"sink_tokens": sinks, "recent_tokens": recent}, 1, 8, 16, span)
    for _ in range(context):
        by_hand.append()
    coded = {token for unit in by_hand.quantized_units for token in unit} - by_hand.gone()
    shape = {"layer": 0, "kind": "sliding", "kv_heads": 1, "key_head_dim": 8, "value_head_dim": 8, "window": span}
    geometry = CacheGeometry.model_validate({"dtype": "float16", "layers": [shape]})
    left = layers_left_alone(geometry, "all", Window(sink_tokens=sinks, recent_tokens=recent), context)
    assert bool(left) == (not coded)


def test_a_rotated_tensor_fits_heads_of_its_group_size_alone(
    plan_json: dict[str, Any], small_geometry_json: dict[str, Any]
) -> None:
    plan_json["layers"][0]["value"] = {"scheme": "rotated", "bits": 2, "group_size": 64, "axis": "token"}
    plan = read(plan_json)
    plan.check_fits(geometry_of(small_geometry_json), None)
    small_geometry_json["layers"][0]["value_head_dim"] = 80
    assert "head dimension is 80" in mismatch(plan, geometry_of(small_geometry_json))


# Bytes


def test_bytes_of_a_plan_counted_by_hand(plan_json: dict[str, Any]) -> None:
    plan_json["model"]["num_layers"] = 1
    plan_json["window"] = {"sink_tokens": 4, "recent_tokens": 32}
    plan_json["layers"] = [
        {
            "layer": 0,
            "key": {"bits": 2, "group_size": 32, "axis": "channel"},
            "value": {"scheme": "rotated", "bits": 3, "group_size": 64, "axis": "token"},
        }
    ]
    layer = {"layer": 0, "kind": "full", "kv_heads": 2, "key_head_dim": 64, "value_head_dim": 64}
    plan_json["geometry"] = {"dtype": "float16", "layers": [layer]}
    plan = read(plan_json)
    # 102 tokens: 4 sinks, 32 recent, 66 that may be quantized. Keys: 2 groups of 32, so 38 tokens in float16.
    keys = 38 * 128 * 2 + 64 * 128 * 2 // 8 + 2 * 128 * 4
    values = 36 * 128 * 2 + 66 * 128 * 3 // 8 + 66 * 2 * 2
    assert plan.bytes_at(102) == plan.bytes_at(102, batch=1) == keys + values
    assert plan.bytes_at(102, batch=5) == 5 * (keys + values)
    assert plan.bytes_at(36) == 36 * 256 * 2  # nothing has 32 tokens after it, but for the sinks
    assert plan.bytes_at(0) == plan.bytes_at(102, batch=0) == 0


def test_skipped_layers_count_their_own_window_in_the_models_dtype(
    hybrid_plan_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    for entry in hybrid_plan_json["layers"]:
        entry["key"]["bits"] = entry["value"]["bits"] = 16
    plan = read({**hybrid_plan_json, "geometry": hybrid_geometry_json})
    assert plan.bytes_at(1000) == 2 * (1000 * 256 + 512 * 256 + 1000 * 208)


def test_a_long_run_costs_the_stored_bits(plan_json: dict[str, Any], small_geometry_json: dict[str, Any]) -> None:
    plan = read({**plan_json, "geometry": small_geometry_json})
    # 5.0 stored bits for 128 key elements a token, 2.5 for 128 value elements, two layers, 32 * 100 tokens more.
    more = plan.bytes_at(10_000 + 3_200) - plan.bytes_at(10_000)
    assert more == 2 * 3_200 * (128 * 5 + 128 * 2.5) / 8


def test_bytes_without_a_geometry_are_unknown(plan_json: dict[str, Any]) -> None:
    with pytest.raises(KvprofError, match="no geometry"):
        read(plan_json).bytes_at(1000)


@pytest.mark.parametrize(("context", "batch"), [(-1, 1), (1, -1)])
def test_a_cache_of_negative_size_does_not_exist(
    plan_json: dict[str, Any], small_geometry_json: dict[str, Any], context: int, batch: int
) -> None:
    with pytest.raises(KvprofError, match="does not exist"):
        read({**plan_json, "geometry": small_geometry_json}).bytes_at(context, batch)


class TensorByHand:
    """The keys or the values of one layer of one sequence, appended token by token and quantized by the letter.

    Section 3 of the design: groups start after the sinks; a token (axis `token`) or a group of tokens (axis `channel`)
    is quantized exactly when at least `recent_tokens` tokens follow it; with a recent fraction, that part of all
    tokens seen so far must follow it too. Of a span, what the newest query did not see is let go: a sink alone, a unit
    as a whole, and eight units together where the codes of a token and head fill no whole bytes.
    """

    def __init__(
        self,
        form: dict[str, Any],
        window: dict[str, int],
        heads: int,
        head_dim: int,
        full_bits: int,
        span: int | None = None,
    ) -> None:
        self.form, self.window, self.heads, self.head_dim, self.full_bits = form, window, heads, head_dim, full_bits
        self.span = span
        self.full_tokens: set[int] = set()
        self.quantized_units: list[list[int]] = []
        self.seen = 0

    def append(self) -> None:
        self.full_tokens.add(self.seen)
        self.seen += 1
        if self.form["bits"] == 16:
            return
        unit = 1 if self.form["axis"] == "token" else self.form["group_size"]
        while True:
            start = self.window["sink_tokens"] + unit * len(self.quantized_units)
            tokens = list(range(start, start + unit))
            if tokens[-1] >= self.seen:
                return
            following = self.seen - 1 - tokens[-1]
            if following < self.window["recent_tokens"]:
                return
            if following < Decimal(str(self.form["recent_fraction"])) * self.seen:
                return
            self.full_tokens -= set(tokens)
            self.quantized_units.append(tokens)

    def gone(self) -> set[int]:
        """Return the positions that were let go."""
        if self.span is None:
            return set()
        is_full = self.form["bits"] == 16
        sinks = 0 if is_full else self.window["sink_tokens"]
        size = 1 if is_full or self.form["axis"] == "token" else self.form["group_size"]
        if not is_full and self.head_dim * self.form["bits"] % 8:
            size *= 8
        together = [[sink] for sink in range(sinks)]
        together += [list(range(first, first + size)) for first in range(sinks, self.seen, size)]
        unseen = set(range(self.seen - self.span))
        return {token for tokens in together if unseen.issuperset(tokens) for token in tokens}

    def bytes(self) -> int:
        bits, gone = 0, self.gone()
        for tokens in self.quantized_units:
            if tokens[0] in gone:
                continue
            for _ in range(self.heads):
                bits += len(tokens) * self.head_dim * self.form["bits"]
                if self.form["scheme"] == "rotated":
                    bits += 16
                elif self.form["axis"] == "channel":
                    bits += sum(16 + 16 for _ in range(self.head_dim))
                else:
                    bits += sum(16 + 16 for _ in range(0, self.head_dim, self.form["group_size"]))
        full = len(self.full_tokens - gone)
        return math.ceil(bits / 8) + full * self.heads * self.head_dim * self.full_bits // 8


HEAD_DIMS = st.sampled_from([1, 5, 16, 64, 80])
FRACTIONS = st.one_of(st.just(0.0), st.sampled_from([0.1, 0.2, 0.3, 0.7, 1.0, 1]), st.floats(0, 1))


@st.composite
def forms(draw: st.DrawFn, head_dim: int) -> dict[str, Any]:
    fraction = draw(FRACTIONS)
    if head_dim & (head_dim - 1) == 0 and draw(st.booleans()):
        bits = draw(st.sampled_from(CODE_BITS))
        form = {"scheme": "rotated", "bits": bits, "group_size": head_dim, "axis": "token"}
        return {**form, "recent_fraction": fraction}
    return {
        "scheme": "asymmetric",
        "bits": draw(st.sampled_from([*CODE_BITS, 16])),
        "group_size": draw(st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 128]))),
        "axis": draw(st.sampled_from(["channel", "token"])),
        "clip": draw(st.sampled_from(["none", "mse"])),
        "recent_fraction": fraction,
    }


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a plan with its geometry: one to three layers, some of them sliding, and of these some skipped."""
    kinds = ["full", *draw(st.lists(st.sampled_from(["full", "sliding", "chunked", "none"]), max_size=2))]
    layers, geometry_layers, skipped = [], [], []
    for index, kind in enumerate(kinds):
        shape = {
            "kv_heads": draw(st.integers(1, 3)),
            "key_head_dim": draw(HEAD_DIMS),
            "value_head_dim": draw(HEAD_DIMS),
        }
        slides = kind in ("sliding", "chunked")
        geometry_layers.append({"layer": index, "kind": kind, **shape})
        geometry_layers[-1]["window"] = draw(st.integers(1, 50)) if slides else None
        if kind == "full" or (slides and draw(st.booleans())):
            key, value = draw(forms(shape["key_head_dim"])), draw(forms(shape["value_head_dim"]))
            layers.append({"layer": index, "key": key, "value": value})
        else:
            geometry_layers[-1]["skipped"] = kind
            skipped.append({"layer": index, "reason": kind})
    return {
        "schema": "kvprof.plan/1",
        "model": {"num_layers": len(kinds)},
        "quantizer": {},
        "window": {"sink_tokens": draw(st.integers(0, 9)), "recent_tokens": draw(st.integers(0, 60))},
        "geometry": {"dtype": draw(st.sampled_from(["float32", "bfloat16"])), "layers": geometry_layers},
        "layers": layers,
        "skipped": skipped,
    }


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 4))
def test_bytes_at_every_context_are_those_of_a_cache_filled_token_by_token(value: dict[str, Any], batch: int) -> None:
    plan = read(value)
    full_bits = 32 if value["geometry"]["dtype"] == "float32" else 16
    tensors = [
        TensorByHand(
            entry[tensor],
            value["window"],
            layer["kv_heads"],
            layer[f"{tensor}_head_dim"],
            full_bits,
            layer["window"],
        )
        for entry in value["layers"]
        for layer in [value["geometry"]["layers"][entry["layer"]]]
        for tensor in ("key", "value")
    ]
    planned = [entry["layer"] for entry in value["layers"]]
    sliding = [layer for layer in value["geometry"]["layers"] if layer["window"] and layer["layer"] not in planned]
    for context in range(130):
        by_hand = sum(tensor.bytes() for tensor in tensors)
        for layer in sliding:
            last = range(context)[-layer["window"] :]
            by_hand += (
                len(last) * layer["kv_heads"] * (layer["key_head_dim"] + layer["value_head_dim"]) * full_bits // 8
            )
        assert plan.bytes_at(context, batch) == batch * by_hand, context
        for tensor in tensors:
            tensor.append()


@settings(max_examples=100, deadline=None)
@given(st.data(), HEAD_DIMS, st.integers(0, 9), st.integers(1, 60))
def test_the_oldest_token_held_is_the_first_that_was_not_let_go(
    data: st.DataObject, head_dim: int, sinks: int, span: int
) -> None:
    form = data.draw(forms(head_dim))
    window = {"sink_tokens": sinks, "recent_tokens": data.draw(st.integers(0, 60))}
    by_hand = TensorByHand(form, window, 1, head_dim, 16, span)
    read_form, read_window = TensorPlan.model_validate(form), Window.model_validate(window)
    for context in range(400):
        held = set(range(context)) - by_hand.gone()
        assert held == set(range(min(held, default=0), context))  # without a gap
        assert oldest_held(read_form, read_window, span, context, head_dim) == min(held, default=0), context
        assert oldest_held(read_form, read_window, None, context, head_dim) == 0
        assert held.issuperset(range(max(0, context - span), context))  # all that the newest query saw
        by_hand.seen += 1


def test_a_recent_fraction_of_one_quantizes_nothing(
    plan_json: dict[str, Any], small_geometry_json: dict[str, Any]
) -> None:
    for entry in plan_json["layers"]:
        entry["key"]["recent_fraction"] = entry["value"]["recent_fraction"] = 1
    plan = read({**plan_json, "geometry": small_geometry_json})
    assert plan.bytes_at(5_000) == geometry_of(small_geometry_json).bytes_at(5_000)


def test_bytes_of_a_context_of_millions_are_counted_without_walking_it(
    plan_json: dict[str, Any], small_geometry_json: dict[str, Any]
) -> None:
    plan = read({**plan_json, "geometry": small_geometry_json})
    assert plan.bytes_at(10**15) > plan.bytes_at(10**15 - 1) > 10**15
