"""Weights of every origin as one type: a read-only mapping parameter name -> tensor.

A folder, a stream, an adapter, a model in memory, each in its own file, all with what is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optmerge_core.checkpoints.names import is_head

IN_MEMORY = "a model in memory"  # what errors call weights without a folder


class Weights(Mapping[str, Tensor]):
    """Parameter name -> CPU tensor, with all that merging and diagnosis ask of weights.

    An implementation sets `_names`, the names it has, and gives a tensor, its shape and its dtype;
    the rest says here what is true of a model in memory. Nothing but indexing reads weights.
    """

    folder: Path | None = None
    """where the files that are not weights lie; None for a model in memory"""
    revision: str | None = None
    """commit on the hub"""
    source: str | None = None
    """where weights are read: "folder", "hub" (its cache), the address they are streamed from"""
    named_base: str = ""
    """the base model that an adapter says it was made for"""
    changes: Collection[str] | None = None
    """the only parameters that may differ from the base's, where that is known: an adapter's"""
    on_bytes: Callable[[int], None] | None = None
    """told each time how many bytes of tensors have come, where they come over the network"""
    _names: Collection[str]

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters."""
        return {name: self.shape(name) for name in self}

    def nbytes(self, name: str) -> int:
        """Bytes one parameter takes as it is stored."""
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def config(self) -> dict[str, Any]:
        """The model's config.json; an empty dict where there is none."""
        return {}

    def task_vector(self, name: str, base_tensor: Tensor | None = None) -> Tensor | None:
        """What is added to the base's (`base_tensor`, if at hand), where known; None: subtract."""
        return None

    def own_name(self, name: str) -> str:
        """What a parameter is called in the files."""
        return name

    def file_sizes(self) -> dict[str, int]:
        """File name -> bytes of each file that decides what the weights are."""
        return {}

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of each weight file."""
        return {}

    def hash_beside(self, name: str) -> None:
        """Take the hash of the file up to this parameter, which was just read, for `sha256`."""

    def provenance(self) -> dict[str, Any]:
        """What identifies the weights wherever they lie: commit, origin, hashes of the files."""
        return {"revision": self.revision, "source": self.source, "sha256": self.sha256()}

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        """What comes over the network when these are read: remote checkpoints, their own names."""
        return []


class InMemory(Weights):
    """A state dict, as it is, with the config of the model it is of, if that is known."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None):
        self.tensors = self._names = tensors
        self._config = config or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def config(self) -> dict[str, Any]:
        return dict(self._config)


class Renamed(Weights):
    """Other weights under other names, or some of them: `names` maps a name to the one in the file.

    All else, `config` or `folder`, is that of the weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Mapping[str, str]):
        self.weights, self.names = as_weights(weights), names
        self.folder, self.revision = self.weights.folder, self.weights.revision
        self.source, self.named_base = self.weights.source, self.weights.named_base
        self._names = names
        if (changes := self.weights.changes) is not None:
            self.changes = {name for name, own in names.items() if own in changes}

    def own_name(self, name: str) -> str:
        return self.weights.own_name(self.names[name])

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.names[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(self.names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(self.names[name])

    def config(self) -> dict[str, Any]:
        return self.weights.config()

    def task_vector(self, name: str, base_tensor: Tensor | None = None) -> Tensor | None:
        return self.weights.task_vector(self.names[name], base_tensor)

    def file_sizes(self) -> dict[str, int]:
        return self.weights.file_sizes()

    def hash_beside(self, name: str) -> None:
        self.weights.hash_beside(self.names[name])

    def sha256(self) -> dict[str, str]:
        return self.weights.sha256()

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        return self.weights.streamed(self.names[name] for name in names)


def as_weights(tensors: Mapping[str, Tensor] | torch.nn.Module) -> Weights:
    """The same with all that `Weights` has, of a state dict or a model; weights stay themselves."""
    if isinstance(tensors, torch.nn.Module):
        config = getattr(tensors, "config", None)  # a Hugging Face model's
        return InMemory(tensors.state_dict(), config and config.to_dict())
    return tensors if isinstance(tensors, Weights) else InMemory(tensors)


def ties(weights: Weights) -> bool:
    """Whether the model's head is its embeddings: config.json says so, or says nothing of it."""
    config = weights.config()
    texts = [config.get(key) for key in ("text_config", "llm_config")]
    for part in (config, *(text for text in texts if isinstance(text, dict))):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return not any(is_head(name) for name in weights)
