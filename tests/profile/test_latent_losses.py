"""Is the predicted loss of a latent's format what a decoder of latent attention (MLA) feels? By the definition.

Latents are rounded by reference.py, and made into keys and values by kv_b_proj's weights, query by query, in loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from runtime.reference import rounded, tokens_in_codes
from test_loss_increase import NAMES, WINDOW, Recorder, attended, batch_of, effects_of, formats_for
from tiny import LATENTS, tiny_model
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from kvprof.errors import UnsupportedAttention
from kvprof.profile import loss_increase as losses
from kvprof.profile.decoder import Formats
from kvprof.records.plan import Quantizer, TensorPlan

START, TOKENS = 21, 41


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model = tiny_model(name).to(dtype)
    model.set_experts_implementation("eager")
    return model


def by_definition(model: PreTrainedModel, ids: Tensor, labels: Tensor, formats: Formats) -> dict[Any, list[float]]:
    """Return each format's effects of one sequence, in float64, from what the model's own forward shows."""
    attentions = {block.self_attn.layer_idx: block.self_attn for block in model.model.layers}
    latents: dict[int, Tensor] = {}
    hooks = [
        attention.kv_a_layernorm.register_forward_hook(
            lambda _, inputs, output, layer=layer: latents.__setitem__(layer, output.detach())
        )
        for layer, attention in attentions.items()
    ]
    recorder = Recorder()
    AttentionInterface.register("recorder", recorder)
    model.set_attn_implementation("recorder")
    logits = model(input_ids=ids[None], use_cache=False).logits[0, START:]
    (-logits.log_softmax(-1).gather(1, labels[:, None]).sum()).backward()
    model.set_attn_implementation("eager")
    for hook in hooks:
        hook.remove()
    return {
        (layer, tensor, form.name): effects(
            model, attentions[layer], latents[layer][0], recorder.seen[layer], tensor, form
        )
        for (layer, tensor), forms in formats.items()
        for form in forms
    }


def effects(
    model: PreTrainedModel, attention: Any, latent: Tensor, seen: Sequence[Tensor], tensor: str, form: Any
) -> list[float]:
    """Return g . d of each query. latent: (T, rank). seen: query, key, value and output of the attention."""
    query, key, _, output = seen
    plain, heads = attention.qk_nope_head_dim, attention.num_heads
    exact = {"key": latent.double().numpy(), "value": key.detach()[0, 0, :, plain:].double().numpy()}
    up = attention.kv_b_proj.weight.double().numpy().reshape(heads, plain + attention.v_head_dim, -1)

    def expanded(parts: dict[str, np.ndarray], head: int) -> tuple[np.ndarray, np.ndarray]:
        made = parts["key"] @ up[head].T  # (T, plain + values)
        return np.concatenate([made[:, :plain], parts["value"]], axis=1), made[:, plain:]

    series = []
    for t in range(START, TOKENS):
        coded = tokens_in_codes(t, TensorPlan(**form.model_dump()), WINDOW)
        mixed = {name: part[: t + 1].copy() for name, part in exact.items()}
        inside = slice(WINDOW.sink_tokens, WINDOW.sink_tokens + coded)
        if coded:
            given_back = torch.tensor(rounded(mixed[tensor][inside], form, Quantizer()))
            mixed[tensor][inside] = given_back.to(model.dtype).double().numpy()
        dot = 0.0
        for head in range(heads):
            out, own = (
                attended(query.detach()[0, head, t].double().numpy(), *expanded(parts, head), attention.scaling)
                for parts in (mixed, {name: part[: t + 1] for name, part in exact.items()})
            )
            dot += output.grad[0, t, head].double().numpy() @ (out - own)
        series.append(dot)
    return series


@pytest.mark.parametrize("name", [name for name in LATENTS if name != "deepseek-v32"])
def test_effects_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(name, torch.float64), batch_of(TOKENS)
    formats = formats_for(model, {"key": ("int2g4", "int3g8c", "rot2"), "value": ("int2g4", "rot1", "int4g8")})
    labels = torch.randint(1, 96, (TOKENS - START,), generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(losses, "_sampled_labels", lambda *_: labels)
    found = effects_of(model, batch, formats)
    expected = by_definition(model, batch.input_ids[0], labels, formats)
    assert set(found) == set(expected)
    for key, series in expected.items():
        size = math.sqrt(np.square(series).mean())
        assert size > 0
        assert found[key][0].tolist() == pytest.approx(series, rel=1e-5, abs=1e-5 * size), key


def test_in_half_precision_the_rounding_of_expanded_latents_is_not_taken_for_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys are made in float32 of exact and of rounded latents alike: bfloat16 moves them by more than 8 bits do."""
    model, batch = build("deepseek-v3", torch.bfloat16), batch_of(TOKENS)
    formats = formats_for(model, {"key": ("int4g4", "int8g4"), "value": ("int8g4",)})
    labels = torch.randint(1, 96, (TOKENS - START,), generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(losses, "_sampled_labels", lambda *_: labels)
    found = effects_of(model, batch, formats)
    expected = by_definition(model, batch.input_ids[0], labels, formats)
    ratios = [float(found[key][0].square().mean()) / np.square(series).mean() for key, series in expected.items()]
    assert 0.6 < np.median(ratios) < 1.6
    assert max(ratios) < 10


def test_every_layer_with_an_indexer_is_scored() -> None:
    model = build("deepseek-v32", torch.float64)
    formats = formats_for(model, NAMES | {"value": ("int2g4",)})
    found = effects_of(model, batch_of(60), formats)
    assert all(float(one[0].square().mean()) > 0 for one in found.values())


def test_latents_that_cannot_be_expanded_in_a_wider_dtype_are_refused() -> None:
    model = build("deepseek-v3", torch.bfloat16)
    up = model.model.layers[0].self_attn.kv_b_proj

    class Quantized(torch.nn.Linear):
        """Whose weights another package unpacks."""

    model.model.layers[0].self_attn.kv_b_proj = Quantized(up.in_features, up.out_features, bias=False).bfloat16()
    model.requires_grad_(False)
    with pytest.raises(UnsupportedAttention, match="by a Quantized that cannot be widened to float32"):
        effects_of(model, batch_of(30), formats_for(model, {"key": ("int2g4",), "value": ()}))
