"""Figures and tables are saved with their numbers, byte for byte the same."""

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from optmerge_core import METHODS  # noqa: E402
from optmerge_core.figures import (
    COLORS,
    LABELS,
    MARKERS,
    compare,
    markdown,
    paper_table,
    save_figure,
    save_table,
    use_style,
)


def test_every_method_has_a_label_and_looks_of_its_own():
    for table in (LABELS, COLORS, MARKERS):
        assert set(METHODS) < set(table)
        assert len(set(table.values())) == len(table)


def test_labels_are_the_papers():
    published = paper_table("data/paper", "table2_internvl25_1b_full_finetuning").index
    ours = [LABELS[m] for m in METHODS if m not in ("swudi", "aswudi")]
    assert set(ours) <= set(published)


def test_the_same_numbers_give_the_same_files(tmp_path):
    use_style()
    for folder in ("a", "b"):
        figure, axis = plt.subplots()
        axis.plot([0, 1], [2, 3])
        save_figure(figure, {"x": [0, 1], "y": [2, 3]}, tmp_path / folder, "fig99_line")
        plt.close(figure)
    for suffix in ("png", "svg", "csv"):
        first, again = ((tmp_path / f / f"fig99_line.{suffix}").read_bytes() for f in "ab")
        assert first == again
    assert list(pd.read_csv(tmp_path / "a" / "fig99_line.csv")["y"]) == [2, 3]


def test_table_is_written_for_machines_and_for_readers(tmp_path):
    table = pd.DataFrame({"Avg": [1.23456, None]}, index=pd.Index(["a", "b"], name="method"))
    path = save_table(table, tmp_path, "table99_x")
    assert pd.read_csv(path, index_col=0)["Avg"]["a"] == pytest.approx(1.23456)
    assert (tmp_path / "table99_x.md").read_text() == (
        "| method | Avg |\n| --- | --- |\n| a | 1.23 |\n| b | – |\n"
    )


def test_markdown_keeps_whole_numbers_whole():
    assert "| a | 3 |" in markdown(pd.DataFrame({"n": [3]}, index=["a"]))


def test_markdown_keeps_a_bar_within_its_cell():
    table = pd.DataFrame({"a|b": ["c|d"]}, index=pd.Index(["e|f"], name="g|h"))
    assert markdown(table) == "| g\\|h | a\\|b |\n| --- | --- |\n| e\\|f | c\\|d |\n"


def test_compare_lines_up_by_name():
    table = compare(pd.Series({"a": 1.0, "z": 9.0}), pd.Series({"b": 5.0, "a": 3.0}))
    assert list(table.index) == ["b", "a"]
    assert table.loc["a", "difference"] == 2.0
    assert pd.isna(table.loc["b", "paper"])
