"""What recipes/ holds: the scripts that a newcomer runs, and the recipes that come with kvprof."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from folders import save_folder
from typer.testing import CliRunner

from kvprof import BitPlan
from kvprof.cli.app import app
from kvprof.recipes.shipped import find_recipe, shipped_recipes
from kvprof.records.recipe import read_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CLUSTER = (ROOT / "recipes/cluster.md").read_text(encoding="utf-8")


def test_a_python_that_is_too_old_or_absent_is_named(tmp_path: Path) -> None:
    for script in ("recipes/quickstart.sh", "tests/run.sh"):
        done = subprocess.run(
            ["bash", str(ROOT / script)],
            env=os.environ | {"PYTHON": "no-such-python"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "no-such-python" in done.stderr


def test_ci_runs_the_test_script() -> None:
    assert "tests/run.sh" in (ROOT / ".ci" / "run").read_text()


def test_the_constraints_pin_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "recipes" / "constraints.txt").read_text().splitlines()
    names, pinned = (
        {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in group} for group in (declared, lines)
    )
    assert names <= pinned


def test_the_cluster_recipe_is_a_config_that_accelerate_reads(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    (body,) = re.findall(r"^```yaml\n(.*?)^```$", CLUSTER, re.MULTILINE | re.DOTALL)
    (tmp_path / "cluster.yaml").write_text(body)
    config = ClusterConfig.from_yaml_file(str(tmp_path / "cluster.yaml"))
    assert (config.num_machines, config.num_processes, config.machine_rank) == (4, 32, 0)
    assert config.distributed_type == "MULTI_GPU"


def test_the_cluster_recipe_names_only_options_that_there_are() -> None:
    group = typer.main.get_command(app)
    commands = re.findall(r"kvprof (gradients|merge)\b([^\n]*)", CLUSTER)
    assert len(commands) > 6
    for name, words in commands:
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", words)) <= known


SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))


def carry_out(*words: str) -> dict[str, Any]:
    """Carry out a recipe; return its answer."""
    result = CliRunner().invoke(app, ["run", *words, "--json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_made_of_command_lines_that_there_are(name: str, in_tmp: Path) -> None:
    assert read_recipe(find_recipe(name)).description
    steps = carry_out(name, "--dry-run")["steps"]
    assert {step["status"] for step in steps} == {"to do"}
    group = typer.main.get_command(app)
    for step in steps:
        kvprof, command, *arguments = shlex.split(step["command"])
        assert kvprof == "kvprof"
        group.commands[command].make_context(command, arguments)  # raises for an option that there is not
    assert not list(in_tmp.iterdir())


def test_seven_recipes_are_shipped_each_in_the_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHIPPED == ["hybrid", "kvmix", "long-context", "norm-aware", "predictive", "quickstart", "serving"]
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, place in wheel["force-include"].items():
        target = tmp_path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, target)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "another.toml").write_text("[norms]")  # some other package's
    monkeypatch.setattr("kvprof.recipes.shipped._HERE", tmp_path / "kvprof" / "recipes")
    assert sorted(shipped_recipes()) == SHIPPED
    assert find_recipe("hybrid").read_text() == (ROOT / "recipes" / "hybrid.toml").read_text()


@pytest.mark.parametrize(("name", "model", "planned"), [("quickstart", "llama", [0, 1]), ("hybrid", "gemma3", [1])])
def test_a_shipped_recipe_runs_to_its_end_on_another_model(
    in_tmp: Path, name: str, model: str, planned: list[int]
) -> None:
    save_folder(in_tmp / "my-model", model)
    words = (name, "--model", "./my-model", "--out", "results")
    assert {step["status"] for step in carry_out(*words)["steps"]} == {"done"}
    assert [entry.layer for entry in BitPlan.load("results/plan-2.50.json").layers] == planned
    assert Path("results/report.html").is_file()
    assert {step["status"] for step in carry_out(*words)["steps"]} == {"skipped"}
