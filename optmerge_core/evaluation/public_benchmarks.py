"""The paper's public benchmarks in two toolkits' names, and how to run them on a merged model.

They need a GPU and lmms-eval or VLMEvalKit, each in an environment of its own; nothing of theirs is
imported here. `hand_off` writes their command lines, `public_results` reads what they leave.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from optmerge_core.checkpoints.formats import read_json
from optmerge_core.evaluation import toolkits
from optmerge_core.figures import markdown, paper_table
from optmerge_core.merging.templates import chat_template, fault, takes_pictures
from optmerge_core.places import checkout

TABLES = {
    "2": ("table2_internvl25_1b_full_finetuning", "InternVL2.5-1B, full fine-tuning"),
    "3": ("table3_qwen2vl_7b_lora", "Qwen2-VL-7B, LoRA"),
    "6": ("table6_huggingface_checkpoints", "Qwen2-VL-7B, experts by different makers"),
    "9": ("table9_qwen25vl_32b", "Qwen2.5-VL-32B"),
    "10": ("table10_general_tasks", "tasks that need several abilities"),
}
"""The paper's tables of public benchmarks: file in data/paper, what was merged."""


class Benchmark(NamedTuple):
    """One column of the paper's tables, in the names of both toolkits; None where one lacks it."""

    task: str | None
    metric: str
    dataset: str | None
    dataset_class: str
    rows: tuple[str, ...] = ()
    """the rows of VLMEvalKit's result file whose mean the paper's number is; none: the only row"""
    note: str = ""


NOTES = {
    "parts": "the paper's number is the mean of geometry parts, three of MathVista's tasks and "
    "skills, four of MATH-Vision's subjects. Only VLMEvalKit reports them, and its judge of "
    "answers is gpt-4o-mini, which needs an API key",
    "punctuation": "the authors' copy of VLMEvalKit compares these answers without punctuation",
    "boxes": "the authors ran Qwen2-VL in lmms-eval, with the prompt and box format of their own "
    "copy, and InternVL2.5 by InternVL's own script; look at some answers before comparing",
    "split": "which split the paper used is not verified",
}

BENCHMARKS = {
    "VizWiz": Benchmark("vizwiz_vqa_val", "exact_match", "VizWiz", "VizWiz"),
    "GQA": Benchmark(
        "gqa", "exact_match", "GQA_TestDev_Balanced", "ImageVQADataset", note="punctuation"
    ),
    "MathVista": Benchmark(
        "mathvista_testmini_format", "llm_as_judge_eval", "MathVista_MINI", "MathVista",
        ("geometry reasoning", "algebraic reasoning", "geometry problem solving"),
        "parts",
    ),
    "MATH-Vision": Benchmark(
        "mathvision_testmini", "mathvision_standard_eval", "MathVision_MINI", "MathVision",
        ("metric geometry - angle", "metric geometry - area", "metric geometry - length",
         "solid geometry"),
        "parts",
    ),
    "ChartQA": Benchmark("chartqa", "relaxed_overall", "ChartQA_TEST", "ImageVQADataset"),
    "TextVQA": Benchmark("textvqa_val", "exact_match", "TextVQA_VAL", "ImageVQADataset"),
    "OCRVQA": Benchmark(
        None, "exact_match", "OCRVQA_TESTCORE", "ImageVQADataset", note="punctuation"
    ),
    "RefCOCO": Benchmark(
        "refcoco_bbox_rec_val", "refcoco_ACC@0.5", "RefCOCO", "RefCOCODataset",
        ("RefCOCO_val",), "boxes",
    ),
    "RefCOCO+": Benchmark(
        "refcoco+_bbox_rec_val", "refcoco_ACC@0.5", "RefCOCO", "RefCOCODataset",
        ("RefCOCO+_val",), "boxes",
    ),
    "RefCOCOg": Benchmark(
        "refcocog_bbox_rec_val", "refcoco_ACC@0.5", "RefCOCO", "RefCOCODataset",
        ("RefCOCOg_val",), "boxes",
    ),
    "MMMU": Benchmark(
        "mmmu_val", "mmmu_acc", "MMMU_DEV_VAL", "MMMUDataset", ("validation",), "split"
    ),
    "DocVQA": Benchmark("docvqa_val", "anls", "DocVQA_VAL", "ImageVQADataset", note="split"),
    "ScienceQA": Benchmark(
        "scienceqa_img", "exact_match", "ScienceQA_TEST", "ImageMCQDataset", note="split"
    ),
    "AI2D": Benchmark("ai2d", "exact_match", "AI2D_TEST", "ImageMCQDataset", note="split"),
    "InfographicVQA": Benchmark(
        "infovqa_val", "anls", "InfoVQA_VAL", "ImageVQADataset", note="split"
    ),
}  # fmt: skip
"""Column of the paper's tables -> where the toolkits have it, as their sources name it (lmms-eval
0.7.3 as packaged has all of these tasks).

Table 5's MUSIC-AVQA and AVQA are in neither; the authors run ModelCompose's own scripts.
"""

