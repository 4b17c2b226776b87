"""Figures and tables are saved with their numbers, byte for byte the same."""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from optmerge_core import METHODS, TABLE_METHODS  # noqa: E402
from optmerge_core.figures import (
    COLORS,
    LABELS,
    MARKERS,
    as_stored,
    compare,
    markdown,
    paper_table,
    save_answers,
    save_figure,
    save_table,
    use_style,
)

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
COMMITTED = sorted((ROOT / "figures").glob("*/*.csv"))


def test_every_method_has_a_label_and_looks_of_its_own():
    for table in (LABELS, COLORS, MARKERS):
        assert set(METHODS) < set(table)
        assert len(set(table.values())) == len(table)


def test_the_committed_tables_have_the_methods_that_are_compared():
    """What `METHODS` alone has changes no table; one more in TABLE_METHODS needs reruns."""
    assert set(TABLE_METHODS) <= set(METHODS)
    named = {LABELS[m] for m in METHODS}
    for table, folder in (("table02_full_finetuning", "internvl"), ("table03_lora", "qwen2_vl")):
        rows = pd.read_csv(ROOT / "figures" / folder / f"{table}.csv", index_col=0).index
        assert [row for row in rows if row in named] == [LABELS[m] for m in TABLE_METHODS]


def test_the_later_releases_numbers_have_the_papers_methods_and_models():
    """Notebook 03 prints OptMerge's; that for InternVL is another row of Table 2."""
    later = paper_table("data/paper", "later_release")
    assert set(later.index) <= {LABELS[m] for m in TABLE_METHODS}
    table2 = paper_table("data/paper", "table2_internvl25_1b_full_finetuning")["Avg"]
    assert (
        later.loc["OptMerge", "InternVL2.5-1B"] == table2["Task Arithmetic"] != table2["OptMerge"]
    )
    table3 = paper_table("data/paper", "table3_qwen2vl_7b_lora")["Avg"]
    assert later.loc["OptMerge", "Qwen2-VL-7B"] < table3["OptMerge"]


def test_labels_are_the_papers():
    published = paper_table("data/paper", "table2_internvl25_1b_full_finetuning").index
    ours = [LABELS[m] for m in TABLE_METHODS if m not in ("swudi", "aswudi")]
    assert set(ours) <= set(published)


@pytest.mark.parametrize(
    ("number", "kept"),
    [
        (0.123456, 0.1235),
        (-0.00123456, -0.001235),
        (57.66, 57.66),
        (45.0195, 45.02),
        (161.4049, 161.4),
        (3127.7, 3128.0),
        (9.99996, 10.0),
        (147456.0, 147456.0),
        (147456, 147456),
        (True, True),
        ("0.123456", "0.123456"),
        (None, None),
        (float("inf"), float("inf")),
    ],
)
def test_digits_of_a_number(number, kept, tmp_path):
    found = as_stored({"x": pd.Series([number], dtype=object)}, tmp_path, "table99_x")["x"][0]
    assert found == kept and isinstance(found, type(kept))


def test_what_is_noise_beside_the_largest_of_its_column_is_zero(tmp_path):
    table = {"x": [2.0, -3.14159e-5, 1.9e-5, -7.1e-15, np.nan], "y": [1e-9, 2e-9, 0.0, 1e-5, 1e-4]}
    kept = as_stored(table, tmp_path, "table99_x")
    assert kept["x"].tolist()[:4] == [2.0, -3.142e-5, 0.0, 0.0] and np.isnan(kept["x"][4])
    assert kept["y"].tolist() == [1e-9, 2e-9, 0.0, 1e-5, 1e-4]


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (0.1235, 0.12344, 0.1235),  # 0.1234: one unit away
        (0.1235, 0.12364, 0.1235),
        (0.1235, 0.12334, 0.1233),  # two units
        (-0.1235, -0.12344, -0.1235),
        (-0.1235, 0.1235, 0.1235),
        (57.66, 57.68, 57.68),  # one answer of five thousand
        (1.0, 0.99996, 1.0),
        (0.9999, 1.0000001, 0.9999),
        (0.9999, 1.0, 0.9999),
        (0.123512, 0.12344, 0.1235),  # written with more digits than reproduce
        (147456.0, 147457.0, 147457.0),  # counted
        (np.nan, 0.5, 0.5),
        (0.5, np.nan, np.nan),
        (4.667e-06, 4.2e-06, 0.0),  # noise beside 0.7
        (0.0, 6.9e-06, 0.0),
        (0.0, 3e-05, 3e-05),
    ],
)
def test_a_stored_number_stays_while_a_rerun_is_a_unit_away(before, now, kept, tmp_path):
    rows = pd.Index(["a", "b"], name="row")
    pd.DataFrame({"x": [before, 0.7]}, index=rows).to_csv(tmp_path / "table99_x.csv")
    save_table(pd.DataFrame({"x": [now, 0.7]}, index=rows), tmp_path, "table99_x")
    found = pd.read_csv(tmp_path / "table99_x.csv")["x"][0]
    assert found == kept or np.isnan([found, kept]).all()


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [(44.68, 44.7402, 44.68), (94.0, 93.0, 94.0), (44.68, 47.0, 47.0), (-0.2, 0.8, -0.2)],
)
def test_a_score_stays_while_one_answer_turned(before, now, kept, tmp_path):
    pd.DataFrame({"Avg": [before], "λ": [1.0]}).to_csv(tmp_path / "fig99_x.csv", index=False)
    scores = pd.DataFrame({"Avg": [now], "λ": [0.7]})
    found = as_stored(scores, tmp_path, "fig99_x", {"Avg": 1.0, "VQA": 1.0})
    assert found.loc[0].to_dict() == {"Avg": kept, "λ": 0.7}
    save_figure(plt.figure(), found, tmp_path, "fig99_x")
    plt.close()
    assert pd.read_csv(tmp_path / "fig99_x.csv").loc[0].to_dict() == {"Avg": kept, "λ": 0.7}


