"""The page kvprof/evaluate/README.md and tests/benchmarks/models.py, which writes its tables, agree."""

import io
import pickle
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import models
import small_models

PAGE = models.PAGE.read_text()


def test_each_model_has_one_place_on_the_page():
    names = [case.name for case in models.CASES]
    assert [PAGE.count(models.begin(name)) for name in names] == [1] * len(names)
    assert PAGE.count(models.END) == len(names)


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.name)
def test_tables_are_written_between_the_markers_and_nowhere_else(case):
    before, _, after = PAGE.partition(models.begin(case.name))
    page = models.rewritten(PAGE, case.name, "new")
    assert page == f"{before}{models.begin(case.name)}\n\nnew\n\n{models.END}{after.partition(models.END)[2]}"
    assert models.rewritten(page, case.name, "new") == page


def test_every_kind_of_text_and_every_package_is_pinned_and_known():
    for case in models.CASES:
        assert all("==" in package for package in case.packages)
        assert set(case.texts) <= {"builtin", "self", "profiles"}


def test_the_pickle_of_a_tokenizer_runs_nothing():
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        small_models._Inertly(io.BytesIO(pickle.dumps(print))).load()
