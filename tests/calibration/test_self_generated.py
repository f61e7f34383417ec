"""What the model writes itself: the same text for the same seed, written once, whatever is asked for in between."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvprof.calibration import self_generated as self_text
from kvprof.calibration.mixture import TextRequest, mix_texts
from kvprof.calibration.sampling import sample_documents
from kvprof.calibration.self_generated import batches_of, end_tokens, fill, first_token, streamable, write_text
from kvprof.errors import CalibrationError
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.storage.folders import cache_folder

LENGTH = 12
ROWS = 4
"""Sequences of each of the first two batches; the third has twice as many, all others four times."""
TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; the folder that the texts are kept in."""
    return elsewhere(monkeypatch, tmp_path / "cache")


@pytest.fixture
def model() -> PreTrainedModel:
    """A model whose documents never end, so that a batch takes a forward for each token."""
    return endless()


def endless(name: str = "llama") -> PreTrainedModel:
    model = tiny_model(name)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def written(model: PreTrainedModel, sequences: int = 3, **how: Any) -> list[tuple[int, ...]]:
    fields = {"tokenizer": TOKENIZER, "fingerprint": "sha256:a", "split": "calibration", "length": LENGTH} | how
    return write_text(model, sequences=sequences, **fields)


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Go on with another cache folder, but for the demo model; return where texts are kept in it."""
    monkeypatch.setattr(self_text, "cache_folder", lambda: folder)
    return folder / "self"


class Forwards:
    """Counts a model's forwards."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.number = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.number += 1


def test_a_text_is_as_long_as_asked_and_begins_where_texts_begin(model: PreTrainedModel) -> None:
    for sequences, length in ((1, 2), (3, 12), (9, 30)):
        found = written(model, sequences, length=length)
        assert [len(ids) for ids in found] == [length] * sequences
        assert {ids[0] for ids in found} == {1}
        assert all(0 <= token < 96 for ids in found for token in ids)
    assert len(set(found)) == 9


def test_a_text_is_written_once_and_found_again(model: PreTrainedModel, cache: Path) -> None:
    forwards = Forwards(model)
    first = written(model, 5)
    assert forwards.number == 2 * (LENGTH - 1)  # two batches
    assert written(model, 5) == first
    assert written(model, 2 * ROWS) == [*first, *written(model, 2 * ROWS)[5:]]
    assert forwards.number == 2 * (LENGTH - 1)
    assert len(list(cache.iterdir())) == 1


