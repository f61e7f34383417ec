"""How K and V lie inside a model's projections: the one table of layouts, and how to cut a fused matrix.

Works on names and shapes, of checkpoint tensors and of live modules alike; never on model ids, never on weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kvprof.errors import UnknownLayout
from kvprof.records.geometry import CacheGeometry, KVLayer


@dataclass(frozen=True)
class Layout:
    """How one family of attention modules names and orders its projections.

    names: the projections that hold K and V, with the module they sit in where the name alone is ambiguous.
    blocks: the output rows are this many equal blocks, each holding its share of every part.
    parts: what stands in a block, in order. `k`, `v`: the tensor alone fills the projection.
    """

    names: tuple[str, ...]
    parts: Literal["k,v", "qkv", "qvk", "kv"]
    blocks: Literal["one", "kv_heads", "four"] = "one"
    transposed: bool | None = None
    """Whether the weight is stored (in, out), as GPT-2's Conv1D does; None where it is never so."""


LAYOUTS = (
    Layout(("k_proj", "v_proj"), "k,v"),  # Llama, Mistral, Mixtral, Qwen, Gemma, OPT, GPT-J, StarCoder2, OLMo2, Cohere
    Layout(("self_attn.qkv_proj",), "qkv"),  # Phi-3: all of Q, then K, then V
    Layout(("attn.Wqkv",), "qkv"),  # MPT, DBRX
    Layout(("attn.c_attn",), "qkv", transposed=True),  # GPT-2
    Layout(("attn.c_attn",), "qkv", blocks="kv_heads", transposed=False),  # GPT-BigCode
    Layout(("query_key_value",), "qkv", blocks="kv_heads"),  # GPT-NeoX, Bloom, Persimmon, Falcon's three layouts
    Layout(("attn.qkv_proj",), "qvk", blocks="four"),  # CodeGen: cut for four TPU cores
    Layout(("self_attention.kv_proj",), "kv"),  # JetMoE
    Layout(("kv_a_proj_with_mqa",), "kv"),  # latent attention (DeepSeek and after it): the latent, the rotary part
    Layout(("attention.wkv_a_with_mqa",), "kv"),  # the same in checkpoints of Mistral Large 4
    Layout(("attn_kv_a_mqa",), "kv"),  # the same in a GGUF
    Layout(("self_attn.to_k", "self_attn.to_v"), "k,v"),  # checkpoints of Cosmos3
    Layout(("attn.wk_dv", "attn.wv_dv"), "k,v"),  # checkpoints of Inkling
    Layout(("attn_k", "attn_v"), "k,v"),  # GGUF
    Layout(("attn_qkv",), "qkv"),  # GGUF: every fused family is stored as Q, then K, then V
)

_NAMED = re.compile(r"^(?P<stack>.*?)(?:^|(?<=\.))(?:layers|layer|h|blocks|block|blk)\.(?P<layer>\d+)\.(?P<module>.+)$")

INCOMPLETE = "The checkpoint is incomplete, or its layers are not alike in a way that kvprof knows."
"""What to say of a checkpoint some of whose layers have no projections."""

_TOWER = re.compile(r"vision|visual|image|audio|speech|tower|encoder|talker|2wav|(^|\.)vit(\.|$)")
"""Names of the stacks beside the decoder of a multimodal model."""


@dataclass(frozen=True)
class Projection:
    """Where one layer's K and V come from.

    layout: how they are cut. key, value: names of the modules that project them: one name where they are fused, and
    where values are made of what the keys' matrix puts out (Gemma 4's `attention_k_eq_v`).
    """

    layer: int
    layout: Layout
    key: str
    value: str

    @property
    def is_fused(self) -> bool:
        """Whether K and V are rows of one matrix."""
        return self.layout.parts != "k,v"

    @property
    def block(self) -> str:
        """The name of the block that the layer is."""
        match = _NAMED.match(self.key)
        assert match is not None
        return self.key.removesuffix("." + match["module"])

    @property
    def attention(self) -> str:
        """The name of the attention module that holds the projections."""
        return self.key.rpartition(".")[0]


