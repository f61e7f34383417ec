"""The two scripts that a newcomer runs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from quickstart import Quickstart

from kvprof import BitPlan
from kvprof.cli.app import app

ROOT = Path(__file__).parents[1]
CLUSTER = (ROOT / "recipes/cluster.md").read_text(encoding="utf-8")


@pytest.mark.demo
def test_quickstart_runs_from_any_folder_and_ends_with_a_plan(quickstart: Quickstart) -> None:
    assert quickstart.output.splitlines()[-1] == "written to outputs/demo/plan-2.50.json"
    assert len(BitPlan.load(quickstart.folder / "plan-2.50.json").layers) == 30


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
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
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
    import typer

    group = typer.main.get_command(app)
    commands = re.findall(r"kvprof (gradients|merge)\b([^\n]*)", CLUSTER)
    assert len(commands) > 6
    for name, words in commands:
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", words)) <= known