def test_the_same_text_is_written_without_the_kept_one(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(model, 5)
    elsewhere(monkeypatch, tmp_path / "elsewhere")
    torch.manual_seed(77)
    assert written(endless(), 5) == first


def test_more_of_a_text_changes_nothing_before(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    forwards = Forwards(model)
    steps = [written(model, number) for number in (1, ROWS, ROWS + 1, 2 * ROWS + 3, 40)]
    assert forwards.number == 5 * (LENGTH - 1)  # of 4, 4, 8, 16 and 16
    assert len(list(cache.iterdir())) == 1
    elsewhere(monkeypatch, tmp_path / "elsewhere")
    whole = written(model, 40)
    assert steps == [whole[: len(step)] for step in steps]


def test_a_batch_of_another_size_writes_the_same(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(model, 6)
    monkeypatch.setattr(self_text, "ROWS", (2,))
    forwards = Forwards(model)
    assert written(model, 6) == first
    assert forwards.number == 3 * (LENGTH - 1)


def test_of_long_sequences_fewer_are_written_side_by_side(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(model, 4)
    monkeypatch.setattr(self_text, "TOKENS_AT_ONCE", 2 * LENGTH + 1)
    forwards = Forwards(model)
    assert written(model, 4) == first
    assert forwards.number == 2 * (LENGTH - 1)
    monkeypatch.setattr(self_text, "TOKENS_AT_ONCE", 1)
    assert written(model, 1) == first[:1]


def reseeded(model: PreTrainedModel) -> dict[str, Any]:
    return {"seed": 1}


def held_out(model: PreTrainedModel) -> dict[str, Any]:
    return {"split": "held-out"}


def finetuned(model: PreTrainedModel) -> dict[str, Any]:
    model.model.layers[1].mlp.up_proj.weight.mul_(1.5)  # K and V are as they were
    return {}


def stretched(model: PreTrainedModel) -> dict[str, Any]:
    model.config.rope_parameters["rope_theta"] = 5.0
    model.model.rotary_emb.inv_freq *= 0.5
    return {}


def begun_elsewhere(model: PreTrainedModel) -> dict[str, Any]:
    return {"tokenizer": SimpleNamespace(bos_token_id=9)}


@pytest.mark.parametrize("change", [reseeded, held_out, finetuned, stretched, begun_elsewhere])
def test_whatever_decides_the_text_gives_another(
    model: PreTrainedModel, change: Callable[[PreTrainedModel], dict[str, Any]], cache: Path
) -> None:
    first = written(model, 6, length=40)
    second = written(model, 6, length=40, **change(model))
    assert not {ids[1:] for ids in first} & {ids[1:] for ids in second}
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "how", [{"fingerprint": "sha256:b"}, {"length": 11}, {"dtype": torch.float64}], ids=lambda how: next(iter(how))
)
def test_another_model_length_or_dtype_has_a_text_of_its_own(
    model: PreTrainedModel, how: dict[str, Any], cache: Path
) -> None:
    written(model)
    if dtype := how.pop("dtype", None):
        model.to(dtype)
    forwards = Forwards(model)
    written(model, **how)
    assert forwards.number
    assert len(list(cache.iterdir())) == 2


def test_where_a_model_lies_makes_no_other_of_it(model: PreTrainedModel) -> None:
    first = written(model)
    forwards = Forwards(model)
    model.config._name_or_path = "/somewhere/else"
    model.config.transformers_version = "9.9"
    model.config._attn_implementation = "eager"
    assert written(model) == first
    assert forwards.number == 0


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def altered(path: Path) -> None:
    value = json.loads(path.read_text())
    value["sequences"][1][3] += 1
    path.write_text(json.dumps(value))


def shortened(path: Path) -> None:
    value = json.loads(path.read_text())
    value["sequences"].pop()
    path.write_text(json.dumps(value))


def anothers(path: Path) -> None:
    written(endless(), 5, seed=5)
    (other,) = (file for file in path.parent.iterdir() if file != path)
    other.replace(path)


def replaced(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        altered,
        shortened,
        anothers,
        *map(replaced, (b"", b"\0" * 99, b"\xff\xfe", b"[1, 2]", b"{}", b"null", b"[" * 100_000)),
    ],
)
def test_a_damaged_file_is_written_anew(
    model: PreTrainedModel, cache: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    first = written(model, 5)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    damage(path)
    forwards = Forwards(model)
    with caplog.at_level(logging.INFO, "kvprof"):
        assert written(model, 5) == first
    assert "damaged" in caplog.text
    assert forwards.number == 2 * (LENGTH - 1)
    assert path.read_bytes() == whole
    assert written(model, 5) == first
    assert forwards.number == 2 * (LENGTH - 1)


def test_a_run_that_is_stopped_keeps_its_finished_batches(model: PreTrainedModel, cache: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 1.5 * ROWS * LENGTH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(model, 3 * ROWS, progress=stop)
    assert len(list(cache.iterdir())) == 1  # and nothing half written
    forwards = Forwards(model)
    whole = written(model, 3 * ROWS)
    assert forwards.number == 2 * (LENGTH - 1)
    assert len(set(whole)) == 3 * ROWS
    assert written(model, ROWS) == whole[:ROWS]


def test_a_cache_folder_that_cannot_be_written_costs_only_time(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = written(model, ROWS + 2)
    (tmp_path / "file").touch()
    elsewhere(monkeypatch, tmp_path / "file")
    with caplog.at_level(logging.INFO, "kvprof"):
        assert written(model, ROWS + 2) == first
    assert "cannot write" in caplog.text
    assert "KVPROF_CACHE" in caplog.text
    assert "--out" not in caplog.text
    assert "damaged" not in caplog.text


def test_the_texts_are_kept_where_kvprof_keeps_what_it_makes_once(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "cache_folder", cache_folder)
    monkeypatch.setenv("KVPROF_CACHE", str(tmp_path / "by the environment"))
    written(model)
    assert len(list((tmp_path / "by the environment" / "self").iterdir())) == 1


def test_the_splits_are_apart_and_all_is_three_of_one_to_one_of_the_other(model: PreTrainedModel) -> None:
    calibration = written(model, 9)
    held_out = written(model, 3, split="held-out")
    assert not set(calibration) & set(held_out)
    forwards = Forwards(model)
    assert written(model, 9, split="all") == [
        *calibration[:3],
        held_out[0],
        *calibration[3:6],
        held_out[1],
        calibration[6],
    ]
    assert forwards.number == 0
    assert written(model, 2, split="all", seed=3) == written(model, 2, seed=3)


def test_progress_counts_the_tokens_that_are_written(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    written(model, ROWS + 1, progress=lambda done, total: seen.append((done, total)))
    total = 2 * ROWS * LENGTH
    assert seen == [(done, total) for done in range(0, total + 1, ROWS)]
    seen.clear()
    written(model, 2 * ROWS, progress=lambda done, total: seen.append((done, total)))
    assert seen == []


def owner(**tokens: object) -> SimpleNamespace:
    return SimpleNamespace(**{f"{name}_token_id": token for name, token in tokens.items()})


@pytest.mark.parametrize(
    ("tokenizer", "config", "expected"),
    [
        (owner(bos=3, eos=4), owner(bos=5, eos=6), 3),
        (owner(bos=None, eos=4), owner(bos=5, eos=6), 5),
        (owner(bos=None, eos=4), owner(bos=None, eos=6), 4),
        (owner(), owner(bos=None, eos=6), 6),
        (owner(), owner(bos=None, eos=[7, 8]), 7),
        (owner(bos=0), owner(), 0),
        (owner(bos=500), owner(bos=96, eos=95), 95),  # the vocabulary has 96
        (owner(), owner(bos=None, eos=None), None),
        (owner(), owner(bos=None, eos=[]), None),
    ],
)
def test_a_text_begins_with_the_first_mark_that_the_model_knows(
    tokenizer: object, config: SimpleNamespace, expected: int | None
) -> None:
    text = SimpleNamespace(vocab_size=96, **vars(config))
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text))
    assert first_token(tokenizer, model) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation", "expected"),
    [
        (owner(eos=4), owner(eos=[5, 6]), owner(eos=[7]), {4, 5, 6, 7}),
        (owner(), owner(eos=None), owner(eos=3), {3}),
        (owner(eos=None), owner(eos=96), None, set()),  # the vocabulary has 96
    ],
)
def test_a_text_ends_at_every_token_that_somebody_says_ends_it(
    tokenizer: object, config: SimpleNamespace, generation: object, expected: set[int]
) -> None:
    text = SimpleNamespace(vocab_size=96, get_text_config=lambda decoder: text, **vars(config))
    model = SimpleNamespace(config=text, generation_config=generation)
    assert end_tokens(tokenizer, model) == expected  # type: ignore[arg-type]


def documents_of(ids: tuple[int, ...], opening: list[int], end: int) -> list[list[int]]:
    """Cut a sequence where a document ends; each must begin with the opening, but for what the cut at the end took."""
    documents: list[list[int]] = []
    rest = list(ids)
    while rest:
        stop = next((n for n, token in enumerate(rest) if n >= len(opening) and token == end), len(rest) - 1)
        documents.append(rest[: stop + 1])
        rest = rest[stop + 1 :]
        assert documents[-1][: len(opening)] == opening[: len(documents[-1])]
    return documents


def test_after_the_end_of_a_text_a_document_begins_that_has_not_read_the_one_before(model: PreTrainedModel) -> None:
    end = written(model, 1, length=40)[0][9]  # a token that it writes
    ending = SimpleNamespace(bos_token_id=1, eos_token_id=end)
    found = written(model, 3, length=40, tokenizer=ending, opening=(1, 7))
    assert [len(ids) for ids in found] == [40] * 3
    several = 0
    for number, ids in enumerate(found):
        documents = documents_of(ids, [1, 7], end)
        several += len(documents) > 1
        for place, document in enumerate(documents):
            draws = Random(f"0/calibration/{number}/{place}")
            with torch.no_grad():  # of the document alone
                logits = model(input_ids=torch.tensor([document]), use_cache=False).logits[0].double()
            sums = logits.softmax(-1).cumsum(-1)
            for read, token in enumerate(document[2:], start=1):
                assert token == int((sums[read] > draws.random()).nonzero()[0])
    assert several


def test_the_token_that_ends_a_text_and_begins_the_next_stands_there_once(model: PreTrainedModel) -> None:
    end = written(model, 1, length=40)[0][9]
    both = SimpleNamespace(bos_token_id=end, eos_token_id=end)
    for number, ids in enumerate(written(model, 2, length=40, tokenizer=both)):
        expected, place = [end], 0
        while len(expected) < 40:
            draw = Random(f"0/calibration/{number}/{place}").random
            (document,) = sample_documents(model, [[end]], [41 - len(expected)], [draw], [end])
            expected += document[1:]
            place += 1
        assert place > 1
        assert list(ids) == expected


class Says(nn.Module):
    """A model that says the same token of everything."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 1)
        self.logits = torch.full((50,), -60.0).index_fill(0, torch.tensor(token), 0.0)
        self.dtype = torch.float32
        config = SimpleNamespace(vocab_size=50, to_json_string=lambda use_diff: "{}")
        config.get_text_config = lambda decoder: config
        self.config = config

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=object())


class Letters:
    bos_token_id, eos_token_id = 1, 2

    def __call__(self, row: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 40 for letter in row]}


@pytest.mark.parametrize("token", [2, 9], ids=["empty documents", "one token for ever"])
def test_text_that_holds_nothing_is_refused_where_it_was_asked_for(token: int) -> None:
    mix = mix_texts(TextRequest(["self"], 4, 32), Letters())
    with pytest.raises(CalibrationError, match=r"of 128 tokens, .*\n.*Leave `self` out of --data"):
        fill(mix, Says(token), Letters(), "sha256:a")  # type: ignore[arg-type]
    weighted = mix_texts(TextRequest(["builtin", "self:2"], 9, 32), Letters())
    with pytest.raises(CalibrationError, match="Leave `self` out of --data"):
        fill(weighted, Says(token), Letters(), "sha256:a")  # type: ignore[arg-type]


def test_text_that_holds_nothing_is_left_out_of_the_usual_texts_with_a_note() -> None:
    usual = mix_texts(TextRequest(["builtin", "self"], 8, 32, seed=3), Letters())
    text = fill(usual, Says(9), Letters(), "sha256:a")  # type: ignore[arg-type]
    alone = mix_texts(TextRequest(["builtin"], 8, 32, seed=3), Letters()).complete()
    assert text.sequences == alone.sequences
    assert text.info == alone.info
    (remark,) = text.notes
    assert remark.startswith("self is left out: ")
    assert "of 128 tokens, 97% are one and the same" in remark


def test_what_a_random_model_writes_is_text_like_any_other(model: PreTrainedModel) -> None:
    mix = mix_texts(TextRequest(["self"], 4, 64), Letters())
    assert fill(mix, model, Letters(), "sha256:a").notes == ()


def test_of_a_model_whose_weights_are_read_for_each_token_batches_are_counted_as_they_are_written() -> None:
    usual = ("builtin", "self")
    for sequences, batches in ((4, 1), (5, 2), (9, 3), (17, 4), (33, 5)):
        most = int(self_text.STREAMED_BYTES) // (batches * 64)
        assert streamable(usual, sequences, 64, most) == usual
        assert streamable(usual, sequences, 64, most + 1) == ("builtin",)


def test_where_no_mark_begins_a_text_each_begins_with_a_token_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = endless("gpt2")
    model.config.bos_token_id = None
    first = written(model, 24, tokenizer=owner())
    assert len({ids[0] for ids in first}) > 12
    elsewhere(monkeypatch, tmp_path / "elsewhere")
    assert written(model, 24, tokenizer=owner()) == first


def test_a_mix_is_filled_with_what_the_model_writes(model: PreTrainedModel) -> None:
    class Letters:
        bos_token_id, eos_token_id = 1, None

        def __call__(self, row: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 96 for letter in row]}

    def of(sequences: int) -> list[tuple[int, ...]]:
        mix = mix_texts(TextRequest(["builtin", "self:2"], sequences, 16, seed=3), Letters())
        text = fill(mix, model, Letters(), "sha256:a")
        assert text.info.dataset == "builtin+self"
        return list(text.sequences)

    own = write_text(model, Letters(), "sha256:a", "calibration", 6, 16, 3)
    found = of(9)
    assert [ids for ids in found if ids in own] == own
    assert found[1::3] != own[1::3]
    assert of(5) == found[:5]
    forwards = Forwards(model)
    plain = mix_texts(TextRequest(["builtin"], 2, 16), Letters())
    assert fill(plain, model, Letters(), "sha256:a") == plain.complete()
    assert forwards.number == 0


def test_predictions_that_are_not_finite_leave_nothing_behind(model: PreTrainedModel, cache: Path) -> None:
    model.lm_head.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="in float32 its predictions are not finite"):
        written(model)
    assert not cache.exists()


@pytest.mark.demo
def test_the_demo_models_own_text_surprises_it_by_as_much_as_it_expects() -> None:
    source = resolve("demo")
    model, tokenizer = load_model(source), load_tokenizer(source)
    found = write_text(model, tokenizer, "sha256:demo", "calibration", 8, 24)
    ids = torch.tensor(found)
    assert {row[0] for row in found} == {tokenizer.bos_token_id}
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    surprise = -logits.gather(-1, ids[:, 1:, None])[..., 0]  # (8, 23), nats
    entropy = -(logits.exp() * logits).sum(-1)
    # Drawn from its own distribution, a token surprises on average by the entropy.
    spread = (surprise - entropy).std() / surprise.numel() ** 0.5
    assert abs((surprise - entropy).mean()) < 4 * spread


@pytest.mark.parametrize(("split", "sequences"), [("calibration", 1), ("calibration", 9), ("all", 3), ("all", 21)])
def test_the_batches_that_are_reckoned_are_those_that_are_written(
    split: str, sequences: int, model: PreTrainedModel
) -> None:
    mix = mix_texts(TextRequest(["self"], sequences, LENGTH, split=split, seed=0), Letters())
    told: list[tuple[int, int]] = []
    written(model, sequences, split=split, progress=lambda done, total: told.append((done, total)))
    assert sum(batches_of(mix)) * LENGTH == told[0][1]
