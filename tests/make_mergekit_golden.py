"""Makes mergekit_golden.safetensors: what mergekit itself computes for all of mergekit_cases.py.

Run in an environment of its own, which the tests do not need:

    python3 -m venv VENV && VENV/bin/pip install mergekit==0.1.5 torch==2.13.0
    VENV/bin/python tests/make_mergekit_golden.py
"""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit_cases import DROPPED, GOLDEN, SHAPES, all_files, digest, write_models
from safetensors.torch import load_file, save_file


def merged(text, output):
    """All entries of the merged model, float32, parameter by parameter in the order of SHAPES."""
    LoaderCache().flush_all()  # it knows models by the names in the file
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(output), options)
    tensors = {}
    for path in output.glob("*.safetensors"):
        tensors |= load_file(path)
    assert tensors.keys() == SHAPES.keys()
    return torch.cat([tensors[name].float().flatten() for name in SHAPES])


def main():
    files, rows = all_files(), []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for number, (name, (dtype, text)) in enumerate(files.items()):
            os.chdir(Path(folder, dtype))
            rows.append(merged(text, Path(folder, f"merged-{number}")))
            print(name, flush=True)
        torch.manual_seed(0)
        os.chdir(Path(folder, "float32"))
        dropped = merged(yaml.safe_dump(DROPPED), Path(folder, "dropped"))
    made_by = {name: version(name) for name in ("mergekit", "torch", "transformers")}
    tensors = {"merged": torch.stack(rows), "dropped": dropped}
    save_file(tensors, GOLDEN, made_by | {"files": digest(files)})


if __name__ == "__main__":
    main()
