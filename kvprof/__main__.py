"""`python -m kvprof`, and the console script `kvprof`."""

from __future__ import annotations

import gc
import io
import os
import sys

from kvprof.cli.stops import Stopped, heed_signals, leave, leave_in_peace


def main() -> None:
    """Run the command line."""
    heed_signals()
    try:
        _run()
    except Stopped as stopped:
        leave(stopped)
    except OSError as error:  # of what no command prints: --version, --help
        from kvprof.cli.errors import explained

        sys.exit(f"error: {explained(error)}")
    finally:
        leave_in_peace()


def _run() -> None:
    from kvprof.cli.app import QUICK, app_for  # here, where a Ctrl-C is heeded
    from kvprof.models.quiet import silence_process

    silence_process()

    if sys.argv[1:2] == ["help"]:  # as it is typed for other tools
        sys.argv[1:] = [*sys.argv[2:3], "--help"]
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # kvprof has none, and looking for them takes time
    if not QUICK.isdisjoint(sys.argv[1:2]):
        gc.disable()  # they end before garbage could matter, and looking for it is a tenth of their time
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? for a bar, and no traceback
    app_for(sys.argv[1:])(prog_name="kvprof")


if __name__ == "__main__":
    main()