_QWEN = {"min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28}  # as the authors set them
WRAPPERS: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any]]] = {
    "internvl_chat": ("internvl2", {}, "InternVLChat", {"version": "V2.0"}),
    "internvl": ("internvl_hf", {}, None, {}),
    "qwen2_vl": ("qwen2_vl", {"max_pixels": 2359296}, "Qwen2VLChat", _QWEN),
    "qwen2_5_vl": ("qwen2_5_vl", {}, "Qwen2VLChat", _QWEN),
    "qwen3_vl": ("qwen3_vl", {}, None, {}),
    "llava": ("llava_hf", {}, None, {}),
    "llava_next": ("llava_hf", {}, "LLaVA_Next", {}),
    "llava_onevision": ("llava_hf", {}, "LLaVA_OneVision_HF", {}),
    "qwen2_5_omni": ("qwen2_5_omni", {}, "Qwen2VLChat", _QWEN),
    "qwen3_omni_moe": ("qwen3_omni", {}, None, {}),
}
"""model_type -> lmms-eval's model and its arguments, VLMEvalKit's class (None: not verified)."""

OMNI = "optmerge_omni"
"""the model type of a composed model, as `omni.model` has it"""

_TEXT = """# {name} on the benchmarks of the paper's Table {table}

Each toolkit runs in its own environment, in this folder.

{tasks}
{notes}
## How they ask

The toolkits ask the same model in different ways, and scores of one do not belong beside the
other's. The paper's numbers were taken in float16 with eager attention.

{settings}
What each adds to a question:

{prompts}
## lmms-eval

{lmms_eval}
## VLMEvalKit

{vlmevalkit}
## Afterwards

```bash
python -m optmerge_core benchmarks --results results --table {table}
```
"""


def hand_off(model: str | Path, table: str = "2") -> dict[str, str]:
    """File name -> text: benchmarks.md (tasks and command lines), and a script for each toolkit.

    `model` is a merged model's folder, `table` a key of TABLES. Raises `ValueError` for a folder
    without config.json, for a model type neither toolkit is known to load, and for a path that a
    command line cannot hold.
    """
    folder, model_type = _merged_model(model)
    lmms_model, lmms_arguments, model_class, settings = WRAPPERS[model_type]
    chosen = {name: BENCHMARKS[name] for name in columns(table)}
    arguments = {"pretrained": folder} | lmms_arguments
    lmms_eval = _command(
        ["accelerate", "launch", "--num_processes=1", "-m", "lmms_eval"],
        ["--model", lmms_model],
        ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())],
        ["--tasks", ",".join(benchmark.task for benchmark in chosen.values() if benchmark.task)],
        ["--batch_size", "1", "--log_samples", "--output_path", "results/lmms_eval"],
    )
    files = {"lmms_eval.sh": _script("lmms-eval's", lmms_eval)}
    vlmevalkit = f"No class of VLMEvalKit is known to load model type {model_type}.\n"
    if model_class:
        _check_name(folder, model_type)
        config = {
            "model": {folder.name: {"class": model_class, "model_path": str(folder)} | settings},
            "data": {
                benchmark.dataset: {"class": benchmark.dataset_class, "dataset": benchmark.dataset}
                for benchmark in chosen.values()
                if benchmark.dataset
            },
        }
        command = 'python "$VLMEVALKIT/run.py"' + _command(
            [], ["--config", "vlmevalkit.json"], ["--work-dir", "results/vlmevalkit", "--verbose"]
        )
        files["vlmevalkit.json"] = json.dumps(config, indent=2) + "\n"
        files["vlmevalkit.sh"] = _script(
            "VLMEvalKit's", command, ': "${VLMEVALKIT:?is the folder of its repository}"'
        )
        vlmevalkit = (
            f"`VLMEVALKIT` is the folder of its repository.\n\n{_block('bash', command)}\n"
            f"`vlmevalkit.json`:\n\n{_block('json', files['vlmevalkit.json'])}"
        )
    text = _TEXT.format(
        name=folder.name,
        table=table,
        tasks=markdown(tasks(table)),
        notes="".join(f"- {key}: {NOTES[key]}.\n" for key in _notes(chosen)),
        settings=markdown(
            toolkits.settings(model_type, {"lmms-eval": lmms_arguments, "VLMEvalKit": settings})
        ),
        prompts=markdown(toolkits.prompts(list(chosen), model_class)),
        lmms_eval=_block("bash", lmms_eval),
        vlmevalkit=vlmevalkit,
    )
    return {"benchmarks.md": text} | files


