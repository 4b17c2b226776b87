"""Makes what mergekit itself computes for all of mergekit_cases.py and mergekit_layers.py.

Run in an environment of its own, which the tests do not need; without a name, both are made:

    python3 -m venv VENV && VENV/bin/pip install mergekit==0.1.5 torch==2.13.0
    VENV/bin/python tests/make_mergekit_golden.py [cases | layers]
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.sparsify import SparsificationMethod, sparsify
from mergekit_cases import DROPPED, GOLDEN, SHAPES, all_files, digest, shapes, write_models
from mergekit_layers import (
    DENSITY,
    EPSILON,
    LAYERED,
    LAYERS,
    MODELS,
    ROWS,
    WIDTH,
    layered_files,
)
from safetensors.torch import load_file, save_file

MADE_BY = {name: version(name) for name in ("mergekit", "torch", "transformers")}


def merged(text, output, expected=SHAPES):
    """All entries of the merged model, float32, parameter by parameter in the order expected."""
    LoaderCache().flush_all()  # it knows models by the names in the file
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(output), options)
    tensors = {}
    for path in output.glob("*.safetensors"):
        tensors |= load_file(path)
    assert tensors.keys() == expected.keys()
    return torch.cat([tensors[name].float().flatten() for name in expected])


def cases(folder):
    files, rows = all_files(), []
    write_models(folder)
    for number, (name, (dtype, text)) in enumerate(files.items()):
        os.chdir(folder / dtype)
        rows.append(merged(text, folder / f"merged-{number}"))
        print(name, flush=True)
    torch.manual_seed(0)
    os.chdir(folder / "float32")
    dropped = merged(yaml.safe_dump(DROPPED), folder / "dropped")
    tensors = {"merged": torch.stack(rows), "dropped": dropped}
    save_file(tensors, GOLDEN, MADE_BY | {"files": digest(files)})


def layers(folder):
    files, rows = layered_files(), {}
    for count in (1, LAYERS):
        write_models(folder / str(count), ("float32",), count, MODELS)
    for number, (name, (count, text)) in enumerate(files.items()):
        os.chdir(folder / str(count) / "float32")
        rows[name] = merged(text, folder / f"merged-{number}", shapes(count))
        print(name, flush=True)
    torch.manual_seed(0)
    sizes = torch.arange(1.0, WIDTH + 1).expand(ROWS, WIDTH).contiguous()
    kept = sparsify(sizes, DENSITY, SparsificationMethod.della_magprune, epsilon=EPSILON) != 0
    tensors = rows | {"kept by della": kept.sum(dim=0)}
    save_file(tensors, LAYERED, MADE_BY | {"files": digest([files, MODELS])})


if __name__ == "__main__":
    for make in [x for x in (cases, layers) if x.__name__ in (sys.argv[1:] or [x.__name__])]:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
