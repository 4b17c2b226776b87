"""One place where a location, folder, hub id or URL, becomes an opened checkpoint or expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from optmerge_core.checkpoints import URL
from optmerge_core.checkpoints.adapters import Adapter
from optmerge_core.checkpoints.folder import Checkpoint, plain_names
from optmerge_core.checkpoints.formats import (
    PICKLE_PATTERNS,
    SIDE_PATTERNS,
    CheckpointError,
    parse_hub_id,
)
from optmerge_core.checkpoints.names import other_names
from optmerge_core.checkpoints.quantised import dequantised
from optmerge_core.checkpoints.weights import IN_MEMORY, Renamed, Weights, as_weights


def open_expert(
    expert: str | Path | Mapping[str, Tensor] | torch.nn.Module, base: Weights, stream: bool = False
) -> Weights:
    """An expert of `base`: a whole checkpoint or a PEFT LoRA adapter (see `open_checkpoint`), or a
    model or state dict in memory.

    Weights with other names for the base's parameters (`names.other_names`) get these; wrappers of
    training (`names.unwrapped`) are no part of a name.
    """
    if isinstance(expert, str | Path):
        checkpoint = open_checkpoint(expert, adapter=True, stream=stream)
        if checkpoint.is_adapter:
            return Adapter(checkpoint, base)
        opened = dequantised(checkpoint)
    else:
        opened = as_weights(expert)
        opened = Renamed(opened, plain_names(IN_MEMORY, opened))
    ours = {theirs: ours for ours, theirs in other_names(base, opened).items()}
    return Renamed(opened, {ours.get(name, name): name for name in opened}) if ours else opened


def open_checkpoint(
    location: str | Path, revision: str | None = None, adapter: bool = False, stream: bool = False
) -> Checkpoint:
    """Open a local folder, or else a Hugging Face hub id: `owner/name` or `owner/name@revision`.

    `revision` (branch, tag or commit) is for hub ids. What a model needs is downloaded to the hub's
    cache, once; in offline mode (HF_HUB_OFFLINE) it is taken from there. With `stream`, weights
    that the cache lacks stay on the hub and are read tensor by tensor, and `location` can also be
    the URL of a checkpoint's folder on a web server. Raises `CheckpointError`.
    """
    if not str(location).strip():
        raise CheckpointError("an empty path, where a checkpoint's folder or hub id is needed")
    folder = Path(location).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder} is a local folder: revision is for hub ids only")
        return Checkpoint(folder, adapter=adapter)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the checkpoint's folder")
    from huggingface_hub import constants  # slow, and not needed for a local folder

    from optmerge_core.checkpoints.remote import open_hub, open_url

    if URL.fullmatch(str(location)):
        if not stream or revision is not None:
            raise CheckpointError(
                f"{location}: a web server's folder has no revision and is not downloaded; stream "
                "it (stream=True, --stream), or download it and give the local folder"
            )
        return open_url(str(location), adapter)
    repo_id, revision = parse_hub_id(str(location), revision)
    if stream and not constants.HF_HUB_OFFLINE:
        return open_hub(repo_id, revision, adapter)
    return _open_cached(repo_id, revision, adapter)


def _open_cached(repo_id: str, revision: str | None, adapter: bool) -> Checkpoint:
    """Through the hub's cache: what is missing is downloaded, pickles only if alone."""
    from huggingface_hub import snapshot_download as fetch
    from huggingface_hub.utils import httpx

    from optmerge_core.checkpoints.remote import hub_error

    try:
        patterns = ["*.safetensors", *SIDE_PATTERNS]
        folder = Path(fetch(repo_id, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            patterns += PICKLE_PATTERNS
            fetch(repo_id, revision=folder.name, allow_patterns=patterns)
        return Checkpoint(folder, revision=folder.name, adapter=adapter)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise hub_error(repo_id, revision, error) from error
