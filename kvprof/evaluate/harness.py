"""`lm_eval --model kvprof`: how the lm-evaluation-harness finds kvprof, and a command for where it cannot.

    lm_eval --model kvprof --model_args pretrained=MODEL,plan=plan.json --tasks ...
    python -m kvprof.evaluate.harness --model kvprof ...        # the same command, certain to know kvprof

Releases of lm_eval after 0.4.13 look up the entry point `lm_eval.models` that pyproject.toml declares. 0.4.13 itself
looks up nothing, but imports torch before it looks for the model, and torch calls what is declared as `torch.backends`:
there `register_where_wanted` waits for lm_eval, and does nothing in any other program. Imports neither by itself.
"""

from __future__ import annotations

import contextlib
import sys

from kvprof.errors import KvprofError

NAME = "kvprof"
MODEL = "kvprof.evaluate.harness_model:HarnessModel"


def register() -> None:
    """Tell lm_eval of the model, by name alone: it is imported when it is asked for. Raises ImportError without it."""
    import lm_eval.models  # noqa: F401 - first: a registry that has any model is taken for complete
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=MODEL)


def register_where_wanted() -> None:
    """Tell lm_eval of the model where it is what runs; never raises, since `import torch` would fail with it."""
    if "lm_eval" in sys.modules:
        with contextlib.suppress(Exception):
            register()


def main() -> None:
    """Run lm_eval's command line."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"the lm-evaluation-harness is needed, and {error}.\n  Install it: pip install 'kvprof-bits[eval]'")
    try:
        cli_evaluate()
    except KvprofError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
