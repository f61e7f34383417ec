"""Python code that a checkpoint brings, and the user's word that it may run: which files it is, named before they run.

Reads config.json, tokenizer_config.json and the import lines of the files that they name. Runs nothing itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from kvprof.errors import InvalidFile, ModelError
from kvprof.records.document import read_json

logger = logging.getLogger(__name__)

CONFIG_AND_MODEL = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
"""The classes of the auto_map of a config.json that kvprof has a use for."""
TOKENIZER = ("AutoTokenizer",)

FLAG = "--trust-remote-code"

_CLASS = re.compile(r"\w+\.\w+", re.ASCII)
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+\.([\w.]*)[ \t]+import[ \t]+\(?([\w, \t]+)|import[ \t]+\.(\S+))", re.MULTILINE
)
_LARGEST_CODE_BYTES = 2**22
_named: set[tuple[str, ...]] = set()


@dataclass(frozen=True)
class OwnCode:
    """Code in a model's folder. classes: what is taken from it, as `module.Class`; files: all that would run."""

    classes: tuple[str, ...]
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.files)} (for {', '.join(self.classes)})"


def needs_code(config: Mapping[str, object]) -> bool:
    """Whether a config.json is of an architecture that transformers has not built in, and brings code for it."""
    model_type = config.get("model_type")
    built_in = isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES
    return bool(config.get("auto_map")) and not built_in


def find_code(folder: Path, tokenizer: bool = False) -> OwnCode | None:
    """Return the code that loading a model, or its tokenizer, from a folder would run; None where none is needed.

    Raises ModelError for code that lies outside the folder, in another repository say, or is named in no way known.
    """
    wanted = TOKENIZER if tokenizer else CONFIG_AND_MODEL
    config = read_object(folder / ("tokenizer_config.json" if tokenizer else "config.json"))
    if not (tokenizer or needs_code(config)):
        return None
    auto_map = config.get("auto_map")
    if isinstance(auto_map, list):  # an old tokenizer's: its slow class and its fast one
        auto_map = {"AutoTokenizer": auto_map}
    if not isinstance(auto_map, dict):
        return None
    given = [auto_map[name] for name in wanted if auto_map.get(name)]
    classes = [each for value in given for each in (value if isinstance(value, list) else [value]) if each is not None]
    if not classes:
        return None
    for each in classes:
        if isinstance(each, str) and "--" in each:
            raise ModelError(
                f"the model in {folder} takes its code from another repository, {each.split('--')[0]}, "
                "which may change at any time.\n"
                "  Put that code into the model's own folder, and its name into auto_map, if you trust it."
            )
        if not isinstance(each, str) or not _CLASS.fullmatch(each):
            raise ModelError(
                f"the auto_map of the model in {folder} names no class of a file there: {str(each)[:60]!r}."
            )
    modules = dict.fromkeys(each.split(".")[0] for each in classes)
    return OwnCode(tuple(dict.fromkeys(classes)), tuple(f"{name}.py" for name in _with_imports(folder, list(modules))))


def check_code(folder: Path, model_id: str, trusted: bool, tokenizer: bool = False) -> bool:
    """Return whether the code that a folder brings is to be run, having named it.

    Raises ModelError, naming the code and the flag, where it is needed and not trusted. A tokenizer's is left to
    transformers, which may have one of its own.
    """
    code = find_code(folder, tokenizer)
    if code is None:
        return False
    if not trusted:
        if tokenizer:
            return False
        raise refused_code(model_id, code)
    missing = [name for name in code.files if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{model_id} needs code that is not there: {missing[0]} in {folder}.\n  Download it again.")
    if (model_id, *code.files) not in _named:
        _named.add((model_id, *code.files))
        logger.warning("%s: running code that %s brings, in %s: %s", FLAG, model_id, folder, code)
    return True


def refused_code(model_id: str, code: OwnCode | None) -> ModelError:
    """Return the refusal of a model that cannot be loaded without its own code."""
    what = "" if code is None else f": {code}"
    return ModelError(
        f"{model_id} brings Python code of its own, which is not run unless you say so{what}.\n"
        f"  Read it. If you trust it, add {FLAG}; it can do whatever you can."
    )


def is_own_class(config: PretrainedConfig) -> bool:
    """Whether a config is of a class that came with its checkpoint: the user trusted it, else it would not be there."""
    return type(config).__module__.startswith("transformers_modules.")


def read_object(path: Path) -> dict[str, object]:
    """Return a small JSON file of a model's; an empty one where it cannot be read: what loads it says why."""
    value = read_value(path)
    return value if isinstance(value, dict) else {}


def read_value(path: Path) -> object:
    """Return whatever a small JSON file of a model's holds; an empty object where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except InvalidFile:
        return {}


def _with_imports(folder: Path, modules: list[str]) -> list[str]:
    """Return modules with those beside them that they import, directly or not, as far as their files are there."""
    for module in modules:  # which grows meanwhile
        try:
            with open(folder / f"{module}.py", "rb") as file:
                source = file.read(_LARGEST_CODE_BYTES).decode("utf-8", errors="replace")
        except OSError:
            continue
        for beside, names, old in _IMPORT.findall(source):
            found = [beside or old] if beside or old else [name.split()[0] for name in names.split(",") if name.split()]
            for name in found:
                name = name.lstrip(".").replace(".", "/")
                is_plain = re.fullmatch(r"\w+(/\w+)*", name, re.ASCII)
                if is_plain and name not in modules and (folder / f"{name}.py").is_file():
                    modules.append(name)
    return modules
