"""A checkpoint on the hub, read in part: are the norms those of the downloaded one, and is nothing else fetched?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub, point_here, running_hub
from folders import edit_json, edit_weights, save_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.errors import ModelError
from kvprof.models.checkpoint.files import SafetensorsCheckpoint
from kvprof.models.checkpoint.remote import RemoteCheckpoint
from kvprof.models.checkpoint.weights import stream_projections
from kvprof.models.config import load_config
from kvprof.models.identity import checkpoint_fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import resolve
from kvprof.models.pinning import bytes_to_download, pin
from kvprof.models.source import ModelSource
from kvprof.profile.norms import measure_norms
from kvprof.records.geometry import CacheGeometry

REMOTE = "org/tiny"
SOURCE = ModelSource(REMOTE, "hub", hub_id=REMOTE)


@pytest.fixture
def hub(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub, and a client that asks it and waits for nothing."""
    with running_hub() as hub:
        point_here(hub.url, in_tmp / "hub-cache", monkeypatch)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


def norms(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["norms", *arguments])


def assert_one_message(result: Result, *words: str) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    text = " ".join(result.output.split())
    assert text.count("error: ") == 1
    for word in words:
        assert word in text
    assert "Traceback" not in text


def sent_bytes(hub: FakeHub) -> int:
    """Bytes of weight files that left the hub."""
    return sum(count for name, count in hub.sent_bytes.items() if name.endswith(".safetensors"))


def needed_bytes(folder: Path, geometry: CacheGeometry, hidden: int) -> int:
    """Headers, K, V and every vector: the most that must be sent of float32 weights, from their shapes alone."""
    total = sum(4 * hidden * (layer.key_width + layer.value_width) for layer in geometry.scored)
    for shard in folder.glob("*.safetensors"):
        total += 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        total += sum(4 * tensor.numel() for tensor in load_file(shard).values() if tensor.ndim == 1)
    return total


def test_of_every_architecture_headers_keys_and_values_are_all_that_is_fetched(
    any_tiny: tuple[str, PreTrainedModel], hub: FakeHub, in_tmp: Path
) -> None:
    name, model = any_tiny
    hub.models[REMOTE] = in_tmp / "served"
    model.save_pretrained(in_tmp / "served", max_shard_size="20KB")
    config = model.config.get_text_config(decoder=True)
    geometry = take_inventory(model.config).geometry
    checkpoint = pin(SOURCE).open(config)
    assert isinstance(checkpoint, RemoteCheckpoint)
    local = stream_projections(SafetensorsCheckpoint(in_tmp / "served"), geometry, config)
    for remote, own in zip(stream_projections(checkpoint, geometry, config), local, strict=True):
        for part in ("key", "value", "key_bias", "value_bias", "key_gain"):
            there, here = getattr(remote, part), getattr(own, part)
            assert (there is None) == (here is None)
            assert there is None or torch.equal(there, here)
    hidden = config.hidden_size
    queries = 2 * 4 * hidden**2 if name == "gpt2" else 0  # stored (in, out): every row has some of each
    assert sent_bytes(hub) <= needed_bytes(in_tmp / "served", geometry, hidden) + queries
    assert checkpoint.fetched.fetched_bytes == sent_bytes(hub)
    assert checkpoint.fetched.whole_bytes == sum(file.stat().st_size for file in in_tmp.glob("served/*.safetensors"))
    assert {revision for revision, *_ in hub.ranges} == {COMMIT}
    for _, shard, start, stop in hub.ranges:
        assert 0 <= start < stop <= (in_tmp / "served" / shard).stat().st_size


