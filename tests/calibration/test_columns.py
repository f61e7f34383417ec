"""Which columns of a row are its text, in the shapes that published data sets have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprof.calibration.chat import Chat
from kvprof.calibration.columns import choose_reading
from kvprof.errors import CalibrationError, KvprofError, UsageError

USER, REPLY = ("user", "why does a cat sit"), ("assistant", "because there is a mat")
CHAT = (USER, REPLY)
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]
SHAREGPT = [{"from": "human", "value": USER[1]}, {"from": "gpt", "value": REPLY[1]}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER[1]}]},
    {"role": "assistant", "content": REPLY[1]},
]
WITH_NULLS = [  # as Arrow fills up what a part lacks
    {"role": "user", "content": [{"type": "text", "text": USER[1], "image_url": None}], "tool_calls": None},
    {"role": "assistant", "content": [{"type": "text", "text": REPLY[1], "image_url": None}], "tool_calls": None},
]


def read(row: dict[str, Any], column: str | None = None) -> object:
    return choose_reading([row], column).take(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"id": "chat_0001", "messages": MESSAGES},
        {"id": "chat_0001", "conversations": SHAREGPT},
        {"conversation_id": "9f", "model": "gpt", "conversation": MESSAGES, "language": "English"},
        {"messages": PARTS, "images": ["a.png"]},
        {"messages": WITH_NULLS},
        {"messages": json.dumps(MESSAGES)},
        {"messages": json.dumps(MESSAGES, indent=1)},
        {"chat_as_json": " " + json.dumps(MESSAGES, indent="\t"), "id": "9"},
        {"messages": repr(MESSAGES)},
        {"text": json.dumps({"messages": MESSAGES}), "id": "9"},
        {"text": json.dumps({"id": "9", "conversations": SHAREGPT}, indent=2)},
        {"conversation": [{"human": USER[1], "assistant": REPLY[1]}], "id": "9"},
        {"conversation": [{"user": USER[1], "assistant": REPLY[1]}]},
        {"turns": [{"Human": USER[1]}, {"Assistant": REPLY[1]}], "conversation": [{"human": USER[1], "gpt": REPLY[1]}]},
        {"user": USER[1], "assistant": REPLY[1], "topic": "cats"},
        {"human": USER[1], "bot": REPLY[1]},
        {"instruction": USER[1], "answer": REPLY[1], "n": 1},
        {"prompt": USER[1], "output": REPLY[1]},
        {"question": USER[1], "completion": REPLY[1]},
        {"input": {"messages": MESSAGES[:1]}, "preferred_output": MESSAGES[1:], "non_preferred_output": MESSAGES[1:]},
        {"texts": [{"user": USER[1], "assistant": REPLY[1], "source": "web"}], "images": ["a.png"]},
        {"contents": [{"role": role, "parts": [{"text": text}]} for role, text in (USER, ("model", REPLY[1]))]},
        {"turns": [{"role": role, "message": text} for role, text in CHAT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "value": USER[1]}]}, MESSAGES[1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"value": USER[1]}}]}, MESSAGES[1]]},
        {"data": {"id": "9", "messages": MESSAGES}},
        {"custom_id": "r1", "method": "POST", "url": "/v1/chat", "body": {"model": "gpt", "messages": MESSAGES}},
        {"request": {"body": {"messages": MESSAGES}, "method": "POST"}, "id": "9"},
        {"prompt": "why?", "prompt_id": "9f", "messages": MESSAGES},
        {"prompt": USER[1], "completion": REPLY[1]},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": USER[1], "chosen": MESSAGES, "rejected": MESSAGES[:1]},
        {"chosen": MESSAGES, "rejected": MESSAGES[:1], "score_chosen": 1.0},
        {"instruction": USER[1], "input": "", "output": REPLY[1]},
        {"instruction": USER[1], "output": REPLY[1], "id": "9"},
        {"instruction": USER[1], "context": "", "response": REPLY[1], "category": "open_qa"},
        {"question": USER[1], "answer": REPLY[1]},
        {"Question": USER[1], "Answer": REPLY[1]},
        {"id": "9", "question": USER[1], "response": REPLY[1], "system_prompt": ""},
        {"question": USER[1], "answer": [REPLY[1], "for the sun"]},
        {"id": "9", "question": USER[1], "answers": {"text": [REPLY[1], "for the sun"], "answer_start": [3, 40]}},
        {"question": USER[1], "answers": [{"text": REPLY[1], "score": 3}, {"text": "for the sun", "score": 1}]},
        {"question": USER[1], "answer": {"value": REPLY[1], "aliases": ["for the sun"]}},
        {"query": USER[1], "answers": ["", REPLY[1]]},
        {"query": USER[1], "response": REPLY[1], "type": "math"},
        {"problem": USER[1], "solution": REPLY[1], "source": "olympiads"},
        {"inputs": USER[1], "targets": REPLY[1]},
        {"conversations": {"from": ["human", "gpt"], "value": [USER[1], REPLY[1]]}},
        {"dialog": [USER[1], REPLY[1]], "act": [0, 1]},
    ],
    ids=lambda row: "+".join(row),
)
def test_a_chat_is_found_in_every_shape_that_it_is_published_in(row: dict[str, Any]) -> None:
    assert read(row) == Chat(CHAT)
    reading = choose_reading([row])
    assert not {*reading.used} & {"id", "prompt_id", "conversation_id", "rejected", "source", "category", "images"}
    assert {*reading.used, *reading.aside} == set(row)
    assert choose_reading([row], reading.name).take(row) == Chat(CHAT)  # what is written down reads the same again


def test_what_goes_before_a_question_goes_before_it_in_the_chat() -> None:
    alpaca = {"instruction": "translate", "input": "le chat", "output": "the cat", "system": "you are brief"}
    assert read(alpaca) == Chat((("system", "you are brief"), ("user", "translate\nle chat"), ("assistant", "the cat")))
    squad = {"context": "a mat", "question": "where?", "answer": "there"}
    assert read(squad) == Chat((("user", "a mat\nwhere?"), ("assistant", "there")))
    dolly = {"instruction": "where?", "context": "a cat on a mat", "response": "there", "category": "closed_qa"}
    assert read(dolly) == Chat((("user", "where?\na cat on a mat"), ("assistant", "there")))
    asked = {"prompt": "where?", "context": "a cat on a mat", "completion": "there"}
    assert read(asked) == Chat((("user", "where?\na cat on a mat"), ("assistant", "there")))
    own = {"system": "not this", "messages": [{"role": "system", "content": "this"}, *MESSAGES]}
    assert read(own) == Chat((("system", "this"), *CHAT))
    sharegpt = {"system": "this", "tools": "[]", "conversations": SHAREGPT}
    assert read(sharegpt) == Chat((("system", "this"), *CHAT))


def test_of_several_answers_the_first_is_taken_and_none_is_no_text() -> None:
    squad: list[dict[str, Any]] = [
        {"context": "a mat", "question": "where?", "answers": {"text": ["there", "on it"], "answer_start": [2, 5]}},
        {"context": "a mat", "question": "who?", "answers": {"text": [], "answer_start": []}},
    ]
    taken = [Chat((("user", "a mat\nwhere?"), ("assistant", "there"))), None]
    assert [choose_reading(squad).take(row) for row in squad] == taken
    asked = choose_reading(squad, "question+answers")
    assert [asked.take(row) for row in squad] == [Chat((("user", "where?"), ("assistant", "there"))), None]


def test_turns_without_text_and_rows_without_turns_are_no_text() -> None:
    silent = [{"role": "assistant", "tool_calls": [{"id": "1"}]}, *MESSAGES, {"role": "assistant", "content": None}]
    assert read({"messages": silent}) == Chat(CHAT)
    rows: list[dict[str, Any]] = [{"messages": MESSAGES}, {"messages": []}, {"messages": None}, {}]
    take = choose_reading(rows).take
    assert [take(row) for row in rows] == [Chat(CHAT), None, None, None]
    empty: list[dict[str, Any]] = [{"messages": "[]"}, {"messages": "[]"}, {"messages": json.dumps(MESSAGES)}]
    assert [choose_reading(empty).take(row) for row in empty] == [None, None, Chat(CHAT)]
    unanswered: list[dict[str, Any]] = [{"question": "q", "answer": "a"}, {"question": "q", "answer": ""}]
    take = choose_reading(unanswered).take
    assert [take(row) is None for row in unanswered] == [False, True]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a cat", "messages": MESSAGES}, "a cat"),
        ({"Text": "a cat", "Source": "web"}, "a cat"),
        ({"text": "a cat", "title": "cats", "meta": {"x": 1}}, "a cat"),
        ({"content": "a cat", "label": "x"}, "a cat"),
        ({"prompt": "a cat", "label": "x"}, "a cat"),
        ({"prompt": "a cat", "document": "a mat"}, "a cat"),
        ({"story": "a cat", "url": "https://a.example/b", "sha256": "0" * 64, "id": "1", "lang": "en"}, "a cat"),
        ({"story": "a cat", "storyId": "abc", "n": 3}, "a cat"),
        ({"raw_content": "a cat", "meta": '{"url": "a b"}', "signals": '[{"a": "b c"}]'}, "a cat"),
        ({"chosen": "Human: a cat?", "rejected": "Human: a dog?"}, "Human: a cat?"),
        ({"text": '[1, 2] is a list, {"messages"} is no chat'}, '[1, 2] is a list, {"messages"} is no chat'),
        ({"content": '{"messages": {"hello": "a cat"}}'}, '{"messages": {"hello": "a cat"}}'),
        ({"story": "a cat", "runs": [{"model": "gpt", "user": "u1"}]}, "a cat"),
        ({"question": "which?", "choices": ["a", "b"], "answer": 1}, "which?"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_column_of_text_is_found_beside_others(row: dict[str, Any], text: str) -> None:
    assert read(row) == text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "chat_0004", "body": "a cat sits"}, "a cat sits"),
        ({"content": "https://a.example/b", "story": "a cat sits"}, "a cat sits"),
        ({"text": "9f86d081884c7d659a2feaa0c55ad015", "story": "a cat sits"}, "a cat sits"),
        ({"content": "id_4", "messages": MESSAGES}, Chat(CHAT)),
        ({"question": "q_00011", "answer": "a_00011", "body": "a cat sits"}, "a cat sits"),
        ({"question": "https://a.example/q", "answer": "a cat sits"}, "a cat sits"),
        ({"prompt": "doc_00012", "completion": "doc_00013", "content": "a cat sits"}, "a cat sits"),
        ({"prompt": "img/11.png", "document": "a cat sits"}, "a cat sits"),
        ({"question": "who?", "answer": "a_00011"}, "who?"),
        ({"dialog": ["chat_0004", "chat_0005"], "story": "a cat sits"}, "a cat sits"),
        ({"question": "in which year?", "answer": "1945"}, Chat((("user", "in which year?"), ("assistant", "1945")))),
        ({"question": "which?", "answer": "COVID-19"}, Chat((("user", "which?"), ("assistant", "COVID-19")))),
        ({"question": "how heavy?", "answer": "10.5kg"}, Chat((("user", "how heavy?"), ("assistant", "10.5kg")))),
        ({"input": "12+7", "output": "19"}, Chat((("user", "12+7"), ("assistant", "19")))),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_good_name_makes_no_text_of_ids_and_links(row: dict[str, Any], text: object) -> None:
    assert read(row) == text


@pytest.mark.parametrize(
    "row",
    [
        {"text": "https://a.example/c4"},
        {"text": "chat_0004"},
        {"prompt": "https://a.example/11", "n": 1},
        {"document": "doc_00011", "page": "x"},
        {"question": "q_00011", "answer": "a_00011"},
        {"text": "2024-01-05 10:00:00"},
        {"when": "2024-01-05 10:00:00"},
        {"when": "Fri, 5 Jan 2024 10:00:00 GMT"},
        {"when": "January 5, 2024 3:07 PM"},
        {"when": "2024年1月5日"},
        {"picture": "images/doge.png"},
        {"picture": "My Pictures/the doge sits.jpeg"},
        {"picture": "C:\\pictures\\doge"},
        {"host": "www.a.example"},
        {"contact": "a.cat@mat.example"},
        {"contact": "A. Cat <a.cat@mat.example>"},
        {"members": "chat_0004, chat_0005"},
        {"members": "chat_0004 chat_0005"},
        {"members": "['chat_0004', 'chat_0005']"},
        {"members": "https://a.example/b; https://a.example/c"},
        {"price": "$12.50"},
        {"grade": "A"},
        {"signals": '{"a b": "c d"}', "none": ""},
        {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions"},
        {"picture": "data:image/png;base64,iVBORw0KGgo="},
        {"picture": "s3://cats/the doge sits.png"},
        {"tag_of_it": "#caturday"},
    ],
    ids=lambda row: "+".join(row),
)
def test_no_ids_links_dates_or_names_of_files_are_text_for_want_of_another(row: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="cannot tell which column is text"):
        read(row)


@pytest.mark.parametrize(
    ("row", "found", "advice"),
    [
        (
            {"id": "chat_0001", "headline": "a cat", "body": "a mat"},
            "id (ids), headline, body",
            "Name one with --column headline, or several in a template such as --column '{headline}\\n{body}'.",
        ),
        ({"n": 1, "first verse": "a cat", "second": "a mat"}, "n (numbers), first verse, second", "'first verse'"),
        (
            {"id": "chat_0001", "tokens": ["a", "cat"]},
            "id (ids), tokens (lists)",
            "Write the text of what tokens holds",
        ),
        ({"doc": {"body": "a cat"}, "n": 1.5}, "doc (records), n (numbers)", "Write the text of what doc holds"),
        ({"url": "https://a.example/b"}, "url (links)", "None of them is text. Write the text into a column 'text'"),
        ({"source": "a cat on a mat"}, "source (no text by its name)", "with --column source"),
        ({"text": "2024-01-05"}, "text (numbers or dates)", "None of them is text."),
        ({}, "no columns", "None of them is text."),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_refusal_says_what_columns_hold_and_recommends_none_that_is_no_text(
    row: dict[str, Any], found: str, advice: str
) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(row)
    first, second = str(caught.value).split("\n")
    assert first == f"cannot tell which column is text; found {found}."
    assert advice in second
    assert "--column id" not in second


def test_labels_are_no_text_however_many_they_are() -> None:
    few = [{"feeling": word} for word in ("positive", "negative", "negative") * 3]
    many = [{"subject": f"science of {'abcdefghijklmnopqrstuvwxy'[n % 25] * 3}"} for n in range(100)]
    words = [{"animal": word} for word in ("cat", "dog", "mouse", "guinea-pig", "кот")]
    for rows in (few, many, words):
        with pytest.raises(CalibrationError, match="cannot tell which column is text"):
            choose_reading(rows)
    assert choose_reading([{"text": "a cat sat."}] * 9).name == "text"  # a sentence, if the same one
    ids = [{"text": f"chat-{letter}", "body": "a cat sits on a mat"} for letter in "abc"]
    assert choose_reading(ids).name == "body"
    assert choose_reading([{"text": row["text"]} for row in ids]).name == "text"
    named: list[dict[str, Any]] = [{"text": row["feeling"], "body": "a cat sits on a mat"} for row in few]
    assert choose_reading(named).take(named[0]) == "a cat sits on a mat"


@pytest.mark.parametrize(
    "values",
    [
        ["a cat sits", "yes, it does", "on a mat"],
        ["Yes.", "Thank you!", "The cat sat on the mat at 10:30."],
        ["猫坐在垫子上", "狗", "鸟"],
        ["แมวนั่งบนเสื่อ", "หมา", "นก"],
        ["кот сидит", "на коврике", "5 котов"],
        ["print(42)", "x=[1,2]", "f(x1)"],
        ["scores.check(self.geometry, self.plan)", "a.b(c.d)", "print(a.b, c.d)"],
        ["int a1; int b2;", "a1 = b2;", "return a1;"],
        ["w1 w2 w3", "w4 w5 w6", "w7 w8 w9"],
        ["see https://a.example/b", "mail a.cat@mat.example", "chat_0004 is open"],
        ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQD"] * 3,
    ],
    ids=lambda values: values[0],
)
@pytest.mark.parametrize("name", ["text", "body"])
def test_short_sentences_other_scripts_and_code_are_text(name: str, values: list[str]) -> None:
    rows = [{name: value} for value in values]
    assert [choose_reading(rows).take(row) for row in rows] == values


@pytest.mark.parametrize(
    "values",
    [
        {"id": ["chat_0001", "chat_0002"]},
        {"conversation_id": ["one", "two"]},
        {"docId": ["one", "two"]},
        {"label": ["good", "bad"]},
        {"url": ["https://a.example/1", "https://a.example/2"]},
        {"key": ["one", "two"], "n": [1, 2]},
        {"page": ["https://a.example/1", "https://b.example/2"]},
        {"blob": ["9f86d081884c7d65", "60303ae22b998861"]},
        {"row": ["7d444840-9dc0-11d1-b245-5ffdce74fad2", "e902893a-9d22-3c7e-a7b8-d6e313b71d9f"]},
        {"day": ["2026-11-30", "2026-12-01"]},
        {"sentiment": ["good", "bad"] * 20},
        {"n": [1, 2]},
    ],
    ids=lambda values: "+".join(values),
)
def test_ids_links_labels_and_hashes_are_never_text(values: dict[str, list[Any]]) -> None:
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    with pytest.raises(CalibrationError, match=r"found ") as caught:
        choose_reading(rows)
    assert all(f"{name} (" in str(caught.value) for name in values)
    assert "--column" not in str(caught.value)
    first = next(iter(values))
    if isinstance(values[first][0], str):  # who asks for it gets it
        assert choose_reading(rows, first).take(rows[0]) == values[first][0]


def test_a_column_that_few_rows_have_gives_way_to_what_most_have() -> None:
    rows: list[dict[str, Any]] = [{"text": "a cat"}, *({"id": f"c{n}", "messages": MESSAGES} for n in range(5))]
    assert choose_reading(rows).name == "messages"
    pairs = [{"text": "a cat"}, *({"prompt": USER[1], "completion": REPLY[1]} for _ in range(5))]
    assert choose_reading(pairs).name == "prompt+completion"
    assert choose_reading([*rows[:2], {"text": "a dog"}]).name == "text"


def test_words_of_other_scripts_without_spaces_are_text() -> None:
    rows = [{"sentence": "2024年猫坐在垫子上"}, {"sentence": "狗在2025年吠叫"}]
    assert choose_reading(rows).take(rows[0]) == "2024年猫坐在垫子上"


def test_a_template_puts_columns_where_it_names_them() -> None:
    row = {"question": "why?", "answer": "so", "n": 3, "none": None, "a b": "c"}
    assert read(row, "Q: {question}\\nA: {answer}") == "Q: why?\nA: so"
    assert read(row, "{question}\n{answer}") == "why?\nso"
    assert read(row, "{n}{none}{a b}{{}}") == "3c{}"
    assert read(row, "answer") == "so"
    assert read({"{odd}": "text"}, "{odd}") == "text"
    empty = {"question": " ", "answer": None}
    assert choose_reading([row], "{question}\n{answer}").take(empty) is None
    reading = choose_reading([row], "{question}\n{answer}")
    assert (reading.used, reading.aside) == (("question", "answer"), ("n", "none", "a b"))


@pytest.mark.parametrize("column", ["qestion", "{qestion}\n{answer}", "qestion+answer"])
def test_a_column_that_is_not_there_is_refused_with_the_nearest(column: str) -> None:
    with pytest.raises(UsageError, match=r"no column 'qestion': did you mean 'question'"):
        read({"question": "why?", "answer": "so"}, column)


def test_a_column_of_no_text_is_refused_by_what_it_holds() -> None:
    for column in ("n", "{tags}"):
        with pytest.raises(CalibrationError, match=r"holds (int|list), not text"):
            read({"n": 3, "tags": ["a"], "text": "a cat"}, column)


NAMES = st.sampled_from(
    ["text", "messages", "conversations", "prompt", "completion", "question", "answer", "answers", "user", "id", "x"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=9)
    | st.sampled_from(["[{", "[{}]", '[{"role": 1}]', "['role'", "[" * 9999]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "messages", "human", "gpt"]), inner, max_size=3
        )
    ),
    max_leaves=9,
)


@given(
    rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=4),
    column=st.none()
    | NAMES
    | st.sampled_from(["{text}", "question+answer", "{", "}", "{}", "{0}", "{text!r:>3}", "+"]),
)
def test_whatever_rows_hold_they_are_text_or_refused(rows: list[dict[str, Any]], column: str | None) -> None:
    try:
        take = choose_reading(rows, column).take
        found = [take(row) for row in rows]
    except KvprofError:
        return
    for row in found:
        text = row.text if isinstance(row, Chat) else row
        assert text is None or (isinstance(text, str) and text.strip())
