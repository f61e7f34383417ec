"""Which layers a plan covers: scores without those that it leaves alone.

Reads Scores, and the words of a user. Does not know how bits are chosen.
"""

from __future__ import annotations

from kvprof.allocate.target import Target, layer_choice
from kvprof.errors import InvalidFile, UsageError
from kvprof.records.plan import Window, layers_left_alone
from kvprof.records.requests.request import LayerChoice
from kvprof.records.scores import Scores


def covered_scores(
    scores: Scores,
    layers: LayerChoice | None,
    window: Window,
    context: int | None = None,
    runtime: Target | None = None,
) -> Scores:
    """Return the scores of the layers that plans give bits to; as they are without a geometry.

    layers: `all` or `full`, see `layers_left_alone`; by default what the runtime does, else `all`. context: tokens
    that a plan is made for, where they are known. runtime: that the plan is for, instead of kvprof's own cache.
    Raises UsageError for a choice that the runtime cannot be told, or that leaves nothing to plan;
    InvalidFile where the window of the scores leaves nothing.
    """
    if scores.geometry is None:
        return scores
    choice = layer_choice(layers, runtime, scores.geometry)
    left = scores.leaving(layers_left_alone(scores.geometry, choice, window, context))
    assert left.geometry is not None
    if scores.geometry.planned and not left.geometry.planned:
        first = scores.geometry.planned[0].layer
        what = f"a plan would leave every layer of this model alone: {left.geometry.layers[first].skipped}."
        if choice == "full":
            way = "Choose another --target" if layers is None else f"Leave out --layers {layers}"
            raise UsageError(f"{what}\n  {way}.")
        raise InvalidFile(f"{what}\n  Give fewer --recent-tokens.")
    return left
