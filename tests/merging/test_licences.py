"""What the cards of base and experts say of licences, in notice, report and card."""

import json
import re
import shutil
import warnings

import pytest
import yaml
from lora import make_lora_family

from optmerge_core import merge, merge_adapters
from optmerge_core.merging.card import model_card
from optmerge_core.merging.licences import common, forbids, licence_of, listed, read_licence
from optmerge_core.merging.report import MergeReport

RECORD = {
    "name": "model.layers.0.mlp.up_proj.weight", "shape": [2, 2], "base_norm": 1.0,
    "merged_norm": 1.0, "expert_norms": {"ocr": 1.0},
}  # fmt: skip
NAMED = {"license": "other", "license_name": "qwen", "license_link": "https://example.org/qwen"}


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def rows(text):
    """Those of a card's table of licences."""
    part = text.split("## Licences\n")[1].split("\n## ")[0]
    return [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("|")][2:]


def card(**front_matter):
    return f"---\n{yaml.safe_dump(front_matter)}---\n# A model\n"


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("apache-2.0", []),
        ("cc-by-nd-4.0", ["derivatives"]),
        ("cc-by-nc-sa-4.0", ["commercial use"]),
        ("cc-by-nc-nd-4.0", ["derivatives", "commercial use"]),
        ("fair-noncommercial-research-license", ["commercial use"]),
        ("openrail", []),
        ("bsd-3-clause-clear", []),
        ("ncsa", []),
    ],
)
def test_what_a_licences_name_says_it_forbids(name, forbidden):
    assert forbids({"license": name}) == forbidden
    assert forbids({"license": "other", "license_name": name}) == forbidden


def test_a_card_is_read_or_says_nothing(tmp_path):
    assert read_licence(None) == read_licence(tmp_path) == {}
    (tmp_path / "README.md").write_text(card(**NAMED, tags=["x"]))
    assert read_licence(tmp_path) == NAMED
    for text in (
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "no front matter",
        "---\na: b\n---\n",
    ):
        (tmp_path / "README.md").write_text(text)
        assert read_licence(tmp_path) == {}
    assert licence_of({"license": ["mit", "apache-2.0"]}) == {"license": "mit and apache-2.0"}
    assert licence_of({"license": 3}) == licence_of({"license": " "}) == {}


def test_one_licence_of_all_that_name_one_or_other():
    mit, upper = {"license": "mit"}, {"license": "MIT"}
    assert common({"a": mit, "b": upper, "c": {}}) == upper | {}
    assert common({"a": {}, "b": {}}) == {}
    assert common({"a": mit, "b": NAMED}) == {"license": "other"}
    assert common({"a": NAMED, "b": NAMED}) == NAMED
    beside = NAMED | {"license_link": "LICENSE"}  # a file that the merged folder may not have
    assert common({"a": beside, "b": beside}) == {"license": "other", "license_name": "qwen"}
    assert common({"a": NAMED, "b": beside}) == {"license": "other", "license_name": "qwen"}
    assert listed({"a": mit, "b": {"license": "cc-by-nc-nd-4.0"}, "c": {}}) == (
        "a: mit; b: cc-by-nc-nd-4.0 (forbids derivatives and commercial use); c: none named"
    )


def licensed(tiny, root, licences):
    """Copies of base and experts with these in their cards; None for no card."""
    folders = {}
    for name, folder in {"base": tiny.base, **tiny.experts}.items():
        folders[name] = shutil.copytree(folder, root / name)
        if licence := licences.get(name):
            (folders[name] / "README.md").write_text(card(license=licence))
    return folders.pop("base"), folders


def test_licences_that_differ_stand_in_notice_report_and_card(tiny, tmp_path):
    given = {"base": "mit", "ocr": "cc-by-nd-4.0", "vqa": "MIT"}
    base, experts = licensed(tiny, tmp_path, given)
    said = (
        "licences, by the models' own cards: base model: mit; expert chart: none named; expert "
        "ocr: cc-by-nd-4.0 (forbids derivatives); expert vqa: MIT; the card names them all"
    )
    with pytest.warns(UserWarning, match=re.escape(said)):
        done = merge(base, experts, tmp_path / "out", method="ties")
    assert done.licences()["ocr"] == {"license": "cc-by-nd-4.0"} and not done.licences()["chart"]
    stored = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert stored["base_model"]["licence"] == {"license": "mit"}
    text = (tmp_path / "out/README.md").read_text()
    assert front_matter(text)["license"] == "other"
    assert rows(text) == [
        ["base model", "mit", "–"],
        ["chart", "not named", "–"],
        ["ocr", "cc-by-nd-4.0", "derivatives"],
        ["vqa", "MIT", "–"],
    ]
    assert "\n\n## Layers\n" in text


def test_one_licence_is_the_cards_and_no_card_claims_nothing(tiny, tmp_path):
    base, experts = licensed(tiny, tmp_path, dict.fromkeys(["base", *tiny.experts], "mit"))
    with warnings.catch_warnings(action="error"):
        merge(base, experts, tmp_path / "out", method="ties")
        merge(tiny.base, tiny.experts, tmp_path / "none", method="ties")
    text = (tmp_path / "out/README.md").read_text()
    assert front_matter(text)["license"] == "mit" and "Licences" not in text
    assert "icen" not in (tmp_path / "none/README.md").read_text()


def test_where_only_some_name_a_licence_the_card_says_whose_is_not_known():
    item = {"location": "owner/base", "revision": "c0ffee", "sha256": {}}
    report = MergeReport(
        output_dir="out", method="ties", method_options={}, scaling_coefficient=1.0, device="cpu",
        base_model=item | {"licence": {"license": "mit"}}, experts={"ocr": item},
        parameters=[RECORD], seconds=1.0, peak_memory_bytes=1, peak_device_memory_bytes=None,
    )  # fmt: skip
    text = model_card(report, {})
    assert front_matter(text)["license"] == "mit"
    assert rows(text) == [["base model", "mit", "–"], ["ocr", "not named", "–"]]


def test_adapters_have_cards_too(tmp_path):
    _, experts = make_lora_family(tmp_path)
    for name, licence in zip(experts, ("mit", "cc-by-nc-4.0"), strict=False):
        (experts[name] / "README.md").write_text(card(license=licence))
    with pytest.warns(UserWarning, match="e0: mit; expert e1: cc-by-nc-4.0 .forbids commercial"):
        merge_adapters(experts, tmp_path / "out", method="task_arithmetic")
    text = (tmp_path / "out/README.md").read_text()
    assert ["e1", "cc-by-nc-4.0", "commercial use"] in rows(text)
    assert front_matter(text)["license"] == "other"
