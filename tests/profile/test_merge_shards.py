"""Shards make together, to the last bit, what one run makes; and nothing else is taken for one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprof.errors import InvalidFile, KvprofError, Mismatch, UsageError
from kvprof.profile.shards import Share, as_shard, merge_shards, read_share, seal
from kvprof.records.document import ModelInfo
from kvprof.records.effects import encode
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import Window
from kvprof.records.sampled import TensorSamples, gradient_scores
from kvprof.records.scores import CalibrationInfo, DecodingSetup, Scores

GEOMETRY = CacheGeometry(
    dtype="float32",
    layers=tuple(KVLayer(layer=n, kind="full", kv_heads=2, key_head_dim=8, value_head_dim=8) for n in range(2)),
)
MODEL = ModelInfo(id="m", fingerprint="sha256:1", architecture="A", num_layers=2)
SETTINGS = {"model": "m", "dtype": "torch.float32", "formats": ["keys in int2g8"], "window": {"sink_tokens": 1}}


def text(sequences: int) -> CalibrationInfo:
    return CalibrationInfo(dataset="t", sequences=sequences, sequence_length=4, tokens=4 * sequences, seed=0)


def effects(layer: int, tensor: str, index: int) -> str:
    """Two blocks of two positions, and a last one of one where the sequence is longer."""
    number = 1 / (7 + index * index + layer + 3 * (tensor == "key"))
    return encode(number, [number * (1 + index % 3), -number / 2, *[number / 5] * (counted(index) - 4)])


def counted(index: int) -> int:
    return 4 + index % 2


def samples(indices: Sequence[int]) -> dict[Any, TensorSamples]:
    """A number of each tensor and sequence that no other has."""
    return {
        (layer, tensor): TensorSamples(
            [1 / (3 + index + layer) for index in indices],
            {"int2g8": [effects(layer, tensor, index) for index in indices]},
        )
        for layer in range(2)
        for tensor in ("key", "value")
    }


def scores(indices: Sequence[int]) -> Scores:
    decoding = DecodingSetup(
        window=Window(sink_tokens=1, recent_tokens=2), suffix_fraction=0.5, tokens=2 * len(indices)
    )
    positions = [counted(index) for index in indices]
    return gradient_scores(samples(indices), text(len(indices)), MODEL, GEOMETRY, decoding, 2, positions)


def shard(share: Share, sequences: int, **changed: object) -> Scores:
    indices = share.indices(sequences)
    return as_shard(scores(indices), samples(indices), share, indices, text(sequences), SETTINGS | changed)


def written(folder: Path, number: int, of: int, sequences: int, **changed: object) -> Path:
    return shard(Share(number, of), sequences, **changed).save(folder / f"gradients-{number}-of-{of}.json")


@given(st.integers(1, 12).flatmap(lambda of: st.tuples(st.just(of), st.integers(of, 30), st.randoms())))
def test_any_partition_in_any_order_makes_the_scores_of_one_run(case: tuple[int, int, Any]) -> None:
    of, sequences, chance = case
    shards = [(Path(f"{number}.json"), shard(Share(number, of), sequences)) for number in range(1, of + 1)]
    chance.shuffle(shards)
    assert merge_shards(dict(shards)).to_text() == scores(range(sequences)).to_text()


def test_shards_of_different_counts_fit_where_no_sequence_is_twice() -> None:
    parts = {Path(str(share)): shard(share, 9) for share in (Share(1, 2), Share(2, 4), Share(4, 4))}
    assert merge_shards(parts) == scores(range(9))


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("model", "n"),
        ("dtype", "torch.bfloat16"),
        ("formats", ["keys in int3g8"]),
        ("window", {"sink_tokens": 2}),
        ("extra", 1),
    ],
)
def test_a_shard_of_another_setting_is_refused_by_the_field_that_differs(field: str, other: object) -> None:
    parts = {Path("a.json"): shard(Share(1, 2), 6), Path("b.json"): shard(Share(2, 2), 6, **{field: other})}
    with pytest.raises(Mismatch, match=rf"b\.json does not belong to a\.json: they differ in {field}"):
        merge_shards(parts)


def test_a_shard_of_another_text_is_refused() -> None:
    parts = {Path("a"): shard(Share(1, 2), 6), Path("b"): shard(Share(2, 2), 7)}
    with pytest.raises(Mismatch, match="differ in the text's sequences, 7 and 6"):
        merge_shards(parts)


def test_a_missing_shard_is_named_with_the_option_that_makes_it() -> None:
    with pytest.raises(InvalidFile, match=r"sequence 1 of 6 is in none.*\n.*--shard 2/3"):
        merge_shards({Path(str(n)): shard(Share(n, 3), 6) for n in (1, 3)})


def test_a_sequence_that_two_files_have_is_refused() -> None:
    with pytest.raises(InvalidFile, match="a and b both measured sequence 0"):
        merge_shards({Path("a"): shard(Share(1, 2), 6), Path("b"): shard(Share(1, 2), 6)})


def test_whole_scores_are_no_shard() -> None:
    with pytest.raises(InvalidFile, match="is no shard"):
        merge_shards({Path("a"): scores(range(6))})


def leaves(value: object, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(part, (*place, key))]
    if isinstance(value, list):
        return [leaf for key, part in enumerate(value) for leaf in leaves(part, (*place, key))]
    return [place]


def test_no_number_or_word_of_a_shard_can_be_changed_unnoticed(tmp_path: Path) -> None:
    file = written(tmp_path, 1, 1, 3)
    whole = json.loads(file.read_text())
    places = leaves(whole)
    assert len(places) > 60
    for place in places:
        changed = json.loads(file.read_text())
        at = changed
        for key in place[:-1]:
            at = at[key]
        old = at[place[-1]]
        at[place[-1]] = old + 1 if isinstance(old, int | float) else f"{old}x" if isinstance(old, str) else "x"
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        with pytest.raises(KvprofError):
            merge_shards({tmp_path / "changed.json": Scores.load(tmp_path / "changed.json")})


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_one_message(kept: float, tmp_path: Path) -> None:
    file = written(tmp_path, 1, 1, 3)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(kept * len(raw))])
    with pytest.raises(InvalidFile):
        Scores.load(file)


@pytest.mark.parametrize("wrong", ["2", "0/8", "9/8", "a/b", "2/8/9", "-1/8", "2.0/8", "", "1/0", "1/9999999"])
def test_a_share_that_cannot_be_is_a_usage_error(wrong: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        read_share(wrong)


def test_a_share_has_every_so_manieth_sequence() -> None:
    assert read_share(" 2/3 ").indices(8) == (1, 4, 7)
    assert sorted(index for number in range(1, 4) for index in Share(number, 3).indices(8)) == list(range(8))
    with pytest.raises(UsageError, match="none is left for this shard"):
        Share(9, 9).indices(8)


def test_merging_imports_no_torch(tmp_path: Path) -> None:
    files = [str(written(tmp_path, number, 2, 5)) for number in (1, 2)]
    code = f"""