@pytest.mark.parametrize("form", ["plain", "sharded", "without an index", "fused"])
def test_the_norms_of_a_hub_model_are_those_of_its_files_and_the_command_says_what_it_fetched(
    form: str, hub: FakeHub, in_tmp: Path
) -> None:
    shard = "1GB" if form in ("plain", "fused") else "10KB"
    hub.models[REMOTE] = save_folder(in_tmp / "served", "phi3" if form == "fused" else "llama", max_shard_size=shard)
    if form == "without an index":
        (in_tmp / "served" / "model.safetensors.index.json").unlink()
    result = norms(REMOTE, "--out", "remote")
    assert result.exit_code == 0, result.output
    assert norms(str(in_tmp / "served"), "--out", "local").exit_code == 0
    remote, local = (json.loads((in_tmp / place / "norms.json").read_text()) for place in ("remote", "local"))
    assert remote["layers"] == local["layers"]
    assert remote["model"]["fingerprint"] == local["model"]["fingerprint"]
    whole = sum(file.stat().st_size for file in in_tmp.glob("served/*.safetensors"))
    said = re.search(r"fetched ([\d.]+) kB of ([\d.]+) kB \(([\d.]+) %\)", result.output)
    assert said is not None, result.output
    assert float(said[1]) == pytest.approx(sent_bytes(hub) / 1000, rel=5e-3)
    assert float(said[2]) == pytest.approx(whole / 1000, rel=5e-3)
    assert float(said[3]) == pytest.approx(100 * sent_bytes(hub) / whole, abs=0.06)
    assert not list(in_tmp.glob("hub-cache/**/*.safetensors"))


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_a_dtype_that_the_config_does_not_name_is_in_the_first_header(shard: str, hub: FakeHub, in_tmp: Path) -> None:
    served = in_tmp / "served"
    hub.models[REMOTE] = save_folder(served, max_shard_size=shard)
    for file in served.glob("*.safetensors"):
        save_file({name: weight.half() for name, weight in load_file(file).items()}, file)
    edit_json(served / "config.json", dtype=None)
    assert take_inventory(load_config(SOURCE)).geometry.dtype == "float16"
    first = sorted(served.glob("*.safetensors"))[0]
    header = 8 + int.from_bytes(first.read_bytes()[:8], "little")
    assert {name for _, name, *_ in hub.ranges} == {first.name}
    assert sent_bytes(hub) <= header


