"""GPUs that are none: what `study.gpus` starts for each, on the CPU, with a note of what it did."""

import os
import signal
from pathlib import Path

import torch

from optmerge_core.merging import merge
from optmerge_core.study import gpus

OWN = gpus._work


def work(connection, path, gpu):
    """In the process of one GPU: notes beside the plan are GPU-PART. The one called kill dies once,
    when its first part is not yet under its name, the one called always each time."""
    notes, do = Path(path).parent / "notes", gpus.merge_part

    def parse_device(device):
        assert device == "cuda"
        return torch.device("cpu")

    def noted(plan, part):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu
        (notes / f"{gpu}-{part}").touch()
        if gpu == "always" or gpu == "kill" and not (notes / "killed").exists():
            if gpu == "kill":
                (notes / "killed").touch()
            os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        return do(plan, part)

    merge.parse_device, gpus.merge_part = parse_device, noted
    OWN(connection, path, gpu)
