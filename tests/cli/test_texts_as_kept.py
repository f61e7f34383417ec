"""Commands on calibration text as people keep it: chats, columns of other names, configurations, shards."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from folders import WORDS, save_folder, save_text
from test_commands import run
from transformers import PreTrainedTokenizerFast

import kvprof
from kvprof.profile.spectra import run_spectra
from kvprof.records.evaluation import Evaluation
from kvprof.records.requests.measure import SpectraRequest
from kvprof.records.scores import Scores

SHORT = ["--sequences", "2", "--sequence-length", "16", "--formats", "none", "--out", "out"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
ASKED, ANSWERED = " ".join(WORDS[:6]), " ".join(WORDS[6:])
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]


@pytest.fixture(autouse=True)
def place(in_tmp: Path) -> Path:
    save_folder(in_tmp / "model")
    return in_tmp


def give_template(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def write(path: str, row: dict[str, Any], rows: int = 2) -> str:
    Path(path).write_text("".join(json.dumps(row | {"id": f"chat_{number:04}"}) + "\n" for number in range(rows)))
    return path


def gradients(*options: str, code: int = 0) -> str:
    result = run("gradients", "model", *SHORT, *options)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def calibration() -> Any:
    found = Scores.load("out/gradients.json").calibration
    assert found is not None
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
        {"messages": CHAT},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, CHAT[1]]},
        {"instruction": ASKED, "input": "", "output": ANSWERED},
        {"question": ASKED, "answer": ANSWERED},
    ],
    ids=lambda row: "+".join(row),
)
def test_a_chat_is_measured_as_the_template_writes_it_and_never_by_its_id(place: Path, row: dict[str, Any]) -> None:
    tokenizer = give_template(place / "model")
    said = gradients("--data", write("rows.jsonl", row), "--sequence-length", "64")
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert calibration().tokens == 2 * len(expected)
    assert "rows.jsonl: column '" in said
    assert "by the tokenizer's chat template" in said
    assert f"2 rows read, of {len(expected)} tokens in the median; left aside: id" in said


def test_without_a_template_chats_are_read_role_by_role_and_that_is_said() -> None:
    said = gradients("--data", write("rows.jsonl", {"messages": CHAT}))
    assert "role by role: the tokenizer has no chat template" in said


def test_a_column_of_another_name_is_read_where_it_is_named() -> None:
    write("rows.jsonl", {"headline": ANSWERED, "summary": ASKED})
    assert "found headline, summary, id (ids). Name one with --column headline" in gradients(
        "--data", "rows.jsonl", code=1
    )
    assert not Path("out/gradients.json").exists()
    gradients("--data", "rows.jsonl", "--column", "summary")
    assert (calibration().column, calibration().tokens) == ("summary", 2 * len(ASKED.split()))
    gradients("--data", "rows.jsonl", "--column", r"{summary}\n{headline}")
    assert (calibration().column, calibration().tokens) == ("{summary}\n{headline}", 32)
    assert "there is no column 'sumary': did you mean 'summary'?" in gradients(
        "--data", "rows.jsonl", "--column", "sumary", code=2
    )
    save_text(Path("text.txt"))
    assert "have no columns" in gradients("--data", "text.txt", "--column", "text", code=2)


def test_only_ids_are_no_text() -> None:
    said = gradients("--data", write("rows.jsonl", {}), code=1)
    assert "cannot tell which column is text; found id" in said


@pytest.mark.parametrize("form", ["shards", "shards/*.parquet", "wiki.test.raw", "rows.txt.gz", "rows.md"])
def test_shards_patterns_and_compressed_files_are_texts(place: Path, form: str) -> None:
    rows = save_text(place / "rows.md").read_text().splitlines()
    (place / "shards").mkdir()
    for number in range(3):
        table = pyarrow.table({"text": rows[number::3]})
        pyarrow.parquet.write_table(table, place / "shards" / f"train-0000{number}-of-00003.parquet")
    (place / "wiki.test.raw").write_text("\n".join(rows))
    (place / "rows.txt.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    gradients("--data", form, "--sequences", "12", "--sequence-length", "64")
    assert calibration().dataset == form
    assert calibration().tokens == sum(len(row.split()) for row in rows)


def test_a_configuration_is_named_by_an_option_or_behind_the_name(place: Path) -> None:
    (place / "two").mkdir()
    (place / "two/README.md").write_text(
        "---\nconfigs:\n- config_name: raw\n  data_files: raw.jsonl\n"
        "- config_name: clean\n  data_files: clean.jsonl\n---\n"
    )
    write("two/raw.jsonl", {"text": ASKED})
    write("two/clean.jsonl", {"text": ANSWERED})
    assert "two has several configurations: raw, clean. Name one: --config raw" in gradients("--data", "two", code=1)
    for options in (["--data", "two", "--config", "clean"], ["--data", "two/clean"]):
        gradients(*options)
        assert (calibration().dataset, calibration().tokens) == ("two/clean", 2 * len(ANSWERED.split()))


@pytest.mark.parametrize("mode", [[], ["--pack"], ["--dry-run"]])
def test_text_that_misleads_is_said_in_every_mode(mode: list[str]) -> None:
    Path("rows.txt").write_text("<s> [INST] the cat\n" * 40)
    said = gradients("--data", "rows.txt", *mode)
    assert "are shorter than 32 tokens" in said
    assert "the same sequence is there more than once" in said
    assert "special tokens of another model in plain text, <s>, [INST]" in said


def test_a_stopped_run_with_another_column_is_another_text(place: Path) -> None:
    write("rows.jsonl", {"headline": ANSWERED, "summary": ASKED}, 3)
    source = kvprof.models.load.resolve("model")

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    settings = SpectraRequest(data=("rows.jsonl",), sequences=3, sequence_length=16, column="summary")
    (place / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_spectra(source, settings, place / "out", False, stop)
    options = ["spectra", "model", "--data", "rows.jsonl", "--sequences", "3", "--sequence-length", "16"]
    other = run(*options, "--column", "headline", "--out", "out")
    assert other.exit_code == 4
    assert "another column: it has 'summary', this command 'headline'" in " ".join(other.output.split())
    again = run(*options, "--column", "summary", "--out", "out")
    assert again.exit_code == 0, again.output
    assert "went on with a stopped run" in again.output


def test_evaluate_and_the_functions_read_the_same_column(place: Path) -> None:
    write("rows.jsonl", {"headline": ANSWERED, "summary": ASKED})
    text: dict[str, Any] = {"data": "rows.jsonl", "sequences": 2, "sequence_length": 16, "column": "headline"}
    scores = kvprof.gradients("./model", formats="int4g8", sink_tokens=0, recent_tokens=0, **text)
    assert scores.calibration is not None
    plan = kvprof.allocate(scores, 8, formats="int4g8")
    plan.save(place / "plan.json")
    options = ["--data", "rows.jsonl", "--column", "headline", "--sequences", "2", "--sequence-length", "16"]
    result = run("evaluate", "plan.json", "--model", "model", "--no-rivals", *options, "--out", "out")
    assert result.exit_code == 0, result.output
    found = Evaluation.load("out/evaluation.json")
    assert found.text.column == "headline"
    assert found.text.fingerprint == scores.calibration.fingerprint
    assert found.plans == kvprof.evaluate(plan, "./model", rivals=False, **text).plans
    verified = run("verify", "plan.json", "--model", "model")
    assert "text" in verified.output


def test_a_recipe_names_column_configuration_folder_and_pattern(place: Path) -> None:
    write("rows.jsonl", {"headline": ANSWERED, "summary": ASKED})
    (place / "shards").mkdir()
    save_text(place / "shards/a.txt")
    Path("mine.toml").write_text(
        'model = "./model"\nout = "out"\n[text]\ndata = ["rows.jsonl", "shards:2"]\ncolumn = "summary"\n'
        'sequences = 3\nsequence_length = 16\n[gradients]\nformats = "none"\n'
    )
    result = run("run", "mine.toml")
    assert result.exit_code == 0, result.output
    assert [share.column for share in calibration().sources] == ["summary", None]
    assert "skipped" in run("run", "mine.toml").output
    save_text(place / "shards/b.txt", 5)
    assert "skipped" not in run("run", "mine.toml").output  # a shard more is another text
