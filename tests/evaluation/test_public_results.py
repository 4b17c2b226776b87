"""Result files of lmms-eval and VLMEvalKit, in the forms both write, become the paper's tables."""

import json
import math
import warnings

import pandas as pd
import pytest

from optmerge_core.__main__ import main
from optmerge_core.evaluation.public_results import beside_paper, read_results, remarks

ONE_ROW = '"Overall"\n"{}"\n'  # as VLMEvalKit writes a dict of scores


def lmms_eval(folder, results, name="20260110_120000_results.json", **more):
    """What lmms-eval saves: scores by task under "metric,filter", and what was run."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, scores in results.items():
        scores.setdefault("alias", task)
    content = {
        "results": results,
        "group_subtasks": {},
        "configs": {task: {"task": task} for task in results},
        "versions": {task: "Yaml" for task in results},
        "n-samples": {task: {"original": 100, "effective": 100} for task in results},
        "config": {"model": "qwen2_vl", "model_args": "pretrained=/models/merged", "limit": None},
        "model_source": "qwen2_vl",
        "model_name": "/models/merged",
        "model_name_sanitized": "__models__merged",
    }
    path = folder / name
    path.write_text(json.dumps(content | more, indent=2))
    return path


def vlmevalkit(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def parts(label, accuracies, **columns):
    """A table with a row for each part, accuracy in per cent."""
    table = pd.DataFrame({label: list(accuracies)})
    for name, value in columns.items():
        table[name] = value
    return table.assign(acc=list(accuracies.values())).to_csv(index=False)


MATH_VISTA = parts(
    "Task&Skill",
    {
        "Overall": 61.3, "scientific reasoning": 12.0, "geometry reasoning": 50.0,
        "algebraic reasoning": 53.0, "geometry problem solving": 56.0, "visual qa": 70.0,
    },
    tot=10, prefetch=3, hit=5, prefetch_rate=30.0,
)  # fmt: skip
MATH_VISION = parts(
    "Subject",
    {
        "Overall": 20.0, "algebra": 90.0, "metric geometry - angle": 21.0,
        "metric geometry - area": 10.0, "metric geometry - length": 30.0, "solid geometry": 23.0,
    },
    tot=19,
)  # fmt: skip
REFCOCO = """Split,Precision@1,Average IoU,Samples
RefCOCO_val,80.5,0.7,10
RefCOCO_testA,82.0,0.7,10
RefCOCO+_val,66.0,0.6,10
RefCOCOg_val,77.25,0.7,10
Average,76.4,0.7,40
"""


@pytest.fixture
def everything(tmp_path):
    """A work folder of VLMEvalKit with all ten benchmarks, as its run.py leaves one."""
    run = tmp_path / "results" / "merged" / "T20260110_G01234567"
    for dataset, value in (
        ("VizWiz", 40.0), ("GQA_TestDev_Balanced", 61.0), ("TextVQA_VAL", 81.0),
        ("OCRVQA_TESTCORE", 59.0),
    ):  # fmt: skip
        vlmevalkit(run, f"merged_{dataset}_acc.csv", ONE_ROW.format(value))
    chart = '"test_human","test_augmented","Overall"\n"70","76","73"\n'
    vlmevalkit(run, "merged_ChartQA_TEST_acc.csv", chart)
    vlmevalkit(run, "merged_MathVista_MINI_gpt-4o-mini_score.csv", MATH_VISTA)
    vlmevalkit(run, "merged_MathVision_MINI_gpt-4o-mini_score.csv", MATH_VISION)
    vlmevalkit(run, "merged_RefCOCO_acc.csv", REFCOCO)
    (run / "merged_VizWiz.xlsx").write_bytes(b"predictions")
    (run / "status.json").write_text("{}")
    link = run.parent / "merged_VizWiz_acc.csv"  # the latest run's files, linked
    link.symlink_to(run / "merged_VizWiz_acc.csv")
    return tmp_path / "results"


def values(results):
    return dict(zip(results["benchmark"], results["value"], strict=True))


def test_lmms_eval_scores_in_per_cent(tmp_path):
    lmms_eval(
        tmp_path / "__models__merged",
        {
            "gqa": {"exact_match,none": 0.6117, "exact_match_stderr,none": 0.0043},
            "chartqa": {
                "relaxed_overall,none": 0.74, "relaxed_human_split,none": 0.7,
                "relaxed_augmented_split,none": 0.78, "relaxed_overall_stderr,none": "N/A",
            },
            "textvqa_val": {"exact_match,none": 0.8, "submission,none": None},
            "refcoco+_bbox_rec_val": {
                "refcoco_IoU,none": 0.7, "refcoco_ACC@0.5,none": 0.659, "refcoco_ACC@0.7,none": 0.5,
            },
            "docvqa_val": {"anls,none": 0.84},
            "ai2d": {"exact_match,flexible-extract": 0.79},
            "mmmu_val": {"mmmu_acc,none": 0.39},
            "vizwiz_vqa_val": {"exact_match": 0.41},
        },
    )  # fmt: skip
    results = read_results(tmp_path)
    assert values(results) == pytest.approx(
        {
            "GQA": 61.17, "ChartQA": 74, "TextVQA": 80, "RefCOCO+": 65.9, "DocVQA": 84, "AI2D": 79,
            "MMMU": 39, "VizWiz": 41,
        }
    )  # fmt: skip
    assert set(results["model"]) == {"merged"} and set(results["differs"]) == {""}
    assert results["file"][0].endswith("_results.json")
    assert results["metric"][0] == "exact_match,none"


def test_lmms_eval_without_a_models_name_takes_the_folders(tmp_path):
    scores = {"gqa": {"exact_match,none": 0.5}}
    path = lmms_eval(tmp_path / "mine", scores, name="results.json", model_name=None)
    assert list(read_results(path)["model"]) == ["mine"]


def test_what_measures_something_else_is_set_apart(tmp_path):
    lmms_eval(
        tmp_path,
        {
            "mathvista_testmini_format": {"gpt_eval_score,none": 48.2},
            "mathvision_testmini": {"mathvision_standard_eval,none": 19.4},
            "gqa": {"exact_match,none": 0.5},
        },
        **{"n-samples": {"gqa": {"original": 12578, "effective": 8}}},
    )
    results = read_results(tmp_path)
    assert values(results) == {"MathVista": 48.2, "MATH-Vision": 19.4, "GQA": 50}
    assert list(results["differs"].str[:18]) == ["over all questions"] * 2 + ["of 8 of 12578 ques"]
    with pytest.raises(ValueError, match="no comparable result among Table 2's"):
        beside_paper(results)
    assert remarks(results)[2].startswith("merged: GQA 50.00 of 8 of 12578 questions (")


def test_vlmevalkit_files(everything):
    results = read_results(everything)
    assert values(results) == pytest.approx(
        {
            "VizWiz": 40, "GQA": 61, "TextVQA": 81, "OCRVQA": 59, "ChartQA": 73,
            "MathVista": (50 + 53 + 56) / 3, "MATH-Vision": (21 + 10 + 30 + 23) / 4,
            "RefCOCO": 80.5, "RefCOCO+": 66, "RefCOCOg": 77.25,
        }
    )  # fmt: skip
    assert set(results["model"]) == {"merged"} and len(results) == 10


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        ({}, ""),
        ({"n-samples": {"gqa": {"original": 12578, "effective": -1}}}, ""),
        ({"n-samples": [], "config": {"limit": -1}}, ""),
        ({"n-samples": None, "config": {"limit": 8.0}}, "of a part of the questions (limit 8)"),
    ],
)
def test_limits(tmp_path, more, differs):
    lmms_eval(tmp_path, {"gqa": {"exact_match,none": 0.5}}, **more)
    assert list(read_results(tmp_path)["differs"]) == [differs]


@pytest.mark.parametrize("form", ["csv", "dict", "records", "columns"])
def test_multiple_choice_scores_are_shares(tmp_path, form):
    table = pd.DataFrame({"split": ["dev", "validation"], "Overall": [0.3, 0.4], "Art": [0.1, 0.2]})
    text = {
        "csv": table.to_csv(index=False),
        "dict": table.to_json(),
        "records": table.to_json(orient="records"),
        "columns": json.dumps(table.to_dict("list")),
    }[form]
    vlmevalkit(tmp_path, f"m_MMMU_DEV_VAL_acc.{'csv' if form == 'csv' else 'json'}", text)
    vlmevalkit(tmp_path, "m_AI2D_TEST_acc.csv", '"split","Overall"\n"none","0.79"\n')
    vlmevalkit(tmp_path, "m_VizWiz_acc.json", '{"Overall": 41.5}')
    found = values(read_results(tmp_path))
    assert found == pytest.approx({"MMMU": 40, "AI2D": 79, "VizWiz": 41.5})


def test_beside_the_papers_row(everything):
    table = beside_paper(read_results(everything), "3")
    assert list(table.index) == ["OptMerge (paper)", "merged", "merged, difference"]
    assert table.loc["OptMerge (paper)", "Avg"] == 63.30
    expected = (40 + 61 + 53 + 21 + 73 + 81 + 59 + 80.5 + 66 + 77.25) / 10
    assert table.loc["merged", "Avg"] == pytest.approx(expected)
    assert table.loc["merged, difference", "VizWiz"] == pytest.approx(40 - 41.61)
    assert list(table.columns[:2]) == ["VizWiz", "GQA"]
    assert remarks(read_results(everything), "3") == []
    with pytest.raises(ValueError, match="Table 3 has no row 'optmerge'; it has .*Weight Average"):
        beside_paper(read_results(everything), "3", "optmerge")


def test_partial_results_have_no_average_and_name_what_is_missing(everything, tmp_path):
    files = [p for p in everything.rglob("*_acc.csv") if "OCRVQA" not in p.name]
    other = lmms_eval(tmp_path / "o", {"gqa": {"exact_match,none": 0.6}}, model_name="other")
    results = read_results([*files, other])
    table = beside_paper(results, "2", "TIES Merging")
    assert math.isnan(table.loc["merged", "Avg"]) and math.isnan(table.loc["other", "TextVQA"])
    assert table.loc["other, difference", "GQA"] == pytest.approx(60 - 56.48)
    lines = remarks(results)
    assert lines[0] == "merged: missing MathVista, MATH-Vision, OCRVQA, so no average"
    assert lines[1].startswith("other: missing VizWiz, MathVista")
    assert "Avg" not in beside_paper(mmmu(tmp_path / "mmmu"), "10")


def mmmu(folder):
    return read_results(lmms_eval(folder, {"mmmu_val": {"mmmu_acc,none": 0.39}}))


def test_the_same_value_twice_is_one_and_two_values_are_an_error(tmp_path):
    first = lmms_eval(tmp_path / "a", {"gqa": {"exact_match,none": 0.6}})
    lmms_eval(tmp_path / "b", {"gqa": {"exact_match,none": 0.6}})
    assert len(read_results(tmp_path)) == 1
    second = lmms_eval(tmp_path / "c", {"gqa": {"exact_match,none": 0.61}})
    with pytest.raises(ValueError) as caught:
        read_results(tmp_path)
    text = str(caught.value)
    assert "GQA of merged twice: 60.00 in" in text and str(first) in text and str(second) in text


@pytest.mark.parametrize(("theirs", "apart"), [(60.9, False), (58.0, True)])
def test_two_toolkits_are_compared_and_told_apart(tmp_path, theirs, apart):
    """Two standard errors of 61 against 58 to 61 % of 2500 questions are 2.8 points."""
    counts = {"gqa": {"original": 2500, "effective": 2500}}
    lmms_eval(tmp_path / "a", {"gqa": {"exact_match,none": 0.61}}, **{"n-samples": counts})
    vlmevalkit(tmp_path / "b", "merged_GQA_TestDev_Balanced_acc.csv", ONE_ROW.format(theirs))
    vlmevalkit(tmp_path / "b", "merged_OCRVQA_TESTCORE_acc.csv", ONE_ROW.format(50))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = read_results(tmp_path)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == apart
    told = "GQA of merged 61.00 by lmms-eval, 58.00 by VLMEvalKit; they ask in different ways"
    assert all(told in text for text in texts)
    table = beside_paper(results, "2")
    rows = ["merged, lmms-eval", "merged, VLMEvalKit"]
    assert list(table.loc[rows, "GQA"]) == [61, theirs]
    assert list(table.loc[rows, "OCRVQA"]) == [50, 50]  # which one alone has asked


def test_other_benchmarks_in_a_folder_are_a_notice(everything):
    vlmevalkit(everything / "merged", "merged_MMBench_DEV_EN_acc.csv", ONE_ROW.format(0.8))
    vlmevalkit(everything / "merged", "merged_RefCOCO-M_acc.csv", ONE_ROW.format(0.8))
    lmms_eval(everything, {"mme": {"mme_perception_score,none": 1500.0}, "mme_group": {" ": " "}})
    with pytest.warns(UserWarning, match="not among the paper's benchmarks") as caught:
        assert len(read_results(everything)) == 10
    text = str(caught[0].message)
    assert "MMBench_DEV_EN_acc" in text and "RefCOCO-M" in text and "mme (" in text
    assert "mme_group" not in text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m_VizWiz_acc.csv", "", "not readable"),
        ("results.json", "{", "not readable"),
        ("results.json", '{"results": {"gqa": 0.5}}', "gqa has no scores by metric"),
        ("results.json", '{"results": {"gqa": {"acc,none": 0.5}}}', "no single exact_match"),
        ("results.json", '{"results": {"gqa": {"exact_match,none": 61.2}}}', "from 0 to 1"),
        ("results.json", '{"results": {"mme": {"score,none": 1}}}', "none of the paper's.*mme"),
        ("other.json", "[1]", "none of the paper's benchmarks"),
        ("m_VizWiz_acc.csv", '"Overall"\n"140"\n', "from 0 to 100"),
        ("m_VizWiz_acc.csv", '"Score"\n"40"\n', "no column 'Overall', but Score"),
        ("m_VizWiz_acc.csv", '"Overall"\n"40"\n"50"\n', "2 rows where one is expected"),
        ("m_VizWiz_acc.json", "3", "not a table of scores"),
        ("m_MMMU_DEV_VAL_acc.csv", "split,Overall\ndev,0.3\n", "no row 'validation'"),
        ("m_MMMU_DEV_VAL_acc.csv", "split,Overall\nvalidation,39\n", "from 0 to 1"),
        ("m_MathVista_MINI_score.csv", "Task&Skill,acc\nOverall,60\n", "no row 'geometry reas"),
    ],
)
def test_errors_name_the_file(tmp_path, name, text, message):
    path = vlmevalkit(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "empty"),
        (math.nan, "empty"),
        ("N/A", "'N/A'"),
        ("", "''"),
        (True, "True"),
        ([], "[]"),
    ],
)
def test_a_metric_without_a_number_is_missing_and_the_rest_is_there(tmp_path, value, found):
    path = lmms_eval(
        tmp_path,
        {
            "vizwiz_vqa_val": {"exact_match,none": value},
            "gqa": {"exact_match,none": 0.5, "exact_match,strict": value},
        },
    )
    results = read_results(path)
    assert values(results) == pytest.approx({"VizWiz": math.nan, "GQA": 50}, nan_ok=True)
    table = beside_paper(results)
    assert math.isnan(table.loc["merged", "VizWiz"]) and table.loc["merged", "GQA"] == 50
    first, second = remarks(results)
    assert first == f"merged: VizWiz is missing: exact_match,none is {found} ({path})"
    assert second.startswith("merged: missing VizWiz, MathVista") and "GQA" not in second


@pytest.mark.parametrize("cell", ["", "N/A", "failed"])
def test_a_part_without_a_number_leaves_its_benchmark_missing(everything, tmp_path, cell):
    run = tmp_path / "results" / "merged" / "T20260110_G01234567"
    vlmevalkit(run, "merged_VizWiz_acc.csv", f'"split","Overall"\n"none","{cell}"\n')
    text = MATH_VISION.replace(
        "metric geometry - area,19,10.0", f"metric geometry - area,19,{cell}"
    )
    vlmevalkit(run, "merged_MathVision_MINI_gpt-4o-mini_score.csv", text)
    results = read_results(everything)
    missing = results[results["value"].isna()]
    assert set(missing["benchmark"]) == {"VizWiz", "MATH-Vision"} and len(results) == 10
    assert all(missing["differs"].str.match("is missing: (Overall|acc) is (empty|'failed')$"))
    assert beside_paper(results, "3").loc["merged", "GQA"] == 61
    assert remarks(results, "3")[-1] == "merged: missing VizWiz, MATH-Vision, so no average"


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "samples.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="no results of the paper's benchmarks; lmms-eval writes"):
        read_results(tmp_path)


def test_command(everything, tmp_path, capsys):
    (everything / "merged" / "T20260110_G01234567" / "merged_OCRVQA_TESTCORE_acc.csv").unlink()
    out = tmp_path / "out"
    command = ["benchmarks", "--results", str(everything), "--table", "3", "--output", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Table 3: Qwen2-VL-7B, LoRA" in shown and "| merged, difference |" in shown
    assert "merged: missing OCRVQA, so no average" in shown
    saved = pd.read_csv(out / "tablexx_public_benchmarks_3.csv", index_col="method")
    assert saved.loc["merged", "RefCOCO"] == 80.5
    assert main([*command[:3], "--row", "magic"]) == 1
    assert capsys.readouterr().err.startswith("error: Table 2 has no row 'magic'")
