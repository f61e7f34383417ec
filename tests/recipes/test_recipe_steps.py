"""Recipes as command lines: what each table asks for, and what is refused before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from kvprof.cli.app import app
from kvprof.errors import InvalidFile
from kvprof.recipes.steps import Step, steps_of
from kvprof.records import recipe as tables
from kvprof.records.recipe import Recipe, read_recipe


def steps(folder: Path, text: str, model: str = "demo") -> list[Step]:
    (folder / "mine.toml").write_text(text)
    return steps_of(read_recipe(folder / "mine.toml"), model, Path("out"), folder)


def lines(folder: Path, text: str) -> list[str]:
    return [step.line for step in steps(folder, text)]


def test_a_table_is_a_command_and_a_key_its_option(tmp_path: Path) -> None:
    assert lines(
        tmp_path,
        """
        device = "cpu"
        [text]
        sequences = 8
        seed = 3
        [gradients]
        sequences = 2
        pack = true
        until_stable = false
        stable_at = [2.5, 3]
        [frontier]
        from = 2
        [[plans]]
        budgets = [2.5, 3]
        pin = ["key:0=8", "value:*=rot2"]
        """,
    ) == [
        "kvprof gradients demo --sequences 2 --seed 3 --pack --stable-at 2.5 --stable-at 3 --device cpu --out out",
        "kvprof frontier --from 2 --scores out/gradients.json --out out/frontier.json",
        "kvprof allocate --budget 2.5 --pin key:0=8 --pin 'value:*=rot2' --scores out/gradients.json "
        "--out out/plan-2.50.json",
        "kvprof allocate --budget 3 --pin key:0=8 --pin 'value:*=rot2' --scores out/gradients.json "
        "--out out/plan-3.00.json",
    ]


def test_scores_that_a_plan_needs_are_measured_though_nobody_asked(tmp_path: Path) -> None:
    for table, needed in (
        ('rule = "norm-greedy"\nbudgets = 3', "norms"),
        ('metric = "frobenius_norm"\nbudgets = 3', "norms"),
        ('rule = "kvmix"', "gradients"),
        ("budgets = 3", "gradients"),
        ("max_kl = 0.01", "gradients"),
        ('scores = "divergence"\nbudgets = 3', "divergence"),
    ):
        first, second = steps(tmp_path, f"[[plans]]\n{table}\n")
        assert first.command == needed
        assert second.reads == first.writes == (Path(f"out/{needed}.json"),)


def test_published_rivals_need_both_scores_and_may_be_left_out(tmp_path: Path) -> None:
    text = "[[plans]]\nbudgets = 3\n[evaluate]\n"
    assert [step.command for step in steps(tmp_path, text)] == ["norms", "gradients", "allocate", "evaluate"]
    alone = steps(tmp_path, text + "rivals = false\n")
    assert [step.command for step in alone] == ["gradients", "allocate", "evaluate"]
    assert "--no-rivals" in alone[-1].arguments


def test_all_plans_and_rivals_are_measured_against_the_first(tmp_path: Path) -> None:
    *_, evaluate = steps(tmp_path, '[[plans]]\nbudgets = [3, 4]\n[[rivals]]\nrule = "kvmix"\n[evaluate]\n')
    assert evaluate.line.startswith(
        "kvprof evaluate out/plan-3.00.json --against out/plan-4.00.json --against out/plan-kvmix.json --model demo"
    )


def test_a_runtime_gets_scores_plan_and_artefact_in_a_folder_of_its_own(tmp_path: Path) -> None:
    text = '[text]\nsequences = 2\n[gradients]\nrecent_tokens = 9\n[[targets]]\nruntime = "vllm"\nbudgets = [8]\n'
    _, *rest = lines(tmp_path, text)
    assert rest == [
        "kvprof gradients demo --target vllm --sequences 2 --out out/vllm",
        "kvprof allocate --target vllm --budget 8 --scores out/vllm/gradients.json --out out/vllm/plan-vllm-8.00.json",
        "kvprof export out/vllm/plan-vllm-8.00.json --to vllm --out out/vllm",
    ]


def test_a_runtime_that_obeys_any_plan_needs_no_scores_of_its_own(tmp_path: Path) -> None:
    made = steps(tmp_path, '[gradients]\nrecent_tokens = 9\n[[targets]]\nruntime = "transformers"\nbudgets = 6\n')
    assert [step.command for step in made] == ["gradients", "allocate", "export"]
    assert made[1].reads == made[0].writes
    assert "--recent-tokens" in made[0].arguments


def test_a_text_file_is_relative_to_the_recipe_whatever_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "mine.txt").write_text("text")
    text = '[text]\ndata = ["builtin:2", "mine.txt:0.5", "org/dataset"]\n[gradients]\n'
    (step,) = steps(tmp_path, text)
    assert step.reads == (tmp_path / "mine.txt",)
    assert step.arguments[2:8] == ["--data", "builtin:2", "--data", f"{tmp_path}/mine.txt:0.5", "--data", "org/dataset"]
    monkeypatch.chdir(tmp_path)
    assert "--data mine.txt:0.5" in steps(tmp_path, text)[0].line


def test_a_text_may_be_a_folder_a_pattern_or_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("b.jsonl.gz", "a.jsonl.gz"):
        (tmp_path / "shards" / name).touch()
    files = (tmp_path / "shards/a.jsonl.gz", tmp_path / "shards/b.jsonl.gz")
    hub = "hf://datasets/org/name/data/*.parquet"
    for data, given, reads in (
        ("shards", f"{tmp_path}/shards", files),
        ("shards/:2", f"{tmp_path}/shards:2", files),
        ("shards/a*.gz", f"{tmp_path}/shards/a*.gz", files[:1]),
        ("org/name/config", "org/name/config", ()),
        (hub, hub, ()),
    ):
        (step,) = steps(tmp_path, f'[text]\ndata = "{data}"\ncolumn = "{{q}}"\n[gradients]\nconfig = "c"\n')
        assert step.reads == reads
        assert step.arguments[2:8] == ["--data", given, "--column", "{q}", "--config", "c"]
    with pytest.raises(InvalidFile, match=r"text.data: .*no file's name is like this"):
        steps(tmp_path, '[text]\ndata = "shards/*.csv"\n[gradients]\n')


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('[[plans]]\nrule = "exct"\n', ["plans[0].rule", "did you mean 'exact'?"]),
        ('[[plans]]\nrule = "kvmix"\nbudgets = 3\n', ["plans[0]", "kvmix takes no --budget"]),
        ("[[plans]]\n", ["plans[0]", "needs a limit"]),
        ('[[plans]]\nmemory = "1GiB"\n', ["plans[0]", "--context"]),
        ('[[plans]]\nmemory = "1GiBB"\ncontext = 9\n', ["plans[0]", "did you mean 'GiB'?"]),
        ("[[plans]]\nbudgets = 3\nmax_kl = 0.1\n", ["plans[0]", "leave out"]),
        ("[[plans]]\nbudgets = -1\n", ["plans[0].budgets", "-1"]),
        ('[[plans]]\nbudgets = 3\nbits = "2,7"\n', ["plans[0].bits", "'7'"]),
        ('[[plans]]\nbudgets = 3\nunit = "stored"\nrule = "kvmix"\n', ["plans[0]", "kvmix takes no"]),
        ('[[plans]]\nrule = "uniform"\nbits_key = 4\n', ["plans[0]", "bits of both"]),
        ('[[plans]]\nrule = "kvmix"\nas_published = true\nsink_tokens = 4\n', ["plans[0]", "no sinks"]),
        ("[[plans]]\nbudgets = [3, 3]\n", ["plan-3.00.json", "twice", "name"]),
        ('[[targets]]\nruntime = "vlm"\nbudgets = 8\n', ["targets[0].runtime", "did you mean 'vllm'?"]),
        ('[[targets]]\nruntime = "vllm"\n', ["targets[0]", "needs a limit"]),
        ('[[targets]]\nruntime = "vllm"\nbudgets = 8\n' * 2, ["targets[1].runtime", "twice"]),
        ('[gradients]\ndata = "none.txt"\n', ["gradients.data", "none.txt", "no such file"]),
        ('[text]\ndata = "bultin"\n[norms]\n', ["text.data", "did you mean 'builtin'?"]),
        ('[[plans]]\nbudgets = 3\n[evaluate]\ndata = "none.csv"\n', ["evaluate.data", "none.csv"]),
        ('[text]\ndata = "builtin:0"\n[norms]\n', ["text.data", "builtin:0", "above zero"]),
        ('[text]\ndata = "builtin:two"\n[norms]\n', ["text.data", "builtin:two", "above zero"]),
        ('[text]\ndata = ["self", "org/text:nan"]\n[norms]\n', ["text.data", "org/text:nan"]),
        ('[[plans]]\nbudgets = 3\npin = "kye:0=8"\n', ["plans[0]", "'kye:0=8'", "did you mean 'key'?"]),
        ('[[plans]]\nbudgets = 3\npin = "key:0=9"\n', ["plans[0]", "'key:0=9'", "'9'"]),
        ('[[targets]]\nruntime = "vllm"\nbudgets = 8\npin = "key:3-1=8"\n', ["targets[0]", "run backwards"]),
        ("[[plans]]\nmax_kl = -1\n", ["plans[0]", "-1", "0.01"]),
        ('[[plans]]\nbudgets = 3\nname = "history"\n', ["plans[0].name", "history.json", "another"]),
        ('[[plans]]\nbudgets = 3\nname = "evaluation"\n[evaluate]\n', ["plans[0].name", "evaluation.json"]),
        ('[[plans]]\nbudgets = 3\n[benchmark]\nmemory = "2GiBB"\n', ["benchmark.memory", "did you mean 'GiB'?"]),
    ],
)
def test_what_a_late_step_would_refuse_is_refused_before_the_first(
    tmp_path: Path, table: str, words: list[str]
) -> None:
    with pytest.raises(InvalidFile) as caught:
        steps(tmp_path, table)
    said = " ".join(str(caught.value).split())
    for word in words:
        assert word in said


TABLES = {
    "norms": [tables.Norms],
    "spectra": [tables.Spectra],
    "gradients": [tables.Gradients, tables.Reading],
    "divergence": [tables.Divergence, tables.Reading],
    "calibrate": [tables.Calibrate],
    "frontier": [tables.Frontier],
    "allocate": [tables.Plans, tables.Target],
    "evaluate": [tables.Evaluate],
    "benchmark": [tables.Benchmark],
    "audit": [tables.Audit],
    "plot": [tables.Plot],
    "report": [tables.Report],
}
NO_OPTIONS = {"name", "scores", "runtime", "pictures"}
OPTIONS_BY_ANOTHER_NAME = {"budgets": "budget"}


@pytest.mark.parametrize("command", TABLES)
def test_every_key_of_a_table_is_an_option_of_its_command(command: str) -> None:
    group = typer.main.get_command(app)
    known = {option for parameter in group.commands[command].params for option in parameter.opts}
    for table in TABLES[command]:
        for name, field in table.model_fields.items():
            key = field.alias or OPTIONS_BY_ANOTHER_NAME.get(name, name)
            assert key in NO_OPTIONS or f"--{key.replace('_', '-')}" in known


def test_a_step_reads_nothing_that_a_later_one_writes(tmp_path: Path) -> None:
    text = """
    [divergence]
    [calibrate]
    [frontier]
    [audit]
    [plot]
    [report]
    [benchmark]
    [evaluate]
    [[plans]]
    budgets = [2.5, 3]
    [[rivals]]
    rule = "norm-greedy"
    budgets = 3
    [[targets]]
    runtime = "vllm"
    budgets = [5, 8]
    """
    made = steps(tmp_path, text)
    written: set[Path] = set()
    for step in made:
        assert step.writes[0] in step.reads or step.writes[0] not in written  # calibrate adds to what it reads
        assert set(step.reads) <= written
        written |= set(step.writes)
    assert [step.command for step in made][-2:] == ["plot", "report"]


def test_every_table_of_a_recipe_is_looked_at_here() -> None:
    assert {"allocate" if name in ("plans", "rivals", "targets") else name for name in Recipe.model_fields} - {
        "description",
        "model",
        "out",
        "dtype",
        "device",
        "stream",
        "text",
    } == set(TABLES)
