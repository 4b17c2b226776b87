"""The cards in data/ and figures/: their counts are the files', their claims the tables'."""

import csv
import json
import re
import struct
from math import prod
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "data" / "benchmark"
CARDS = sorted(path.relative_to(ROOT) for path in ROOT.glob("data/**/README.md"))


def rows(page: str, start: str) -> list[list[str]]:
    """The cells of a page's table whose first column begins with `start`."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [row for row in cells if row[0].startswith(start)]


def parameters(folder: Path) -> int:
    """How many numbers a folder's weights hold, by the headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(prod(e["shape"]) for name, e in header.items() if name != "__metadata__")
    return total


@pytest.mark.parametrize("family", ("internvl", "qwen2_vl", "omni", "smol"))
def test_a_models_card_has_its_parameters_and_training(family):
    found = rows(f"data/benchmark/{family}/README.md", "`")
    assert len(found) >= 5
    for name, size, *steps, samples, rate in found:
        folder = BENCHMARK / family / re.match("`(.+?)`", name)[1]
        log = json.loads(folder.with_suffix(".json").read_text())
        assert int(size) == parameters(folder), name
        assert (int(samples), float(rate)) == (log["samples"], log["learning_rate"]), name
        assert [int(step) for step in steps] == ([log["steps"]] if steps else []), name
        if "other four" in name:
            logs = [json.loads(path.read_text()) for path in folder.parent.glob("*.json")]
            assert [other["samples"] for other in logs].count(log["samples"]) == 5, name


@pytest.mark.parametrize("folder", ("questions", "smol/questions"))
def test_a_data_sets_card_has_its_counts(folder):
    pq = pytest.importorskip("pyarrow.parquet")
    _, *tasks = rows(f"data/benchmark/{folder}/README.md", "")
    found = {task: [int(validation), int(test)] for task, _, validation, test in tasks}
    counted = {name: [0, 0] for name in found}
    for column, split in enumerate(("validation", "test")):
        for path in (BENCHMARK / folder / split).glob("*.parquet"):
            counted[path.stem][column] = pq.ParquetFile(path).metadata.num_rows
    assert found == counted


def test_the_overview_has_every_folder_with_its_size():
    found = rows("data/README.md", "`")
    folders = {f"benchmark/{path.name}" for path in BENCHMARK.iterdir() if path.is_dir()}
    assert {row[0].strip("`") for row in found} == folders | {"paper", "recipes"}
    for name, _, weights, size, *_ in found:
        folder = ROOT / "data" / name.strip("`")
        files = [path for path in folder.rglob("*") if path.is_file()]
        if folder.name == "smol":  # whose base does not ship: it is built where it is needed
            files = [path for path in files if folder / "base" not in path.parents]
        assert int(weights) == sum(path.suffix == ".safetensors" for path in files), name
        total = sum(path.stat().st_size for path in files if path.name != "README.md")
        assert size == "–" or float(size) == pytest.approx(total / 1e6, abs=0.06), name


@pytest.mark.parametrize("card", [*map(str, CARDS), "figures/README.md"])
def test_a_cards_links_lead_somewhere(card):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / card).read_text())
    for link in links:
        assert ((ROOT / card).parent / link).exists(), link


@pytest.mark.parametrize("study", ("internvl", "qwen2_vl"))
def test_the_appendix_has_every_claim(study):
    with open(ROOT / "figures" / study / "tablexx_claims.csv", newline="") as file:
        claims = [row["claim"] for row in csv.DictReader(file)]
    said = [row[0] for row in rows("figures/README.md", "")]
    assert said[said.index("Claim") + 1 :][: len(claims)] == claims
