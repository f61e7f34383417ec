"""No word that is written for a runtime is refused by its own parser, as tests/targets/run.sh recorded that."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path

import pytest
from test_exports import plan_of

from kvprof.allocate.constraints import OneOfAll, SomeInFull
from kvprof.records.formats import TENSORS
from kvprof.targets import exllamav3, lmdeploy, sglang, vllm
from kvprof.targets.registry import TARGETS, WRITERS
from kvprof.targets.versions import CHECKED

SEEN = json.loads((Path(__file__).parents[1] / "data" / "runtimes" / "words.json").read_text())
LAYERS = 8


def written(name: str, dtype: str) -> set[str]:
    """Return what follows the flag, for each choice that a runtime has for the whole cache."""
    target = TARGETS[name]
    assert isinstance(target.constraints, OneOfAll | SomeInFull)
    found = set()
    for word, pair in target.constraints.pairs.items():
        ends = target.constraints.forced(word, LAYERS) if isinstance(target.constraints, SomeInFull) else set()
        names = {
            (layer, tensor): "full" if layer in ends else pair[place]
            for layer in range(LAYERS)
            for place, tensor in enumerate(TENSORS)
        }
        if (dtype == "float32") == ("_f32" in pair[0]) and (dtype == "bfloat16") == ("_bf16" in pair[0]):
            found.add(shlex.split(WRITERS[name](plan_of(names, dtype=dtype)).text)[1])
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_word_is_one_that_the_runtimes_parser_takes(dtype: str) -> None:
    assert written("vllm", dtype) <= set(SEEN["vllm"])
    assert len(SEEN["vllm"]) == 22
    assert written("sglang", dtype) <= set(SEEN["sglang"])
    assert {int(word) for word in written("lmdeploy", dtype)} <= set(SEEN["lmdeploy"].values())


def test_words_left_out_are_those_that_the_targets_say() -> None:
    assert set(SEEN["vllm"]) - set(vllm.PAIRS) == {
        *("auto", "float16", "bfloat16"),  # 16 bits
        *("fp8", "fp8_inc", "fp8_ds_mla", "nvfp4_ds_mla", "octave_k3v4", "octave_k3v3", "octave_k3v3_compact"),
    }
    assert set(SEEN["sglang"]) - set(sglang.TARGET.constraints.pairs) == {"auto", "bf16", "bfloat16"}
    assert set(map(str, SEEN["lmdeploy"].values())) <= set(lmdeploy.PAIRS)


def test_exllamav3s_constructor_takes_what_the_module_gives_it() -> None:
    module = ast.parse(
        WRITERS["exllamav3"](plan_of({(layer, one): "exl3_4" for layer in range(8) for one in TENSORS})).text
    )
    (call,) = (
        node for node in ast.walk(module) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__init__"
    )
    given = [argument.id for argument in call.args] + [word.arg for word in call.keywords if word.arg]
    assert set(given) <= set(SEEN["exllamav3"])
    assert given[:4] == SEEN["exllamav3"][:4]
    assert exllamav3.TARGET.name in CHECKED


def test_the_table_names_the_releases_that_were_looked_at() -> None:
    assert {name: CHECKED[name].version for name in SEEN["versions"]} == SEEN["versions"]
