"""Which files a report is made of: the newest of each kind, all of one model, nothing mixed in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import report_factories

from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.document import ModelInfo
from kvprof.records.inventory import Inventory
from kvprof.records.scores import Scores
from kvprof.workspace.report_inputs import folder_of, gather

OTHER = {"id": "other", "fingerprint": "sha256:two", "architecture": "LlamaForCausalLM", "num_layers": 4}


def test_every_kind_of_file_is_found(tmp_path: Path) -> None:
    files = gather(report_factories.save_all(tmp_path))
    assert [found.path.name for found in files.all] == [
        "norms.json", "spectra.json", "gradients.json", "plan-3.00.json", "frontier.json", "evaluation.json",
        "audit.json",
    ]  # fmt: skip
    assert files.model.id == "handmade"
    assert files.model.fingerprint == "sha256:one"
    assert files.geometry is not None
    assert files.remarks == ()


def test_the_newest_plan_is_shown_with_its_own_scores_and_its_own_evaluation(tmp_path: Path) -> None:
    old = report_factories.gradients(source="old")
    mine = report_factories.plan(old)
    for path in (
        old.save(tmp_path / "gradients-old.json"),
        report_factories.plan().save(tmp_path / "plan-2.00.json"),
        report_factories.evaluation(mine).save(tmp_path / "evaluation-mine.json"),
    ):
        report_factories.age(path, 100)
    report_factories.gradients().save(tmp_path / "gradients.json")
    mine.save(tmp_path / "plan-3.00.json")
    report_factories.evaluation().save(tmp_path / "evaluation.json")
    files = gather(tmp_path)
    assert files.plan is not None
    assert files.plan.path.name == "plan-3.00.json"
    assert files.losses is not None
    assert files.losses.path.name == "gradients-old.json"
    assert files.evaluation is not None
    assert files.evaluation.path.name == "evaluation-mine.json"
    assert [found.path.name for found in files.more_evaluations] == ["evaluation.json"]


def test_named_files_come_before_all_others(tmp_path: Path) -> None:
    folder, elsewhere = report_factories.save_all(tmp_path / "a"), tmp_path / "b"
    elsewhere.mkdir()
    scores = report_factories.gradients(source="mine").save(elsewhere / "scores.json")
    plan = report_factories.plan().save(elsewhere / "plan.json")
    evaluation = report_factories.evaluation(measured_from=0).save(elsewhere / "evaluation.json")
    files = gather(folder, [plan, scores, evaluation])
    assert files.plan is not None
    assert files.losses is not None
    assert files.evaluation is not None
    assert (files.plan.path, files.losses.path, files.evaluation.path) == (plan, scores, evaluation)
    assert files.more_evaluations == ()  # measured from another position on


def test_files_of_another_model_are_passed_over_with_a_remark_that_names_them(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path)
    (tmp_path / "plan-3.00.json").unlink()
    report_factories.plan(model=OTHER).save(tmp_path / "plan-9.99.json")
    files = gather(tmp_path)
    assert files.plan is None
    assert len(files.remarks) == 1
    assert "plan-9.99.json" in files.remarks[0]
    assert "other" in files.remarks[0]


def test_the_fingerprint_that_most_files_have_is_the_models(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path)
    report_factories.norms(model=OTHER).save(tmp_path / "norms.json")  # the newest of all
    files = gather(tmp_path)
    assert files.model.fingerprint == "sha256:one"
    assert files.norms is None


def test_a_named_file_of_another_model_is_refused(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path / "a")
    named = [tmp_path / "a" / "norms.json", report_factories.plan(model=OTHER).save(tmp_path / "plan.json")]
    with pytest.raises(Mismatch, match=r"plan\.json is not of the model .* fingerprint sha256:two"):
        gather(tmp_path / "a", named)


def test_a_named_file_decides_which_model_it_is(tmp_path: Path) -> None:
    folder = report_factories.save_all(tmp_path)
    files = gather(folder, [report_factories.norms(model=OTHER).save(tmp_path / "mine.json")])
    assert files.model.id == "other"
    assert [found.path.name for found in files.all] == ["mine.json"]
    assert len(files.remarks) == 7


@pytest.mark.parametrize("name", ["plan-1.00.json", "gradients.json", "evaluation-x.json"])
def test_a_broken_file_of_a_name_of_ours_leaves_a_remark(tmp_path: Path, name: str) -> None:
    report_factories.save_all(tmp_path)
    (tmp_path / name).write_text("{")
    assert len([remark for remark in gather(tmp_path).remarks if name in remark]) == 1


def test_other_json_files_are_nobodys_business(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path)
    (tmp_path / "package.json").write_text("{}")
    assert gather(tmp_path).remarks == ()


def test_scores_that_are_one_part_of_many_are_passed_over(tmp_path: Path) -> None:
    whole = json.loads(report_factories.gradients().to_text())
    for entry in whole["layers"]:
        for tensor in ("key", "value"):
            entry[tensor]["gradient_norm_samples"] = [1.0] * 4
    text = whole["calibration"] | {"sequences": 8, "tokens": 4096}
    whole["shard"] = {"number": 1, "of": 2, "sequences": [0, 1, 2, 3], "text": text, "settings": {}}
    Scores.from_json(whole, "part").save(tmp_path / "gradients.json")
    report_factories.norms().save(tmp_path / "norms.json")
    files = gather(tmp_path)
    assert files.losses is None
    assert "kvprof merge" in files.remarks[0]


def test_a_measured_divergence_is_no_prediction(tmp_path: Path) -> None:
    report_factories.gradients(source="divergence").save(tmp_path / "divergence.json")
    report_factories.norms().save(tmp_path / "norms.json")
    assert gather(tmp_path).losses is None


def test_shapes_of_the_model_at_hand_decide_before_any_count_of_files(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path)
    here = report_factories.norms(layers=6)
    assert here.geometry is not None
    here.save(tmp_path / "norms-6.json")
    inventory = Inventory(model=ModelInfo(id="handmade", num_layers=6), geometry=here.geometry, red_flags=())
    files = gather(tmp_path, inventory=inventory)
    assert [found.path.name for found in files.all] == ["norms-6.json"]
    assert len(files.remarks) == 7


def test_a_config_of_other_shapes_than_the_files_is_left_out_with_a_remark(tmp_path: Path) -> None:
    files = gather(report_factories.save_all(tmp_path))
    shapes = report_factories.norms(layers=6).geometry
    assert shapes is not None
    changed = files.with_inventory(Inventory(model=files.model, geometry=shapes, red_flags=()))
    assert changed.inventory is None
    assert changed.geometry == files.geometry
    assert "another one" in changed.remarks[-1]


def test_scores_written_by_hand_are_taken_as_they_are(tmp_path: Path) -> None:
    layers = [{"layer": n, "key": {"spectral_norm": 2.0}, "value": {"spectral_norm": 1.0}} for n in range(3)]
    (tmp_path / "norms.json").write_text(json.dumps({"schema": "kvprof.scores/1", "layers": layers}))
    files = gather(tmp_path)
    assert files.model.num_layers == 3
    assert files.geometry is None
    assert files.norms is not None


def test_scores_written_by_hand_for_another_number_of_layers_are_passed_over(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path)
    layers = [{"layer": n, "key": {"spectral_norm": 2.0}, "value": {"spectral_norm": 1.0}} for n in range(3)]
    (tmp_path / "norms.json").write_text(json.dumps({"schema": "kvprof.scores/1", "layers": layers}))
    files = gather(tmp_path)
    assert files.norms is None
    assert "norms.json" in files.remarks[0]


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="nothing to report on"):
        gather(tmp_path)


def test_a_folder_of_a_file_that_cannot_be_read_is_said_to_hold_it(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema": "kvprof.plan/1", "model": {"num_layers": 0}}')
    with pytest.raises(InvalidFile, match=r"(?s)nothing to report on.*passed over.*plan.json") as caught:
        gather(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_is_found_by_the_models_name_its_path_or_by_being_the_newest(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    report_factories.save_all(outputs / "demo")
    later = report_factories.save_all(outputs / "org--name")
    for path in (outputs / "demo").glob("*.json"):
        report_factories.age(path, 100)
    assert folder_of("demo", outputs=outputs) == outputs / "demo"
    assert folder_of("org/name", outputs=outputs) == later
    assert folder_of(str(outputs / "demo"), outputs=outputs) == outputs / "demo"
    assert folder_of(None, outputs=outputs) == later
    shutil.rmtree(outputs)
    assert folder_of(None, outputs=outputs) == outputs / "demo"


def test_a_models_own_folder_is_not_taken_for_one_with_results(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert folder_of(str(tmp_path / "model"), outputs=tmp_path / "outputs").parent == tmp_path / "outputs"


def test_a_file_of_other_shapes_than_most_is_passed_over(tmp_path: Path) -> None:
    report_factories.save_all(tmp_path)
    wide = json.loads(report_factories.norms().to_text())["geometry"]
    wide["layers"][1]["kv_heads"] = 5
    report_factories.norms(geometry=wide).save(tmp_path / "norms.json")
    files = gather(tmp_path)
    assert files.geometry == report_factories.plan().geometry
    assert files.norms is None
    assert "5 KV heads" in files.remarks[0]


def test_a_named_file_says_whose_folder_it_is(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    report_factories.save_all(outputs / "other")
    mine = report_factories.save_all(outputs / "handmade")
    for path in mine.glob("*.json"):
        report_factories.age(path, 100)
    plan = report_factories.plan().save(tmp_path / "elsewhere" / "plan.json")
    assert folder_of(None, [plan], outputs) == mine
    shutil.rmtree(mine)
    assert folder_of(None, [plan], outputs) == plan.parent
