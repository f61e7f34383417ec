"""What `import kvprof` gives, and what it costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import kvprof


def modules_after(statement: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter has loaded after a statement."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    return set(json.loads(subprocess.check_output([sys.executable, "-c", script], text=True)))


def test_the_public_names_are_those_of_the_contract() -> None:
    records = {"BitPlan", "Evaluation", "Scores", "Spectra"}
    functions = {"norms", "gradients", "spectra", "allocate", "evaluate"}
    assert set(kvprof.__all__) == {"KvprofError", "PlanCache", "__version__", *records, *functions}
    assert kvprof.__all__ == sorted(kvprof.__all__)
    assert set(kvprof.__all__) <= set(dir(kvprof))


def test_type_checkers_are_told_of_every_public_name() -> None:
    stub = Path(kvprof.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    told = set(re.findall(r"import \w+ as (\w+)|^(\w+): ", stub, re.MULTILINE))
    assert {name for pair in told for name in pair if name} == set(kvprof.__all__)


@pytest.mark.parametrize("name", ["allocate", "evaluate"])
@pytest.mark.parametrize(
    "imports",
    [
        "import kvprof",
        "from kvprof import {name}; import kvprof",
        "import kvprof.{name}",
        "import kvprof; f = kvprof.{name}; from kvprof.{name} import {module}; assert kvprof.{name} is f",
        "import kvprof.{name}.{module}; import kvprof; assert kvprof.{name}.{module}",
        "import kvprof.cli.{name}; import kvprof.api.plan, kvprof.api.quality; import kvprof",
    ],
)
def test_a_function_with_a_packages_name_is_both_in_every_order_of_imports(name: str, imports: str) -> None:
    module = {"allocate": "budget", "evaluate": "summary"}[name]
    script = f"""
import inspect
{imports.format(name=name, module=module)}
from kvprof import {name}
assert {name} is kvprof.{name} and callable({name})
assert "budget" in inspect.signature({name}).parameters or "rivals" in inspect.signature({name}).parameters
try:
    {name}("missing.json")
except kvprof.KvprofError as error:
    assert "missing.json" in str(error), error
else:
    raise AssertionError("it was not called")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", kvprof.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"from kvprof import {name}", namespace)
    assert namespace[name] is getattr(kvprof, name)


def test_a_star_import_gives_exactly_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from kvprof import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(kvprof.__all__)


def test_nothing_of_kvprofs_own_is_public_beside_the_public_names() -> None:
    own = {
        name
        for name, value in vars(kvprof).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and str(getattr(value, "__module__", "")).startswith("kvprof")
    }
    assert own <= set(kvprof.__all__)


def test_a_public_class_is_the_one_that_its_module_defines() -> None:
    from kvprof.errors import KvprofError
    from kvprof.records.plan import BitPlan
    from kvprof.records.scores import Scores
    from kvprof.runtime.cache import PlanCache

    assert (kvprof.BitPlan, kvprof.KvprofError, kvprof.Scores) == (BitPlan, KvprofError, Scores)
    assert kvprof.PlanCache is PlanCache


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Plan'"):
        _ = kvprof.Plan
    with pytest.raises(ImportError):
        exec("from kvprof import Plan")


def test_importing_kvprof_loads_no_library() -> None:
    loaded = modules_after("import kvprof")
    assert not loaded & {"torch", "pydantic", "numpy", "transformers", "filelock", "rich", "matplotlib", "typer"}
    assert {name for name in loaded if name.startswith("kvprof.")} == set()


def test_records_load_neither_torch_nor_numpy() -> None:
    loaded = modules_after("from kvprof import BitPlan, KvprofError, Scores, Spectra; import kvprof.storage.folders")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "rich", "matplotlib", "typer"}


def test_functions_load_no_tensor_before_they_are_called() -> None:
    loaded = modules_after("from kvprof import allocate, evaluate, gradients, norms, spectra; allocate.__wrapped__")
    assert "kvprof.api.plan" in loaded
    assert not loaded & {"torch", "transformers", "rich", "matplotlib", "typer", "datasets"}
