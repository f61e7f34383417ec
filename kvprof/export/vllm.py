"""vLLM: command-line flags, one quantized dtype and the layers that stay in 16 bits.

    --kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0 1 28 29

Sources: `vllm/config/cache.py` (the dtypes; layers by index, separated by blanks), and of TurboQuant
`vllm/model_executor/layers/quantization/turboquant/config.py`: its dtypes leave two layers at either end alone by
themselves, which are written out all the same.
"""

from __future__ import annotations

from kvprof.allocate.grammars import FULL, SomeInFull, pairs_of
from kvprof.allocate.targets import Target
from kvprof.export.artefact import Artefact, told
from kvprof.records.plan import BitPlan


def write_vllm(plan: BitPlan, target: Target) -> Artefact:
    """Return vLLM's flags for a plan of one dtype, and 16 bits for any layers."""
    found = told(plan, target)
    grammar = target.grammar
    assert isinstance(grammar, SomeInFull)
    pairs = pairs_of(found.assignment)
    full = {layer for layer, pair in pairs.items() if pair == (FULL, FULL)}
    if len(full) == len(pairs):
        return Artefact("--kv-cache-dtype auto\n", ".args", found.remarks)
    word = grammar.word_of(found.assignment, plan.model.num_layers)
    skipped = sorted(full | {entry.layer for entry in plan.skipped or ()})
    flags = f"--kv-cache-dtype {word}"
    if skipped:
        flags += " --kv-cache-dtype-skip-layers " + " ".join(map(str, skipped))
    return Artefact(flags + "\n", ".args", found.remarks)
