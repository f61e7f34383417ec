"""Chats as token ids: those of transformers' own chat templates, once begun, however the turns are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvprof.calibration.mixture import TextRequest, mix_texts
from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import CalibrationError

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
BEGUN = "{{ bos_token }}" + CHATML
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ p['text'] }}{% endfor %}\n{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)
MESSAGES = [
    {"role": "system", "content": "you are a cat"},
    {"role": "user", "content": "why do you sit on the mat, cat?"},
    {"role": "assistant", "content": "it is warm."},
]


def a_tokenizer(template: str | None, begins: bool = False) -> Any:
    """Return a tokenizer of bytes, the marks of chats in its vocabulary, that puts <s> before a text or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate([*marks, *alphabet])}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": marks[2:]})
    fast.chat_template = template
    return fast


def measured(path: Path, rows: list[dict[str, Any]], tokenizer: Any, length: int = 400, **how: Any) -> CalibrationSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return mix_texts(TextRequest([str(path)], len(rows), length, **how), tokenizer).complete()


@pytest.mark.parametrize("template", [CHATML, BEGUN])
@pytest.mark.parametrize("begins", [False, True])
def test_the_tokens_are_those_of_the_template_begun_once(tmp_path: Path, template: str, begins: bool) -> None:
    tokenizer = a_tokenizer(template, begins)
    found = measured(tmp_path / "rows.jsonl", [{"id": "c1", "messages": MESSAGES}], tokenizer)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    if begins and template is CHATML:  # as every sequence begins
        expected = [0, *expected]
    assert list(found.sequences[0]) == expected
    assert expected.count(0) == (begins or template is BEGUN)
    assert found.info.column == "messages"
    assert any("by the tokenizer's chat template" in said and "left aside: id" in said for said in found.readings)


def test_windows_of_chats_begin_once_and_lose_nothing(tmp_path: Path) -> None:
    tokenizer = a_tokenizer(BEGUN, begins=True)
    rows = [{"messages": [{"role": "user", "content": f"cat {number} sits"}]} for number in range(6)]
    whole = measured(tmp_path / "rows.jsonl", rows, tokenizer).sequences
    joined = [token for ids in whole for token in (*ids, 1)]
    windows = measured(tmp_path / "rows.jsonl", rows, tokenizer, 20, pack=True).sequences
    for window in windows:
        assert window[0] == 0
        assert window[1] != 0
    begun = [window[1:] for window in windows]
    assert [token for ids in begun for token in ids if token] == [token for token in joined if token][
        : sum(len([token for token in ids if token]) for ids in begun)
    ]


def test_a_tokenizer_without_a_template_reads_role_by_role_and_it_is_said(tmp_path: Path) -> None:
    tokenizer = a_tokenizer(None, begins=True)
    found = measured(tmp_path / "rows.jsonl", [{"messages": MESSAGES}], tokenizer)
    text = "system: you are a cat\n\nuser: why do you sit on the mat, cat?\n\nassistant: it is warm."
    assert list(found.sequences[0]) == tokenizer(text)["input_ids"]
    assert any("role by role: the tokenizer has no chat template" in said for said in found.readings)


def test_a_template_that_reads_only_parts_gets_parts(tmp_path: Path) -> None:
    found = measured(tmp_path / "rows.jsonl", [{"messages": MESSAGES}], tokenizer := a_tokenizer(PARTS))
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    assert list(found.sequences[0]) == tokenizer.apply_chat_template(parts, tokenize=True, return_dict=False)
    assert "why do you sit" in tokenizer.decode(found.sequences[0])


def test_a_template_without_a_system_role_gets_that_turn_within_the_users(tmp_path: Path) -> None:
    found = measured(tmp_path / "rows.jsonl", [{"messages": MESSAGES}], tokenizer := a_tokenizer(STRICT))
    assert tokenizer.decode(found.sequences[0]) == (
        f"[user]you are a cat\n\n{MESSAGES[1]['content']}[assistant]{MESSAGES[2]['content']}"
    )


