"""`python -m kvprof`, and the console script `kvprof`."""

from __future__ import annotations

from kvprof.cli.app import app


def main() -> None:
    """Run the command line."""
    app(prog_name="kvprof")


if __name__ == "__main__":
    main()
