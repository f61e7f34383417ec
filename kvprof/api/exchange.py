"""import as a function: a plan from the file of another tool, for a model that is named or for any that it fits.

Reads the file, and a model's config and checkpoint where one is named; writes nothing.
"""

from __future__ import annotations

from pathlib import Path

from kvprof.records.plan import BitPlan, Window
from kvprof.records.requests.plan import ImportRequest
from kvprof.storage.folders import output_folder, slug
from kvprof.targets.kvtuner_import import kvtuner_plan, read_kvtuner


def imported_plan(
    request: ImportRequest,
    file: Path,
    model: str | None = None,
    out: Path | None = None,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> tuple[BitPlan, Path]:
    """Return the plan that KVTuner's file says, and where it goes.

    model: a name as `models.load.resolve` takes it; the plan is checked against it and names it. out: a folder, or a
    file that ends in .json; by default the model's results' folder. command: for readers of the plan.
    Raises InvalidFile for a file that is no plan of KVTuner's, Mismatch for another model's, ModelError, OutputError.
    """
    layers = read_kvtuner(file)
    window = Window(sink_tokens=request.sink_tokens, recent_tokens=request.recent_tokens)
    if model is None:
        plan = kvtuner_plan(layers, group_size=request.group_size, window=window, command=command)
    else:
        from kvprof.models.config import load_config
        from kvprof.models.identity import checkpoint_fingerprint
        from kvprof.models.inventory import take_inventory
        from kvprof.models.load import resolve

        source = resolve(model, trust_remote_code)
        found = take_inventory(load_config(source), source.id)
        plan = kvtuner_plan(
            layers,
            model=found.model,
            geometry=found.geometry,
            group_size=request.group_size,
            window=window,
            command=command,
        )
        # Only now: a file for another model should not cost a look at the weights.
        known = found.model.model_copy(update={"fingerprint": checkpoint_fingerprint(source, found.geometry)})
        plan = plan.model_copy(update={"model": known})
    if out is None or out.suffix != ".json":
        out = output_folder(plan.model.id or file.stem, out) / f"plan-{slug(file.stem)}.json"
    return plan, out