def test_rows_that_lie_together_are_one_request(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served", "phi3")  # a layer: Q, K, V in one matrix, no bias
    measure_norms(SOURCE)
    assert len([start for *_, start, _ in hub.ranges if start > 8 + header_length(in_tmp / "served")]) == 2


def header_length(folder: Path) -> int:
    return int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


@pytest.mark.parametrize("rows", [[(3, 5)], [(0, 2), (9, 16)], [(4, 8), (0, 4)], [(0, 16)], None])
def test_rows_of_a_tensor_are_those_of_the_file(rows: list[tuple[int, int]] | None, hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    name = "model.layers.1.self_attn.k_proj.weight"
    with safe_open(in_tmp / "served" / "model.safetensors", framework="pt") as file:
        whole = file.get_tensor(name)
    wanted = whole if rows is None else torch.cat([whole[start:stop] for start, stop in rows])
    remote = pin(SOURCE).open(tiny_model("llama").config)
    for checkpoint in (remote, SafetensorsCheckpoint(in_tmp / "served")):
        assert torch.equal(checkpoint.read(name, rows), wanted)
        assert checkpoint.stored_bytes(name, rows) == wanted.nbytes


def test_a_fingerprint_downloads_no_model(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    model = tiny_model("llama")
    geometry = take_inventory(model.config).geometry
    assert checkpoint_fingerprint(SOURCE, geometry) == live_fingerprint(model, geometry)
    assert sent_bytes(hub) <= needed_bytes(in_tmp / "served", geometry, 32)


def test_a_model_that_the_cache_holds_is_read_there_and_needs_no_hub(
    hub: FakeHub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served", max_shard_size="10KB")
    SOURCE.fetch(weights=True)
    fetched = sent_bytes(hub)
    result = norms(REMOTE)
    assert result.exit_code == 0
    assert "fetched" not in result.output
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    del hub.log[:]
    assert norms(REMOTE).exit_code == 0
    assert hub.log == []
    assert sent_bytes(hub) == fetched


def test_a_newer_commit_than_the_cached_one_is_what_is_read(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    SOURCE.fetch(weights=True)
    before = measure_norms(SOURCE)[0].model
    edit_weights(in_tmp / "served", lambda state: state["model.layers.0.self_attn.k_proj.weight"].neg_())
    hub.commits[REMOTE] = "f" * 40
    after = measure_norms(SOURCE)[0].model
    assert before is not None
    assert after is not None
    assert after.fingerprint != before.fingerprint
    assert {revision for revision, *_ in hub.ranges} == {"f" * 40}


@pytest.mark.parametrize("faults", [[503], [429, 500], ["cut"], ["cut", 503, "cut"]], ids=str)
def test_an_answer_that_fails_is_asked_for_again(faults: list[int | str], hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    calm = measure_norms(SOURCE)[0]
    hub.faults = [*faults]
    assert measure_norms(SOURCE)[0] == calm  # of a header
    assert measure_norms(SOURCE, storm(hub, faults))[0] == calm  # of a matrix
    assert hub.faults == []


def storm(hub: FakeHub, faults: list[int | str]) -> Callable[[int, int], None]:
    """Let the faults befall the ranges after the headers."""
    return lambda done, total: hub.faults.extend(faults) if done == 0 else None


def test_what_a_broken_answer_brought_is_not_fetched_again(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    measure_norms(SOURCE)
    calm = sent_bytes(hub)
    measure_norms(SOURCE, storm(hub, ["cut", "cut"]))
    assert sent_bytes(hub) == 2 * calm


@pytest.mark.parametrize("fault", [503, 403, 416, "cut"])
def test_a_hub_that_never_recovers_is_one_message(fault: int | str, hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    hub.faults = [fault] * 100
    assert_one_message(norms(REMOTE), "cannot read model.safetensors of 'org/tiny' on the hub")


def test_weights_come_from_another_host_which_is_shown_no_token(
    hub: FakeHub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    calm = measure_norms(SOURCE)[0]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirecting = True
    assert measure_norms(SOURCE)[0] == calm
    assert "Bearer hf_secret" in hub.tokens["here"]
    assert hub.tokens["elsewhere"] == {None}


def test_what_loading_would_download_is_known_before(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served", max_shard_size="10KB")
    whole = sum(file.stat().st_size for file in (in_tmp / "served").glob("*.safetensors"))
    assert bytes_to_download(resolve(REMOTE)) == whole
    assert hub.ranges == []
    resolve(REMOTE).fetch(weights=True)
    assert bytes_to_download(resolve(REMOTE)) == bytes_to_download(resolve(str(in_tmp / "served"))) == 0


def test_a_hub_that_serves_whole_files_only_says_to_download(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    hub.without_ranges = True
    assert_one_message(norms(REMOTE), "serves whole files only", "hf download org/tiny")


@pytest.mark.parametrize("listing", [True, False])
def test_a_hub_that_tells_no_sizes_beside_names_is_asked_for_them(listing: bool, hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    hub.without_sizes, hub.without_listing = True, not listing
    assert norms(REMOTE).exit_code == 0
    assert hub.ranges
    assert sent_bytes(hub) < (in_tmp / "served" / "model.safetensors").stat().st_size


def test_a_hub_that_tells_no_sizes_at_all_is_downloaded_from(
    hub: FakeHub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    hub.without_sizes = True
    monkeypatch.setattr("kvprof.models.checkpoint.hub._ask_sizes", lambda *_: {})
    assert norms(REMOTE).exit_code == 0
    assert hub.ranges == []


def test_a_shard_that_the_index_names_and_the_hub_lacks_is_named(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served", max_shard_size="10KB")
    shard = sorted(in_tmp.glob("served/*.safetensors"))[1]
    shard.unlink()
    assert_one_message(norms(REMOTE), f"names the shard {shard.name}, but it is not there")


def test_quantized_weights_are_refused_before_any_is_fetched(hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_weights(in_tmp / "served", lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    assert_one_message(norms(REMOTE), f"{name} is quantized to float8_e4m3fn")
    assert sent_bytes(hub) <= 8 + header_length(in_tmp / "served")


Header = dict[str, dict[str, object]]
KEY = "model.layers.0.self_attn.k_proj.weight"


def with_header(content: bytes, edit: Callable[[Header], object]) -> bytes:
    """Return a safetensors file with its header changed, and its data left as it was."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def changed(**fields: object) -> Callable[[bytes], bytes]:
    return lambda content: with_header(content, lambda header: header[KEY].update(fields))


def moved(start: int, stop: int) -> Callable[[bytes], bytes]:
    def edit(header: Header) -> None:
        offsets = header[KEY]["data_offsets"]
        header[KEY]["data_offsets"] = [offsets[0] + start, offsets[1] + stop]  # type: ignore[index]

    return lambda content: with_header(content, edit)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "stub": lambda content: content[:4],
    "length alone": lambda content: content[:8],
    "header cut": lambda content: content[:200],
    "a byte short": lambda content: content[:-1],
    "a byte longer": lambda content: content + b"\0",
    "header longer than the file": lambda content: (len(content) - 7).to_bytes(8, "little") + content[8:],
    "header of 2^63": lambda content: (2**63).to_bytes(8, "little") + content[8:],
    "header a byte short": lambda content: (
        (int.from_bytes(content[:8], "little") - 1).to_bytes(8, "little") + content[8:]
    ),
    "no header": lambda content: bytes(8) + content[8:],
    "LFS pointer": lambda content: b"version 1\noid sha256:00\nsize 12345\n",
    "no text": lambda content: content[:8] + b"\xff" * 64 + content[72:],
    "list": lambda content: (2).to_bytes(8, "little") + b"[]",
    "deep": lambda content: (50_000).to_bytes(8, "little") + b"[" * 50_000,
    "long number": lambda content: (9_000).to_bytes(8, "little") + b'{"a":' + b"9" * 8_994 + b"}",
    "no entry": lambda content: with_header(content, lambda header: header.update({KEY: 7})),  # type: ignore[dict-item]
    "unknown dtype": changed(dtype="F7"),
    "another dtype": changed(dtype="F16"),
    "no dtype": changed(dtype=None),
    "no shape": changed(shape=None),
    "negative shape": changed(shape=[-16, -32]),
    "true for a size": changed(shape=[True, 512]),
    "fractional shape": changed(shape=[0.5, 1024]),
    "huge shape": changed(shape=[2**62, 2**62, 2**62]),
    "long shape": changed(shape=[2**62] * 10_000),
    "another shape": changed(shape=[16, 31]),
    "one offset": changed(data_offsets=[0]),
    "huge offsets": changed(data_offsets=[2**70, 2**70 + 2048]),
    "negative offsets": changed(data_offsets=[-2048, 0]),
    "turned offsets": changed(data_offsets=[2048, 0]),
    "overlapping": moved(-64, -64),
    "a gap": moved(4, 4),
    "beyond the end": moved(10**9, 10**9),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_message_and_no_more_of_it_is_fetched(damage: str, hub: FakeHub, in_tmp: Path) -> None:
    hub.models[REMOTE] = save_folder(in_tmp / "served")
    file = in_tmp / "served" / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert_one_message(norms(REMOTE), "model.safetensors of org/tiny on the hub is truncated or corrupt")
    assert sent_bytes(hub) <= file.stat().st_size
    with pytest.raises(ModelError, match="truncated or corrupt"):  # so says the library that reads it from a disk
        SafetensorsCheckpoint(in_tmp / "served")
