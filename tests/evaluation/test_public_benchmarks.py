"""The paper's benchmarks in the toolkits' names, and the command lines for a merged model."""

import json
import shlex
import subprocess

import pytest

from optmerge_core.__main__ import main
from optmerge_core.evaluation import toolkits
from optmerge_core.evaluation.public_benchmarks import (
    BENCHMARKS,
    NOTES,
    OMNI,
    TABLES,
    WRAPPERS,
    columns,
    hand_off,
    published,
    tasks,
)


def model(folder, model_type):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_a_model_that_is_asked_nothing_is_told(tmp_path):
    folder = model(tmp_path / "merged", "qwen2_vl")
    template = "{% for part in messages %}{{ part.text }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.warns(UserWarning, match="merged: the chat template makes empty prompts, which"):
        hand_off(folder, "3")


def arguments(script):
    """Option -> value of the command that ends a script, as the shell reads it."""
    command = script[script.rindex("\n", 0, script.index("    --")) :].replace("\\\n", " ")
    words = [word for word in shlex.split(command) if word != "--log_samples"]
    return dict(
        (word, words[i + 1] if i + 1 < len(words) else None)
        for i, word in enumerate(words)
        if word.startswith("--") and "=" not in word
    )


def test_every_column_of_the_papers_tables_is_known():
    for table in TABLES:
        assert columns(table) and set(columns(table)) <= set(BENCHMARKS)
    assert columns("2") == columns("3") and len(columns("2")) == 10 and len(columns("10")) == 5
    used = {benchmark.note for benchmark in BENCHMARKS.values()} - {""}
    assert used == set(NOTES)
    for benchmark in BENCHMARKS.values():
        assert (benchmark.task or benchmark.dataset) and benchmark.metric


def test_the_papers_math_vision_is_the_mean_of_four_parts():
    """Four subjects of 19 questions each: every number is so many out of 76, as all of 304 were."""
    for table in ("2", "3", "9"):
        of_76 = published(table)["MATH-Vision"] * 0.76
        assert ((of_76 - of_76.round()).abs() < 0.01).all()
    assert len(BENCHMARKS["MATH-Vision"].rows) == 4


def test_task_list():
    table = tasks("2")
    assert table.loc["RefCOCO+", "lmms-eval"] == "refcoco+_bbox_rec_val"
    assert table.loc["OCRVQA", ["lmms-eval", "metric"]].isna().all()
    assert table.loc["OCRVQA", "VLMEvalKit"] == "OCRVQA_TESTCORE"
    with pytest.raises(ValueError, match="table '5'.*2, 3, 6, 9, 10"):
        tasks("5")


def test_command_lines(tmp_path):
    folder = model(tmp_path / "merged model", "qwen2_vl")  # with a blank
    files = hand_off(folder, "3")
    lmms = arguments(files["lmms_eval.sh"])
    assert lmms["--model"] == "qwen2_vl" and lmms["--output_path"] == "results/lmms_eval"
    assert lmms["--model_args"] == f"pretrained={folder},max_pixels=2359296"
    wanted = lmms["--tasks"].split(",")
    assert len(wanted) == 9 and "gqa" in wanted and "refcocog_bbox_rec_val" in wanted

    assert arguments(files["vlmevalkit.sh"])["--config"] == "vlmevalkit.json"
    config = json.loads(files["vlmevalkit.json"])
    assert config["model"] == {
        "merged model": {
            "class": "Qwen2VLChat", "model_path": str(folder),
            "min_pixels": 200704, "max_pixels": 1003520,
        }
    }  # fmt: skip
    assert len(config["data"]) == 8  # one dataset for the three RefCOCO
    assert config["data"]["MathVision_MINI"] == {
        "class": "MathVision",
        "dataset": "MathVision_MINI",
    }
    text = files["benchmarks.md"]
    assert all(note in text for key, note in NOTES.items() if key != "split")
    assert NOTES["split"] not in text and NOTES["split"] in hand_off(folder, "10")["benchmarks.md"]
    assert files["vlmevalkit.json"] in text and "--model qwen2_vl" in text


def test_how_the_toolkits_ask_stands_beside_each_other(tmp_path):
    text = hand_off(model(tmp_path / "merged", "qwen2_vl"), "3")["benchmarks.md"]
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if "|" in row}
    # the authors' limits win over lmms-eval's own maximum of 602112, its minimum stays
    assert "3136 to 2359296 pixels | 200704 to 1003520 pixels" in rows["images"]
    assert "transformers' default | FlashAttention 2" in rows["attention"]
    asks = [line for line in text.split("What each adds")[1].splitlines() if "| GQA |" in line]
    assert "single word or phrase. | Please try to answer the question with short" in asks[0]
    assert "| OCRVQA | no task |" in text
    internvl = hand_off(model(tmp_path / "remote", "internvl_chat"))["benchmarks.md"]
    assert "| VizWiz | When the provided" in internvl and "| not looked up |" in internvl
    alone = hand_off(model(tmp_path / "alone", "internvl"))["benchmarks.md"]
    assert "| setting | lmms-eval |\n" in alone and "| benchmark | lmms-eval |\n" in alone


