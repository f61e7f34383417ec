"""Every type of decoder that the installed transformers has, as a tiny random model, through the whole chain.

    python tests/walk.py                  run them all: see README for the time
    python tests/walk.py llama mllama     run these, and say what came of each
    python tests/walk.py --write          run them all, and keep what came in tests/data/walk.json

Of each type there is what the chain saw (families.py), or the sentence in which kvprof refused it, or why there is
nothing to see: transformers builds no model of the default config made small, or the model does not run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WALKED = HERE / "data" / "walk.json"


def walk(kind: str) -> dict[str, Any]:
    """Return what came of one type: `seen`, `refused` or `unbuilt`. An error that kvprof has no words for is raised."""
    import torch
    from families import see_folder
    from folders import save_tokenizer
    from shrunk import build

    from kvprof.errors import KvprofError

    try:
        model = build(kind)
    except Exception as error:  # transformers' own, of a config that it calls the default
        return {"unbuilt": _short(error)}
    runs = None
    if type(model).forward is not torch.nn.Module.forward and not model.config.is_encoder_decoder:
        try:
            with torch.no_grad():
                model(input_ids=torch.arange(3, 23)[None])
        except Exception as error:
            runs = _short(error)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        save_tokenizer(folder)

    try:
        return {"class": type(model).__name__, "seen": see_folder(save)}
    except KvprofError as error:
        return {"class": type(model).__name__, "refused": str(error), "without_kvprof": runs}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help=f"keep what came in {WALKED.name}")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is first imported
    from shrunk import types

    found = {}
    for kind in chosen.kinds or types():
        start = time.perf_counter()
        try:
            found[kind] = walk(kind)
        except Exception as error:
            found[kind] = {"traceback": _short(error)}
        print(kind, json.dumps(found[kind]), f"{time.perf_counter() - start:.1f} s", flush=True)
    if chosen.write:
        WALKED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
