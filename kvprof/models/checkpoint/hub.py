"""What a model's repository or folder may hold: the hub's files fetched into its cache, pickles refused.

Reads the hub and file names; never opens a weight. Does not know what a config says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvprof.errors import ModelError, first_line
from kvprof.models.names import nearest_model

_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
_WEIGHT_FILES = ["model*.safetensors"]  # some models keep the same weights beside them under a second name
_CODE_FILES = ["*.py"]  # where the user trusts them
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_SECONDS = 10.0
"""How long the hub may take to say that it knows a model."""


@dataclass(frozen=True)
class HubModel:
    """A model's repository on the hub, at one commit.

    folder: that commit in the hub's cache, which holds the config, and weights where they were fetched before.
    weight_bytes: the sizes of its weight files by name; None where the hub does not answer or does not tell, and
    `folder` holds the weights.
    """

    id: str
    folder: Path
    weight_bytes: Mapping[str, int] | None

    @property
    def commit(self) -> str:
        """The commit, by its hash."""
        return self.folder.name


def fetch_from_hub(hub_id: str, weights: bool, code: bool = False) -> Path:
    """Bring a hub id's config and tokenizer, and its safetensors where asked, into the hub's cache; return the folder.

    code: its Python files, too. Where the hub does not answer, the cache serves alone.
    """
    return _find(hub_id, needs_weights=weights, fetches_weights=weights, code=code).folder


def find_on_hub(hub_id: str, code: bool = False) -> HubModel:
    """Bring a hub id's config into the hub's cache, and say what weights there are to be read.

    code: its Python files, too. Where the hub does not answer, the cache serves alone, if it has the weights.
    """
    return _find(hub_id, needs_weights=True, fetches_weights=False, code=code)


def _find(hub_id: str, needs_weights: bool, fetches_weights: bool, code: bool) -> HubModel:
    """Ask for a repository. needs_weights: one without any is refused. fetches_weights: they are downloaded too."""
    from huggingface_hub import HfApi, snapshot_download

    def wanted(weights: bool) -> dict[str, Any]:
        files = _CONFIG_FILES + (_WEIGHT_FILES if weights else []) + (_CODE_FILES if code else [])
        return {
            "repo_id": hub_id,
            "allow_patterns": files,
            "ignore_patterns": ["*/*", *(f"*{end}" for end in _PICKLES)],
        }

    try:
        # Asked first, because snapshot_download waits for an answer for ever.
        info = HfApi().model_info(hub_id, timeout=_HUB_SECONDS, files_metadata=needs_weights and not fetches_weights)
        sizes = {file.rfilename: file.size for file in info.siblings or [] if "/" not in file.rfilename}
        if needs_weights:
            refuse_pickles(sizes, f"{hub_id} on the hub")
        weight_bytes = {name: size for name, size in sizes.items() if any(fnmatch(name, own) for own in _WEIGHT_FILES)}
        known = {name: size for name, size in weight_bytes.items() if size is not None}
        if needs_weights and not fetches_weights and len(known) < len(weight_bytes):
            known = _ask_sizes(hub_id, list(weight_bytes), info.sha)
        untold = needs_weights and len(known) < len(weight_bytes)  # nothing can be read in part
        folder = Path(snapshot_download(**wanted(fetches_weights or untold)))
    except ModelError:
        raise
    except Exception as error:  # the hub's client lets through whatever its HTTP library raises
        with contextlib.suppress(Exception):
            return HubModel(hub_id, Path(snapshot_download(**wanted(needs_weights), local_files_only=True)), None)
        what, _, advice = why_refused(error).partition("\n  ")
        advice = f"{nearest_model(hub_id)}{advice}"
        raise ModelError(f"cannot get the model {hub_id!r} from the hub: {what}\n  {advice}") from None
    if needs_weights and info.sha is not None and folder.name != info.sha:
        raise ModelError(f"{hub_id} has changed on the hub while it was asked for.\n  Run the same command again.")
    return HubModel(hub_id, folder, None if untold else known)


def _ask_sizes(hub_id: str, names: list[str], commit: str | None) -> dict[str, int]:
    """Return the sizes of files that a mirror does not tell beside their names: by its listing, else file by file."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    with contextlib.suppress(Exception):
        paths = HfApi().get_paths_info(hub_id, names, revision=commit)
        found = {entry.path: entry.size for entry in paths if isinstance(entry, RepoFile)}
        if len(found) == len(names):
            return found
    with contextlib.suppress(Exception):
        urls = {name: hf_hub_url(hub_id, name, revision=commit) for name in names}
        sizes = {name: get_hf_file_metadata(url, timeout=_HUB_SECONDS).size for name, url in urls.items()}
        return {name: size for name, size in sizes.items() if size is not None}
    return {}


def why_refused(error: Exception) -> str:
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