def test_every_model_and_benchmark_has_its_way_of_asking():
    assert toolkits.SETTINGS.keys() == WRAPPERS.keys()
    for model_type, (_, _, model_class, _) in WRAPPERS.items():
        assert ("VLMEvalKit" in toolkits.SETTINGS[model_type]) == (model_class is not None)
    assert toolkits.LMMS_EVAL.keys() == {n for n, b in BENCHMARKS.items() if b.task}
    asked = {name for asks in toolkits.VLMEVALKIT.values() for name in asks}
    assert asked <= BENCHMARKS.keys()


def test_commands_for_an_omni_model_of_the_hub(tmp_path):
    folder = model(tmp_path / "omni", "qwen2_5_omni")
    files = hand_off(folder)
    lmms = arguments(files["lmms_eval.sh"])
    assert lmms["--model"] == "qwen2_5_omni" and lmms["--model_args"] == f"pretrained={folder}"
    config = json.loads(files["vlmevalkit.json"])["model"]["omni"]
    assert config["class"] == "Qwen2VLChat" and config["max_pixels"] == 1280 * 28 * 28
    text = files["benchmarks.md"]
    assert "| attention | eager | FlashAttention 2 |" in text and "Qwen2.5-Omni-7B's proc" in text
    third = hand_off(model(tmp_path / "three", "qwen3_omni_moe"))
    assert arguments(third["lmms_eval.sh"])["--model"] == "qwen3_omni"
    assert "vlmevalkit.sh" not in third


def test_a_composed_models_type_is_known():
    from optmerge_core.omni import OmniConfig

    assert OmniConfig.model_type == OMNI


def test_a_model_that_one_toolkit_lacks(tmp_path):
    files = hand_off(model(tmp_path / "merged", "internvl"))
    assert set(files) == {"benchmarks.md", "lmms_eval.sh"}
    assert "No class of VLMEvalKit is known to load model type internvl" in files["benchmarks.md"]
    config = json.loads(hand_off(model(tmp_path / "remote", "internvl_chat"))["vlmevalkit.json"])
    assert config["model"]["remote"]["class"] == "InternVLChat"


@pytest.mark.parametrize(
    ("name", "model_type", "text"),
    [
        ("merged_2.5", "qwen2_vl", "'2.5' in it means another model"),
        ("omni", "qwen2_vl", "'omni' in it means another model"),
        ("merged", "qwen2_5_vl", "has to contain 'qwen2_5'"),
        ("qwen2_5", "qwen2_5_omni", "for Qwen2.5-Omni it has to contain 'omni'"),
    ],
)
def test_paths_that_mislead_vlmevalkit_are_a_notice(tmp_path, name, model_type, text):
    with pytest.warns(UserWarning, match=text):
        hand_off(model(tmp_path / name, model_type))
    hand_off(model(tmp_path / "fine-qwen2_5_vl", "qwen2_5_vl"))


@pytest.mark.parametrize(
    ("name", "model_type", "text"),
    [
        ("a,b", "qwen2_vl", "commas and equals signs"),
        ("a=b", "qwen2_vl", "commas and equals signs"),
        ("text", "llama", "no toolkit is known to load model type 'llama'"),
        ("composed", OMNI, "an Omni model, whose class is this package's: neither toolkit loads"),
    ],
)
def test_refusals(tmp_path, name, model_type, text):
    with pytest.raises(ValueError, match=text):
        hand_off(model(tmp_path / name, model_type))
    with pytest.raises(ValueError, match="no config.json"):
        hand_off(tmp_path)


def test_command(tmp_path, capsys):
    folder = model(tmp_path / "merged", "qwen2_vl")
    assert main(["benchmarks", str(folder)]) == 0
    assert "accelerate launch" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["benchmarks", str(folder), "--table", "10", "--output", str(out)]) == 0
    assert "run each script" in capsys.readouterr().out
    names = {"benchmarks.md", "lmms_eval.sh", "vlmevalkit.json", "vlmevalkit.sh"}
    assert {path.name for path in out.iterdir()} == names
    for script in out.glob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)
    run = subprocess.run(["sh", out / "vlmevalkit.sh"], capture_output=True, text=True, env={})
    assert run.returncode != 0 and "VLMEVALKIT" in run.stderr
    for wrong in ([], [str(folder), "--results", str(out)], [str(folder), "--table", "5"]):
        assert main(["benchmarks", *wrong]) == 1
        assert capsys.readouterr().err.startswith("error: ")
