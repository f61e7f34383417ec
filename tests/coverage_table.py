"""Which models does kvprof work on? Prints the table of families, from what tests saw of each family.

    python tests/coverage_table.py            print it, from tests/data/coverage.json
    python tests/coverage_table.py --write    put it into kvprof/models/README.md, between its two markers
    python tests/coverage_table.py --measure  first run every family through the chain of commands, and keep what came

Reads facts, writes Markdown. Does not know how a family is run (families.py).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEEN, PAGE = HERE / "data" / "coverage.json", HERE.parent / "kvprof/models/README.md"
MARKERS = ("<!-- models: begin -->", "<!-- models: end -->")

COLUMNS = (
    *("family", "attention", "inspect", "norms", "gradient norm", "loss_increase", "plan", "PlanCache", "evaluate"),
    "remarks",
)
KINDS = {
    "sliding": "sliding windows are planned too, unless `--layers full` leaves them",
    "shared": "shared keys and values are stored once, by the layer that makes them",
    "recurrent": "recurrent states stay as they are",
    "hybrid": "the recurrent state beside each attention stays as it is",
    "latent": "the latent and its rotary part are planned in the place of K and V",
}
"""What is to be said of layers that are more, or other, than attention to all tokens."""
FLAGS = {
    "key_norm": "normalised keys",
    "key_bias": "biased keys",
    "softcap": "capped logits",
    "attention_sinks": "learned sinks",
}
"""What `inspect` raises flags about."""


def table(seen: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Return the table. seen: facts by tiny model. names: what each tiny model stands for."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_row(names[key], seen[key]) for key in names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(family: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        family,
        _attention(facts),
        "yes" if facts["inspect"] is True else "no",
        *(_reached(facts[each], facts["kinds"]) for each in ("norms", "gradient_norm", "loss_increase", "plan")),
        "no" if facts["cache"] is None else "yes" if all(facts["cache"].values()) else "wrong",
        _evaluated(facts["evaluate"]),
        "; ".join(_remarks(facts)),
    )


def _attention(facts: Mapping[str, Any]) -> str:
    if "latent" in facts["kinds"]:
        return "MLA"
    query, key_value = facts["heads"]["query"], facts["heads"]["key_value"]
    grouping = "MHA" if query == key_value else "MQA" if key_value == 1 else "GQA"
    return grouping if "k_proj" in facts["projections"] else f"{grouping}, fused"


def _reached(found: Any, kinds: Sequence[str]) -> str:
    """Say whether a command reached every layer, or which kinds of layer it left out."""
    if not isinstance(found, list) or not found:
        return "no"
    left = {kind for layer, kind in enumerate(kinds) if layer not in found}
    if left & {kinds[layer] for layer in found}:
        return f"{len(found)} of {len(kinds)} layers"
    return f"yes, not {', '.join(sorted(left))}" if left else "yes"


def _evaluated(found: Any) -> str:
    if found is None or "refused" in found:
        return "no"
    if not found["loses"]:
        return "wrong"
    return "yes" if found["path"] == "fast" else "token by token"


def _remarks(facts: Mapping[str, Any]) -> list[str]:
    remarks = [KINDS[kind] for kind in dict.fromkeys(facts["kinds"]) if kind in KINDS]
    remarks += [FLAGS[flag] for flag in facts["red_flags"]]
    if not facts["keeps_a_cache"]:
        remarks.append("its config turns caches off: give `generate` also `use_cache=True`")
    refusal = facts["loss_increase"]
    if not isinstance(facts["plan"], list):
        remarks.append("nothing is left to plan: each command says so")
    elif isinstance(refusal, dict):
        remarks.append(refusal["says"].removeprefix("no loss is predicted: ").rstrip("."))
    return remarks


def section(page: str, made: str, markers: tuple[str, str]) -> str:
    """Return a page that has this table between these markers."""
    begin, end = markers
    before, rest = page.split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the chain of every family anew: a minute or two")
    parser.add_argument("--write", action="store_true", help="put the table into kvprof/models/README.md")
    chosen = parser.parse_args()
    if chosen.measure:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is first imported
        from families import FAMILIES, see

        found = {name: see(name) | {"family": family} for name, family in FAMILIES.items()}
        SEEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    seen = json.loads(SEEN.read_text(encoding="utf-8"))
    made = table(seen, {name: facts["family"] for name, facts in seen.items()})
    if chosen.write:
        PAGE.write_text(section(PAGE.read_text(encoding="utf-8"), made, MARKERS), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
