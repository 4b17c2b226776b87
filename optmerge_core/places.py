"""Where the repository's own files are, and who works on them. Imports nothing slow."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def checkout() -> Path:
    """The repository's folder, with data/ and notebooks/: around the package or where one works.

    Raises `FileNotFoundError` where neither the package nor the working directory lies in one.
    """
    package, here = Path(__file__).resolve().parents[1], Path.cwd()
    for folder in (package, here, *here.parents):
        if (folder / "data" / "paper").is_dir():
            return folder
    raise FileNotFoundError(
        f"no data/paper beside the package ({package}) or above the working directory ({here}): "
        "this needs the repository's data and notebooks, which an installed package does not "
        "bring; clone the repository and work in it"
    )


def in_checkout(path: str | Path) -> str:
    """A path of the repository from here, relative, so that no notebook shows a computer's own."""
    return Path(os.path.relpath(checkout() / path)).as_posix()


def worker() -> str:
    """Who works here: machine:process."""
    return f"{socket.gethostname()}:{os.getpid()}"
