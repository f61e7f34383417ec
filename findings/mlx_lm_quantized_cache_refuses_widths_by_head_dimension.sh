#!/usr/bin/env bash
# mlx-lm 0.32.2: whether an empty QuantizedKVCache takes 3, 5 or 6 bits depends on the head dimension.
#
# Two guesses would be wrong. One: mx.quantize takes 3, 5 and 6 bits, so a cache of these widths works, or never does. An
# empty cache makes room for D // (32 // bits) words a token, mx.quantize needs D * bits / 32: at D = 64 the two agree for
# all widths, at D = 128 not for 5 and 6 bits, at D = 256 not for 3 either. What fails is the first token, with an error
# about broadcasting. Two: KVCache().to_quantized(...), which generate calls, has the same trouble. It quantizes what is
# there already, and then makes room by that width: it works for every width, once there is a token.
#
# Seen (mlx 0.32.4, CPU): as the script expects; it fails where a release behaves otherwise.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$work/venv/bin/python" - <<'P'
import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

WIDTHS = (2, 3, 4, 5, 6, 8)


def takes(cache, head_dim):
    token = mx.ones((1, 2, 1, head_dim))
    try:
        mx.eval(cache.update_and_fetch(token, token))
    except ValueError:
        return False
    return True


def begun(bits, head_dim):
    cache = KVCache()
    takes(cache, head_dim)
    return cache.to_quantized(group_size=64, bits=bits)


for head_dim, refused in ((64, set()), (128, {5, 6}), (256, {3, 5, 6})):
    found = {bits for bits in WIDTHS if not takes(QuantizedKVCache(group_size=64, bits=bits), head_dim)}
    print(f"heads of {head_dim}: an empty cache refuses {sorted(found)}")
    assert found == refused, found
    assert all(takes(begun(bits, head_dim), head_dim) for bits in WIDTHS)
P
