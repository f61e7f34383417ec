"""Section: what a model caches, layer by layer, and what is special about it.

Reads an inventory where the model's config could be read, else the shapes that the files carry.
"""

from __future__ import annotations

from itertools import groupby

from kvprof.records.geometry import CacheGeometry, KVLayer, bytes_text
from kvprof.records.inventory import Inventory
from kvprof.records.words import context_text, layers_text
from kvprof.report.page import Block, Paragraph, Section, Table, missing, sentence
from kvprof.report.sentences import latent_remarks, state_remarks
from kvprof.workspace.report_inputs import ReportFiles


def cache_section(files: ReportFiles, command: str) -> Section:
    """Return the section. command: of this model, `kvprof inspect demo`."""
    geometry = files.geometry
    if geometry is None:
        return Section("cache", "What this model caches", [missing(command, "heads, widths and bytes")])
    grows = sum(map(geometry.bytes_per_token, geometry.growing))
    blocks: list[Block] = [
        Paragraph(
            "While a model reads and writes, every attention layer keeps a key and a value vector for each token and "
            "KV head, so that later tokens can look back at them. That is the KV cache. It grows with every token of "
            "context, and it is what a bit plan makes smaller.",
            "see",
        ),
        Paragraph(_means(geometry, grows), "means"),
        Table(
            f"Layers of one shape (elements in {geometry.dtype})",
            (
                "layers",
                "kind",
                "KV heads",
                "head dim K",
                "head dim V",
                "width K",
                "width V",
                "bytes/token",
                "in a plan",
            ),
            [_row(layers, geometry) for layers in _alike(geometry)],
            left=(0, 1, 8),
        ),
        Table(
            "The cache of one sequence with nothing quantized",
            ("tokens of context", "bytes", "in words"),
            [
                (str(tokens), str(geometry.bytes_at(tokens)), bytes_text(geometry.bytes_at(tokens)))
                for tokens in geometry.contexts
            ],
            left=(2,),
        ),
    ]
    if unknown := [layer.layer for layer in geometry.unknown]:
        blocks.append(Paragraph(f"Not counted above: caches of other kinds, {layers_text(unknown)}.", "note"))
    remarks = (*state_remarks(geometry), *latent_remarks(geometry))
    blocks += [Paragraph(sentence(remark), "note") for remark in remarks]
    return Section("cache", "What this model caches", [*blocks, *_flags(files.inventory, command)])


def _means(geometry: CacheGeometry, grows: int) -> str:
    longest = geometry.contexts[-1]
    text = (
        f"Each token adds {grows} bytes ({bytes_text(grows)}) in {len(geometry.growing)} of {geometry.num_layers} "
        f"layers: {bytes_text(geometry.bytes_at(longest))} for one sequence of {context_text(longest)} tokens."
    )
    skipped = [layer.layer for layer in geometry.layers if layer.skipped is not None]
    if skipped:
        text += (
            f" A plan gives bits to {len(geometry.planned)} of them and leaves {layers_text(skipped)} alone; the table "
            "says why."
        )
    return text


def _alike(geometry: CacheGeometry) -> list[list[KVLayer]]:
    """Return the runs of layers that differ in nothing but their number."""
    runs = groupby(geometry.layers, key=lambda layer: layer.model_copy(update={"layer": 0}))
    return [list(run) for _, run in runs]


def _row(layers: list[KVLayer], geometry: CacheGeometry) -> tuple[str, ...]:
    first = layers[0]
    numbers = f"{first.layer}" if len(layers) == 1 else f"{first.layer}-{layers[-1].layer}"
    kind = first.kind + (f", window {first.window} tokens" if first.window else "")
    shape = (first.kv_heads, first.key_head_dim, first.value_head_dim, first.key_width, first.value_width)
    cells = tuple(map(str, shape)) if first.keeps_tokens else ("-",) * 5
    size = "not known" if first in geometry.unknown else str(geometry.bytes_per_token(first))
    return numbers, kind, *cells, size, first.skipped or "yes"


def _flags(inventory: Inventory | None, command: str) -> list[Block]:
    if inventory is None:
        return [
            Paragraph(
                "The shapes are those that the measurements carry: the model's config was not read, so red flags "
                f"(norms or biases on keys, capped logits, sinks) are unknown here. {command} tells them.",
                "note",
            )
        ]
    if not inventory.red_flags:
        return [Paragraph("No red flags: nothing in its attention changes what a score of it means.", "note")]
    flags: list[Block] = []
    for flag in inventory.red_flags:
        everywhere = len(flag.layers) == len(inventory.geometry.scored)
        where = "every layer" if everywhere else layers_text(flag.layers)
        flags.append(Paragraph(f"Red flag {flag.name} ({where}): {flag.why}.", "flag"))
    return flags
