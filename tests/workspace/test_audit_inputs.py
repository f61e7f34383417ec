"""Is what lies beside a divergence found, what is named read, and what is broken or strange passed over or refused?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvprof.errors import InvalidFile
from kvprof.records.scores import Scores
from kvprof.workspace.audit_inputs import find_audit_files
from kvprof.workspace.names import short_names


def save_scores(path: Path, source: str = "gradients", **tensor: Any) -> Path:
    tensor = tensor or {"loss_increase": {"int2g64": 0.001}}
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [{"layer": 0, "key": tensor, "value": tensor}]
    path.write_text(json.dumps({"schema": "kvprof.scores/1", "source": source, "layers": layers}))
    return path


def save_plan(path: Path, scores: Path | None = None) -> Path:
    tensor = {"bits": 2, "group_size": 64, "axis": "channel"}
    plan = {
        "schema": "kvprof.plan/1", "model": {"num_layers": 1}, "quantizer": {},
        "window": {"sink_tokens": 0, "recent_tokens": 0},
        "layers": [{"layer": 0, "key": tensor, "value": tensor | {"axis": "token"}}],
        "provenance": None if scores is None else {"scores": Scores.load(scores).digest},
    }  # fmt: skip
    path.write_text(json.dumps(plan))
    return path


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    folder = in_tmp / "outputs" / "model"
    save_scores(folder / "divergence.json", "divergence")
    save_scores(folder / "gradients.json")
    save_scores(folder / "norms.json", "norms", spectral_norm=1.0)
    return folder


def test_the_newest_divergence_is_found_with_its_scores_and_plans(folder: Path) -> None:
    save_plan(folder / "plan-3.00.json")
    (folder / "evaluation.json").write_text("{")
    (folder / "notes.json").write_text('{"mine": 1}')
    found = find_audit_files()
    assert found.path == Path("outputs/model/divergence.json")
    assert found.divergence.source == "divergence"
    assert list(found.scores) == ["gradients", "norms"]
    assert list(found.plans) == ["plan-3.00"]
    assert found.evaluations == ()
    (remark,) = found.remarks
    assert "evaluation.json: not valid JSON" in remark
    other = save_scores(folder.parent / "other" / "divergence.json", "divergence")
    save_scores(other.parent / "norms.json", "norms", spectral_norm=1.0)
    os.utime(other, ns=(2**62, 2**62))
    assert find_audit_files().path == Path("outputs/other/divergence.json")
    assert find_audit_files(folder).path == folder / "divergence.json"
    assert find_audit_files(folder / "divergence.json").path == folder / "divergence.json"


def test_named_scores_take_the_place_of_those_beside_it(folder: Path) -> None:
    mine, yours = save_scores(folder / "a" / "gradients.json"), save_scores(folder / "b" / "gradients.json")
    assert list(find_audit_files(folder, [mine]).scores) == ["gradients"]
    assert list(find_audit_files(folder, [mine, yours]).scores) == [str(mine), str(yours)]


def test_a_broken_file_that_nobody_named_is_passed_over_aloud(folder: Path) -> None:
    (folder / "gradients.json").write_text("{")
    found = find_audit_files(folder)
    assert list(found.scores) == ["norms"]
    assert "gradients.json: not valid JSON" in found.remarks[0]
    with pytest.raises(InvalidFile, match="not valid JSON"):
        find_audit_files(folder, [folder / "gradients.json"])


def test_plans_that_lie_elsewhere_can_be_named(folder: Path, tmp_path: Path) -> None:
    save_plan(folder / "plan-3.00.json")
    elsewhere = save_plan(tmp_path / "mine.json")
    assert set(find_audit_files(folder, plans=[elsewhere]).plans) == {"mine", "plan-3.00"}
    assert set(find_audit_files(folder, plans=[folder / "plan-3.00.json"]).plans) == {"plan-3.00"}
    with pytest.raises(InvalidFile, match="no such file"):
        find_audit_files(folder, plans=[tmp_path / "missing.json"])
    with pytest.raises(InvalidFile, match=r"expected 'kvprof\.evaluation/1'"):
        find_audit_files(folder, evaluations=[elsewhere])


def test_without_a_divergence_the_command_that_makes_one_is_named(in_tmp: Path) -> None:
    with pytest.raises(InvalidFile, match="Run `kvprof divergence` first"):
        find_audit_files()
    with pytest.raises(InvalidFile, match="no such file"):
        find_audit_files(in_tmp)


def test_a_divergence_alone_has_nothing_to_be_held_against(in_tmp: Path) -> None:
    save_scores(in_tmp / "outputs" / "model" / "divergence.json", "divergence")
    with pytest.raises(InvalidFile, match="Run `kvprof gradients` or `kvprof norms` first"):
        find_audit_files()


def test_names_are_stems_unless_two_are_alike() -> None:
    assert short_names([Path("a/x.json"), Path("b/y.json")]) == ["x", "y"]
    assert short_names([Path("a/x.json"), Path("b/x.json")]) == ["a/x.json", "b/x.json"]


def test_scores_of_the_model_are_found_where_its_results_go_when_none_lie_beside(in_tmp: Path) -> None:
    def stamp(path: Path, fingerprint: str) -> Path:
        scores = json.loads(path.read_text())
        info = {"id": "org/model", "fingerprint": fingerprint, "num_layers": 1}
        path.write_text(json.dumps(scores | {"model": info}))
        return path

    divergence = stamp(save_scores(in_tmp / "elsewhere" / "divergence.json", "divergence"), "sha256:a")
    stamp(save_scores(in_tmp / "outputs" / "org--model" / "gradients.json"), "sha256:a")
    stamp(save_scores(in_tmp / "outputs" / "org--model" / "norms.json", "norms", spectral_norm=1.0), "sha256:b")
    assert list(find_audit_files(divergence).scores) == ["gradients"]
