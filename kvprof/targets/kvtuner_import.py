"""KVTuner's per-layer bits (arXiv 2502.04420): the YAML file that its search publishes, to a BitPlan.

    0: {nbits_key: 4, nbits_value: 2}
    1: {nbits_key: 8, nbits_value: 4}

Does not know which model the file was searched for, unless told: the file does not say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from kvprof.allocate.assemble import assemble, tensors_of
from kvprof.errors import InvalidFile, Mismatch, did_you_mean, first_line
from kvprof.records.document import ModelInfo, read_at_most
from kvprof.records.formats import CODE_BITS, FULL_BITS, usual_format
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, Provenance, Quantizer, Solver, Window
from kvprof.targets.kvtuner import KIVI_GROUP_SIZE, KIVI_WINDOW

LARGEST_FILE_BYTES = 2**17
"""A thousand layers take 40 kB; this is read in two seconds."""
MOST_LEVELS = 8
"""Of mappings in mappings. A file of KVTuner's has two; a few more get a message of their own."""

_KEYS = {"nbits_key": "key", "nbits_value": "value"}
_BITS = (*CODE_BITS, FULL_BITS)


class LayerBits(NamedTuple):
    """The bits of one layer's keys and values."""

    key: int
    value: int


def read_kvtuner(path: Path) -> dict[int, LayerBits]:
    """Return the bits of each layer that a file names, ascending.

    Raises InvalidFile, in one message, for a file that cannot be read, is not YAML, or says anything but the bits of
    some layers, each layer and each tensor once.
    """
    layers: dict[int, LayerBits] = {}
    for line, key, node in _pairs(_compose(_read_text(path), path), f"{path}"):
        layer = _whole_number(key)
        if layer is None:
            raise InvalidFile(f"{path}, {line}: {_text(key)} is not the number of a layer.")
        if layer in layers:
            raise InvalidFile(f"{path}, {line}: layer {layer} stands for the second time.\n  Keep one of the two.")
        layers[layer] = _layer_bits(node, path, layer)
    if not layers:
        raise InvalidFile(f"{path}: the file names no layer.")
    return dict(sorted(layers.items()))


def kvtuner_plan(
    layers: Mapping[int, LayerBits],
    *,
    model: ModelInfo | None = None,
    geometry: CacheGeometry | None = None,
    group_size: int = KIVI_GROUP_SIZE,
    window: Window = KIVI_WINDOW,
    command: str | None = None,
) -> BitPlan:
    """Return the plan that gives each layer's keys and values these bits, in the formats of KIVI.

    model, geometry: of the model that the bits are for, where it is known. Its skipped layers must not have any; those
    that slide need none.
    Raises InvalidFile where no model is named and a layer is missing, Mismatch where the layers are not those that a
    plan for the model must cover.
    """
    if geometry is not None:
        geometry = geometry.leaving({at.layer: at.window_text for at in geometry.sliding if at.layer not in layers})
        _check_layers(layers, geometry)
        tensors = tensors_of({shape.layer: shape for shape in geometry.planned})
    else:
        missing = sorted(set(range(max(layers))) - set(layers))
        if missing:
            raise InvalidFile(
                f"the file gives no bits to layer {missing[0]}.\n"
                "  If that is a layer that the model skips, name the model: --model."
            )
        tensors = tensors_of(dict.fromkeys(layers))
    bits = [getattr(layers[tensor.layer], tensor.name) for tensor in tensors]
    return assemble(
        tensors,
        [
            usual_format(tensor.stored_as, width, group_size, tensor.head_dim)
            for tensor, width in zip(tensors, bits, strict=True)
        ],
        model=model or ModelInfo(num_layers=geometry.num_layers if geometry else len(layers)),
        geometry=geometry,
        quantizer=Quantizer(),
        window=window,
        solver=Solver(method="kvtuner"),
        provenance=Provenance(command=command),
    )


