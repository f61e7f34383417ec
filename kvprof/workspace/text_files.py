"""Names of text files: which kind of file a name is, and which files a folder or a pattern stands for.

Asks the disk which files there are, and opens none but the lists of a folder that datasets saved. Does not know what is
in a text.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprof.errors import CalibrationError, UsageError, did_you_mean

KINDS = {
    ".txt": "lines",
    ".md": "lines",
    ".raw": "lines",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""How the name of a text file ends, and how the file is read."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""What may stand behind the ending of a file of characters."""
HUB = "hf://datasets/"
"""What stands before files of a hub dataset, as fsspec and datasets have it."""
BINARY = ("parquet", "arrow")
"""Kinds that are compressed within, and never as a whole."""

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_WORD = re.compile(
    rf"(?:^|[-._ 0-9/])({'|'.join(word for words in _KEYWORDS.values() for word in words)})(?=$|[-._ 0-9/])"
)
"""A word that names a split, as the hub's own rule for names of files has it."""
_LOCAL = re.compile(r"[/\\]|\.{1,2}(?:[/\\]|$)|~[/\\]|[A-Za-z]:[/\\]")
"""The beginning of a path from the root, from here or from home."""
_ABOUT = re.compile(
    r"readme|licen[cs]e|dataset_infos?\.json|dataset_dict\.json|state\.json|metadata\.json", re.IGNORECASE
)
"""Files of a folder that say what the others are."""


@dataclass(frozen=True)
class TextFiles:
    """The files of one kind that are one text.

    split: of several that their names tell apart. aside: what of the folder is not read, in words.
    """

    kind: str
    files: tuple[Path, ...]
    split: str | None = None
    aside: tuple[str, ...] = ()


def kind_of(name: str | Path) -> str | None:
    """Return how a file of this name is read, by its ending; None where it is no text that is read."""
    path = Path(name)
    if path.suffix.lower() in COMPRESSIONS:
        kind = KINDS.get(Path(path.stem).suffix.lower())
        return None if kind in BINARY else kind
    return KINDS.get(path.suffix.lower())


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern of file names, and no file that happens to be called so."""
    return glob.has_magic(name) and "\0" not in name and not os.path.exists(os.path.expanduser(name))


def is_on_disk(name: str) -> bool:
    """Whether a name is a file's, a folder's or a pattern's; what no hub dataset is called like need not be there."""
    if name.startswith(HUB):
        return False
    return names_a_path(name) or os.path.exists(os.path.expanduser(name))


def names_a_path(name: str) -> bool:
    """Whether a name is a path's or a pattern's by its look, whatever is on the disk."""
    return bool(_LOCAL.match(name)) or kind_of(name) is not None or is_pattern(name)


def may_have_splits(name: str) -> bool:
    """Whether a name on the disk stands for several files, which may be splits."""
    return is_pattern(name) or os.path.isdir(os.path.expanduser(name))


def find_files(name: str, split: str | None = None) -> TextFiles:
    """Return the files that a name stands for.

    name: a file; a folder, whose files of text are read, those of folders within it too; a folder that datasets saved
    (`save_to_disk`); or a pattern such as `shards/*.jsonl.gz`.
    split: of files whose names tell splits apart, the one to take; `train` by default.
    Raises CalibrationError where there is no file, or where files are of several kinds; UsageError for a kind that is
    not read, and for a split that is not there.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        saved = _saved(path)
        if saved is not None:
            return _of_split(name, saved, split)
        return _of_one_kind(name, _within(path), path, split)
    if is_pattern(name):
        found = files_below(path)
        if not found:
            raise CalibrationError(f"{name}: no file's name is like this.\n  Check the folder, and quote the pattern.")
        return _of_one_kind(name, found, Path(os.path.commonpath([file.parent for file in found])), split)
    kind = kind_of(name)
    if not os.path.exists(path):
        raise CalibrationError(f"{name}: no such file{'' if kind else ' or folder'}.\n  Check the path.")
    if kind is None:
        raise UsageError(f"{name} is no text that kvprof reads: name a file that ends in {endings()}, or a folder.")
    if not os.path.isfile(path):
        raise CalibrationError(f"{path}: no such file.")
    return TextFiles(kind, (path,))


def files_below(path: Path) -> list[Path]:
    """Return all files that a path stands for: itself, those below a folder, or those of a pattern."""
    if path.is_dir():
        return _within(path)
    if is_pattern(str(path)):
        return [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(file)]
    return [path] if path.is_file() else []


def endings() -> str:
    """Return the endings of text files, for a message."""
    return f"{', '.join(KINDS)} (of characters with {' or '.join(COMPRESSIONS)} behind it, too)"


def _within(folder: Path) -> list[Path]:
    """Return the files below a folder, hidden ones and folders aside."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        found += [Path(place, name) for name in sorted(files) if not name.startswith((".", "_"))]
    return sorted(found)


