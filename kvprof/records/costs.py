"""What a plan's cache costs, whatever the dtype of its model: bits an element, bytes a token, bytes of a context."""

from __future__ import annotations

from fractions import Fraction

from kvprof.records.evaluation import ContextBytes
from kvprof.records.formats import FULL_BITS, TENSORS
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, head_dim_of


def context_bytes(plan: BitPlan, geometry: CacheGeometry, tokens: int) -> ContextBytes:
    """Return what the cache of one sequence takes, against 16 bits whatever dtype the model has.

    Compression is a claim about 2 bytes an element: a float32 model's cache must not look twice as well compressed.
    """
    geometry = geometry.model_copy(update={"dtype": "float16"})
    planned, full = plan.model_copy(update={"geometry": geometry}).bytes_at(tokens), geometry.bytes_at(tokens)
    return ContextBytes(tokens=tokens, bytes=planned, bytes_at_16_bits=full, compression=full / planned)


def costs(plan: BitPlan, geometry: CacheGeometry) -> tuple[float, float, float]:
    """Return nominal and stored bits an element, weighted by cached width, and the bytes that one more token adds.

    What is kept in full precision counts 16 bits, whatever dtype the model has.
    """
    width, nominal, stored, adds = 0, 0, Fraction(0), Fraction(0)
    for entry in plan.layers:
        shape = geometry.layers[entry.layer]
        adds += shape.indexer_width * Fraction(FULL_BITS, 8)
        for tensor in TENSORS:
            form, head_dim = entry.tensor(tensor), head_dim_of(shape, tensor)
            elements = shape.kv_heads * head_dim
            width += elements
            nominal += elements * form.bits
            stored += elements * form.stored_bits(head_dim)
            if shape.window is None:  # a window that is full grows no more
                adds += elements * form.stored_bits(head_dim) / 8
    return float(Fraction(nominal, width)), float(stored / width), float(adds)
