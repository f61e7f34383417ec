"""Packages that are functions as well: kvprof.allocate and kvprof.evaluate.

Python binds a package to its parent's attribute as soon as anything in it is imported, whatever stood there before. So
the package itself is made callable: `kvprof.allocate` is one object, and works, in every order of imports.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that passes a call on to the function of its own name in another one, which is imported only then."""

    _home: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; what it takes and returns, `__init__.pyi` tells type checkers."""
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The function: `inspect.signature` finds its parameters here."""
        return getattr(import_module(self._home), self.__name__.rpartition(".")[2])


def make_callable(module: str, home: str) -> None:
    """Make a module callable. home: the module that has the function."""
    found = sys.modules[module]
    found.__class__ = CallableModule
    found._home = home  # type: ignore[attr-defined]
