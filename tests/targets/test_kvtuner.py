"""KVTuner's published files become plans; whatever is wrong with one is said in a message, and nothing is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from tiny import tiny_model
from typer.testing import CliRunner, Result

from kvprof import BitPlan
from kvprof.cli.app import app
from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import Window
from kvprof.targets.kvtuner_import import kvtuner_plan, read_kvtuner

PUBLISHED = Path(__file__).parents[1] / "data" / "kvtuner_llama31_8b_kivi_4_1.yaml"
TWO_LAYERS = "0:\n  nbits_key: 4\n  nbits_value: 2\n1:\n  nbits_key: 8\n  nbits_value: 4\n"
BAD = "bits.yaml"


def run(*arguments: str | Path) -> Result:
    """Run `kvprof import`; an exception that is no exit is a failure."""
    result = CliRunner().invoke(app, ["import", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(path: str = BAD) -> str:
    """Import a bad file, hold the command to its exit code and its silence, and return its message."""
    before = sorted(Path().rglob("*"))
    result = run(path, "--from", "kvtuner")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) <= 3
    assert sorted(Path().rglob("*")) == before
    return result.output


# The plan


def test_the_published_file_has_the_published_means() -> None:
    plan = kvtuner_plan(read_kvtuner(PUBLISHED))
    assert plan.model.num_layers == len(plan.layers) == 32
    assert mean(entry.key.bits for entry in plan.layers) == 4.0
    assert mean(entry.value.bits for entry in plan.layers) == 2.5
    assert plan.budget is not None
    assert (plan.budget.nominal_bits, plan.budget.stored_bits, plan.budget.requested) == (3.25, 4.25, None)
    assert (plan.layers[13].key.bits, plan.layers[13].value.bits) == (8, 4)
    assert (plan.layers[31].key.bits, plan.layers[31].value.bits) == (4, 4)


def test_the_formats_and_the_window_are_those_of_kivi() -> None:
    plan = kvtuner_plan(read_kvtuner(PUBLISHED))
    assert {(entry.key.axis, entry.key.group_size, entry.key.clip) for entry in plan.layers} == {
        ("channel", 32, "none")
    }
    assert {(entry.value.axis, entry.value.group_size) for entry in plan.layers} == {("token", 32)}
    assert plan.window == Window(sink_tokens=0, recent_tokens=32)
    assert plan.solver is not None
    assert (plan.solver.method, plan.solver.metric, plan.solver.optimal) == ("kvtuner", None, False)


def test_layers_may_stand_in_any_order_and_in_any_style_of_yaml(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text("# two layers\n{1: {nbits_value: 16, nbits_key: 1}, 0: {nbits_key: 5, nbits_value: 6}}\n")
    layers = read_kvtuner(path)
    assert list(layers) == [0, 1]
    assert [tuple(bits) for bits in layers.values()] == [(5, 6), (1, 16)]


def test_groups_of_values_are_capped_at_the_head_where_the_model_is_known(tmp_path: Path) -> None:
    path = tmp_path / BAD
    path.write_text(TWO_LAYERS)
    shapes = [KVLayer(layer=n, kind="full", kv_heads=2, key_head_dim=64, value_head_dim=64) for n in range(2)]
    geometry = CacheGeometry(dtype="float32", layers=tuple(shapes))
    plan = kvtuner_plan(read_kvtuner(path), geometry=geometry, group_size=128)
    assert [(entry.key.group_size, entry.value.group_size) for entry in plan.layers] == [(128, 64)] * 2
    assert plan.budget is not None
    assert plan.budget.bytes_per_token is not None


# The command


def test_import_writes_a_plan_that_says_where_it_comes_from(in_tmp: Path) -> None:
    result = run(PUBLISHED, "--from", "kvtuner")
    assert result.exit_code == 0, result.output
    path = Path("outputs/kvtuner_llama31_8b_kivi_4_1/plan-kvtuner_llama31_8b_kivi_4_1.json")
    assert f"written to {path}" in result.output
    assert "mean key bits over 32 layers: 4.0000" in result.output
    plan = BitPlan.load(path)
    assert plan.provenance is not None
    assert plan.provenance.command is not None
    assert plan.provenance.command.startswith("kvprof")
    assert (plan.model.id, plan.geometry) == (None, None)


def test_options_reach_the_plan(in_tmp: Path) -> None:
    options = ("--group-size", "64", "--recent-tokens", "100", "--sink-tokens", "4", "--out", "mine/plan.json")
    assert run(PUBLISHED, "--from", "kvtuner", *options).exit_code == 0
    plan = BitPlan.load("mine/plan.json")
    assert plan.window == Window(sink_tokens=4, recent_tokens=100)
    assert {entry.key.group_size for entry in plan.layers} == {64}
    assert run(PUBLISHED, "--from", "kvtuner", "--out", "folder").exit_code == 0
    assert Path("folder/plan-kvtuner_llama31_8b_kivi_4_1.json").is_file()


def test_a_tool_that_kvprof_does_not_know_is_a_usage_error(in_tmp: Path) -> None:
    result = run(PUBLISHED, "--from", "kvtunr")
    assert result.exit_code == 2
    assert "did you mean 'kvtuner'?" in result.output
    assert run(PUBLISHED).exit_code == 2
    assert not list(in_tmp.iterdir())


def test_with_a_model_the_plan_is_checked_and_is_that_models(in_tmp: Path) -> None:
    tiny_model("llama").save_pretrained("model")
    Path(BAD).write_text(TWO_LAYERS)
    result = run(BAD, "--from", "kvtuner", "--model", "./model", "--out", "plan.json")
    assert result.exit_code == 0, result.output
    plan = BitPlan.load("plan.json")
    assert plan.model.id == str((in_tmp / "model").resolve())
    assert plan.model.fingerprint is not None
    assert plan.geometry is not None
    validated = CliRunner().invoke(app, ["validate", "plan.json", "./model"])
    assert validated.exit_code == 0, validated.output


def test_a_file_for_a_model_of_more_layers_exits_with_four(in_tmp: Path) -> None:
    tiny_model("llama").save_pretrained("model")
    result = run(PUBLISHED, "--from", "kvtuner", "--model", "./model", "--out", "plan.json")
    assert result.exit_code == 4
    assert "layer 2, and the model has 2 layers" in result.output
    assert not Path("plan.json").exists()


def test_layers_that_slide_need_no_bits_and_those_that_the_model_skips_have_none(in_tmp: Path) -> None:
    tiny_model("gemma3").save_pretrained("model")
    Path(BAD).write_text("1: {nbits_key: 4, nbits_value: 2}\n")
    assert run(BAD, "--from", "kvtuner", "--model", "./model", "--out", "plan.json").exit_code == 0
    plan = BitPlan.load("plan.json")
    assert [(entry.layer, entry.reason) for entry in plan.skipped or ()] == [(0, "sliding window of 16 tokens")]
    Path(BAD).write_text(TWO_LAYERS)
    assert run(BAD, "--from", "kvtuner", "--model", "./model", "--out", "both.json").exit_code == 0
    assert [entry.layer for entry in BitPlan.load("both.json").layers] == [0, 1]
    tiny_model("bamba").save_pretrained("recurrent")
    result = run(BAD, "--from", "kvtuner", "--model", "./recurrent", "--out", "other.json")
    assert result.exit_code == 4
    assert "layer 0, which the model skips" in result.output
    assert not Path("other.json").exists()


def test_a_layer_of_the_model_without_bits_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / BAD
    path.write_text(TWO_LAYERS)
    shapes = [KVLayer(layer=n, kind="full", kv_heads=2, key_head_dim=64, value_head_dim=64) for n in range(3)]
    with pytest.raises(Mismatch, match="no bits to layer 2, and the model has 3 layers"):
        kvtuner_plan(read_kvtuner(path), geometry=CacheGeometry(dtype="float32", layers=tuple(shapes)))


def test_importing_without_a_model_loads_no_torch(in_tmp: Path) -> None:
    code = f"""
