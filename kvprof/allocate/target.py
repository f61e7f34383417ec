"""A runtime that plans are made for: what it can be told, in which formats, and what was checked of that.

Plain data. `targets` has each runtime's; `constrained` solves a plan within what it can be told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.constraints import FULL, Constraints, OneOfAll, SomeInFull
from kvprof.errors import UsageError
from kvprof.records.external_formats import EXTERNAL, ExternalFormat
from kvprof.records.formats import TENSORS, Format, TensorName, format_named
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, Window
from kvprof.records.requests.request import LayerChoice

WHOLE_CACHE = Window(sink_tokens=0, recent_tokens=0, own_token_stored=True)
"""Every token is quantized as it comes, before any query reads it: each target's file says where it was seen."""


@dataclass(frozen=True)
class Device:
    """What a runtime's attention takes on one kind of device.

    lacks: words of formats that it does not. alike: whether keys and values have to have the same.
    """

    title: str
    lacks: frozenset[str] = frozenset()
    alike: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime that plans can be made for.

    constraints: what it can be told; None where it obeys any plan of kvprof's own formats. artefact: what `kvprof
    export` writes. since: the version that understands it. checked: what was held against what. window: what it keeps
    in full precision. full: its own word for 16 bits. sliding: what it does with layers of a sliding window: as they
    are told one by one, quantizes them like the others, or keeps them in 16 bits. stores: whether keys, or values, of a
    model are stored in one of its formats, where one word stands for several; asked with geometry and architecture.
    devices: those on which it takes less than it can be told. refuses: returns why a model cannot be served, or None.
    """

    name: str
    constraints: Constraints | None
    artefact: str
    since: str
    checked: str
    window: Window = WHOLE_CACHE
    full: str = FULL
    stores: Callable[[ExternalFormat, TensorName, CacheGeometry, str | None], bool] = lambda *model: True
    sliding: Literal["as told", "quantized", "full"] = "quantized"
    devices: Mapping[str, Device] = field(default_factory=dict)
    refuses: Callable[[CacheGeometry], str | None] = lambda geometry: None

    def formats_of(self, tensor: TensorName) -> tuple[str, ...]:
        """Return the formats, by name, that keys or values can have; none where any of kvprof's own will do."""
        return () if self.constraints is None else self.constraints.formats_of(tensor)

    def forms(self, tensor: CachedTensor) -> dict[str, Format]:
        """Return the formats by name that a tensor can have, those left out that its heads cannot."""
        found = {}
        for name in self.formats_of(tensor.name):
            with contextlib.suppress(UsageError):
                found[name] = format_named(name, tensor.stored_as, tensor.head_dim)
        return found

    def for_model(self, geometry: CacheGeometry | None, architecture: str | None = None) -> Target:
        """Return the target as it stores a model; as it is where the model's geometry is not known.

        Some runtimes keep scales in the model's dtype. vLLM leaves no layers at the ends of a hybrid model alone
        (0.33.0, `TurboQuantConfig.get_boundary_skip_layers`).
        """
        if self.constraints is None or geometry is None:
            return self

        def is_stored(name: str, tensor: TensorName) -> bool:
            form = EXTERNAL.get(name)
            return form is None or (form.suits(geometry.dtype) and self.stores(form, tensor, geometry, architecture))

        constraints = self.constraints.only(is_stored)
        if isinstance(constraints, SomeInFull) and geometry.is_hybrid:
            constraints = replace(constraints, ends={})
        return replace(self, constraints=constraints)

    def on_device(self, name: str | None) -> Target:
        """Return the target as it runs on one device; raise UsageError where it makes no difference of devices."""
        if name is None:
            return self
        if name not in self.devices or self.constraints is None:
            raise UsageError(f"--device {name}: {self.name} takes the same on every device.\n  Leave out --device.")
        device = self.devices[name]
        constraints: Constraints = self.constraints.only(lambda form, tensor: self.word(form) not in device.lacks)
        if device.alike:
            keys, values = (constraints.formats_of(tensor) for tensor in TENSORS)
            pairs = {f"{key} {value}": (key, value) for key in keys for value in values if self.are_alike(key, value)}
            constraints = OneOfAll(pairs)
        return replace(self, constraints=constraints)

    def are_alike(self, key: str, value: str) -> bool:
        """Whether the runtime has one word for two formats."""
        return self.word(key) == self.word(value)

    def formats_for(
        self, geometry: CacheGeometry, architecture: str | None
    ) -> dict[TensorName, tuple[str, ...]] | None:
        """Return `to_score` of one model."""
        return self.for_model(geometry, architecture).to_score

    @property
    def to_score(self) -> dict[TensorName, tuple[str, ...]] | None:
        """The formats that its plans need scores of; None where kvprof's usual ones will do."""
        if self.constraints is None:
            return None
        return {tensor: tuple(name for name in self.formats_of(tensor) if name != FULL) for tensor in TENSORS}

    def word(self, name: str) -> str:
        """Return the runtime's own word for a format that it knows by the name that kvprof has for it."""
        if name == FULL:
            return self.full
        return EXTERNAL[name].word or name if name in EXTERNAL else name

    def stored_bits(self) -> list[tuple[str, str]]:
        """Return each of the runtime's own words with the bits that an element then stores; D is the head dimension."""
        if self.constraints is None:
            return []
        rows = []
        # Of a model in half precision: most are.
        for word, forms in self.constraints.only(_in_half_precision).choices().items():
            bits = dict.fromkeys(map(_stored_bits, forms))
            rows.append((self.word(word), next(iter(bits)) if len(bits) == 1 else "K {} V {}".format(*bits)))
        return list(dict.fromkeys(rows))

    @property
    def words(self) -> str:
        """What the runtime can be told, in words."""
        return "any plan of kvprof's own formats" if self.constraints is None else self.constraints.words


def layer_choice(
    layers: LayerChoice | None, target: Target | None, geometry: CacheGeometry | None = None
) -> LayerChoice:
    """Return whether plans cover sliding layers: as is asked for, else as the runtime does, else they do.

    geometry: None where it is not known whether there are any.
    Raises UsageError for one that the runtime cannot be told.
    """
    if layers is None:
        return "full" if target is not None and target.sliding == "full" else "all"
    if target is not None and (geometry is None or geometry.sliding):
        fixed = {"quantized": "all", "full": "full"}.get(target.sliding, layers)
        if layers != fixed:
            does = "keeps them in 16 bits" if fixed == "full" else "quantizes them like the others"
            raise UsageError(
                f"--layers {layers}: {target.name} cannot be told so of layers of a sliding window; it {does}.\n"
                f"  Leave out --layers, or give --layers {fixed}."
            )
    return layers


def check_serves(target: Target, geometry: CacheGeometry | None) -> None:
    """Raise UsageError where a runtime can be told nothing of a model."""
    if (why := why_unserved(target, geometry)) is not None:
        raise UsageError(f"--target {target.name}: {why}.\n  Leave out --target: kvprof's own cache stores it.")


def why_unserved(target: Target, geometry: CacheGeometry | None) -> str | None:
    """Return why a runtime can be told nothing of a model, or None where it can."""
    if target.name == "transformers" or geometry is None:
        return None
    if any(shape.is_latent for shape in geometry.planned):
        return f"the model has latent attention (MLA), and kvprof does not know how {target.name} stores a latent"
    return target.refuses(geometry)


def sliding_remark(plan: BitPlan, target: Target) -> str | None:
    """Return that a runtime quantizes the sliding layers that a plan leaves alone, where it does; else None."""
    skipped = [] if plan.geometry is None else [plan.geometry.layers[layer] for layer in plan.reasons]
    if target.sliding != "quantized" or not any(shape.window for shape in skipped):
        return None
    return (
        f"{target.name} quantizes layers of a sliding window like the others: neither its KL nor its bytes are what "
        f"the plan says; `kvprof gradients --target {target.name}` scores them too"
    )


def own_token_remark(plan: BitPlan, target: Target) -> str | None:
    """Return that a plan's prediction leaves out what a query loses of its own token, where it does; else None."""
    if plan.window == target.window or plan.window != target.window.with_own_token_exact:
        return None
    return (
        f"{target.name} reads a query's own key and value as they are stored, and the plan's scores have them in full "
        f"precision: it loses more than predicted; `kvprof gradients --target {target.name}` scores that too"
    )


def target_remarks(plan: BitPlan, target: Target, device: str | None = None) -> tuple[str, ...]:
    """Return in what a runtime does otherwise than a plan for it was predicted and counted, and where it is slow.

    device: the one that the plan was made for, None for any.
    """
    found = [remark for remark in (own_token_remark(plan, target), sliding_remark(plan, target)) if remark]
    return (*found, *(device_remarks(plan, target) if device is None else ()))


def device_remarks(plan: BitPlan, target: Target) -> list[str]:
    """Return on which devices attention to a plan's formats falls back to something slower."""
    words = [[target.word(entry.tensor(tensor).name) for tensor in TENSORS] for entry in plan.layers]
    used = {word for pair in words for word in pair}
    found = []
    for name, device in target.devices.items():
        lacking = ", ".join(sorted(used & device.lacks))
        unlike = device.alike and any(len(set(pair)) > 1 for pair in words)
        what = f"flash attention for {lacking}" if lacking else "flash attention for keys and values of unlike types"
        if lacking or unlike:
            found.append(
                f"{device.title} has no {what}: attention then runs on the CPU or in f16; "
                f"`kvprof allocate --device {name}` leaves that out"
            )
    return found


def _in_half_precision(name: str, tensor: TensorName) -> bool:
    return name not in EXTERNAL or EXTERNAL[name].suits("float16")


def _stored_bits(name: str) -> str:
    """Return the stored bits of a format by name, in words: `4.5`, `4 + 32/D`."""
    external = EXTERNAL.get(name)
    if external is not None and external.block == 0:
        return f"{external.bits} + {external.side_bits}/D"
    return f"{float(format_named(name, 'value').stored_bits()):g}"
