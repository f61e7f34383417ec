"""Is loss_increase right whatever a model's own attention does: softcaps, learned sinks, layers with a sliding window?

Truth is the model's own eager attention function, asked for one query at a time with states rounded by other code; of a
model that has no such function, what arrives at its output projection when it decodes from a cache with such states.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from mean_squares import mean_squares
from runtime.reference import rounded, tokens_in_codes
from tiny import tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvprof.calibration.sequences import batches
from kvprof.models.inventory import take_inventory
from kvprof.profile import loss_increase as losses
from kvprof.profile.decoder import Decoder, Formats, formats_of
from kvprof.records.plan import LayerChoice, Quantizer, TensorPlan, Window

WINDOW = Window(sink_tokens=2, recent_tokens=5)
NAMES = {"key": ("int2g4", "rot2"), "value": ("int3g8", "rot2")}
TOKENS, START = 41, 21


def eagerly(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, formats: Formats, patch: pytest.MonkeyPatch
) -> dict[Any, float]:
    """Return each format's score of a sequence, the layer's attention asked again for each query alone."""
    module = sys.modules[type(model).__module__]
    eager = vars(module)["eager_attention_forward"]
    seen: dict[int, tuple[Any, ...]] = {}

    def record(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        output, weights = eager(layer, query, key, value, mask, **options)
        output.requires_grad_(True).retain_grad()
        seen[layer.layer_idx] = (layer, query.detach(), key.detach(), value.detach(), mask, options, output)
        return output, weights

    patch.setattr(module, "eager_attention_forward", record)
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids[None], use_cache=False).logits[0, START:]
    (-logits.log_softmax(-1).gather(1, labels[:, None]).sum()).backward()
    expected = {}
    for (number, tensor), forms in formats.items():
        layer, query, key, value, mask, options, output = seen[number]
        for form in forms:
            total = 0.0
            for at in range(START, TOKENS):
                states = {"key": key.clone(), "value": value.clone()}
                coded = tokens_in_codes(at, TensorPlan(**form.model_dump()), WINDOW)
                inside = states[tensor][0, :, WINDOW.sink_tokens : WINDOW.sink_tokens + coded]
                if coded:
                    inside.copy_(torch.from_numpy(rounded(inside.numpy().copy(), form, Quantizer())))
                here = slice(at, at + 1)
                bias = options.get("position_bias")  # (1, H, queries, keys), of Inkling
                own = options if bias is None else options | {"position_bias": bias[:, :, here]}
                changed, _ = eager(layer, query[:, :, here], states["key"], states["value"], mask[:, :, here], **own)
                total += 0.5 * float((output.grad[0, at] * (changed[0, 0] - output.detach()[0, at])).sum()) ** 2
            expected[number, tensor, form.name] = total / (TOKENS - START)
    return expected


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma2", "all"),
        ("gemma3", "all"),
        ("gpt-oss", "all"),
        ("mistral-sliding", "all"),
        ("gemma3", "full"),
        ("qwen3-moe", "all"),
        ("phi3", "all"),
        ("gpt2", "all"),
        ("inkling", "all"),
    ],
)
def test_every_architecture_s_losses_are_those_of_its_own_attention(
    name: str, layers: LayerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers that slide too: their window is 16 of 41 tokens, of which the last 5 stay in full precision."""
    has_experts = name in ("gpt-oss", "qwen3-moe", "inkling")  # whose kernels know no float64
    model = tiny_model(name) if has_experts else tiny_model(name).double()
    ids = torch.randint(1, 96, (TOKENS,), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(1, 96, (TOKENS - START,), generator=torch.Generator().manual_seed(9))
    decoder = Decoder(NAMES, WINDOW, layers=layers)
    formats = formats_of(decoder.covers(take_inventory(model.config).geometry), decoder)
    assert {layer for layer, _ in formats} == ({1} if layers == "full" else set(range(model.config.num_hidden_layers)))
    monkeypatch.setattr(losses, "_sampled_labels", lambda *_: labels)
    batch = next(batches([ids.tolist()], 1))
    found = mean_squares(losses.loss_effects(model, batch, formats, WINDOW, Quantizer(), 0.5, seed=0))
    expected = eagerly(model, ids, labels, formats, monkeypatch)
    assert set(found) == set(expected)
    assert min(expected.values()) > 0
    for key, loss in expected.items():
        assert float(found[key][0]) == pytest.approx(loss, rel=1e-3 if has_experts else 1e-5), key


class RoundedCache(DynamicCache):
    """A cache in full precision whose last step reads one tensor of one layer rounded."""

    def __init__(self, model: PreTrainedModel, layer: int, place: int, form: TensorPlan, coded: int) -> None:
        super().__init__(config=model.config)
        self.rounds = False
        self.where = layer, place
        self.form = form
        self.tokens = slice(WINDOW.sink_tokens, WINDOW.sink_tokens + coded)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        states = list(super().update(key_states, value_states, layer_idx, *rest, **more))
        layer, place = self.where
        if self.rounds and layer_idx == layer and self.tokens.start < self.tokens.stop:
            states[place] = states[place].clone()
            inside = states[place][0, :, self.tokens]
            inside.copy_(torch.from_numpy(rounded(inside.numpy().copy(), self.form, Quantizer())))
        return states[0], states[1]


def outputs_of(model: PreTrainedModel, name: str) -> list[nn.Module]:
    """The projections after each layer's attention."""
    return [module for path, module in model.named_modules() if path.endswith(name)]


@pytest.mark.parametrize(
    ("name", "projection"),
    [
        ("gptj", "attn.out_proj"),
        ("codegen", "attn.out_proj"),
        ("bloom", "self_attention.dense"),
        ("falcon-mqa", "self_attention.dense"),
        ("falcon-mha", "self_attention.dense"),
        ("falcon-grouped", "self_attention.dense"),
        ("mpt", "attn.out_proj"),
    ],
)
def test_losses_of_attention_that_is_written_out_are_those_of_decoding(
    name: str, projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name).double()
    ids = torch.randint(1, 96, (TOKENS,), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(1, 96, (TOKENS - START,), generator=torch.Generator().manual_seed(9))
    decoder = Decoder({"key": ("int2g4",), "value": ("rot2",)}, WINDOW)
    formats = formats_of(take_inventory(model.config).geometry, decoder)
    monkeypatch.setattr(losses, "_sampled_labels", lambda *_: labels)
    batch = next(batches([ids.tolist()], 1))
    found = mean_squares(losses.loss_effects(model, batch, formats, WINDOW, Quantizer(), 0.5, seed=0))

    seen: list[Tensor] = []
    for module in outputs_of(model, projection):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = model.get_input_embeddings()(ids[None]).requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits[0, START:]
    loss = -logits.log_softmax(-1).gather(1, labels[:, None]).sum()
    gradients = torch.autograd.grad(loss, seen)
    exact = [output.detach() for output in seen]
    for (layer, tensor), forms in formats.items():
        form, total = TensorPlan(**forms[0].model_dump()), 0.0
        for at in range(START, TOKENS):
            place = ("key", "value").index(tensor)
            cache = RoundedCache(model, layer, place, form, tokens_in_codes(at, form, WINDOW))
            with torch.no_grad():
                model(ids[None, :at], past_key_values=cache, use_cache=True)
                cache.rounds = True
                seen.clear()
                model(ids[None, at : at + 1], past_key_values=cache, use_cache=True)
            total += 0.5 * float((gradients[layer][0, at] * (seen[layer][0, 0] - exact[layer][0, at])).sum()) ** 2
        expected = total / (TOKENS - START)
        assert expected > 0
        # GPT-J and CodeGen compute scores in float32 whatever the model is in.
        assert float(found[layer, tensor, form.name][0]) == pytest.approx(expected, rel=1e-3), (layer, tensor)
