"""Which file of this room writes a plan for which runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kvprof.allocate.targets import Target, latents_unknown
from kvprof.errors import Inexpressible, UsageError
from kvprof.export.artefact import Artefact
from kvprof.export.exllamav3 import write_exllamav3
from kvprof.export.kvtuner import write_kvtuner
from kvprof.export.llama_cpp import write_ik_llama_cpp, write_llama_cpp
from kvprof.export.mlx_lm import write_mlx_lm
from kvprof.export.modelopt import write_modelopt
from kvprof.export.one_choice import write_lmdeploy, write_mlx_vlm, write_sglang, write_tensorrt_llm
from kvprof.export.transformers import write_transformers
from kvprof.export.vllm import write_vllm
from kvprof.records.plan import BitPlan

WRITERS: dict[str, Callable[[BitPlan, Target], Artefact]] = {
    "ik_llama.cpp": write_ik_llama_cpp,
    "llama.cpp": write_llama_cpp,
    "vllm": write_vllm,
    "modelopt": write_modelopt,
    "sglang": write_sglang,
    "lmdeploy": write_lmdeploy,
    "tensorrt-llm": write_tensorrt_llm,
    "mlx-vlm": write_mlx_vlm,
    "mlx-lm": write_mlx_lm,
    "exllamav3": write_exllamav3,
    "kvtuner": write_kvtuner,
}


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
    if (unknown := latents_unknown(target, plan.geometry)) is not None:
        raise Inexpressible(f"{target.name} cannot be told this plan: {unknown}.")
    if target.name != "transformers":
        made = WRITERS[target.name](plan, target)
        return made, _place(path, folder, target, made.suffix)
    place = _place(path, folder, target, ".py")
    seen = Path(os.path.relpath(path.absolute(), place.absolute().parent)).as_posix()
    return write_transformers(plan, target, seen), place


def _place(path: Path, out: Path, target: Target, suffix: str) -> Path:
    if out.suffix in FILES and not out.is_dir():
        return out
    return out / f"{path.stem.removesuffix(f'-{target.name}')}.{target.name}{suffix}"
