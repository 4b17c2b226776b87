"""A model's side files, wherever it is, without its weights; and what config.json tells of a study.

Both are for what is to be known before anything is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from optmerge_core.checkpoints import URL
from optmerge_core.checkpoints.formats import parse_hub_id
from optmerge_core.errors import extra
from optmerge_core.merging.templates import json_of

if TYPE_CHECKING:
    from optmerge_core.study.recipe import Recipe

ASKED = "AutoModelForImageTextToText"


@contextmanager
def side_files(location: str, *names: str) -> Iterator[Path]:
    """A folder with these files of a folder, hub id or URL, as far as they are there.

    Raises `CheckpointError` if the hub has no such model.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        yield folder
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import httpx

    from optmerge_core.checkpoints.http import NotThere, RemoteFile
    from optmerge_core.checkpoints.remote import hub_error

    with TemporaryDirectory() as fetched:
        folder = Path(fetched)
        if URL.fullmatch(location):
            for name in names:
                with suppress(NotThere):
                    content = RemoteFile(f"{location.rstrip('/')}/{name}").fetch()
                    (folder / name).write_bytes(content)
        else:
            repository, revision = parse_hub_id(location)
            try:
                for name in names:
                    with suppress(EntryNotFoundError):
                        file = hf_hub_download(repository, name, revision=revision)
                        (folder / name).write_bytes(Path(file).read_bytes())
            except (OSError, ValueError, httpx.HTTPError) as error:
                raise hub_error(repository, revision, error) from error
        yield folder


def check_askable(recipe: Recipe) -> None:
    """Raise `ValueError` where nothing is there that answers questions about pictures.

    That is transformers' class of the base's model type, or with `trust_remote_code` its own.
    """
    place = recipe.base_model
    with side_files(place, "config.json") as folder:
        config = json_of(folder / "config.json")
    kind, own = config.get("model_type"), config.get("auto_map")
    if not isinstance(kind, str):
        return  # opening it says what is wrong
    if find_spec("transformers") is None:
        return  # so does what asks
    with extra("models"):
        from transformers.models.auto import modeling_auto

    remote = isinstance(own, dict) and ASKED in own
    if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if remote and recipe.trust_remote_code:
        return
    code = "its own Python code has none either"
    if remote:
        code = "its own Python code does: read it and let the recipe say trust_remote_code: true"
    elif not own:
        code = "it brings none"
    raise ValueError(
        f"{place}: transformers has no class that answers questions about pictures ({ASKED}) for "
        f"model type {kind!r}, and {code}; merge it and evaluate elsewhere (`benchmarks`), or give "
        "base model and experts converted to transformers, often named ...-hf"
    )