import sys
sys.argv = ["kvprof", "import", {str(PUBLISHED)!r}, "--from", "kvtuner"]
from kvprof.__main__ import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
assert not {{"torch", "transformers", "safetensors"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Bad files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a mapping, found nothing"),
        ("# nothing\n", "expected a mapping, found nothing"),
        ("{}", "names no layer"),
        ("[1, 2]", "expected a mapping, found a list"),
        ("4", "expected a mapping, found 4"),
        ("0: [", "line 1: not valid YAML"),
        ("0: {nbits_key: 4\n", "not valid YAML"),
        ("\t0: 1", "not valid YAML"),
        ("0: \x01", "not valid YAML"),
        ("--- {}\n--- {}\n", "line 2: not valid YAML"),
        ("!!python/object/apply:os.system {a: b}", "expected a mapping, found a mapping with a tag"),
        ("0: 4", "layer 0: expected a mapping, found 4"),
        ("0:\n", "layer 0: expected a mapping, found nothing"),
        ("0: {nbits_key: 4}", "layer 0 has no nbits_value"),
        ("0: {nbits_value: 4}", "layer 0 has no nbits_key"),
        ("0: {}", "layer 0 has no nbits_key"),
        (
            "0: {nbits_key: 4, nbits_values: 4}",
            "line 1: layer 0: unknown key nbits_values: did you mean 'nbits_value'?",
        ),
        ("0: {0: {nbits_key: 4, nbits_value: 4}}", "layer 0: unknown key 0: choose from nbits_key, nbits_value"),
        ("0: {[1]: 4}", "unknown key a list"),
        ("0: {nbits_key: 4, nbits_key: 8, nbits_value: 4}", "nbits_key stands twice"),
        (TWO_LAYERS + "0: {nbits_key: 4, nbits_value: 2}", "line 7: layer 0 stands for the second time"),
        ("0: {nbits_key: 4, nbits_value: 2}\n00: {nbits_key: 4, nbits_value: 2}", "00 is not the number of a layer"),
        ("true: {nbits_key: 4, nbits_value: 2}", "true is not the number of a layer"),
        ("'0': {nbits_key: 4, nbits_value: 2}", "'0' is not the number of a layer"),
        ("-1: {nbits_key: 4, nbits_value: 2}", "-1 is not the number of a layer"),
        ("layers: {nbits_key: 4, nbits_value: 2}", "layers is not the number of a layer"),
        ("99999999999: {nbits_key: 4, nbits_value: 2}", "is not the number of a layer"),
        ("[0]: {nbits_key: 4, nbits_value: 2}", "a list is not the number of a layer"),
        ("1: {nbits_key: 4, nbits_value: 2}", "no bits to layer 0"),
        (TWO_LAYERS + "3: {nbits_key: 4, nbits_value: 2}", "no bits to layer 2"),
        ("0: {nbits_key: true, nbits_value: 2}", "nbits_key is true; choose from 1, 2, 3, 4, 5, 6, 8, 16"),
        ("0: {nbits_key: '4', nbits_value: 2}", "nbits_key is '4'; choose from"),
        ("0: {nbits_key: 4.0, nbits_value: 2}", "nbits_key is 4.0"),
        ("0: {nbits_key: 7, nbits_value: 2}", "nbits_key is 7"),
        ("0: {nbits_key: 0, nbits_value: 2}", "nbits_key is 0"),
        ("0: {nbits_key: -1, nbits_value: 2}", "nbits_key is -1"),
        ("0: {nbits_key: , nbits_value: 2}", "nbits_key is nothing"),
        ("0: {nbits_key: 4, nbits_value: {a: 1}}", "nbits_value is a mapping"),
        ("0: {nbits_key: " + "4" * 5000 + ", nbits_value: 2}", "..."),
        ("0: &a {nbits_key: 4, nbits_value: 2}\n1: *a\n", "line 1: no anchors and aliases"),
        ("0: {<<: {nbits_key: 4, nbits_value: 2}}", "unknown key <<"),
        ("[" * 20_000 + "]" * 20_000, "nested too deeply"),
    ],
    ids=range(42),
)
def test_a_bad_file_is_one_message(in_tmp: Path, text: str, words: str) -> None:
    Path(BAD).write_text(text)
    said = refusal()
    assert words in said
    assert BAD in said or "no bits to layer" in said


def test_a_bomb_of_aliases_is_refused_before_it_can_grow(in_tmp: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    Path(BAD).write_text("\n".join(lines))
    assert "line 1: no anchors and aliases" in refusal()


def test_what_is_no_text_file_is_refused(in_tmp: Path) -> None:
    assert "no such file" in refusal("nowhere.yaml")
    Path("folder").mkdir()
    assert "Is a directory" in refusal("folder")
    Path(BAD).write_bytes(b"0: {nbits_key: \xff}")
    assert "not UTF-8" in refusal()
    Path(BAD).write_text(TWO_LAYERS, encoding="utf-16")
    assert "not UTF-8" in refusal()
    Path(BAD).write_text("# " + "x" * 2**17)
    assert "more than 131072 bytes" in refusal()
    assert "more than 131072 bytes" in refusal("/dev/zero")


def test_a_layer_is_missing_where_no_model_explains_it(tmp_path: Path) -> None:
    path = tmp_path / BAD
    path.write_text("1: {nbits_key: 4, nbits_value: 2}")
    with pytest.raises(InvalidFile, match=r"no bits to layer 0[^$]*--model"):
        kvtuner_plan(read_kvtuner(path))
