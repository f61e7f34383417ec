"""The kernels on a GPU at the sizes that they are for: poisoned outputs, and attention in float64 beside them.

python -m pytest tests/runtime/test_gpu.py tests/runtime/test_triton_kernels.py tests/runtime/test_hook.py
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from packed import CODE_BITS, attended_64, form_of, history, random_tokens, relative_error, same_block
from transformers import LlamaConfig, LlamaForCausalLM

from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import BitPlan, Quantizer, Window
from kvprof.runtime import PlanCache
from kvprof.runtime.history import History
from kvprof.runtime.kernels import torch_kernels

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: the same kernels run under Triton's interpreter in test_triton_kernels",
)
USUAL = Window(sink_tokens=4, recent_tokens=128)
OUTPUT_CUT = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}
"""Relative errors; an output in bfloat16 is itself cut at 2^-9 an element."""


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is full of what is no number, so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def attend_checked(read: History, queries: int, **options: torch.Tensor) -> None:
    """Attend in the kernel, and a few sequences at a time in float64."""
    from kvprof.runtime.kernels import triton_kernels

    B, H, _, D = read.key.shape
    query = torch.randn(B, H * queries, 1, D, device="cuda").to(read.key.like.dtype)
    assert triton_kernels.why_not(query, read, options.get("mask")) is None
    found = triton_kernels.attend(query, read, D**-0.5, **options)
    expected = attended_64(query, read, D**-0.5, **options)
    assert relative_error(found, expected) < OUTPUT_CUT[query.dtype]


@pytest.mark.parametrize(("key_bits", "value_bits"), list(itertools.product((*CODE_BITS, 16), repeat=2)))
def test_all_pairs_of_bits_at_a_real_size(key_bits: int, value_bits: int) -> None:
    group = (32, 64, 128)[(key_bits + value_bits) % 3]
    key, value = (
        form_of("full" if bits == 16 else f"int{bits}g{group}", axis, 128)
        for bits, axis in ((key_bits, "channel"), (value_bits, "token"))
    )
    read = history(key, value, B=2, H=8, T=4000 + key_bits, key_D=128, value_D=128, device="cuda", window=USUAL)
    attend_checked(read, queries=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 8])
def test_heads_of_every_width(head_dim: int, dtype: torch.dtype, queries: int) -> None:
    forms = form_of("int3g64c", "channel", head_dim), form_of("int2g32", "token", head_dim)
    read = history(*forms, B=3, H=2, T=2999, key_D=head_dim, value_D=head_dim, dtype=dtype, device="cuda", window=USUAL)
    mask = (torch.arange(3000, device="cuda") >= torch.tensor([[0], [77], [2500]], device="cuda")).view(3, 1, 1, 3000)
    attend_checked(read, queries, mask=mask)


@pytest.mark.parametrize(
    ("key", "value"), [("rot2", "rot2"), ("rot4", "rot3"), ("int4g64", "rot1"), ("rot8", "int4g128")]
)
def test_rotated_tensors(key: str, value: str) -> None:
    forms = form_of(key, "channel" if key.startswith("int") else "token", 128), form_of(value, "token", 128)
    attend_checked(history(*forms, B=2, H=8, T=5000, key_D=128, value_D=128, device="cuda", window=USUAL), queries=4)


@pytest.mark.parametrize(
    ("heads", "queries", "tokens", "batch"), [(8, 4, 32768, 4), (32, 1, 8192, 2), (8, 4, 131072, 1)]
)
def test_published_shapes(heads: int, queries: int, tokens: int, batch: int) -> None:
    """Llama-3-8B at 32k and 128k tokens, Llama-2-7B at 8k."""
    forms = form_of("int4g64", "channel", 128), form_of("int4g128", "token", 128)
    read = history(
        *forms, B=batch, H=heads, T=tokens, key_D=128, value_D=128, dtype=torch.bfloat16, device="cuda", window=USUAL
    )
    attend_checked(read, queries)


@pytest.mark.parametrize(
    "name", ["int1g128", "int2g64c", "int3g32", "int4g64c", "int5g32", "int6g64", "int8g128", "rot2", "rot4"]
)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packing_gives_the_bits_of_plain_torch(name: str, axis: str, dtype: torch.dtype) -> None:
    from kvprof.runtime.kernels import triton_kernels

    if name.startswith("rot") and axis == "channel":
        pytest.skip("a rotated tensor has a scale a token")
    form = form_of(name, axis, 128)
    x = random_tokens(3, 8, 512, 128, dtype, "cuda")
    assert same_block(triton_kernels.pack_tokens(x, form, Quantizer()), torch_kernels.pack_tokens(x, form, Quantizer()))
    read = history(form, form, B=2, H=8, T=1500, key_D=128, value_D=128, dtype=dtype, device="cuda").key
    plain, fused = (torch.full((2, 8, read.coded_tokens, 128), torch.nan, dtype=dtype, device="cuda") for _ in range(2))
    torch_kernels.unpack_tokens(read, plain)
    triton_kernels.unpack_tokens(read, fused)
    assert torch.equal(plain, fused)


def test_a_model_generates_alike_with_both_kernels() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        head_dim=128, vocab_size=1000, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.float32).eval()
    layer = KVLayer(layer=0, kind="full", kv_heads=2, key_head_dim=128, value_head_dim=128)
    geometry = CacheGeometry(dtype="float32", layers=tuple(layer.model_copy(update={"layer": i}) for i in range(3)))
    forms = {
        "key": {"bits": 4, "group_size": 64, "axis": "channel"},
        "value": {"bits": 3, "group_size": 128, "axis": "token"},
    }
    plan = BitPlan.model_validate(
        {
            "schema": "kvprof.plan/1",
            "model": {"num_layers": 3},
            "quantizer": {},
            "window": {"sink_tokens": 0, "recent_tokens": 64},
            "geometry": geometry.model_dump(mode="json"),
            "layers": [{"layer": i, **forms} for i in range(3)],
        }
    )
    ids = torch.randint(1000, (2, 700), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    logits = []
    for kernels in ("torch", "triton"):
        cache = PlanCache.from_plan(plan, model, kernels=kernels)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=80, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        logits.append(torch.stack(out.logits))
        assert cache.nbytes() == cache.plan.bytes_at(cache.get_seq_length(), 2)
    assert torch.allclose(*logits, rtol=1e-3, atol=1e-4)