def test_chats_that_a_template_cannot_write_are_left_aside_and_counted(tmp_path: Path) -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('one turn, please') }}{% endif %}" + CHATML
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES[1:2]}]
    found = measured(tmp_path / "rows.jsonl", rows, a_tokenizer(template))
    assert len(found.sequences) == 1
    assert any("left aside: 1 chat that the chat template cannot write (one turn, please)" in r for r in found.readings)
    with pytest.raises(CalibrationError, match=r"one turn, please.*\n.*--column"):
        measured(tmp_path / "rows.jsonl", rows[:1], a_tokenizer(template))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages if m.role == 'user' %}[u]{{ m.content }}{% endfor %}", ("assistant", "system")),
        ("{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}", ("system",)),
        ("{{ messages[-1].content }}", ("system", "user")),
    ],
)
def test_turns_that_a_template_leaves_out_are_said_by_their_role(
    tmp_path: Path, template: str, said: tuple[str, ...]
) -> None:
    tokenizer = a_tokenizer(template)
    same = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a cat?"}]
    found = measured(tmp_path / "rows.jsonl", [{"messages": MESSAGES}, {"messages": [*MESSAGES[:1], *same]}], tokenizer)
    texts = {tokenizer.decode(ids) for ids in found.sequences}
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) in texts
    for role in ("assistant", "system", "user"):
        left_out = f"2 {role} turns that the chat template leaves out" in found.readings[0]
        assert left_out is (role in said)


def test_a_template_that_cuts_thoughts_or_writes_json_leaves_out_no_turn(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'tool' %}{{ m.content | tojson }}"
        "{% else %}{{ m.content.split('</think>')[-1].strip() }}{% endif %}{% endfor %}"
    )
    thinking = {"role": "assistant", "content": "<think>cats\nare small</think>\n\nin a box."}
    rows = [{"messages": [MESSAGES[1], {"role": "tool", "content": '{"cat": "box"}\n'}, thinking]}]
    tokenizer = a_tokenizer(template)
    found = measured(tmp_path / "rows.jsonl", rows, tokenizer)
    assert tokenizer.decode(found.sequences[0]).endswith("[assistant]in a box.")
    assert "leaves out" not in found.readings[0]


def test_an_answer_before_any_question_is_said_where_a_template_wants_turns_by_turns(tmp_path: Path) -> None:
    rows = [{"messages": [MESSAGES[2], *MESSAGES[1:]]}]
    found = measured(tmp_path / "rows.jsonl", rows, a_tokenizer(STRICT))
    assert "1 assistant turn that the chat template leaves out" in found.readings[0]


@pytest.mark.parametrize("template", [CHATML, None])
def test_what_chats_hold_beside_text_is_said(tmp_path: Path, template: str | None) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "what is it?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "look"}}]}
    answer = {"role": "assistant", "content": "a cat", "reasoning_content": "it has whiskers", "tool_calls": []}
    odd = [{"role": "user", "content": 5}, {"content": "said by nobody"}, "a bare text"]
    rows = [{"messages": [{"role": "user", "content": picture}, call, answer]}, {"messages": [*MESSAGES, call, *odd]}]
    found = measured(tmp_path / "rows.jsonl", rows, a_tokenizer(template))
    for words in (
        "image_url in 1 message,",
        "tool_calls in 2 messages,",
        "reasoning_content in 1 message,",
        "content that is no text in 1 message,",
        "text without a role in 2 messages",
    ):
        assert words in found.readings[0] + ","
    assert "left aside" not in measured(tmp_path / "r.jsonl", [{"messages": MESSAGES}], a_tokenizer(CHATML)).readings[0]


def test_a_row_that_spells_out_its_beginning_has_it_once(tmp_path: Path) -> None:
    tokenizer = a_tokenizer(None, begins=True)
    plain, spelt = "[INST] a cat? [/INST] a mat.", "<s>[INST] a cat? [/INST] a mat."
    for pack in (False, True):
        ids = {
            tuple(measured(tmp_path / "rows.jsonl", [{"text": text}], tokenizer, 20, pack=pack).sequences[0])
            for text in (plain, spelt)
        }
        assert len(ids) == 1
        assert ids.pop()[:2] != (0, 0)


def test_a_chats_split_does_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"cat {number} sits"}]} for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = []
    for template in (CHATML, None):
        tokenizer = a_tokenizer(template)
        text = mix_texts(TextRequest([str(path)], 40, 200, split="held-out"), tokenizer).complete()
        kept.append({word for ids in text.sequences for word in tokenizer.decode(ids).split() if word.isdigit()})
    assert kept[0] == kept[1]
    assert 0 < len(kept[0]) < 40
