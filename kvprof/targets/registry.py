"""Every runtime that a plan can be made for, and what each is given of one."""

from __future__ import annotations

import os
from pathlib import Path

from kvprof.allocate.target import Target, why_unserved
from kvprof.errors import Inexpressible, UsageError, did_you_mean
from kvprof.records.plan import BitPlan
from kvprof.targets import (
    compressed_tensors,
    exllamav3,
    ik_llama_cpp,
    kvtuner,
    llama_cpp,
    lmdeploy,
    mlx_lm,
    mlx_vlm,
    modelopt,
    sglang,
    tensorrt_llm,
    transformers,
    vllm,
)
from kvprof.targets.artefact import Artefact

_OTHERS = (
    ik_llama_cpp, llama_cpp, vllm, modelopt, compressed_tensors, sglang, lmdeploy, tensorrt_llm, mlx_vlm, mlx_lm,
    exllamav3, kvtuner,
)  # fmt: skip
WRITERS = {runtime.TARGET.name: runtime.write for runtime in _OTHERS}

TARGETS: dict[str, Target] = {runtime.TARGET.name: runtime.TARGET for runtime in (transformers, *_OTHERS)}
"""Every runtime by name, kvprof's own cache first."""


def target_named(name: str) -> Target:
    """Return a target; raises UsageError for a name that is none."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}: {did_you_mean(name, TARGETS)}")
    return TARGETS[name]


FILES = (".args", ".conf", ".json", ".py", ".sh", ".txt", ".yaml", ".yml")
"""How the name of a file ends that `out` may be; any other name is a folder's."""


def export(plan: BitPlan, target: Target, path: Path, out: Path | None = None) -> tuple[Artefact, Path]:
    """Return what a runtime is given of a plan, and where that goes; writes nothing.

    path: of the plan's file. out: a file, or a folder; by default beside the plan, under its name and the runtime's.
    Raises Inexpressible for a plan that the runtime cannot be told.
    """
    folder = path.parent if out is None else out
    if out is not None and out.exists() and path.exists() and out.samefile(path):
        raise UsageError(f"--out {out} is the plan itself.\n  Name another file, or a folder.")
    if (unknown := why_unserved(target, plan.geometry)) is not None:
        raise Inexpressible(f"{target.name} cannot be told this plan: {unknown}.")
    if target.name in WRITERS:
        made = WRITERS[target.name](plan)
        return made, _place(path, folder, target, made.suffix)
    place = _place(path, folder, target, ".py")
    seen = Path(os.path.relpath(path.absolute(), place.absolute().parent)).as_posix()
    return transformers.write(plan, seen), place


def _place(path: Path, out: Path, target: Target, suffix: str) -> Path:
    if out.suffix in FILES and not out.is_dir():
        return out
    return out / f"{path.stem.removesuffix(f'-{target.name}')}.{target.name}{suffix}"
