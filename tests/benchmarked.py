"""Benchmark records made by hand: a plan of 4 stored bits that is three times as fast at every context."""

from __future__ import annotations

from typing import Any

from kvprof.records.benchmark import Benchmark


def timing(seconds: float) -> dict[str, Any]:
    return {"median_seconds": seconds, "fast_seconds": 0.9 * seconds, "slow_seconds": 1.2 * seconds, "repeats": 9}


def attention(name: str, seconds: float, held: int, dtype: str = "bfloat16") -> dict[str, Any]:
    rate = {"bytes_per_second": held / seconds, "copy_fraction": held / seconds / 1e10, "buffer_bytes": 10**8}
    return {"name": name, "dtype": dtype, "bytes": held, "timing": timing(seconds), **rate}


def refused(name: str, held: int) -> dict[str, Any]:
    return {"name": name, "dtype": "bfloat16", "bytes": held, "reason": "the package flash-attn is not installed"}


def decode(cache: str, batch: int, seconds: float) -> dict[str, Any]:
    return {
        "cache": cache, "batch": batch, "cache_bytes": 10**7, "timing": timing(seconds),
        "tokens_per_second": batch / seconds, "peak_bytes": 2 * 10**7,
    }  # fmt: skip


def case(context: int, batch: int, whole_model: bool = True) -> dict[str, Any]:
    seconds, held = 1e-6 * context * batch, 1000 * context * batch
    return {
        "context": context,
        "batch": batch,
        "ceiling": 3.5,
        "planned": attention("PlanCache, triton", seconds, held),
        "full": [
            attention("SDPA", 5 * seconds, 4 * held),
            attention("SDPA flash", 3 * seconds, 4 * held),
            refused("FlashAttention", 4 * held),
        ],
        "speedup": 3.0,
        "append": {"seconds": 1e-5, "tokens": 128, "share": 0.01},
        "decode": [decode("PlanCache", batch, 0.02), decode("DynamicCache", batch, 0.03)] if whole_model else [],
    }


def fitted(cache: str, batch: int, seconds: float) -> dict[str, Any]:
    run = decode(cache, batch, seconds)
    return {"cache": cache, "batch": batch, "cache_bytes": 10**9, "working_bytes": 10**8, "run": run}


def benchmark_json(contexts: tuple[int, ...] = (4096, 32768), batches: tuple[int, ...] = (1, 8)) -> dict[str, Any]:
    return {
        "schema": "kvprof.benchmark/1",
        "model": {"id": "llama-3-8b", "num_layers": 32},
        "dtype": "bfloat16",
        "random_weights": True,
        "device": {
            "type": "cuda", "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30, "cache_bytes": 50 * 2**20,
            "compute_capability": "9.0",
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "kernels": "triton",
        "plan": {"name": "plan-4.00", "digest": "sha256:0", "nominal_bits": 3.5, "stored_bits": 4.0, "ceiling": 4.0},
        "planned_layers": 32,
        "skipped_layers": 0,
        "copy_bandwidth": {"bytes_per_second": 1e10, "buffer_bytes": 10**9, "timing": timing(0.2)},
        "cases": [case(context, batch) for context in contexts for batch in batches],
        "largest_batch": {
            "memory_bytes": 24 * 2**30, "context": 32768, "weight_bytes": 16 * 10**9,
            "planned": fitted("PlanCache", 12, 0.05), "full": fitted("DynamicCache", 3, 0.03),
            "batch_ratio": 4.0, "throughput_ratio": (12 / 0.05) / (3 / 0.03),
        },
        "remarks": ["a remark"],
    }  # fmt: skip


def benchmark(**settings: Any) -> Benchmark:
    return Benchmark.from_json(benchmark_json(**settings), "benchmark.json")
