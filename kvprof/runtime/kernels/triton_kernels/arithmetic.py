"""How numbers are rounded, rotated and multiplied on a GPU: as `runtime.quantization` does it, to the last bit.

Device functions of Triton's; what every kernel here shares. Does not know how codes lie in bytes.

Letters in kernels: M query heads of one KV head, N tokens of a tile, D channels. A name in capitals is a constant that
a kernel is compiled for: a plan of many formats runs many compiled kernels, none of which looks a format up.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

FULL = tl.constexpr(0)
CHANNEL = tl.constexpr(1)
TOKEN = tl.constexpr(2)
ROTATED = tl.constexpr(3)
"""How a tensor is held: in the model's dtype; in codes with a scale a channel, or a scale a token; rotated."""

LOG2_E = tl.constexpr(math.log2(math.e))
"""What scores of base e are multiplied with, to be of base 2."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run under the interpreter, which cuts bfloat16 off and multiplies its bits: helped around here."""


@triton.jit
def limited(x, low, high):
    """Return x within bounds; what is no number stays none."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def rounded_to(x, DTYPE: tl.constexpr):
    """Return float32 in a dtype, rounded to the nearest, halves to the even one."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DTYPE)
    return rounded


@triton.jit
def exact_dot(x, y):
    """Multiply x (M, K) by y (K, N), and add in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def two_part_dot(x, numbers, DOT: tl.constexpr):
    """Multiply x (M, K), float32, by numbers (K, N) of a dtype that would round x: what it rounds away comes second."""
    if tl.float32 == DOT:
        product = exact_dot(x, numbers)
    else:
        high = x.to(DOT)
        low = (x - high.to(tl.float32)).to(DOT)
        product = exact_dot(high, numbers) + exact_dot(low, numbers)
    return product


@triton.jit
def codes_of(x, scale, zero, TOP: tl.constexpr):
    """Return the codes of numbers, float32, taken with scale and zero as they are stored."""
    step = scale.to(tl.float32)
    distance = x - zero.to(tl.float32)
    steps = tl.div_rn(distance, tl.broadcast_to(tl.where(step == 0, 1.0, step), distance.shape))
    # Added and taken away, 1.5 * 2^23 rounds what lies below 2^22 to a whole number, halves to the even one.
    codes = (limited(steps, 0.0, TOP) + 12582912.0) - 12582912.0
    return tl.where(step == 0, 0.0, codes)


@triton.jit
def scale_and_zero(
    low,
    high,
    TOP: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_MAX: tl.constexpr,
):
    """Return scale and zero, as stored, where codes span low to high."""
    scale = tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32))
    return (
        rounded_to(limited(scale, -SCALE_MAX, SCALE_MAX), SCALE),
        rounded_to(limited(low, -ZERO_MAX, ZERO_MAX), ZERO),
    )


@triton.jit
def hadamard(x, LOG_D: tl.constexpr):
    """Multiply rows (N, D) by Sylvester's matrix of 1 and -1, D = 2^LOG_D: a butterfly on each bit of the channel."""
    N: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    for _ in tl.static_range(LOG_D):
        even, odd = tl.split(tl.reshape(x, (N, D // 2, 2)))  # of the lowest bit, which becomes the highest
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (N, D))
    return x
