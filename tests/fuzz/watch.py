"""One input read under guard: what it raised that it may not, how long it took, how much memory it needed."""

from __future__ import annotations

import gc
import time
import tracemalloc
from pathlib import Path

from fuzz.readers import Reader

MOST_SECONDS = 1.0
MOST_TIMES_ITS_BYTES = 10
CONSTANT_BYTES = 2**25


def read_guarded(reader: Reader, path: Path, content: bytes, measures_memory: bool = False) -> str | None:
    """Return what is wrong with how a reader takes an input; None where nothing is. path: where the input is put."""
    path.write_bytes(content)
    if measures_memory:
        gc.collect()
        tracemalloc.start()
    start = time.process_time()  # of this process: another that keeps the machine busy is no hang
    wrong = None
    try:
        reader.read(path)
    except reader.refuses as error:
        if len(str(error).encode(errors="replace")) > 5_000:
            wrong = f"a message of {len(str(error))} characters"
    except Exception as error:  # what the fuzzer is after
        wrong = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - start
    if measures_memory:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if wrong is None and peak > MOST_TIMES_ITS_BYTES * len(content) + CONSTANT_BYTES:
            wrong = f"{peak} bytes of memory for {len(content)} of input"
    elif wrong is None and seconds > MOST_SECONDS:
        wrong = f"{seconds:.1f} s for {len(content)} bytes"
    return wrong
