"""lm_eval's tasks through a plan's cache, beside lm_eval's own `hf` model and beside decoding token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import break_tokenizer, save_folder
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM

import kvprof
from kvprof import BitPlan, PlanCache
from kvprof.errors import CalibrationError, Mismatch, ModelError, UsageError
from kvprof.evaluate.harness import MODEL, register
from kvprof.evaluate.harness_model import HarnessModel

TASKS = Path(__file__).parents[1] / "data" / "harness"
ROWS = [json.loads(line) for line in (TASKS / "words.jsonl").read_text().splitlines()]
WINDOW = {"group_size": 4, "sink_tokens": 1, "recent_tokens": 2}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """A model, two plans for it of which one loses nothing, and tasks; the plans' window is small enough to leave."""
    with_end_of_text(save_folder(in_tmp / "model"))
    scores = kvprof.norms("model")
    kvprof.allocate(scores, rule="uniform", bits_key=2, bits_value=2, **WINDOW, out="plan.json")
    kvprof.allocate(scores, rule="uniform", bits_key=16, bits_value=16, **WINDOW, out="full.json")
    (in_tmp / "words.jsonl").write_text((TASKS / "words.jsonl").read_text())
    return in_tmp


def with_end_of_text(folder: Path) -> Path:
    """Give a folder's tokenizer an end of text, which lm_eval needs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "all"})
    tokenizer.save_pretrained(folder)
    return folder


def requests(kind: str) -> list[Instance]:
    """Return what lm_eval asks of a model in a task over the rows."""
    arguments: list[tuple[Any, ...]] = [(row["text"], f" {choice}") for row in ROWS for choice in row["choices"]]
    if kind == "loglikelihood":
        arguments += [("", row["text"]) for row in ROWS]
    if kind == "loglikelihood_rolling":
        arguments = [(f"{row['text']} {row['text']}",) for row in ROWS]
    if kind == "generate_until":
        arguments = [(row["text"], {"until": ["all"], "max_gen_toks": 12, "do_sample": False}) for row in ROWS]
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]  # type: ignore[arg-type]


def decoded(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Decode token by token through the packed cache: a continuation's log likelihood, and if it is the likeliest."""
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    cache = PlanCache.from_plan(BitPlan.load("plan.json"), model)
    total, likeliest = 0.0, True
    with torch.no_grad():
        for place, token in enumerate((context + continuation)[:-1]):
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
            following = place + 1 - len(context)
            if following >= 0:
                total += float(logits.log_softmax(-1)[continuation[following]])
                likeliest &= int(logits.argmax()) == continuation[following]
    return total, likeliest


@pytest.mark.parametrize("plan", [None, "full.json"])
@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_in_full_precision_the_answers_are_those_of_lm_evals_own_model(
    folder: Path, kind: str, plan: str | None
) -> None:
    theirs = HFLM("model", device="cpu", batch_size=2)
    ours = HarnessModel("model", plan, device="cpu", batch_size=2)
    expected, found = (getattr(model, kind)(requests(kind)) for model in (theirs, ours))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other, abs=1e-5) if kind != "generate_until" else other)


@pytest.mark.parametrize("exact", [False, True])
def test_log_likelihoods_are_those_of_decoding_token_by_token(folder: Path, exact: bool) -> None:
    model = HarnessModel("model", "plan.json", device="cpu", exact=exact)
    found = model.loglikelihood(requests("loglikelihood"))
    full = HarnessModel("model", device="cpu").loglikelihood(requests("loglikelihood"))
    tokenizer = AutoTokenizer.from_pretrained("model")
    for request, (number, likeliest) in zip(requests("loglikelihood"), found, strict=True):
        context, continuation = request.args
        before = tokenizer.encode(context) if context else [tokenizer.eos_token_id]
        expected = decoded(before, tokenizer.encode(continuation))
        assert number == pytest.approx(expected[0], abs=1e-4)
        assert likeliest == expected[1]
    assert max(abs(one[0] - other[0]) for one, other in zip(found, full, strict=True)) > 0.01


def test_a_tokenizer_that_fails_is_one_message(folder: Path) -> None:
    break_tokenizer(folder / "model")
    model = HarnessModel("model", "plan.json", device="cpu")
    for ask in (model.tok_encode, lambda text: model.tok_batch_encode([text])):
        ask("the cat")
        with pytest.raises(CalibrationError, match=r"fails on text: .*\n.*tokenizer files of the model"):
            ask("the dog")


def test_a_rolling_log_likelihood_begins_a_cache_with_each_window(folder: Path) -> None:
    model = HarnessModel("model", "plan.json", device="cpu", max_length=16)
    (request, *_) = requests("loglikelihood_rolling")
    ids = AutoTokenizer.from_pretrained("model").encode(request.args[0])
    assert 16 < len(ids) < 32
    eos = model.eot_token_id
    first, rest = ids[:16], ids[16:]
    # The last window is as long as the others: it begins with tokens that are only read.
    read = (first + rest)[-17 : -len(rest)]
    expected = decoded([eos], first)[0] + decoded(read, rest)[0]
    assert model.loglikelihood_rolling([request]) == [pytest.approx(expected, abs=1e-4)]


def test_text_is_decoded_through_the_packed_cache(folder: Path) -> None:
    found = HarnessModel("model", "plan.json", device="cpu", batch_size=4).generate_until(requests("generate_until"))
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    tokenizer = AutoTokenizer.from_pretrained("model")
    for request, text in zip(requests("generate_until"), found, strict=True):
        inputs = tokenizer(request.args[0], return_tensors="pt")
        cache = PlanCache.from_plan(BitPlan.load("plan.json"), model)
        tokens = model.generate(
            input_ids=inputs["input_ids"], past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0
        )[0, inputs["input_ids"].shape[1] :]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True).partition("all")[0]
    full = HarnessModel("model", device="cpu").generate_until(requests("generate_until"))
    assert found != full


