"""The one error a user is meant to read: what is wrong, where, with which value, and the mend.

Everything that can go wrong through input (a file, a row, a flag, a weight) raises `UserError`.
The command line prints it as one paragraph and exits with code 2; a notebook shows its message.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """Wrong input. `str(error)` is a paragraph that says how to mend it."""


def bad_value(what: str, value: object, allowed: Iterable[str], where: str = "") -> UserError:
    """Return an error for a name that is not in `allowed`; the near misses are listed first.

    >>> bad_value("preset", "cuorse", ["tiny", "course", "full"]).args[0]
    "Unknown preset 'cuorse'. Did you mean 'course'? Known: course, full, tiny."
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(value), allowed, n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    place = f" {where}" if where else ""
    return UserError(f"Unknown {what} {value!r}{place}.{guess} Known: {', '.join(allowed)}.")


def needed(package: str, extra: str) -> ModuleType:
    """Import a package of an optional extra. UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        how = f'pip install -e ".[{extra}]"'
        raise UserError(f"This needs the package {package}: {how} ({error}).") from error
