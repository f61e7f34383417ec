"""KVTuner: the YAML file of its per-layer bits (arXiv 2502.04420).

0: {nbits_key: 4, nbits_value: 2}
1: {nbits_key: 8, nbits_value: 4}

A query reads its own token in full precision: KIVI's cache, as transformers' QuantizedCache, gives new tokens back as
they came and quantizes them once they leave the residual window.
"""

from __future__ import annotations

from kvprof.allocate.constraints import EachTensor
from kvprof.allocate.target import Target
from kvprof.records.formats import TENSORS, USUAL_AXIS
from kvprof.records.plan import BitPlan, Window
from kvprof.targets.artefact import Artefact, refused

KIVI_GROUP_SIZE = 32
KIVI_WINDOW = Window(sink_tokens=0, recent_tokens=32)
"""What KVTuner runs its KIVI files with, keys per channel and values per token: `residual_length=32, q_group_size=32,
axis_key=1, axis_value=0` in its `sh_gen_presets.py`, and in the KiVi example of its README."""

KVTUNER_BITS = (2, 4, 8)
"""What its search chooses from."""

TARGET = Target(
    name="kvtuner",
    constraints=EachTensor(("int2g32", "int4g32", "int8g32")),
    window=KIVI_WINDOW,
    artefact="YAML: layer: {nbits_key: B, nbits_value: B}",
    since="any",
    checked="against the YAML that KVTuner published, both ways",
)


def write(plan: BitPlan) -> Artefact:
    """Return the file for a plan of 2, 4 and 8 bits, in the formats of KIVI: keys per channel, values per token.

    The size of groups and the window stand in no file of KVTuner's: a comment and the remarks say them.
    Raises Inexpressible for any other plan, and where groups are not all of one size.
    """
    if plan.skipped:
        raise refused(plan, TARGET, f"KVTuner needs bits for every layer, and layer {plan.skipped[0].layer} has none")
    sizes: dict[str, set[int]] = {tensor: set() for tensor in TENSORS}
    rows = []
    for entry in plan.layers:
        for tensor in TENSORS:
            form = entry.tensor(tensor)
            place = f"the {tensor} of layer {entry.layer}"
            if form.scheme != "asymmetric" or form.clip != "none" or form.bits not in KVTUNER_BITS:
                raise refused(
                    plan, TARGET, f"{place} has {form.name}, KVTuner has int2, int4 and int8 without clipping"
                )
            if form.axis != USUAL_AXIS[tensor]:
                raise refused(plan, TARGET, f"{place} has groups along axis {form.axis}, KVTuner the other")
            if form.recent_fraction:
                raise refused(plan, TARGET, f"{place} keeps a share of the recent past in full precision")
            sizes[tensor].add(form.group_size)
        rows.append(f"{entry.layer}:\n  nbits_key: {entry.key.bits}\n  nbits_value: {entry.value.bits}\n")
    found = sorted(set.union(*sizes.values()))
    # Values' groups end with the head: a plan of larger ones says how large they are.
    if any(len(each) > 1 for each in sizes.values()) or min(sizes["key"]) < max(sizes["value"]):
        raise refused(plan, TARGET, f"its groups have sizes {', '.join(map(str, found))}, KVTuner takes one")
    group_size, window = found[-1], plan.window
    remarks = [
        f"run it with q_group_size={group_size}, residual_length={window.recent_tokens}, axis_key=1, axis_value=0"
    ]
    if window.sink_tokens:
        remarks.append(f"the plan keeps the first {window.sink_tokens} tokens in full precision, KVTuner none")
    return Artefact("".join(rows), ".yaml", tuple(remarks))
