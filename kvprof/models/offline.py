"""A model's inventory from what is on this machine alone: the hub is never asked.

Reads configs; does not import what builds a model before there is a config to read.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from kvprof.records.inventory import Inventory

DEMO = "demo"


def inventory_at_hand(model: str) -> Inventory | None:
    """Return a model's inventory; None where its config is not on this machine.

    model: as `resolve` takes it. Raises ModelError where there is a config that cannot be read.
    """
    is_local = os.path.exists(os.path.expanduser(model))
    if model != DEMO and not is_local and _cached_config(model) is None:
        return None
    from kvprof.models.config import load_config
    from kvprof.models.inventory import take_inventory
    from kvprof.models.load import resolve

    source = resolve(model)
    if source.path is None and source.hub_id is not None:
        folder = _cached_config(source.hub_id)
        if folder is None:
            return None
        source = replace(source, path=Path(folder))
    return take_inventory(load_config(source), source.id)


def _cached_config(hub_id: str) -> str | None:
    """Return the folder of the hub's cache that holds a model's config; None where it holds none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        return None
    return os.path.dirname(found) if isinstance(found, str) else None
