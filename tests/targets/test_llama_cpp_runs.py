"""llama.cpp itself takes the types that are exported for it, where its Python package is there.

The package compiles for a quarter of an hour, so no extra asks for it: pip install llama-cpp-python.
"""

from __future__ import annotations

import shlex

import pytest

from kvprof.allocate.unscored import uniform_plan
from kvprof.models.config import load_config
from kvprof.models.conversion import demo_gguf
from kvprof.models.inventory import take_inventory
from kvprof.models.load import resolve
from kvprof.records.formats import parse_formats
from kvprof.targets.registry import TARGETS, WRITERS

llama_cpp = pytest.importorskip("llama_cpp")


@pytest.mark.demo
@pytest.mark.parametrize("formats", ["key:q8_0,value:q4_0", "key:q5_0,value:iq4_nl", "key:q5_1,value:q4_1", "full"])
def test_the_demo_model_runs_with_the_exported_types(formats: str) -> None:
    inventory = take_inventory(load_config(resolve("demo")), "demo")
    plan = uniform_plan(parse_formats(formats), inventory.model, inventory.geometry, window=TARGETS["llama.cpp"].window)
    words = shlex.split(WRITERS["llama.cpp"](plan).text)
    flags = dict(zip(words[::2], words[1::2], strict=True))
    model = llama_cpp.Llama(
        str(demo_gguf()),
        n_ctx=256,
        verbose=False,
        flash_attn=flags["-fa"] == "on",
        type_k=getattr(llama_cpp, f"GGML_TYPE_{flags['-ctk'].upper()}"),
        type_v=getattr(llama_cpp, f"GGML_TYPE_{flags['-ctv'].upper()}"),
    )
    done = model("The KV cache of a language model", max_tokens=16, temperature=0.0)
    assert done["usage"]["completion_tokens"] == 16
    assert done["choices"][0]["text"].strip()
