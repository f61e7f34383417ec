"""All that a sensitivity run can know before it loads a weight.

Reads a config, a tokenizer and calibration text. Does not know how anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from kvprof.calibration.mixture import MixedText
from kvprof.calibration.self_generated import batches_of
from kvprof.errors import UsageError
from kvprof.models.config import load_config
from kvprof.models.costs import Passes, estimate_run
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import check_projects
from kvprof.models.source import ModelSource
from kvprof.profile.decoder import Decoder, Formats, formats_of, readable
from kvprof.profile.reading import read_text
from kvprof.profile.shards import Share, read_share
from kvprof.records.estimate import Estimate
from kvprof.records.geometry import CacheGeometry
from kvprof.records.inventory import Inventory
from kvprof.records.requests.measure import GradientsRequest

BYTES_A_NUMBER = 40
"""Of each number of each sequence: in the journal, and in the result."""


@dataclass(frozen=True)
class Prepared:
    """A request with the model and the text that it names.

    share: the sequences of the text that are measured; None for all. wanted: whether losses are to be
    predicted. unread: what to say of formats that these texts never read.
    """

    source: ModelSource
    request: GradientsRequest
    decoder: Decoder
    share: Share | None
    config: PretrainedConfig
    inventory: Inventory
    tokenizer: Any
    mix: MixedText
    formats: Formats
    wanted: bool
    unread: str | None


def prepare(
    source: ModelSource,
    request: GradientsRequest,
    decoder: Decoder,
    until_stable: bool,
    check: Callable[[CacheGeometry, Formats], None] | None,
) -> Prepared:
    """Read the config and the text, and see to it that the one can be measured on the other.

    until_stable: whether the run may stop before its last sequence. check: called with the formats that will be scored;
    may raise. Raises KvprofError in its many kinds: the config, the text or a setting is not fit.
    """
    share = None if request.shard is None else read_share(request.shard)
    if until_stable and share is not None:
        raise UsageError("--until-stable needs all sequences in one run.\n  Leave it out, or --shard.")
    config = load_config(source)
    inventory = take_inventory(config, source.id)
    inventory = inventory.model_copy(update={"geometry": decoder.covers(inventory.geometry)})
    check_projects(inventory.geometry)
    decoder.check(inventory.geometry)
    decoder = decoder.for_model(inventory)
    formats = formats_of(inventory.geometry, decoder)
    wanted = decoder.formats is None or any(decoder.formats.values())
    if until_stable and not wanted:
        raise UsageError("--until-stable looks at plans, which need predicted losses.\n  Leave out --formats none.")
    mix, tokenizer = read_text(source, config, request)
    formats, unread = readable(formats, inventory.geometry, decoder, max(mix.lengths))
    if check is not None and formats:
        check(inventory.geometry, formats)
    if share is not None:
        share.indices(len(mix.lengths))  # raises where nothing is left for it
    return Prepared(source, request, decoder, share, config, inventory, tokenizer, mix, formats, wanted, unread)


def estimate(prepared: Prepared, device: str) -> Estimate:
    """Return what a run will take. device: its own, of several processes'."""
    request, lengths = prepared.request, prepared.mix.lengths
    if prepared.share is not None:
        lengths = tuple(lengths[index] for index in prepared.share.indices(len(lengths)))
    asked = sum(map(len, prepared.formats.values()))
    times = 2 if prepared.formats else 1  # gradient norms by themselves, losses by themselves
    numbers = len(lengths) * (2 * len(prepared.inventory.geometry.scored) + asked)
    return estimate_run(
        prepared.source,
        prepared.config,
        lengths,
        Passes(forwards=times, backwards=times, attentions=prepared.decoder.suffix_fraction * asked),
        request.dtype,
        device,
        request.stream,
        request.batch_size,
        written_bytes=BYTES_A_NUMBER * numbers,
        written=batches_of(prepared.mix),
    ).about(prepared.mix.about_text())
