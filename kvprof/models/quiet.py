"""Other libraries' advice, kept off the screen while kvprof works, and let through again afterwards.

Changes the loggers of transformers and Python's warnings, and puts them back. Errors still come through.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and bars, and Python's warnings, of loading and of every forward."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def silence_process() -> None:
    """Do the same for good, where the process is kvprof's own; no library is imported.

    Who sets TRANSFORMERS_VERBOSITY or PYTHONWARNINGS, or gives -W, has the last word.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
