"""Every type of decoder that the installed transformers has, as a tiny random model, through the whole chain.

    python tests/walk.py                     print the table of the page of models, from tests/data/walk.json
    python tests/walk.py --write             put it into kvprof/models/README.md, between its two markers
    python tests/walk.py --measure           first run them all and keep what came: a quarter of an hour on one core
    python tests/walk.py --measure llama     run these alone, and keep what came beside what is known of the others

Of each type there is how far the chain went (families.py), or the sentence in which kvprof refused it, or why there is
nothing to see: transformers builds no model of the default config made small (shrunk.py).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coverage_table import PAGE, section

HERE = Path(__file__).resolve().parent
WALKED = HERE / "data" / "walk.json"
MARKERS = ("<!-- types: begin -->", "<!-- types: end -->")

OUTCOMES = {
    "whole": "the whole chain, `evaluate` in one forward",
    "exact": "the whole chain, `evaluate` token by token; no losses are predicted",
    "unplanned": "`inspect`, and nothing is planned: recurrent or short sliding layers alone; each command says so",
    "partly": "a part of the chain; the other commands say why not",
    "image": "`inspect` and `norms`: the model does not run on text alone, or not in the size that was tried",
    "refused": "refused by every command, in one sentence",
    "unbuilt": "not known: transformers builds no small model of its default config, or lacks a package",
}
"""What can come of a type, the best first."""


def walk(kind: str) -> dict[str, str]:
    """Return what came of one type. An error that kvprof has no words for is raised."""
    from families import see_folder
    from folders import save_tokenizer
    from shrunk import build

    from kvprof.errors import KvprofError
    from kvprof.models.inventory import take_inventory

    try:
        model = build(kind)
    except Exception as error:  # transformers' own, of a config that it calls the default
        return {"outcome": "unbuilt", "says": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        save_tokenizer(folder)

    try:
        seen = see_folder(save)
    except KvprofError as error:
        try:
            take_inventory(model.config)
        except KvprofError as refusal:
            return {"outcome": "refused", "says": str(refusal).splitlines()[0]}
        return {"outcome": "image", "says": str(error).splitlines()[0]}
    return summary(seen)


def summary(seen: Mapping[str, Any]) -> dict[str, str]:
    """Return the outcome of what the chain saw. Raises AssertionError for a cache that is not what the plan says."""
    assert seen["cache"] is None or all(seen["cache"].values()), seen["cache"]
    assert seen["inspect"] is True, seen["inspect"]
    said = {name: found["says"] for name, found in seen.items() if isinstance(found, dict) and "refused" in found}
    if not said and seen["evaluate"] == {"path": "fast", "loses": True}:
        return {"outcome": "whole"}
    if not isinstance(seen["plan"], list):
        return {"outcome": "unplanned" if set(seen["kinds"]) - {"full", "hybrid"} else "partly", **_first(said)}
    exact = set(said) == {"loss_increase"} and seen["evaluate"] == {"path": "exact", "loses": True}
    return {"outcome": "exact" if exact else "partly", **_first(said)}


def _first(said: Mapping[str, str]) -> dict[str, str]:
    return {"says": next(iter(said.values()))} if said else {}


def table(walked: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table: what came of how many types, and which."""
    rows = ["| what came | types |", "| --- | --- |"]
    for outcome, text in OUTCOMES.items():
        kinds = [kind for kind, found in walked.items() if found["outcome"] == outcome]
        if kinds:
            rows.append(f"| {text} | {len(kinds)}: {', '.join(kinds)} |")
    return "\n".join(rows)


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types to run; all by default")
    parser.add_argument("--measure", action="store_true", help="run types anew, and keep what came")
    parser.add_argument("--write", action="store_true", help="put the table into kvprof/models/README.md")
    chosen = parser.parse_args()
    if chosen.measure:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is first imported
        from shrunk import types

        found = json.loads(WALKED.read_text(encoding="utf-8")) if chosen.kinds else {}
        for kind in chosen.kinds or types():
            found[kind] = walk(kind)
            print(kind, found[kind], flush=True)
            WALKED.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
    made = table(json.loads(WALKED.read_text(encoding="utf-8")))
    if chosen.write:
        PAGE.write_text(section(PAGE.read_text(encoding="utf-8"), made, MARKERS), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
