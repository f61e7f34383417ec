"""What was found of a model as tables: an inventory of its cache, Scores of every kind.

Reads records, prints them through `console`; knows nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvprof.records.formats import TENSORS
from kvprof.records.geometry import CacheGeometry, KVLayer, bytes_text
from kvprof.records.inventory import Inventory
from kvprof.records.scores import LOSS_INCREASE, SCALAR_METRICS, Scores
from kvprof.records.words import context_text, layers_text
from kvprof.report.audits import show_divergence
from kvprof.report.console import Table, bar, print_flag, print_note, print_plain
from kvprof.report.losses import show_best_losses, show_losses
from kvprof.report.sentences import indexer_remark, larger, latent_remarks, norm_verdict, score_remarks, state_remarks

BAR_CELLS = 6
"""Of the bar beside a gradient norm."""


def show_inventory(inventory: Inventory) -> None:
    """Print the cache of every layer, its bytes, the layers a plan leaves alone and the red flags."""
    geometry = inventory.geometry
    table = Table(
        f"KV cache of {inventory.model.id} ({inventory.model.architecture}, {geometry.dtype})",
        ("layer", "kind", "KV heads", "head dim K", "V", "width K", "V", "bytes/token"),
        left=[1],
    )
    for layer in geometry.layers:
        style = "" if layer.skipped is None else "dim"
        size = "not known" if layer in geometry.unknown else str(geometry.bytes_per_token(layer))
        table.add(*_shape_cells(layer), size, style=style)
    table.print()
    if inventory.dtype_assumed:
        print_plain(f"the config names no dtype, and no weights are here to tell it: {geometry.dtype} is assumed")
    if inventory.sizes_by_default:
        taken = ", ".join(f"{name} {size}" for name, size in inventory.sizes_by_default.items())
        print_plain(f"the config does not name these, and transformers' defaults are taken: {taken}")
    where = f"{len(geometry.growing)} of {geometry.num_layers} layers"
    if inventory.bytes_per_token is None or inventory.bytes_at is None:
        print_plain(f"what a token adds is not known: caches of a kind of their own, {_numbers(geometry.unknown)}")
    else:
        if geometry.growing:
            adds = inventory.bytes_per_token
            print_plain(f"each token adds {adds} bytes ({bytes_text(adds)}) in {where}")
        else:
            print_plain("no layer grows with the context: tokens that leave a window are let go")
        sizes = inventory.bytes_at.items()
        print_plain("  ".join(f"{context_text(tokens)} context: {bytes_text(size)}" for tokens, size in sizes))
    reasons: dict[str, list[int]] = {}
    for layer in geometry.layers:
        if layer.skipped is not None:
            reasons.setdefault(layer.skipped, []).append(layer.layer)
    for remark in state_remarks(geometry):
        print_plain(remark)
    for reason, layers in reasons.items():
        print_plain(f"left alone by a plan: {layers_text(layers)}: {reason}")
    show_weight_sharing(geometry)
    for remark in latent_remarks(geometry):
        print_plain(remark)
    show_red_flags(inventory)
    if not inventory.red_flags:
        print_plain("no red flags")


def _numbers(layers: Sequence[KVLayer]) -> str:
    return layers_text([layer.layer for layer in layers])


def show_weight_sharing(geometry: CacheGeometry) -> None:
    """Print which layers have no W_v but W_k, and which run one block."""
    if layers := [layer.layer for layer in geometry.layers if layer.values_of_key_projection]:
        print_plain(f"W_v is W_k in {layers_text(layers)}: one matrix makes keys and values, and the cache holds both")
    for sharing in geometry.shared_blocks.values():
        print_plain(f"one block, its weights counted once, with a cache for each layer: {layers_text(sharing)}")


def show_red_flags(inventory: Inventory) -> None:
    """Print each red flag with the layers it concerns and one line of why it matters."""
    for flag in inventory.red_flags:
        everywhere = len(flag.layers) == len(inventory.geometry.scored)
        print_flag(flag.name, f"({'every layer' if everywhere else layers_text(flag.layers)}): {flag.why}")


def show_scores(scores: Scores, brief: bool = False) -> None:
    """Print every metric of a Scores file, layer by layer, and what can be said of it.

    brief: of the predicted losses, the best format of each width alone.
    """
    title = f"{scores.source or 'scores'} of {scores.model.id if scores.model and scores.model.id else 'a model'}"
    if scores.calibration is not None:
        text = scores.calibration
        title += f" on {text.sequences} sequences, {text.tokens} tokens of {text.dataset}"
    norms = [metric for metric in ("spectral_norm", "frobenius_norm") if metric in scores.metrics]
    if len(norms) == 2:
        _show_norms(scores, title)
    elif norms:
        _show_single(scores, norms[0], title)
    if "gradient_norm" in scores.metrics:
        _show_gradients(scores, title)
    if scores.source == "divergence":
        show_divergence(scores)
    else:
        (show_best_losses if brief else show_losses)(scores)
    if not scores.metrics and scores.source != "divergence":  # a measured sample need not cover every layer
        print_plain(f"{title}: {len(scores.layers)} layers, and none of the metrics {', '.join(SCALAR_METRICS)} in all")
    for remark in [*latent_remarks(scores.geometry), *score_remarks(scores)]:
        print_note(remark)
    if LOSS_INCREASE in scores.metrics and (unseen := indexer_remark(scores.geometry)) is not None:
        print_note(unseen)


def _show_norms(scores: Scores, title: str) -> None:
    norm_headings = [heading for norm in ("spec.", "frob.") for heading in (f"{norm}\nK", f"{norm}\nV", "K/V", "in")]
    table = Table(title, ("layer", *norm_headings, "rank\nK", "rank\nV"))
    for entry in scores.layers:
        cells = [str(entry.layer)]
        for metric in ("spectral_norm", "frobenius_norm"):
            key, value = getattr(entry.key, metric), getattr(entry.value, metric)
            ratio = f"{key / value:#.3g}" if value else "-"
            cells += [_number(key), _number(value), ratio, larger(key, value)]
        table.add(*cells, _number(entry.key.stable_rank), _number(entry.value.stable_rank))
    table.print()
    if any(entry.key.bias_norm is not None or entry.key.gain_rms is not None for entry in scores.layers):
        _show_extras(scores)
    print_plain(
        "spec.: largest singular value; frob.: root of the sum of squares; in: larger one; rank: stable rank",
        style="dim",
    )
    if (verdict := norm_verdict(scores)) is not None:
        print_plain(verdict, style="bold")


def _show_extras(scores: Scores) -> None:
    """Print biases and gains, which the weight norm does not see."""
    table = Table(
        "beside the weights", ("layer", "K bias\nnorm", "V bias\nnorm", "k_norm gain\nrms", "k_norm gain\nlargest")
    )
    for entry in scores.layers:
        numbers = (entry.key.bias_norm, entry.value.bias_norm, entry.key.gain_rms, entry.key.gain_max)
        table.add(str(entry.layer), *map(_number, numbers))
    table.print()


def _show_gradients(scores: Scores, title: str) -> None:
    headings = [heading for name in ("K", "V") for heading in (f"{name} gradient\nnorm", "± stderr", "rank", "")]
    table = Table(title, ("layer", *headings), left=[4, 8])
    ranks = {tensor: _ranks(scores.column("gradient_norm", tensor)) for tensor in TENSORS}
    largest = max(max(scores.column("gradient_norm", tensor)) for tensor in TENSORS) or 1.0
    for row, entry in enumerate(scores.layers):
        cells = [str(entry.layer)]
        for tensor in TENSORS:
            found = entry.tensor(tensor)
            norm = found.gradient_norm or 0.0
            cells += [_number(norm), _number(found.gradient_norm_stderr), str(ranks[tensor][row])]
            cells.append(bar(norm / largest, BAR_CELLS))
        table.add(*cells)
    table.print()


def _show_single(scores: Scores, metric: str, title: str) -> None:
    table = Table(title, ("layer", f"{metric} K", f"{metric} V"))
    for entry in scores.layers:
        table.add(str(entry.layer), _number(getattr(entry.key, metric)), _number(getattr(entry.value, metric)))
    table.print()


def _shape_cells(layer: KVLayer) -> list[str]:
    kind = layer.kind + (f" {layer.window}" if layer.window else "")
    if not layer.keeps_tokens:
        return [str(layer.layer), kind, "-", "-", "-", "-", "-"]
    numbers = (layer.kv_heads, layer.key_head_dim, layer.value_head_dim, layer.key_width, layer.value_width)
    return [str(layer.layer), kind, *map(str, numbers)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}"


def _ranks(numbers: Sequence[float]) -> list[int]:
    """Return the rank of each number, 1 for the largest."""
    order = sorted(range(len(numbers)), key=lambda index: -numbers[index])
    ranks = [0] * len(numbers)
    for rank, index in enumerate(order, start=1):
        ranks[index] = rank
    return ranks
