"""Plans for tiny models, and a slow cache that is right on sight: it keeps full precision, and rounds all anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from handplans import tensor_plan
from reference import tokens_in_codes
from tiny import TINY, UNUSUAL, skip_unknown
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvprof.models.identity import live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.records.document import ModelInfo
from kvprof.records.plan import AnyLayerPlan, BitPlan, LayerChoice, Quantizer, SkippedLayer, Window, layer_plan
from kvprof.runtime.layers import RECORDED_TOKENS
from kvprof.runtime.quantization.quantizer import fake_quantize

MIXED = [("int2g4c", "rot2"), ("int3g8", "int4g8"), ("rot3", "int1g4"), ("int4g4", "full")]
"""Formats of keys and values, layer by layer and over again: both schemes, clipped and plain, and one in 16 bits."""
FULL = [("full", "full")]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """Build a tiny model of a named architecture, some settings of its config changed."""
    skip_unknown(name)
    config = (TINY | UNUSUAL)[name]()
    for setting, value in settings.items():
        setattr(config, setting, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).eval().requires_grad_(False)


def plan_for(
    model: PreTrainedModel,
    formats: Sequence[tuple[str, str]] = MIXED,
    window: tuple[int, int] = (2, 6),
    fraction: float = 0.0,
    fingerprint: bool = False,
    layers: LayerChoice = "all",
) -> BitPlan:
    """Return a plan for a model. window: (sink tokens, recent tokens); fraction: the recent fraction of keys.

    layers: whether it covers those that slide.
    """
    geometry = take_inventory(model.config).geometry
    if layers == "full":
        geometry = geometry.leaving({layer.layer: "sliding" for layer in geometry.sliding})
    entries = []
    for number, layer in enumerate(geometry.planned):
        key, value = formats[number % len(formats)]
        axis = "channel" if layer.is_latent else "token"
        tensors = (
            tensor_plan(key, "channel", layer.key_head_dim, fraction),
            tensor_plan(value, axis, layer.value_head_dim),
        )
        entries.append(layer_plan(layer.layer, *tensors, layer.is_latent))
    return BitPlan(
        model=ModelInfo(
            num_layers=geometry.num_layers, fingerprint=live_fingerprint(model, geometry) if fingerprint else None
        ),
        quantizer=Quantizer(),
        window=Window(sink_tokens=window[0], recent_tokens=window[1]),
        geometry=geometry,
        layers=tuple(entries),
        skipped=tuple(
            SkippedLayer(layer=layer.layer, reason=layer.skipped) for layer in geometry.layers if layer.skipped
        ),
    )


def prompt(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Return random token ids, none of them padding: (B, T)."""
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def step(model: PreTrainedModel, ids: Tensor, cache: Cache, **settings: Tensor) -> Tensor:
    """Return the logits of some more tokens, (B, T, V)."""
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache, use_cache=True, **settings).logits
    return logits


class NaiveLayer(DynamicLayer):
    """Everything in full precision; what the plan would have rounded is rounded on the way out."""

    def __init__(self, plan: BitPlan, entry: AnyLayerPlan, span: int | None) -> None:
        super().__init__()
        self.plan = plan
        self.span = span
        self.is_sliding = span is not None
        self.forms = (entry.key, entry.value)
        self.coded = [0, 0]
        self.record_past = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        past = (self.keys, self.values) if self.is_initialized else (key_states[:, :, :0], value_states[:, :, :0])
        read = [
            torch.cat([self.rounded(states, number), new], dim=2)
            for number, (states, new) in enumerate(zip(past, (key_states, value_states), strict=True))
        ]
        seen = self.get_mask_sizes(key_states.shape[2])[0]
        super().update(key_states, value_states)
        self.settle(RECORDED_TOKENS if self.record_past else 0)
        return read[0][:, :, -seen:], read[1][:, :, -seen:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.get_seq_length()
        hidden = 0 if self.span is None else max(0, past - self.span + 1)
        return past - hidden + query_length, hidden

    def rounded(self, states: Tensor, number: int) -> Tensor:
        first, coded = self.plan.window.sink_tokens, self.coded[number]
        if coded == 0:
            return states
        restored = fake_quantize(states[:, :, first : first + coded], self.forms[number], self.plan.quantizer)
        return torch.cat([states[:, :, :first], restored, states[:, :, first + coded :]], dim=2)

    def settle(self, recorded: int) -> None:
        tokens = max(0, self.get_seq_length() - recorded)
        due = [tokens_in_codes(tokens, form, self.plan.window) for form in self.forms]
        self.coded = [max(old, new) for old, new in zip(self.coded, due, strict=True)]

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.coded = [tokens_in_codes(self.get_seq_length(), form, self.plan.window) for form in self.forms]


def naive_cache(plan: BitPlan, model: PreTrainedModel) -> Cache:
    """Return the slow cache of a plan, for a model whose cache grows layer by layer."""
    assert plan.geometry is not None
    layers = list(DynamicCache(config=model.config).layers)
    for entry in plan.layers:
        layers[entry.layer] = NaiveLayer(plan, entry, plan.geometry.layers[entry.layer].window)
    return Cache(layers=layers)