def test_a_model_whose_attention_cannot_be_replaced_goes_token_by_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = HarnessModel("model", "plan.json", device="cpu").loglikelihood(requests("loglikelihood"))
    monkeypatch.setattr("kvprof.evaluate.harness_model.choose_route", lambda *arguments: "exact")
    slow = HarnessModel("model", "plan.json", device="cpu").loglikelihood(requests("loglikelihood"))
    assert [number for number, _ in slow] == pytest.approx([number for number, _ in fast], abs=1e-4)


def test_the_plans_own_model_is_taken_where_none_is_named_and_a_lent_one_as_it_is(folder: Path) -> None:
    named = HarnessModel(plan="plan.json", device="cpu").loglikelihood(requests("loglikelihood"))
    model = AutoModelForCausalLM.from_pretrained("model")
    lent = HarnessModel(model, BitPlan.load("plan.json"), tokenizer=AutoTokenizer.from_pretrained("model"))
    assert lent.loglikelihood(requests("loglikelihood")) == named
    assert lent.model is model


def test_arguments_that_nothing_knows_are_refused_with_the_nearest(folder: Path) -> None:
    for given, meant in [("pln", "plan"), ("max_lenght", "max_length"), ("batchsize", "batch_size")]:
        with pytest.raises(UsageError, match=f"unknown argument '{given}'.*did you mean '{meant}'"):
            HarnessModel.create_from_arg_string(f"pretrained=model,{given}=3")
    with pytest.raises(UsageError, match="unknown --dtype 'flat32': did you mean 'float32'"):
        HarnessModel("model", dtype="flat32")
    with pytest.raises(UsageError, match="--device cpuu"):
        HarnessModel("model", device="cpuu")
    with pytest.raises(ModelError, match="there is no model at"):
        HarnessModel("./modl")


def test_arguments_of_the_model_say_more_than_lm_evals_defaults(folder: Path) -> None:
    defaults = {"device": "cuda:0", "batch_size": 8, "max_batch_size": None}
    model = HarnessModel.create_from_arg_string("pretrained=model,device=cpu,max_length=20,dtype=bfloat16", defaults)
    assert (model.device.type, model.batch_size, model.max_length) == ("cpu", 8, 20)
    assert model.model.dtype == torch.bfloat16
    planned = HarnessModel.create_from_arg_obj({"pretrained": "model", "plan": "plan.json", "device": "cpu"}, defaults)
    assert planned.batch_size == 1


def test_another_models_plan_and_a_tokenizer_without_an_end_are_refused(folder: Path) -> None:
    tiny_model("llama-mha").save_pretrained("other")
    AutoTokenizer.from_pretrained("model").save_pretrained("other")
    with pytest.raises(Mismatch):
        HarnessModel("other", "plan.json", device="cpu")
    save_folder(folder / "endless")
    with pytest.raises(UsageError, match="prefix_token_id"):
        HarnessModel("endless", device="cpu")
    assert HarnessModel("endless", device="cpu", prefix_token_id=3).prefix_token_id == 3


def test_lm_eval_finds_the_model_by_its_entry_point(folder: Path) -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="lm_eval.models", name="kvprof")
    assert found.value == MODEL
    assert found.load() is HarnessModel
    register()
    register()  # twice is no harm
    assert model_registry.get("kvprof") is HarnessModel
    assert model_registry.get("hf") is HFLM


def test_the_plain_command_line_runs_offline_and_keeps_the_plan_with_its_results(folder: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "kvprof"),
            *("--model_args", "pretrained=model,plan=plan.json,device=cpu"),
            *("--tasks", "words_choice,words_rolling,words_written", "--include_path", str(TASKS)),
            *("--output_path", "results", "--log_samples"),
        ],
        env=os.environ | OFFLINE | {"HF_DATASETS_CACHE": str(folder / "datasets")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = Path("results").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["plan"] == BitPlan.load("plan.json").digest
    model = HarnessModel("model", "plan.json", device="cpu")
    (path,) = Path("results").rglob("samples_words_choice_*.jsonl")
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    found = [float(answer[0][0]) for row in sorted(logged, key=lambda row: row["doc_id"]) for answer in row["resps"]]
    choices = model.loglikelihood(requests("loglikelihood"))[: len(found)]
    assert found == pytest.approx([number for number, _ in choices], abs=1e-5)
    rolling = model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (row["text"],), 0) for row in ROWS]  # type: ignore[arg-type]
    )
    words = sum(len(row["text"].split()) for row in ROWS)
    perplexity = results["results"]["words_rolling"]["word_perplexity,none"]
    assert perplexity == pytest.approx(torch.tensor(-sum(rolling) / words).exp().item(), rel=1e-4)


def test_a_failure_of_kvprofs_own_command_is_one_message(folder: Path) -> None:
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "kvprof.evaluate.harness",
                "--model",
                "kvprof",
                "--model_args",
                "plan=nowhere.json",
            ),
            *("--tasks", "words_choice", "--include_path", str(TASKS)),
        ],
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nowhere.json" in done.stderr.splitlines()[-1]


def test_importing_torch_loads_no_lm_eval() -> None:
    script = "import sys, torch; sys.exit('lm_eval' in sys.modules or 'pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
