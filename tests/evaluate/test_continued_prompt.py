"""One prompt continued twice: the full cache as transformers alone would, the planned one by its plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import edit_json, save_folder
from tiny import tiny_model

from kvprof.errors import Mismatch, UsageError
from kvprof.evaluate.generation import compare_continuations
from kvprof.models.load import resolve
from kvprof.records.document import ModelInfo
from kvprof.records.plan import BitPlan, LayerPlan, Quantizer, SkippedLayer, TensorPlan, Window
from kvprof.records.replies import Continuations
from kvprof.records.requests.check import GenerateRequest

PROMPT = "the cat sat on a mat and saw another cat that sat on no mat"


def plan_of(bits: int, recent_tokens: int = 2) -> BitPlan:
    key = TensorPlan(bits=bits, group_size=4, axis="channel")
    value = TensorPlan(bits=bits, group_size=8, axis="token")
    return BitPlan(
        model=ModelInfo(num_layers=2),
        quantizer=Quantizer(),
        window=Window(sink_tokens=1, recent_tokens=recent_tokens),
        layers=tuple(LayerPlan(layer=layer, key=key, value=value) for layer in range(2)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model")


def continued(folder: Path, plan: BitPlan, prompt: str = PROMPT, **settings: object) -> Continuations:
    given = {"max_new_tokens": 12} | settings
    return compare_continuations(resolve(str(folder)), plan, prompt, GenerateRequest.of(given))  # type: ignore[arg-type]


def test_the_full_continuation_is_what_the_model_writes_alone(folder: Path) -> None:
    found = continued(folder, plan_of(2))
    model = tiny_model("llama")
    from kvprof.models.load import load_tokenizer

    inputs = load_tokenizer(resolve(str(folder)))(PROMPT, return_tensors="pt")
    with torch.no_grad():
        alone = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12, do_sample=False
        )
    assert list(found.full.tokens) == alone[0, inputs["input_ids"].shape[1] :].tolist()


def test_bytes_are_those_of_the_tokens_read(folder: Path) -> None:
    found = continued(folder, plan_of(2))
    held = found.prompt_tokens + len(found.full.tokens) - 1  # the last token is written, never read
    assert found.full.cache_bytes == held * 2 * (2 * 8 + 2 * 8) * 4
    assert found.planned.cache_bytes < found.full.cache_bytes
    assert not found.is_vacuous


def test_sixteen_bits_write_the_same_words_in_the_same_bytes(folder: Path) -> None:
    found = continued(folder, plan_of(16), temperature=1.5, seed=3)
    assert found.planned == found.full
    assert found.shared_tokens == len(found.full.tokens)
    assert found.is_vacuous


def test_the_seed_decides_what_is_sampled(folder: Path) -> None:
    first, again, other = (continued(folder, plan_of(16), temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.full.tokens != other.full.tokens


def test_shared_tokens_end_where_the_two_part(folder: Path) -> None:
    found = continued(folder, plan_of(1, recent_tokens=0), max_new_tokens=24)
    count = found.shared_tokens
    assert found.full.tokens[:count] == found.planned.tokens[:count]
    assert count < 24, "one bit without a window must be noticed"
    assert found.full.tokens[count] != found.planned.tokens[count]


def test_progress_ends_at_its_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    settings = GenerateRequest(max_new_tokens=3)
    compare_continuations(
        resolve(str(folder)), plan_of(2), PROMPT, settings, lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (6, 6)


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ("", {}, "the prompt is empty"),
        (PROMPT, {"max_new_tokens": 0}, "--max-new-tokens 0"),
        (PROMPT, {"max_new_tokens": 60}, "more than the 64 that the model was made for"),
        (PROMPT, {"temperature": -1.0}, "--temperature -1.0"),
        (PROMPT, {"temperature": float("nan")}, "--temperature nan"),
        (PROMPT, {"chat": True}, "no chat template"),
    ],
)
def test_what_cannot_be_continued_is_refused(folder: Path, prompt: str, settings: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        continued(folder, plan_of(2), prompt, **settings)


def test_another_models_plan_is_refused(folder: Path) -> None:
    plan = plan_of(2)
    with pytest.raises(Mismatch):
        continued(folder, plan.model_copy(update={"model": ModelInfo(num_layers=2, fingerprint="sha256:other")}))


def test_a_chat_template_is_used(folder: Path) -> None:
    template = "{% for turn in messages %}the {{ turn.content }} sat{% endfor %}"
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    plain, chat = continued(folder, plan_of(2), "the cat sat"), continued(folder, plan_of(2), "cat", chat=True)
    assert chat.full.tokens == plain.full.tokens


def test_layers_that_slide_count_alike_on_both_sides(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "gemma", "gemma3")
    plan = plan_of(16).model_copy(update={"layers": plan_of(16).layers[1:]})
    plan = plan.model_copy(update={"skipped": (SkippedLayer(layer=0, reason="it slides"),)})
    found = continued(folder, plan, max_new_tokens=20)  # beyond the window of 16 tokens
    assert found.planned == found.full
    assert found.is_vacuous
