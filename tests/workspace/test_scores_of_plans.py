"""A plan's scores found again: by their bytes, by what they say, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from score_factories import plan_of, random_scores

from kvprof import BitPlan, Scores
from kvprof.errors import InvalidFile, UsageError
from kvprof.records.scores import KlCalibration
from kvprof.workspace.scores_of_plans import find_common_losses, find_scores, scores_of_plans

SCORES = random_scores(2, 2)


def plan_from(scores: Scores) -> BitPlan:
    return plan_of([("int3g64", "rot2")] * 2, provenance={"scores": scores.digest, "command": None})


def test_scores_lie_beside_the_plan_or_in_the_outputs(in_tmp: Path) -> None:
    places = ("plans/any-name.json", "outputs/demo/gradients.json", "outputs/demo/vllm/gradients.json")
    for place in (*places, "outputs/loose.json"):
        path = SCORES.save(place)
        assert find_scores(plan_from(SCORES), Path("plans/plan.json")) == (path, SCORES)
        path.unlink()


def test_scores_written_by_hand_are_known_by_what_they_say(in_tmp: Path) -> None:
    Path("hand.json").write_text(json.dumps(SCORES.model_dump(mode="json", by_alias=True)))
    assert find_scores(plan_from(SCORES), Path("plan.json"))[1] == SCORES


def test_scores_that_were_calibrated_since_are_still_the_plans(in_tmp: Path) -> None:
    calibrated = SCORES.model_copy(
        update={"kl_calibration": KlCalibration(factor=1.7, plans=3, sequences=4, spread=1.2)}
    )
    calibrated.save("outputs/demo/gradients.json")
    assert find_scores(plan_from(SCORES), Path("plan.json"))[1].kl_calibration == calibrated.kl_calibration


def test_of_copies_the_calibrated_one_is_taken_and_else_the_one_named_as_usual(in_tmp: Path) -> None:
    plan, home = plan_from(SCORES), Path("outputs/demo/gradients.json")
    SCORES.save("before.json")
    SCORES.save(home)
    assert find_scores(plan, Path("plan.json"))[0] == home
    factor = KlCalibration(factor=1.7, plans=3, sequences=4, spread=1.2)
    SCORES.model_copy(update={"kl_calibration": factor}).save("named-otherwise.json")
    path, found = find_scores(plan, Path("plan.json"))
    assert path == Path("named-otherwise.json")
    assert found.kl_calibration == factor


def test_scores_measured_anew_keep_the_factor_unless_they_are_others(in_tmp: Path) -> None:
    factor = KlCalibration(factor=1.7, plans=3, sequences=4, spread=1.2)
    assert SCORES.calibrated_as(Path("gradients.json")) == SCORES
    path = SCORES.model_copy(update={"kl_calibration": factor}).save("gradients.json")
    assert SCORES.calibrated_as(path).kl_calibration == factor
    assert random_scores(2, 2, seed=9).calibrated_as(path).kl_calibration is None


def test_whatever_else_lies_there_is_passed_over(in_tmp: Path) -> None:
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("folder.json").mkdir()
    Path("link.json").symlink_to("nowhere")
    os.mkfifo("pipe.json")
    plan = plan_from(SCORES)
    plan.save("plan.json")
    random_scores(2, 2, seed=9).save("others.json")
    path = SCORES.save("outputs/demo/gradients.json")
    assert find_scores(plan, Path("plan.json"))[0] == path


def test_scores_that_are_gone_are_an_error_that_says_what_to_do(in_tmp: Path) -> None:
    random_scores(2, 2, seed=9).save("outputs/demo/gradients.json")
    with pytest.raises(InvalidFile, match="--scores FILE") as refusal:
        find_scores(plan_from(SCORES), Path("plan.json"))
    assert SCORES.digest[:19] in str(refusal.value)


@pytest.mark.parametrize("provenance", [None, {"scores": None, "command": "by hand"}])
def test_a_plan_that_names_no_scores_is_an_error_that_says_so(in_tmp: Path, provenance: dict[str, str] | None) -> None:
    with pytest.raises(InvalidFile, match="does not say which scores"):
        find_scores(plan_of([("int3g64", "rot2")], provenance=provenance), Path("plan.json"))


# Of several plans


def test_plans_lead_to_the_scores_they_were_made_from(in_tmp: Path) -> None:
    path = SCORES.save("outputs/demo/gradients.json")
    made, by_hand = plan_from(SCORES), plan_of([("int3g64", "rot2")] * 2)
    for plans in ([made, by_hand, made], [by_hand, made], [made]):
        named = {Path(f"{number}.json"): plan for number, plan in enumerate(plans)}
        assert scores_of_plans(named) == (path, SCORES)
        assert find_common_losses(named) == SCORES
    assert scores_of_plans({}) == (path, SCORES)  # the newest with losses


def test_plans_of_no_scores_or_several_have_none_in_common(in_tmp: Path) -> None:
    SCORES.save("outputs/demo/gradients.json")
    by_hand, other = plan_of([("int3g64", "rot2")] * 2), plan_from(random_scores(2, 2, seed=9))
    cases: list[tuple[list[BitPlan], type[Exception], str]] = [
        ([by_hand], InvalidFile, "does not say which scores"),
        ([other], InvalidFile, "are not beside it"),
        ([plan_from(SCORES), other], UsageError, "made from different scores"),
    ]
    for plans, kind, words in cases:
        named = {Path(f"{number}.json"): plan for number, plan in enumerate(plans)}
        with pytest.raises(kind, match=words):
            scores_of_plans(named)
        assert find_common_losses(named) is None
