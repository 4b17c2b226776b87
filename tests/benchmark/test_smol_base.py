"""The base of the study smol: built once, whole, and the same everywhere."""

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from optmerge_core.benchmark.models import smol
from optmerge_core.study.recipe import RecipeError, read_recipe


def test_products_are_summed_in_float64_one_rank_after_the_other():
    generator = torch.Generator().manual_seed(0)
    weight, b, a = (torch.randn(s, generator=generator) for s in ((40, 30), (40, 16), (16, 30)))
    b = 0.02 * b
    expected = np.empty((40, 30), dtype=np.float16)
    for i in range(40):
        for j in range(30):
            total = weight[i, j].item()
            for column, row in zip(b[i].tolist(), a[:, j].tolist(), strict=True):
                total += column * row
            expected[i, j] = np.float32(total)
    assert np.array_equal(smol.plus_product(weight, b, a).numpy(), expected)
    assert not np.array_equal(weight.half().numpy(), expected)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """What a base is built from, where building is copying; `.builds` says how often it was done.

    It is what training leaves in the repository, without the base itself.
    """
    builds = []

    def build(folder, adapter, sight):
        assert adapter == tmp_path / "base_adapter"
        folder.mkdir(exist_ok=True)
        time.sleep(0.05)
        shutil.copy(sight, folder / "model.safetensors")
        builds.append(folder)
        return hashlib.sha256(sight.read_bytes()).hexdigest()

    monkeypatch.setattr(smol, "build_base", build)
    (tmp_path / "sight.safetensors").write_bytes(b"as trained")
    recorded = {"sha256": hashlib.sha256(b"as trained").hexdigest(), "build": smol.BUILD}
    (tmp_path / "base.json").write_text(json.dumps(recorded))
    weights = tmp_path / "base" / "model.safetensors"
    return SimpleNamespace(path=tmp_path, builds=builds, weights=weights)


def test_of_several_at_once_one_builds(place):
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(smol.base_folder, [place.path] * 3))
    assert folders == {place.path / "base"} and len(place.builds) == 1
    assert place.weights.read_bytes() == b"as trained"
    left = {path.name for path in place.path.iterdir()}
    assert left == {"base", "base.json", "sight.safetensors"}


def test_a_base_that_is_damaged_or_of_another_training_is_built_again(place):
    smol.base_folder(place.path)
    place.weights.write_bytes(b"as tained")
    (place.path / ".base.partial").mkdir()
    (place.path / ".base.partial" / "rest").touch()  # a build was killed
    smol.base_folder(place.path)
    assert len(place.builds) == 2 and place.weights.read_bytes() == b"as trained"
    assert [path.name for path in (place.path / "base").iterdir()] == ["model.safetensors"]


def test_a_base_of_other_bytes_than_recorded_is_refused(place):
    (place.path / "sight.safetensors").write_bytes(b"of another seed")
    with pytest.raises(ValueError, match="base.json says [0-9a-f]{64}: restore base_adapter"):
        smol.base_folder(place.path)
    assert not (place.path / "base").exists()


def test_a_recipe_whose_base_is_not_built_yet_names_the_command(place):
    recipe = place.path / "smol.yaml"
    recipe.write_text("base_model: base\nmodels: [owner/one]\n")
    command = "python -m optmerge_core.benchmark smol-base"
    with pytest.raises(RecipeError, match=f"base_model: 'base' is built, not shipped: {command}$"):
        read_recipe(recipe)
    smol.base_folder(place.path)
    assert read_recipe(recipe).name == "smol"
