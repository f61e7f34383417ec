"""What a model's repository or folder may hold: the hub's files fetched into its cache, pickles refused.

Reads the hub and file names; never opens a weight. Does not know what a config says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvprof.errors import ModelError, first_line

_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
_WEIGHT_FILES = ["model*.safetensors"]  # some models keep the same weights beside them under a second name
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_SECONDS = 10.0
"""How long the hub may take to say that it knows a model."""


def fetch_from_hub(hub_id: str, weights: bool) -> Path:
    """Bring a hub id's config and tokenizer, and its safetensors where asked, into the hub's cache; return the folder.

    Where the hub does not answer, the cache serves alone.
    """
    from huggingface_hub import HfApi, snapshot_download

    files = _CONFIG_FILES + (_WEIGHT_FILES if weights else [])
    wanted: dict[str, Any] = {"repo_id": hub_id, "allow_patterns": files, "ignore_patterns": ["*/*"]}
    try:
        # Asked first, because snapshot_download waits for an answer for ever.
        siblings = HfApi().model_info(hub_id, timeout=_HUB_SECONDS).siblings or []
        if weights:
            refuse_pickles((file.rfilename for file in siblings if "/" not in file.rfilename), f"{hub_id} on the hub")
        return Path(snapshot_download(**wanted))
    except ModelError:
        raise
    except Exception as error:  # the hub's client lets through whatever its HTTP library raises
        with contextlib.suppress(Exception):
            return Path(snapshot_download(**wanted, local_files_only=True))
        raise ModelError(f"cannot get the model {hub_id!r} from the hub: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Say why the hub gave nothing, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    log_in = "log in (hf auth login, or HF_TOKEN)"
    local = "name a local folder (./name) or a .gguf file"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"it is gated.\n  Ask for access on its page there and {log_in}, or {local}."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is none of this name, or it is private.\n  Check the spelling, {log_in}, or {local}."
    if status in (401, 403):
        return f"access is refused (HTTP {status}).\n  Look at its page there, {log_in}, or {local}."
    if isinstance(error, HFValidationError):
        return f"{first_line(error)}\n  Check the spelling, or {local}."
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and the hub's cache does not hold it.\n  Unset HF_HUB_OFFLINE, or {local}."
    return f"{first_line(error)}\n  Look at your network and try again, or {local}."


def refuse_pickles(names: Iterable[str], where: str) -> None:
    """Raise ModelError where none of a folder's or a repository's files is a safetensors one, saying what was found.

    names: the files in `where`. A pickle is never opened, nor downloaded: opening one can run any code in it.
    """
    files = sorted(names)
    if any(name.endswith(".safetensors") for name in files):
        return
    if pickles := [name for name in files if name.endswith(_PICKLES)]:
        raise ModelError(
            f"{where} holds only pickled weights ({pickles[0]}), and opening a pickle can run any code in it.\n"
            "  Convert it once, where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    if ggufs := [name for name in files if name.endswith(".gguf")]:
        raise ModelError(f"{where} holds GGUF files only.\n  Download one of them and name it: {', '.join(ggufs[:3])}")
    raise ModelError(f"{where} holds no weights: no *.safetensors file in it.")
