"""Model folders as a user has them: a tiny model with a tokenizer of its own, ready to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and saw another cat that sat on no mat at all".split()  # noqa: SIM905


def save_folder(folder: Path, name: str = "llama", **arguments: object) -> Path:
    """Save a tiny model and a tokenizer of a few words; arguments go to save_pretrained."""
    tiny_model(name).save_pretrained(folder, **arguments)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of a few words."""
    vocabulary = {"<unk>": 0} | {word: number for number, word in enumerate(sorted(set(WORDS)), start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def begin_texts(folder: Path, mark: str = "<unk>") -> Path:
    """Let a folder's tokenizer put a token of its vocabulary before every text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark))]
    )
    tokenizer.save_pretrained(folder)
    return folder


def break_tokenizer(folder: Path) -> Path:
    """Let a folder's tokenizer fail on every word that it does not know."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["unk_token"] = "<gone>"
    path.write_text(json.dumps(document))
    return folder


def save_text(path: Path, rows: int = 12) -> Path:
    """Write rows of words that the tokenizer knows, no two alike."""
    path.write_text("\n".join(" ".join(WORDS[row % 5 :] + WORDS[: row + 3]) for row in range(rows)))
    return path


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an unsharded checkpoint in place."""
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    """Change or add keys of a JSON file; a change to None removes the key."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
