"""Bytes of a file on the hub by range: asked for once, and again where an answer breaks off.

Reads the hub at one commit, into memory that the caller has. Does not know what a byte means.
"""

from __future__ import annotations

import threading

from kvprof.errors import ModelError, first_line
from kvprof.models.checkpoint.hub import why_refused

_ATTEMPTS = 5
"""How often in all a range is asked for whose answers break off; the hub's client itself repeats what was refused."""


class RangeReader:
    """Reads parts of a repository's files. fetched_bytes: how much came so far. Several threads may read at a time."""

    def __init__(self, hub_id: str, commit: str) -> None:
        self._hub_id, self._commit = hub_id, commit
        self._counting = threading.Lock()
        self.fetched_bytes = 0

    def read_into(self, buffer: memoryview, name: str, start_byte: int) -> None:
        """Fill a buffer with the bytes of a file that begin at `start_byte`, in one request where all goes well.

        Raises ModelError where the hub does not give them, saying why.
        """
        done = 0
        broken = None
        for _ in range(_ATTEMPTS):
            if done == len(buffer):
                return
            try:
                arrived, broken = self._ask(buffer[done:], name, start_byte + done)
            except ModelError:
                raise
            except Exception as error:  # the hub's client lets through whatever its HTTP library raises
                raise ModelError(f"cannot read {name} of {self._hub_id!r} on the hub: {why_refused(error)}") from None
            done += arrived
            with self._counting:
                self.fetched_bytes += arrived
        if done < len(buffer):
            why = "its answers break off." if broken is None else first_line(broken)
            raise ModelError(
                f"cannot read {name} of {self._hub_id!r} on the hub: {why}\n"
                "  Look at your network and run the same command again."
            )

    def _ask(self, buffer: memoryview, name: str, start_byte: int) -> tuple[int, Exception | None]:
        """Ask once for what a buffer lacks; return how many bytes came, and what broke them off."""
        from huggingface_hub import constants, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers, http_stream_backoff  # type: ignore[attr-defined]

        url = hf_hub_url(self._hub_id, name, revision=self._commit)
        wanted = {"Range": f"bytes={start_byte}-{start_byte + len(buffer) - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers() | wanted
        arrived = 0
        # Not through HfFileSystem, which takes in the whole file where a mirror knows no ranges.
        with http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise ModelError(
                    f"cannot read parts of {name} of {self._hub_id!r}: this hub serves whole files only.\n"
                    f"  Download it (hf download {self._hub_id}) and run the same command again."
                )
            try:
                for chunk in response.iter_bytes():
                    taken = chunk[: len(buffer) - arrived]
                    buffer[arrived : arrived + len(taken)] = taken
                    arrived += len(taken)
            except Exception as error:  # not let out of the `with`, which would ask for all of it again
                return arrived, error
        return arrived, None