def _merged_model(model: str | Path) -> tuple[Path, str]:
    """A merged model's folder and model type, after the checks of `hand_off`."""
    folder = Path(model).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model}: no config.json; give the folder of a merged model")
    if re.search("[,=]", str(folder)):
        raise ValueError(
            f"{folder}: lmms-eval splits its arguments at commas and equals signs; rename it"
        )
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type == OMNI:
        raise ValueError(
            f"{model}: an Omni model, whose class is this package's: neither toolkit loads it, nor "
            "has MUSIC-AVQA and AVQA of the paper's Table 5, for which the authors ran "
            "ModelCompose's scripts; ask it by generate(modality_inputs=…), as in README.md"
        )
    if model_type not in WRAPPERS:
        raise ValueError(
            f"{model}: no toolkit is known to load model type {model_type!r}, only "
            f"{', '.join(WRAPPERS)}; look for a model class in their documentation"
        )
    template, config = chat_template(folder), read_json(folder / "config.json")
    pictures = takes_pictures(config, folder)
    if template is not None and (problem := fault(folder, template, pictures)):
        warnings.warn(f"{model}: {problem}; merge again with an expert's processor", stacklevel=3)
    return folder, model_type


def tasks(table: str = "2") -> pd.DataFrame:
    """A table's benchmarks in the toolkits' names. Columns: lmms-eval, metric, VLMEvalKit, note."""
    rows = {
        name: {
            "lmms-eval": benchmark.task,
            "metric": benchmark.metric if benchmark.task else None,
            "VLMEvalKit": benchmark.dataset,
            "note": benchmark.note,
        }
        for name, benchmark in ((name, BENCHMARKS[name]) for name in columns(table))
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("benchmark")


def published(table: str) -> pd.DataFrame:
    """One of the paper's tables. Raises `ValueError` for a key not in TABLES."""
    if table not in TABLES:
        raise ValueError(f"table {table!r}: the paper's tables here are {', '.join(TABLES)}")
    return paper_table(checkout() / "data" / "paper", TABLES[table][0])


def columns(table: str) -> list[str]:
    """The benchmarks of one of the paper's tables."""
    return [name for name in published(table) if name != "Avg"]


def _notes(chosen: dict[str, Benchmark]) -> list[str]:
    return list(dict.fromkeys(benchmark.note for benchmark in chosen.values() if benchmark.note))


def _command(*parts: list[str]) -> str:
    return " \\\n    ".join(shlex.join(part) for part in parts)


def _script(whose: str, command: str, *before: str) -> str:
    lines = ["#!/bin/sh", f"# In {whose} environment.", "set -eu", 'cd "$(dirname "$0")"', *before]
    return "\n".join([*lines, command, ""])


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def _check_name(folder: Path, model_type: str) -> None:
    """VLMEvalKit's Qwen2VLChat reads in the path which of its model classes to take."""
    marks = [mark for mark in ("omni", "2.5", "2_5", "qwen25") if mark in str(folder).lower()]
    if model_type == "qwen2_vl" and marks:
        wrong = f"{marks[0]!r} in it means another model: rename it or make a link without that"
    elif model_type == "qwen2_5_vl" and (not marks or marks[0] == "omni"):
        wrong = (
            "for Qwen2.5-VL it has to contain 'qwen2_5' and not 'omni': rename it or make a link"
        )
    elif model_type == "qwen2_5_omni" and "omni" not in marks:
        wrong = "for Qwen2.5-Omni it has to contain 'omni': rename it or make a link"
    else:
        return
    warnings.warn(
        f"{folder}: VLMEvalKit takes the model's class from this path, and {wrong}", stacklevel=3
    )
