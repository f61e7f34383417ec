"""kvprof's functions beside its commands: the same results, files only where asked, a lent model given back."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import pytest
import torch
from folders import save_folder, save_text
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import kvprof
from kvprof import BitPlan, Evaluation, KvprofError, Scores
from kvprof.cli.app import COMMANDS, app, make_app
from kvprof.errors import InfeasibleBudget, ModelError, NotBetter, UsageError
from kvprof.models.loaded import check_loaded

WORDS = ("--sequences", "2", "--sequence-length", "32", "--data", "text.txt", "--pack", "--device", "cpu")
TEXT = {"sequences": 2, "sequence_length": 32, "data": "text.txt", "pack": True, "device": "cpu"}
WINDOW = {"sink_tokens": 1, "recent_tokens": 4}
FORMATS = "int2g8,int4g8,rot3"


def command(*arguments: str) -> str:
    """Run a command in this process and return what it printed."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt", rows=60)
    return in_tmp


def lent() -> tuple[PreTrainedModel, object]:
    """Load the model as a caller would who is about to train it."""
    model = AutoModelForCausalLM.from_pretrained("model").train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    return model, AutoTokenizer.from_pretrained("model")


def state(model: PreTrainedModel) -> tuple[object, ...]:
    """Return all that a measurement might have left otherwise than it was."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        model.config._attn_implementation,
    )


def without_id(scores: Scores) -> Scores:
    assert scores.model is not None
    return scores.model_copy(update={"model": scores.model.model_copy(update={"id": None})})


@pytest.mark.parametrize("name", ["norms", "gradients", "spectra", "allocate", "evaluate"])
def test_a_function_takes_what_its_command_takes(name: str) -> None:
    (made,) = make_app([name]).registered_commands
    options = set(inspect.signature(made.callback).parameters)
    beside = {"dry_run", "quiet", "as_json", "named"}  # about printing; the last is another spelling of --model
    assert options - beside <= set(inspect.signature(getattr(kvprof, name)).parameters)
    assert name in COMMANDS


def test_norms_are_the_commands_to_the_byte(folder: Path) -> None:
    command("norms", "./model", "--out", "there")
    scores = kvprof.norms("./model")
    assert scores.to_text() == Path("there/norms.json").read_text()
    assert kvprof.norms(Path("model")) == scores


def test_gradients_are_the_commands_to_the_byte(folder: Path) -> None:
    window = ("--sink-tokens", "1", "--recent-tokens", "4")
    command("gradients", "./model", *WORDS, *window, "--formats", FORMATS, "--out", "there")
    scores = kvprof.gradients("./model", **TEXT, **WINDOW, formats=FORMATS.split(","))
    assert scores.to_text() == Path("there/gradients.json").read_text()
    assert all(0 < value < 10 for entry in scores.layers for value in (entry.key.loss_increase or {}).values())


def test_spectra_are_the_commands_to_the_byte(folder: Path) -> None:
    command("spectra", "./model", *WORDS, "--out", "there")
    assert kvprof.spectra("./model", **TEXT).to_text() == Path("there/spectra.json").read_text()


def test_a_plan_is_the_commands_but_for_the_words_that_asked_for_it(folder: Path) -> None:
    scores = kvprof.norms("./model")
    scores.save("norms.json")
    command(
        "allocate", "--budget", "3.5", "--bits", "2,4,8", "--pin", "key:0=8", "--scores", "norms.json", "--out", "p"
    )
    written = BitPlan.load("p/plan-3.50.json")
    plan = kvprof.allocate(scores, 3.5, bits=[2, 4, 8], pin="key:0=8")
    assert plan.provenance is not None
    assert plan.provenance.command == "kvprof.allocate(scores, budget=3.5, bits=(2, 4, 8), pin=('key:0=8',))"
    assert plan.model_copy(update={"provenance": written.provenance}).to_text() == written.to_text()
    assert kvprof.allocate("norms.json", budget="3.5", bits="2,4,8", pin=["key:0=8"]).layers == plan.layers


def test_an_evaluation_is_the_commands_to_the_byte_rivals_and_all(folder: Path) -> None:
    command("norms", "./model", "--out", "there")
    command("gradients", "./model", *WORDS, "--formats", "none", "--out", "there")
    plan = kvprof.allocate("there/norms.json", 3, out="plan.json", **WINDOW, group_size=8)
    other = kvprof.allocate("there/norms.json", 2, out="other.json", **WINDOW, group_size=8)
    command("evaluate", "plan.json", "--model", "./model", "--against", "other.json", *WORDS, "--out", "there")
    theirs = Evaluation.load("there/evaluation.json")
    ours = kvprof.evaluate(plan, "./model", against={"other": other}, **TEXT, out="there", restart=True)
    assert ours.to_text() == theirs.to_text()
    assert {entry.role for entry in ours.plans} == {"plan", "rival", "against"}


def test_nothing_is_written_unless_a_folder_is_named(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    plan = kvprof.allocate(kvprof.norms("./model"), 3, **WINDOW, group_size=8)
    kvprof.gradients("./model", **TEXT, formats="none")
    kvprof.evaluate(plan, "./model", rivals=False, **TEXT)
    assert sorted(folder.rglob("*")) == before
    kvprof.norms("./model", out="there")
    assert sorted(path.name for path in Path("there").iterdir()) == ["norms.json"]


def test_progress_is_told_to_whom_asks_and_shown_to_nobody(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kvprof"), "handlers", [])  # which a command before may have added
    seen: list[tuple[int, int]] = []
    kvprof.gradients("./model", **TEXT, formats="none", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert capfd.readouterr() == ("", "")


def test_a_lent_model_has_the_scores_of_its_folder_and_is_given_back_as_it_was(folder: Path) -> None:
    model, tokenizer = lent()
    before = state(model)
    assert without_id(kvprof.norms(model)) == without_id(kvprof.norms("./model"))
    options = TEXT | WINDOW | {"formats": FORMATS}
    lent_scores = kvprof.gradients(model, tokenizer=tokenizer, **options)
    assert without_id(lent_scores) == without_id(kvprof.gradients("./model", **options))
    plan = kvprof.allocate(lent_scores, 5)
    found = kvprof.evaluate(plan, model, tokenizer=tokenizer, rivals=False, **TEXT)
    assert found.plans == kvprof.evaluate(plan, "./model", rivals=False, **TEXT).plans
    assert state(model) == before


def test_a_lent_model_is_given_back_after_a_failure_too(folder: Path) -> None:
    model, tokenizer = lent()
    before = state(model)
    with pytest.raises(UsageError, match="--sequence-length 65"):
        kvprof.gradients(model, tokenizer=tokenizer, **TEXT | {"sequence_length": 65})
    assert state(model) == before


def test_a_lent_model_that_was_cast_is_measured_in_the_dtype_that_it_has(folder: Path) -> None:
    model, _ = lent()
    scores = kvprof.norms(model.to(torch.bfloat16))
    assert scores.geometry is not None
    assert scores.geometry.dtype == "bfloat16"
    whole = kvprof.norms("./model")
    for half, full in zip(scores.layers, whole.layers, strict=True):
        assert half.key.frobenius_norm == pytest.approx(full.key.frobenius_norm, rel=1e-2)
        assert half.key.frobenius_norm != full.key.frobenius_norm


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "phi3"])
def test_norms_of_a_lent_model_are_those_of_its_files_in_other_layouts(in_tmp: Path, name: str) -> None:
    model = tiny_model(name)
    model.save_pretrained("model")
    assert without_id(kvprof.norms(model)) == without_id(kvprof.norms("./model"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs its tokenizer"),
        ({"tokenizer": object(), "dtype": "float16"}, "is loaded, in float32"),
        ({"tokenizer": object(), "stream": True}, "Name its folder"),
    ],
)
def test_a_lent_model_is_not_changed_to_suit_options(in_tmp: Path, options: dict[str, object], message: str) -> None:
    if "tokenizer" in options:
        save_folder(in_tmp / "model")
        options = options | {"tokenizer": AutoTokenizer.from_pretrained("model")}
    save_text(in_tmp / "text.txt")
    with pytest.raises(UsageError, match=message):
        kvprof.gradients(tiny_model("llama"), **TEXT | options)


def test_a_lent_model_is_not_moved() -> None:
    model = tiny_model("llama")
    check_loaded(model, "float32", torch.device("cpu"), stream=False)
    with pytest.raises(UsageError, match="is loaded, on cpu"):
        check_loaded(model, "auto", torch.device("cuda:0"), stream=False)


def test_a_model_with_weights_left_elsewhere_is_refused(in_tmp: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].self_attn.k_proj.to("meta")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_proj\.weight is not in memory"):
        kvprof.norms(model)


def test_what_is_no_model_is_refused(in_tmp: Path) -> None:
    with pytest.raises(UsageError, match=r"a torch\.nn\.modules\.linear\.Linear is no model"):
        kvprof.norms(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="goes with a loaded model"):
        kvprof.norms("./model", tokenizer=object())
    with pytest.raises(ModelError, match="there is no model at"):
        kvprof.norms("./model")


def test_what_is_no_record_and_no_file_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="a dict is no Scores"):
        kvprof.allocate({}, 3)
    with pytest.raises(UsageError, match="a int is no plan"):
        kvprof.evaluate(3)
    with pytest.raises(UsageError, match=r"a kvprof\.records\.scores\.Scores is no plan"):
        kvprof.evaluate(kvprof.norms("./model"), "./model")


def test_wrong_options_are_refused_before_a_model_is_looked_for(in_tmp: Path) -> None:
    for options in (
        {"sink_tokens": -1},
        {"recent_tokens": 2**40},
        {"recent_tokens": 2.5},
        {"suffix_fraction": 0},
        {"suffix_fraction": "0.5"},
        {"seed": -1},
        {"seed": "a"},
        {"sequences": 2.5},
        {"sequences": "2"},
        {"batch_size": True},
    ):
        with pytest.raises(UsageError, match=f"{next(iter(options))}="):
            kvprof.gradients("./nowhere", **options)
    with pytest.raises(UsageError, match="until_stable"):
        kvprof.gradients("./nowhere", stable_at=3)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("norms", {"out": 5}, "out=5: a path is needed"),
        ("norms", {"progress": 5}, "progress=5: a function of"),
        ("norms", {"restart": "yes"}, "restart='yes': True or False is needed"),
        ("gradients", {"progress": 5}, "progress=5"),
        ("gradients", {"batch_size": None}, "batch_size=None: a whole number is needed"),
        ("gradients", {"split": 3}, "split=3: a word is needed"),
        ("gradients", {"pack": 1}, "pack=1: True or False is needed"),
        ("spectra", {"sequences": None}, "sequences=None: a whole number is needed"),
        ("allocate", {"budget": 6, "tie": 3}, "tie=3: a word is needed"),
        ("allocate", {"budget": 6, "out": 5}, "out=5"),
        ("allocate", {"scores": "a\0b"}, "is no path: it holds a zero byte"),
        ("evaluate", {"plan": "plan.json", "against": 5}, "against=5: plans, their files"),
        ("evaluate", {"plan": "plan.json", "sequences": None}, "sequences=None"),
        ("evaluate", {"plan": "plan.json", "out": 7}, "out=7"),
        ("evaluate", {"plan": "plan.json", "rivals": "x"}, "rivals='x': True or False is needed"),
        ("evaluate", {"plan": "plan.json", "exact": "x"}, "exact='x'"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(
    in_tmp: Path, function: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(KvprofError, match=re.escape(words)):
        getattr(kvprof, function)(**options)


def test_no_text_is_not_the_usual_text(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"data=\[\]: it names nothing"):
        kvprof.gradients("./model", data=[])


def test_a_cache_is_made_for_a_loaded_model(folder: Path) -> None:
    plan = kvprof.allocate(kvprof.norms("./model"), 4, bits=4)
    with pytest.raises(KvprofError, match="a str is no model"):
        kvprof.PlanCache.from_plan(plan, "./model")


def test_what_is_no_list_of_words_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="data=3: a word is needed"):
        kvprof.gradients("./model", data=3)
    with pytest.raises(UsageError, match="4 is no text"):
        kvprof.gradients("./model", formats=4)


def test_torch_s_own_dtypes_and_devices_are_named_like_their_words(folder: Path) -> None:
    given = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert kvprof.spectra("./model", **{**TEXT, **given}) == kvprof.spectra("./model", **TEXT, dtype="float32")


def test_a_limit_in_bytes_and_one_width_may_be_numbers(folder: Path) -> None:
    scores = kvprof.norms("./model")
    asked = {"context": 200, "metric": "spectral_norm"}
    assert (
        kvprof.allocate(scores, memory=38_000, **asked).layers == kvprof.allocate(scores, memory="38kB", **asked).layers
    )
    plan = kvprof.allocate(scores, 4, bits=4)
    assert {entry.key.bits for entry in plan.layers} == {4}
    for options in ({"context": "200"}, {"batch": 1.5}, {"group_size": "32"}):
        with pytest.raises(UsageError, match=f"{next(iter(options))}=.*a whole number"):
            kvprof.allocate(scores, memory="1MiB", **options)


def test_an_infeasible_budget_is_an_error_of_its_own(folder: Path) -> None:
    scores = kvprof.norms("./model")
    with pytest.raises(InfeasibleBudget, match="cheapest plan"):
        kvprof.allocate(scores, 0.5)
    with pytest.raises(UsageError, match="needs a limit"):
        kvprof.allocate(scores)
    with pytest.raises(KvprofError, match="min_key_bits=0"):
        kvprof.allocate(scores, 3, min_key_bits=0)


def test_check_raises_where_a_plan_is_beaten(folder: Path) -> None:
    scores = kvprof.norms("./model")
    uniform = {"rule": "uniform", "group_size": 8, **WINDOW}
    coarse = kvprof.allocate(scores, bits_key=2, bits_value=2, **uniform)
    fine = kvprof.allocate(scores, bits_key=2, bits_value=1, **uniform)
    options = {"rivals": False, "check": True, **TEXT}
    with pytest.raises(NotBetter, match="plan is no better than same"):
        kvprof.evaluate(coarse, "./model", against={"same": coarse}, **options)
    with pytest.raises(UsageError, match="nothing to compare with"):
        kvprof.evaluate(coarse, "./model", **options)
    assert len(kvprof.evaluate(fine, "./model", rivals=False, **TEXT).plans) == 1
