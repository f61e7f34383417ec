"""transformers: a script that generates through PlanCache, kvprof's own cache, as the plan's file says."""

from __future__ import annotations

from kvprof.allocate.target import Target
from kvprof.records.plan import USUAL_WINDOW, BitPlan
from kvprof.targets.artefact import Artefact, check_own

TARGET = Target(
    name="transformers",
    constraints=None,
    window=USUAL_WINDOW,
    sliding="as told",
    artefact="a Python script that generates through PlanCache",
    since="transformers 5.23",
    checked="run by the tests, tokens compared with PlanCache's",
)

_TEXT = """\
import sys

from kvprof import BitPlan
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.runtime import PlanCache

source = resolve({model!r})
model, tokenizer = load_model(source), load_tokenizer(source)
cache = PlanCache.from_plan(BitPlan.load(sys.path[0] + {plan!r}), model)
inputs = tokenizer(" ".join(sys.argv[1:]) or "The KV cache", return_tensors="pt").to(model.device)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def write(plan: BitPlan, place: str) -> Artefact:
    """Return the script for a plan of kvprof's own formats. place: of the plan's file, from the script's folder."""
    check_own(plan, TARGET)
    remarks = []
    if plan.model.id is None:
        remarks.append("the plan names no model: put its folder or hub id in the script's resolve(...)")
    text = _TEXT.format(model=plan.model.id or "MODEL", plan=f"/{place}")
    return Artefact(text, ".py", tuple(remarks))