@dataclass(frozen=True)
class Rows:
    """The output rows of a projection that are K, and those that are V, as (start, stop) runs in head order."""

    key: tuple[tuple[int, int], ...]
    value: tuple[tuple[int, int], ...]


def find_projections(
    names: Iterable[str],
    geometry: CacheGeometry | None = None,
    layers: Collection[int] = (),
    keys_alone: Collection[int] = (),
    beside: Collection[str] = (),
) -> dict[int, Projection]:
    """Find the K and V projections among module names, one for each layer, by layer.

    names: every module (or tensor, without `.weight`) of a model.
    geometry, layers: which layers must be found, as a geometry's scored ones or by number. Of several stacks that have
    them (a vision tower, the linear attention of a hybrid) the decoder's is taken.
    keys_alone: the layers that have no matrix for values, beside those that the geometry says so of.
    beside: what the parts of a model are called that are not its decoder.
    Raises UnknownLayout when none does, with the attention-like names that were seen, or where none needs to.
    """
    if geometry is not None:
        check_projects(geometry)
        keys_alone = {layer.layer for layer in geometry.scored if layer.values_of_key_projection}
    stacks: dict[_Stack, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    seen: set[str] = set()
    for name in names:
        match = _NAMED.match(name)
        if match is None:
            continue
        module = match["module"]
        seen.add(module)
        for layout in LAYOUTS:
            for wanted in layout.names:
                if module == wanted or module.endswith("." + wanted):
                    parent = module[: len(module) - len(wanted)]
                    stacks[match["stack"], parent, layout][int(match["layer"])][wanted] = name
    candidates = {
        stack: {
            layer: Projection(layer, stack[2], found[stack[2].names[0]], found.get(value, found[stack[2].names[0]]))
            for layer, found in sorted(by_layer.items())
            if stack[2].names[0] in found and (value in found or layer in keys_alone)
        }
        for stack, by_layer in stacks.items()
        for value in (stack[2].names[-1],)
    }
    candidates |= _several_a_block(candidates)
    if geometry is not None:
        for found in candidates.values():
            for layer in geometry.scored:  # a checkpoint has the weights of a shared block once
                if layer.layer not in found and layer.block_of in found:
                    found[layer.layer] = replace(found[layer.block_of], layer=layer.layer)
    needed = {layer.layer for layer in geometry.scored} if geometry else set(layers)
    covering = {stack: found for stack, found in candidates.items() if found and needed <= found.keys()}
    if not covering:
        raise UnknownLayout(_nothing_found(seen, candidates.values(), needed))
    # A tower may have as many layers as the decoder, or more.
    others = set(beside)
    stack = max(
        covering,
        key=lambda stack: (
            others.isdisjoint(stack[0].split(".")),
            _TOWER.search(stack[0]) is None,
            len(covering[stack]),
        ),
    )
    return covering[stack]


_Stack = tuple[str, str, Layout]
"""What the blocks of a stack are in, what their projections are in, and how these are cut."""


def _several_a_block(stacks: Mapping[_Stack, Mapping[int, Projection]]) -> dict[_Stack, dict[int, Projection]]:
    """Return the stacks whose blocks have several attentions, `self_attn.0` and `self_attn.1` (LongCat-Flash).

    Each attention is a layer of the cache: with two a block, those of block 3 are layers 6 and 7.
    """
    groups: dict[_Stack, dict[int, Mapping[int, Projection]]] = defaultdict(dict)
    for (stack, parent, layout), found in stacks.items():
        if match := re.fullmatch(r"(.+\.)(\d+)\.", parent):
            groups[stack, match[1], layout][int(match[2])] = found
    joined = {}
    for key, attentions in groups.items():
        several = len(attentions)
        if sorted(attentions) == list(range(several)) and len({tuple(found) for found in attentions.values()}) == 1:
            joined[key] = {
                block * several + place: replace(projection, layer=block * several + place)
                for place, found in attentions.items()
                for block, projection in found.items()
            }
    return joined


def check_projects(geometry: CacheGeometry) -> None:
    """Raise UnknownLayout, saying why, where no layer of a model has keys and values to measure."""
    if not geometry.scored:
        raise UnknownLayout(
            f"no layer keeps keys and values of its own: {geometry.reasons}.\n"
            "  There is nothing to measure or to plan; kvprof inspect shows what the model caches instead."
        )


def block_stack(projections: dict[int, Projection]) -> str:
    """Return the name of the module whose children are the model's blocks, those without projections too."""
    return next(iter(projections.values())).block.rpartition(".")[0]


def choose_layout(projection: Projection, shape: tuple[int, ...], layer: KVLayer, query_heads: int) -> Layout:
    """Settle between layouts of one name (GPT-2's and GPT-BigCode's `c_attn`) by the weight's shape.

    shape: of the stored weight. Raises UnknownLayout when no layout of that name has this shape.
    """
    expected = sum(_part_rows(layer, query_heads)[part] for part in projection.layout.parts)
    for layout in LAYOUTS:
        if layout.names == projection.layout.names:
            rows = shape[1 if layout.transposed else 0]
            if rows == expected:
                return layout
    raise UnknownLayout(
        f"{projection.key} of layer {layer.layer} is {'x'.join(map(str, shape))}, but {query_heads} query heads and "
        f"{layer.kv_heads} KV heads of {layer.key_head_dim} and {layer.value_head_dim} make {expected} rows.\n"
        "  This fused layout is none that kvprof knows how to cut."
    )


def cut_rows(layout: Layout, layer: KVLayer, query_heads: int) -> Rows:
    """Return which output rows of a fused projection are K and which are V, heads in order.

    Raises UnknownLayout where the heads do not divide into the layout's blocks.
    """
    blocks = {"one": 1, "kv_heads": layer.kv_heads, "four": 4}[layout.blocks]
    sizes = _part_rows(layer, query_heads)
    if any(size % blocks for size in sizes.values()):
        raise UnknownLayout(
            f"layer {layer.layer}: {query_heads} query and {layer.kv_heads} KV heads do not cut into {blocks} blocks."
        )
    runs: dict[str, list[tuple[int, int]]] = {"q": [], "k": [], "v": []}
    start = 0
    for _ in range(blocks):
        for part in layout.parts:
            stop = start + sizes[part] // blocks
            runs[part].append((start, stop))
            start = stop
    return Rows(tuple(runs["k"]), tuple(runs["v"]))


def _part_rows(layer: KVLayer, query_heads: int) -> dict[str, int]:
    """Return how many output rows are queries, keys and values."""
    return {"q": query_heads * layer.key_head_dim, "k": layer.key_width, "v": layer.value_width}


def _nothing_found(seen: set[str], candidates: Iterable[dict[int, Projection]], needed: set[int]) -> str:
    """Say why no stack will do: the best of them lacks layers, or there is none."""
    best = max(candidates, key=lambda found: len(needed & found.keys()), default={})
    if found := needed & best.keys():
        like = "/".join(best[min(found)].layout.names)
        return (
            f"{len(found)} of {len(needed)} layers project keys and values ({like}), "
            f"but layer {min(needed - found)} does not.\n"
            f"  {INCOMPLETE}"
        )
    attention_like = sorted(name for name in seen if re.search(r"att|qkv|query|key|proj", name, re.IGNORECASE))
    return (
        "cannot tell which matrices project keys and values.\n"
        f"  layers look like: {', '.join(attention_like[:8]) or 'nothing with attention in its name'}\n"
        f"  known layouts: {', '.join(sorted({'/'.join(layout.names) for layout in LAYOUTS}))}"
    )
