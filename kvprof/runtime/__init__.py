"""The cache that obeys a plan, and the arithmetic that rounds for it."""

from kvprof.runtime.cache import PlanCache
from kvprof.runtime.quantization.quantizer import fake_quantize

__all__ = ["PlanCache", "fake_quantize"]