def test_answers_stay_while_one_of_a_task_turned(tmp_path):
    rows = {"task": ["a", "a", "b", "b"], "model": "m", "prediction": list("wxyz")}
    first = pd.DataFrame(rows | {"correct": [True, False, True, True]})
    path = save_answers(first, tmp_path / "new", "answers")
    before = path.read_bytes()
    for turned, stays in (("wxyz", True), ("vxyy", True), ("vvyz", False)):
        path.write_bytes(before)
        save_answers(first.assign(prediction=list(turned)), tmp_path / "new", "answers")
        assert (path.read_bytes() == before) == stays, turned
    path.write_bytes(before)
    save_answers(first[1:], tmp_path / "new", "answers")
    pd.testing.assert_frame_equal(pd.read_parquet(path), first[1:])


def test_a_table_of_another_shape_is_no_table_of_before(tmp_path):
    for numbers in ([0.1235, 1.0], [0.12344, 1.0, 2.0]):
        save_figure(plt.figure(), {"x": numbers}, tmp_path, "fig99_x")
        plt.close()
    assert pd.read_csv(tmp_path / "fig99_x.csv")["x"].tolist() == [0.1234, 1.0, 2.0]
    (tmp_path / "fig99_x.csv").write_text("")
    assert as_stored({"x": [0.12344]}, tmp_path, "fig99_x")["x"].tolist() == [0.1234]


cells = st.floats(-1e6, 1e6) | st.integers(-99, 99) | st.sampled_from([np.nan, "a"])


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    numbers=st.lists(cells, min_size=1, max_size=20),
    other=st.lists(st.floats(-1, 1), max_size=20),
)
def test_storing_what_is_stored_changes_nothing(numbers, other, tmp_path):
    path = tmp_path / "fig99_x.csv"
    path.unlink(missing_ok=True)
    once = as_stored({"x": numbers}, tmp_path, "fig99_x")
    pd.testing.assert_frame_equal(as_stored(once, tmp_path, "fig99_x"), once)
    pd.DataFrame({"x": other}).to_csv(path, index=False)
    kept = as_stored({"x": numbers}, tmp_path, "fig99_x")
    kept.to_csv(path, index=False)
    pd.testing.assert_frame_equal(as_stored(kept, tmp_path, "fig99_x"), kept)


def line(numbers, folder):
    """A figure as the notebooks make it: stored, drawn, saved."""
    table = as_stored({"x": range(len(numbers)), "y": numbers}, folder, "fig99_line")
    figure, axis = plt.subplots()
    axis.plot(table["x"], table["y"], label="y", clip_on=True)
    axis.legend()
    save_figure(figure, table, folder, "fig99_line")
    plt.close(figure)
    return {path.suffix: path.read_bytes() for path in folder.glob("fig99_line.*")}


def test_the_same_numbers_give_the_same_files(tmp_path):
    use_style()
    numbers = np.random.default_rng(0).lognormal(size=5000)
    first, again = line(numbers, tmp_path / "a"), line(numbers, tmp_path / "b")
    assert first == again and set(first) == {".png", ".svg", ".csv"}
    for suffix in (".png", ".svg"):
        assert matplotlib.__version__.encode() not in first[suffix]
        assert b"<dc:date>" not in first[suffix]


