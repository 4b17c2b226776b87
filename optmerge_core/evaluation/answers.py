"""Answers given before: notebooks and reruns ask the same models the same questions.

Where OPTMERGE_ANSWERS names a folder, answers are kept there by a hash of all that decides them:
the model's weights, settings and tokenizer, the questions, this package's code, the libraries'
versions.
"""

import hashlib
import json
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from optmerge_core.checkpoints.formats import side_files

FOLDER = "OPTMERGE_ANSWERS"
DECIDING = ("torch", "transformers", "tokenizers", "numpy", "pillow")


def remembered(model, asked, answer):
    """`answer()`, texts of shape (questions,), or what it said before to the same.

    model: a transformers model; asked: what it is asked, as nested lists and tuples of tensors,
    bytes, texts, numbers and None.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return answer()
    digest = hashlib.blake2b(code().encode(), digest_size=16)
    settings = model.config.to_json_string(), model.generation_config.to_json_string()
    state = [type(model).__name__, settings, *model.state_dict().items()]
    _add(digest, [state, asked])
    path = Path(folder, f"{digest.hexdigest()}.json")
    if path.is_file():
        return np.array(json.loads(path.read_text(encoding="utf-8")), dtype=object)
    answers = answer()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(list(answers)), encoding="utf-8")
    partial.replace(path)
    return answers


def side_content(folder):
    """Name and content of what is not weights: tokenizer, processor, chat template, own code."""
    return [(path.name, path.read_bytes()) for path in side_files(folder)]


def _add(digest, item):
    """A value into a hash, after its type and size, so that no two values look alike."""
    if isinstance(item, list | tuple):
        digest.update(f"{len(item)} items".encode())
        for part in item:
            _add(digest, part)
    elif isinstance(item, torch.Tensor):
        stored = item.detach().cpu().contiguous()
        digest.update(f"{stored.dtype} {tuple(stored.shape)}".encode())
        digest.update(stored.reshape(-1).view(torch.uint8).numpy())
    else:
        content = item if isinstance(item, bytes) else repr(item).encode()
        digest.update(f"{type(item).__name__} {len(content)} ".encode() + content)


@cache
def code():
    """A hash of this package's files and the versions of what they answer with."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, [version(package) for package in DECIDING])
    _add(digest, [path.read_bytes() for path in sorted(root.rglob("*.py"))])
    return digest.hexdigest()
