"""Do the ways to attend in full precision agree, and do those that do not run say why?"""

from __future__ import annotations

import pytest
import torch

from kvprof.benchmark.full_attention import CannotRun, Way, ways_to_attend

CPU = torch.device("cpu")


def states(key_dim: int = 16, value_dim: int = 16) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((2, 6, 1, key_dim), (2, 3, 40, key_dim), (2, 3, 40, value_dim))
    return tuple(torch.randn(shape, generator=draw) for shape in shapes)


@pytest.mark.parametrize("way", ways_to_attend(CPU, torch.float32), ids=lambda way: f"{way.name} {way.dtype}")
def test_every_way_attends_to_the_same(way: Way) -> None:
    query, keys, values = states()
    repeated = [x.repeat_interleave(2, dim=1).double() for x in (keys, values)]
    scores = (query.double() @ repeated[0].transpose(2, 3)) / 16**0.5
    expected = scores.softmax(-1) @ repeated[1]
    found = way.call(query, keys, values)()
    assert found.dtype == way.dtype
    torch.testing.assert_close(found.double(), expected, atol=2e-2 if way.dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "dtypes"),
    [
        (torch.float32, [torch.bfloat16, torch.float32]),
        (torch.bfloat16, [torch.bfloat16]),
        (torch.float16, [torch.float16]),
    ],
)
def test_sixteen_bits_are_always_among_them_and_a_wider_dtype_beside(
    dtype: torch.dtype, dtypes: list[torch.dtype]
) -> None:
    assert list(dict.fromkeys(way.dtype for way in ways_to_attend(CPU, dtype))) == dtypes


def test_a_gpu_has_its_own_ways_and_a_package_that_is_missing_is_named() -> None:
    ways = {way.name: way for way in ways_to_attend(torch.device("cuda"), torch.bfloat16)}
    assert set(ways) == {"SDPA", "SDPA flash", "SDPA efficient", "SDPA cudnn", "FlashAttention", "FlexAttention"}
    with pytest.raises(CannotRun, match="flash-attn is not installed"):
        ways["FlashAttention"].call(*states())


def test_a_kernel_that_refuses_says_why() -> None:
    (flash,) = (way for way in ways_to_attend(CPU, torch.bfloat16) if way.name == "SDPA flash")
    with pytest.raises(CannotRun) as refused:
        flash.call(*states(value_dim=8))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) > 10