def test_another_machine_gives_the_same_files(tmp_path):
    """Its sums differ in the sixth digit, and some of five thousand numbers lie on an edge."""
    numbers = np.random.default_rng(0).lognormal(size=5000)
    elsewhere = numbers * (1 + 1e-5 * np.random.default_rng(1).uniform(-1, 1, size=5000))
    before = line(numbers, tmp_path / "a")
    assert line(elsewhere, tmp_path / "b") != before
    assert line(elsewhere, tmp_path / "a") == before
    numbers[7] *= 1.01
    after = line(numbers, tmp_path / "a")
    assert all(after[suffix] != before[suffix] for suffix in before)
    assert pd.read_csv(tmp_path / "a" / "fig99_line.csv")["y"][7] == float(f"{numbers[7]:.4g}")


def committed(path):
    return pytest.param(path, id=f"{path.parent.name}/{path.stem}")


@pytest.mark.parametrize("path", [committed(path) for path in COMMITTED])
def test_committed_numbers_have_the_digits_that_reproduce(path, tmp_path):
    table = pd.read_csv(path)
    pd.testing.assert_frame_equal(as_stored(table, tmp_path, path.stem), table)
    assert path.with_suffix(".svg").exists() == path.with_suffix(".png").exists()
    assert path.with_suffix(".md").exists() != path.with_suffix(".png").exists()


NOT_MEASURED_IN_A_RUN = {
    "table07_cost",  # from tests/benchmarks/cost.csv
    "figxx_cost",  # from tests/benchmarks/scaling.csv
    "tablexx_expected_cost",  # computed from it
    "table01_training_data",  # from the logs that are shipped
    "table05_modalities",  # storage, counted
}


def test_measured_seconds_and_bytes_are_kept_out_of_what_a_rerun_writes():
    found = {
        path.stem
        for path in COMMITTED
        for name in pd.read_csv(path, nrows=0)
        if re.search(r"\((s|[MG]B)\)|\b(seconds|ms|hours|memory)\b", name)
    }
    assert found == NOT_MEASURED_IN_A_RUN


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl"])
def test_the_table_of_costs_is_what_the_benchmark_measured(name):
    measured = pd.read_csv(ROOT / "tests/benchmarks/cost.csv", index_col="recipe").loc[name]
    mixture = measured.pop("mixture training's peak memory (GB)")
    cost = measured.drop("device").to_dict()
    table = pd.read_csv(ROOT / f"figures/{name}/table07_cost.csv", index_col="setting")
    assert table.loc["OptMerge"].to_dict() == pytest.approx(cost, rel=1e-3)
    assert table.loc["mixture training", "peak memory (GB)"] == pytest.approx(mixture, rel=1e-3)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_draw_from_what_is_stored(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    saved = re.findall(r'save_figure\(.*_dir, ("\w+"|name)\)', code)
    assert len(saved) == code.count("save_figure(") > 0
    kept = re.findall(r'stored\(.*_dir, ("\w+"|name)(?:, one)?\)', code)
    pictures = {'"figxx_samples"', '"fig01_overview"'}  # with texts
    copied = {'"figxx_radar"'}  # rows of figxx_averages
    assert set(saved) - pictures - copied <= set(kept)


def test_table_is_written_for_machines_and_for_readers(tmp_path):
    table = pd.DataFrame({"Avg": [1.23444, None]}, index=pd.Index(["a", "b"], name="method"))
    path = save_table(table, tmp_path, "table99_x")
    assert path.read_text() == "method,Avg\na,1.234\nb,\n"
    assert (tmp_path / "table99_x.md").read_text() == (
        "| method | Avg |\n| --- | --- |\n| a | 1.23 |\n| b | – |\n"
    )


def test_markdown_shows_no_digits_that_are_not_stored(tmp_path):
    numbers = [3127.7, 161.449, 11.8651, 57.66, 1.51779, 0.334, 100.0, 3840.0]
    save_table(pd.DataFrame({"x": numbers}), tmp_path, "table99_x", decimals=3)
    rows = (tmp_path / "table99_x.md").read_text().splitlines()[2:]
    shown = [row.split(" | ")[1].rstrip(" |") for row in rows]
    assert shown == ["3128", "161.4", "11.87", "57.66", "1.518", "0.334", "100.000", "3840"]
    assert markdown(pd.DataFrame({"x": [161.449]}), 3).endswith("| 161.449 |\n")


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
