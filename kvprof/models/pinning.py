"""Which files a model is, once and for all: local ones, or a commit on the hub that is read in part.

Asks the hub; writes nothing but a hub id's config, into the hub's cache. Does not know what is read then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from kvprof.models.checkpoint.files import Checkpoint, GGUFCheckpoint, SafetensorsCheckpoint
from kvprof.models.checkpoint.gguf_model import open_gguf
from kvprof.models.checkpoint.hub import HubModel, find_on_hub
from kvprof.models.checkpoint.remote import RemoteCheckpoint, shards_on_hub
from kvprof.models.checkpoint.shards import SAFETENSORS_INDEX
from kvprof.models.loaded import check_in_memory
from kvprof.models.quantized.checkpoint import dequantized
from kvprof.models.quantized.settings import open_live, settings_in
from kvprof.models.source import ModelSource


@dataclass(frozen=True)
class PinnedModel:
    """A model whose config and weights are of one version, although its repository may change meanwhile.

    source: has a path, of the config at least, or the loaded model. identity: a text that is another one for every
    version.
    """

    source: ModelSource
    path: Path | None
    identity: str
    hub: HubModel | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether weights are read as llama.cpp has them."""
        return self.path is not None and self.path.is_file()

    def open(self, config: PretrainedConfig) -> Checkpoint:
        """Open the checkpoint: a loaded model's own, local files where they are, else the hub's.

        config: the text decoder's. Quantized matrices are dequantized as they are read.
        Raises ModelError as the checkpoints do.
        """
        if self.source.live is not None:
            return open_live(self.source.live)
        assert self.path is not None
        if self.path.is_file():
            return GGUFCheckpoint(self.path, config)
        stored = SafetensorsCheckpoint(self.path) if self.hub is None else _open_hub(self.hub)
        return dequantized(stored, settings_in(self.path))


def pin(source: ModelSource) -> PinnedModel:
    """Settle on a model's files without downloading its weights. Raises ModelError as `models.checkpoint.hub` does."""
    if source.live is not None:
        check_in_memory(source.live)
        return PinnedModel(source, None, f"model {id(source.live)} of process {os.getpid()}")
    if source.path is not None:
        return PinnedModel(source, source.path, _identity(source.path))
    assert source.hub_id is not None
    hub = find_on_hub(source.hub_id, source.trusts_code)
    return PinnedModel(dataclasses.replace(source, path=hub.folder), hub.folder, f"commit {hub.commit}", hub)


def bytes_to_download(source: ModelSource) -> int:
    """Return what loading a model brings from the hub first; 0 for one whose weights are here."""
    hub = pin(source).hub
    if hub is None or hub.weight_bytes is None:
        return 0
    return sum(size for name, size in hub.weight_bytes.items() if not (hub.folder / name).is_file())


def _open_hub(hub: HubModel) -> Checkpoint:
    """Open the files in the hub's cache, where it has them all, or those on the hub."""
    if hub.weight_bytes is None:
        return SafetensorsCheckpoint(hub.folder)
    shards = shards_on_hub(hub)
    if all((hub.folder / name).is_file() for name in shards.files):
        return SafetensorsCheckpoint(hub.folder)
    return RemoteCheckpoint(hub, shards)


def _identity(place: Path) -> str:
    """Hash the names, sizes and times of GGUF files, or of a folder's config, index and shards."""
    others = [place / "config.json", place / SAFETENSORS_INDEX]
    is_gguf = place.is_file()
    files = open_gguf(place).paths if is_gguf else [*place.glob("*.safetensors"), *filter(Path.is_file, others)]
    described = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return "sha256:" + hashlib.sha256(repr(described).encode()).hexdigest()