def _check_layers(layers: Mapping[int, LayerBits], geometry: CacheGeometry) -> None:
    """Raise Mismatch where the layers are not exactly those that a plan for the model covers."""
    problem = None
    for layer in layers:
        if problem is None and layer >= geometry.num_layers:
            problem = f"it gives bits to layer {layer}, and the model has {geometry.num_layers} layers"
        elif problem is None and geometry.layers[layer].skipped is not None:
            problem = f"it gives bits to layer {layer}, which the model skips ({geometry.layers[layer].skipped})"
    missing = [shape.layer for shape in geometry.planned if shape.layer not in layers]
    if problem is None and missing:
        problem = f"it gives no bits to layer {missing[0]}, and the model has {geometry.num_layers} layers"
    if problem is not None:
        raise Mismatch(f"the file is for another model: {problem}.\n  Name the model that it was searched for.")


def _read_text(path: Path) -> str:
    """Return a file's text; raises InvalidFile."""
    try:
        raw = read_at_most(path, LARGEST_FILE_BYTES)
        if raw is None:
            raise InvalidFile(f"{path}: no file of KVTuner's has more than {LARGEST_FILE_BYTES} bytes.")
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise InvalidFile(f"{path}: no such file.") from None
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidFile(f"{path}: not UTF-8 text.") from None


def _compose(text: str, path: Path) -> yaml.Node | None:
    """Return the document as nodes, in which two equal keys are still two: loading would keep the last."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_LEVELS:  # here, since to read on takes time that grows with the square of the depth
                raise InvalidFile(f"{path}, {_line(event.start_mark)}: nested too deeply to be a file of KVTuner's.")
            if getattr(event, "anchor", None) is not None:
                line = _line(event.start_mark)
                raise InvalidFile(f"{path}, {line}: no anchors and aliases, please.\n  Write each layer's bits out.")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", {_line(error.problem_mark)}" if error.problem_mark else ""
        raise InvalidFile(f"{path}{line}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise InvalidFile(f"{path}: not valid YAML: {first_line(error)}.") from None


def _layer_bits(node: yaml.Node, path: Path, layer: int) -> LayerBits:
    bits: dict[str, int] = {}
    for line, key, value in _pairs(node, f"{path}: layer {layer}"):
        where = f"{path}, {line}: layer {layer}"
        name = _KEYS.get(key.value if isinstance(key, yaml.ScalarNode) else "")
        if name is None:
            raise InvalidFile(f"{where}: unknown key {_text(key)}: {did_you_mean(_text(key), _KEYS)}")
        if name in bits:
            raise InvalidFile(f"{where}: {key.value} stands twice.\n  Keep one of the two.")
        width = _whole_number(value)
        if width not in _BITS:
            raise InvalidFile(
                f"{where}: {key.value} is {_text(value)}; choose from {', '.join(map(str, _BITS))}, without quotes."
            )
        bits[name] = width
    for key, name in _KEYS.items():
        if name not in bits:
            raise InvalidFile(f"{path}: layer {layer} has no {key}.")
    return LayerBits(**bits)


def _pairs(node: yaml.Node | None, where: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """Return the line, key and value of each entry of a plain mapping; raises InvalidFile for all else."""
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        raise InvalidFile(
            f"{where}: expected a mapping, found {'nothing' if node is None else _text(node)}.\n"
            "  A file of KVTuner's gives each layer its bits: 0: {nbits_key: 4, nbits_value: 2}"
        )
    return [(_line(key.start_mark), key, value) for key, value in node.value]


def _whole_number(node: yaml.Node) -> int | None:
    """Return what a node says if that is a number such as 4, not '4', 4.0, 0x4 or true."""
    plain = isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int"
    return int(node.value) if plain and re.fullmatch(r"0|[1-9][0-9]{0,3}", node.value) else None


def _text(node: yaml.Node) -> str:
    """Return a node as an error message shows it."""
    if not isinstance(node, yaml.ScalarNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        return kind if node.tag.startswith("tag:yaml.org,2002:") and "/" not in node.tag else f"{kind} with a tag"
    quoted = node.tag == "tag:yaml.org,2002:str" and node.style is not None
    text = repr(node.value) if quoted else str(node.value) or "nothing"
    return text if len(text) <= 60 else text[:57] + "..."


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}"
