"""Is loss_increase right whatever a model's own attention does: softcaps, learned sinks, layers with a sliding window?

Truth is the model's own eager attention function, asked for one query at a time with states rounded by other code.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from runtime.reference import rounded, tokens_in_codes
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.calibration.sequences import batches
from kvprof.models.inventory import take_inventory
from kvprof.profile import losses
from kvprof.profile.decoder import Decoder, Formats, formats_of
from kvprof.records.plan import Quantizer, TensorPlan, Window

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
                changed, _ = eager(
                    layer, query[:, :, here], states["key"], states["value"], mask[:, :, here], **options
                )
                total += 0.5 * float((output.grad[0, at] * (changed[0, 0] - output.detach()[0, at])).sum()) ** 2
            expected[number, tensor, form.name] = total / (TOKENS - START)
    return expected


@pytest.mark.parametrize(
    ("name", "layers"),
    [("gemma2", {1}), ("gemma3", {1}), ("gpt-oss", {1}), ("qwen3-moe", {0, 1}), ("phi3", {0, 1}), ("gpt2", {0, 1})],
)
def test_every_architecture_s_losses_are_those_of_its_own_attention(
    name: str, layers: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_experts = name in ("gpt-oss", "qwen3-moe")  # whose kernels know no float64
    model = tiny_model(name) if has_experts else tiny_model(name).double()
    ids = torch.randint(1, 96, (TOKENS,), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(1, 96, (TOKENS - START,), generator=torch.Generator().manual_seed(9))
    formats = formats_of(take_inventory(model.config).geometry, Decoder(NAMES, WINDOW))
    assert {layer for layer, _ in formats} == layers
    monkeypatch.setattr(losses, "_sampled_labels", lambda *_: labels)
    batch = next(batches([ids.tolist()], 1))
    found = losses.loss_increases(model, batch, formats, WINDOW, Quantizer(), 0.5, seed=0)
    expected = eagerly(model, ids, labels, formats, monkeypatch)
    assert set(found) == set(expected)
    assert min(expected.values()) > 0
    for key, loss in expected.items():
        assert float(found[key][0]) == pytest.approx(loss, rel=1e-3 if has_experts else 1e-5), key