def _of_one_kind(name: str, files: Sequence[Path], base: Path, split: str | None) -> TextFiles:
    texts = [file for file in files if kind_of(file) is not None and not _ABOUT.match(file.name)]
    texts = texts or [file for file in files if kind_of(file) is not None]
    kinds = {str(kind_of(file)) for file in texts}
    if not kinds:
        raise CalibrationError(f"{name} holds no file of text.\n  Text ends in {endings()}.")
    if len(kinds) > 1:
        counts = Counter(_ending(file) for file in texts)
        held = ", ".join(f"{number} {ending}" for ending, number in sorted(counts.items()))
        folder = name if os.path.isdir(os.path.expanduser(name)) else str(base)
        raise CalibrationError(
            f"{name} holds files of several kinds: {held}.\n"
            f"  Name those to read, as in --data '{folder.rstrip('/')}/*{_ending(texts[0])}'"
        )
    groups: dict[str | None, list[Path]] = {}
    for file in texts:
        groups.setdefault(_split_in(file.relative_to(base).as_posix()), []).append(file)
    if None in groups and "train" not in groups:  # a word in a name, and no splits: notes on a test, among others
        groups = {None: texts}
    found = _of_split(name, groups, split)
    others = sorted(str(file.relative_to(base)) for file in set(files) - set(texts))
    return TextFiles(found.kind, found.files, found.split, (*found.aside, *others))


def _of_split(name: str, groups: dict[str | None, list[Path]], split: str | None) -> TextFiles:
    """Return the files of one split, where there are several; what a row's hash decides is not asked here."""
    named = [word for word in groups if word is not None]
    if not named:
        chosen: str | None = None
    elif split is not None:
        if split not in named:
            raise UsageError(f"--split {split}: {name} holds other splits: {did_you_mean(split, named)}")
        chosen = split
    elif len(groups) == 1 or "train" in named:
        chosen = named[0] if len(groups) == 1 else "train"
    else:
        raise UsageError(f"{name} holds the splits {', '.join(named)}.\n  Choose one with --split {named[0]}.")
    files = groups[chosen]
    aside = tuple(
        f"the split {word}" if word is not None else _of_none(group) for word, group in groups.items() if word != chosen
    )
    return TextFiles(str(kind_of(files[0])), tuple(files), chosen, aside)


def _of_none(files: Sequence[Path]) -> str:
    """Say which files are of no split: one by its name."""
    return f"{files[0].name}, of no split" if len(files) == 1 else f"{len(files)} files of no split"


def _split_in(name: str) -> str | None:
    """Return the split that a file's name tells of, the last word of its path before others."""
    words = _SPLIT_WORD.findall(name.lower())
    return next((split for split, known in _KEYWORDS.items() if words and words[-1] in known), None)


def _saved(folder: Path) -> dict[str | None, list[Path]] | None:
    """Return the files of each split of a folder that `save_to_disk` wrote; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", "splits")
        return {str(split): _saved_files(folder / str(split)) for split in splits}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {None: _saved_files(folder)}
    return None


def _saved_files(folder: Path) -> list[Path]:
    if _listed(folder / "state.json", "_indices_data_files", required=False):
        raise CalibrationError(
            f"{folder} was saved by an old datasets, which kept a choice of rows apart from the rows.\n"
            "  Save it again with a datasets of today."
        )
    files = [folder / Path(str(entry["filename"])).name for entry in _listed(folder / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise CalibrationError(f"{file}: no such file, though {folder / 'state.json'} lists it.")
    if not files:
        raise CalibrationError(f"{folder} lists no file of rows.")
    return files


def _listed(file: Path, key: str, required: bool = True) -> list[dict[str, object]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return list(found[key] if required else found.get(key) or ())
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        raise CalibrationError(f"{file} does not list the files that save_to_disk wrote.") from None


def _ending(file: Path) -> str:
    return "".join(file.suffixes[-2:] if file.suffix.lower() in COMPRESSIONS else file.suffixes[-1:])
