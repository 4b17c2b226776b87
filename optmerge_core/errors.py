"""Errors said in one line: a package that is not installed, and how a command ends."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache


class MissingExtra(ImportError):
    """A package is not installed that this needs; the message has the command that installs it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """For imports of what this package's extra `name` installs. Raises `MissingExtra`."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing == "optmerge_core":
            raise
        text = f'this needs {missing}, which is not installed: pip install "optmerge_core[{name}]"'
        raise MissingExtra(text, name=missing) from error


def exit_status(command: Callable[[], object]) -> int:
    """Run a command; 0, or 1 for an error that is explained on stderr, or what the error asks for.

    Warnings are notices there, each text once, though catch_warnings() makes Python forget them.
    130, as shells count it, when it was interrupted: a merge leaves nothing then, a run continues
    where it was.
    """

    @cache
    def told(text: str) -> None:
        print(f"notice: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: told(str(message))
        try:
            command()
        except (ValueError, OSError, MissingExtra) as error:
            print(f"error: {error}", file=sys.stderr)
            return getattr(error, "exit_status", 1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    return 0