import sys
sys.argv = ["kvprof", "merge", *{files!r}, "--out", {str(tmp_path / "merged")!r}]
from kvprof.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Scores.load(tmp_path / "merged" / "gradients.json") == scores(range(5))


def resealed(scores: Scores, **changes: object) -> Scores:
    changed = scores.model_copy(update=changes)
    return changed.model_copy(update={"shard": changed.shard.model_copy(update={"checksum": seal(changed)})})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("decoding", {"decoding": None}),
        ("the model itself", {"model": MODEL.model_copy(update={"fingerprint": "sha256:2"})}),
        ("geometry", {"geometry": GEOMETRY.model_copy(update={"dtype": "float16"})}),
    ],
)
def test_a_shard_whose_other_fields_differ_is_refused_even_when_sealed(field: str, changes: dict[str, Any]) -> None:
    parts = {Path("a"): shard(Share(1, 2), 6), Path("b"): resealed(shard(Share(2, 2), 6), **changes)}
    with pytest.raises(Mismatch, match=f"differ in {field}"):
        merge_shards(parts)


def test_a_shard_without_one_of_the_formats_is_refused() -> None:
    one, other = shard(Share(1, 2), 6), shard(Share(2, 2), 6)
    bare = dict.fromkeys(("loss_increase", "loss_increase_stderr", "loss_increase_samples", "loss_effects"))
    entry = other.layers[0].model_copy(update={"key": other.layers[0].key.model_copy(update=bare)})
    with pytest.raises(Mismatch, match="differ in formats of the layers"):
        merge_shards({Path("a"): one, Path("b"): resealed(other, layers=(entry, *other.layers[1:]))})


def test_a_text_said_to_be_endless_is_not_counted_through() -> None:
    part = shard(Share(1, 2), 6)
    endless = part.shard.model_copy(update={"text": part.shard.text.model_copy(update={"sequences": 10**12})})
    with pytest.raises(InvalidFile, match="sequence 1 of 1000000000000 is in none"):
        merge_shards({Path("a"): resealed(part, shard=endless)})


def without_effects(scores: Scores) -> Scores:
    """Return scores as an older kvprof wrote them: losses of each sequence, and no effects."""
    value = scores.model_dump(mode="json", by_alias=True, exclude={"effects"})
    for entry in value["layers"]:
        for tensor in ("key", "value"):
            entry[tensor].pop("loss_effects", None)
    return Scores.from_json(value, "old")


def test_a_shard_of_an_older_kvprof_is_refused_with_what_it_lacks() -> None:
    old = resealed(without_effects(shard(Share(1, 2), 6)))
    for parts in ({Path("a"): old}, {Path("b"): shard(Share(2, 2), 6), Path("a"): old}):
        with pytest.raises(InvalidFile, match=r"a was written by an older kvprof: .* no effects\.\n  Measure it again"):
            merge_shards(parts)


def test_shards_of_another_block_do_not_fit() -> None:
    other = shard(Share(2, 2), 6)
    # Three positions a block, of as many blocks: nothing but the field tells.
    effects = other.effects.model_copy(update={"block_tokens": 3, "tokens": (6,) * 3})
    parts = {Path("a"): shard(Share(1, 2), 6), Path("b"): resealed(other, effects=effects)}
    with pytest.raises(Mismatch, match="differ in block tokens, 3 and 2"):
        merge_shards(parts)


def test_shards_of_norms_alone_have_no_effects_and_make_none() -> None:
    def bare(share: Share) -> Scores:
        indices = share.indices(5)
        norms = {key: TensorSamples(found.gradient_norms) for key, found in samples(indices).items()}
        whole = gradient_scores(norms, text(len(indices)), MODEL, GEOMETRY, None)
        return as_shard(whole, norms, share, indices, text(5), SETTINGS)

    merged = merge_shards({Path(str(number)): bare(Share(number, 2)) for number in (1, 2)})
    assert merged.effects is None
    assert merged.metrics == ("gradient_norm",)


def test_a_merged_file_keeps_effects_and_positions_in_the_order_of_the_text() -> None:
    merged = merge_shards({Path(str(number)): shard(Share(number, 3), 7) for number in (3, 1, 2)})
    assert merged.effects.tokens == tuple(counted(index) for index in range(7))
    for layer, entry in enumerate(merged.layers):
        for tensor in ("key", "value"):
            expected = tuple(effects(layer, tensor, index) for index in range(7))
            assert entry.tensor(tensor).loss_effects == {"int2g8": expected}
