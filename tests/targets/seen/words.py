"""Writes the words that runtimes' own parsers take for a cache, read from their unpacked wheels without importing them.

    python tests/targets/seen/words.py FOLDER tests/data/runtimes/words.json

FOLDER: where tests/targets/run.sh unpacked the wheels. Each list is found in the syntax tree of the file that it stands
in: a runtime that moves or renames it makes this script fail, and so be looked at again.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def tree(folder: Path, name: str) -> ast.Module:
    return ast.parse((folder / name).read_text())


def assigned(module: ast.AST, name: str) -> ast.expr:
    """Return what a name is assigned, with or without a type, at any depth."""
    for node in ast.walk(module):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value if isinstance(node, ast.Assign) else node.annotation
    raise LookupError(f"nothing is called {name}")


def strings(node: ast.AST) -> Iterator[str]:
    return (one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str))


def choices(node: ast.AST) -> list[str]:
    """Return the `choices` of an argument."""
    (found,) = (one.value for one in ast.walk(node) if isinstance(one, ast.keyword) and one.arg == "choices")
    return list(strings(found))


def members(module: ast.Module, name: str) -> dict[str, int]:
    """Return the members of an enum of integers."""
    (found,) = (node for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.targets[0].id: node.value.value
        for node in found.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }


def parameters(module: ast.Module, name: str) -> list[str]:
    """Return the parameters of a class's constructor."""
    (found,) = (node for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node.name == name)
    (made,) = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return [argument.arg for argument in made.args.args if argument.arg != "self"]


def version(folder: Path, name: str) -> str:
    """Return the version of an installed package."""
    (found,) = folder.glob(f"{name}-*.dist-info")
    return found.name.removesuffix(".dist-info").partition("-")[2]


def main() -> None:
    folder, place = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {
        "vllm": list(strings(assigned(tree(folder, "vllm/config/cache.py"), "CacheDType"))),
        "sglang": choices(assigned(tree(folder, "sglang/srt/arg_groups/fields/model.py"), "kv_cache_dtype")),
        "lmdeploy": members(tree(folder, "lmdeploy/messages.py"), "QuantPolicy"),
        "exllamav3": parameters(tree(folder, "exllamav3/cache/quant.py"), "CacheLayer_quant"),
    }
    found["versions"] = {name: version(folder, name) for name in list(found)}
    place.write_text(json.dumps(found, indent=1) + "\n")


main()
