"""Folders that are built, not shipped: of packaged weights and what training added to them."""

import fcntl
import json
import shutil

from optmerge_core.benchmark.models.packaged import sha256


def built(folder, build, remedy):
    """A model's folder, built where it is missing or not what its log, <folder>.json, says.

    build: (folder to write) -> SHA-256 of its weights; remedy: what to restore where it is another
    than the log's. Of several processes one builds, the others wait. Raises `ValueError` then.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with open(f"{folder}.json", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        expected = json.load(log)["sha256"]
        if sha256(folder / "model.safetensors") != expected:
            shutil.rmtree(partial, ignore_errors=True)  # a killed process left it
            digest = build(partial)
            if digest != expected:
                raise ValueError(
                    f"{partial} has weights of SHA-256 {digest}, and {folder.name}.json says "
                    f"{expected}: {remedy}"
                )
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    return folder
