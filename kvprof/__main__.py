"""`python -m kvprof`, and the console script `kvprof`."""

from __future__ import annotations

import os

from kvprof.cli.app import app


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # kvprof has none, and looking for them takes time
    app(prog_name="kvprof")


if __name__ == "__main__":
    main()
