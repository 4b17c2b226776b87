"""A merged folder that works is seen to, and one that does not says what is wrong with it."""

import json
import math
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from lora import make_lora_family
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, build, save
from transformers import Qwen2ForCausalLM

from optmerge_core import check_merged, merge
from optmerge_core.__main__ import main
from optmerge_core.evaluation import check as checking
from optmerge_core.merging.templates import QUESTION

RECIPES = Path(__file__).resolve().parents[2] / "data" / "recipes"
PROJECTION = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A language model without a tokenizer, and three adapters of it."""
    return make_lora_family(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The embedded Qwen2-VL and its adapters, merged by the command."""
    out = tmp_path_factory.mktemp("shipped") / "out"
    recipe = str(RECIPES / "qwen2_vl.yaml")
    assert main(["merge", recipe, "--output", str(out), "--method", "task_arithmetic"]) == 0
    return out


@pytest.fixture
def broken(shipped, tmp_path):
    return shutil.copytree(shipped, tmp_path / "broken")


def change(folder, name, tensor_of):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensor_of(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    save_file(tensors, path, {"format": "pt"})


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def section(folder):
    """The lines of the card's section, which is there once."""
    (text,) = re.findall(r"## Check\n\n(.*?)\n\n## Load", (folder / "README.md").read_text(), re.S)
    return text.splitlines()


def test_what_works_is_in_report_and_card(shipped):
    found = json.loads((shipped / "merge_report.json").read_text())["check"]
    assert found["model_class"] == "Qwen2VLForConditionalGeneration" and found["failed"] == []
    assert (found["device"], found["dtype"]) == ("cpu", "float16") and found["not_checked"] == []
    assert found["image_tokens"] == 16 and found["prompt_tokens"] > 16 and found["logits_finite"]
    assert isinstance(found["answer"], str) and 0 < found["seconds"]
    # As far from the adapters' logits as rounding them goes, and 10^-3 of the norm is float16's.
    assert found["adapter_difference"] < 2 * found["adapter_rounding"] < 4e-3
    (line,) = section(shipped)
    assert line.startswith("- Seen to work: the folder opens as Qwen2VLForConditionalGeneration (")
    assert "16 of them the image's; the logits are finite; its greedy answer begins" in line
    assert "the adapters, merged into one and applied to the base, give its logits but for" in line


def test_a_greedy_answer_is_what_generate_says(shipped):
    """By the class and processor themselves."""
    from optmerge_core.evaluation import chat, trial

    model = trial.transformers.Qwen2VLForConditionalGeneration.from_pretrained(shipped).half()
    processor = chat.load_processor(shipped)
    side = min(trial.SIDE, chat.least_side(processor))
    picture = trial.Image.new("RGB", (side, side), "white")
    quarter = [side // 4, side // 4, 3 * side // 4, 3 * side // 4]
    trial.ImageDraw.Draw(picture).ellipse(quarter, "red")
    text = processor.prompt(QUESTION, processor.placeholder)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    tokens = model.generate(**inputs.to("cpu", torch.float16), max_new_tokens=8, do_sample=False)
    said = processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    found = json.loads((shipped / "merge_report.json").read_text())["check"]
    assert found["answer"] == said and found["prompt_tokens"] == inputs["input_ids"].shape[1]


EMPTY = "{% for part in messages %}{% if 'text' in part %}{{ part.text }}{% endif %}{% endfor %}"
BLIND = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
NORM, Q = "model.norm.weight", "model.layers.3.self_attn.q_proj.weight"
BROKEN = {
    "empty prompts": (
        lambda folder: (folder / "chat_template.jinja").write_text(EMPTY),
        "the chat template makes empty prompts, which leave out the user's text: take an expert's",
    ),
    "no image tokens": (
        lambda folder: (folder / "chat_template.jinja").write_text(BLIND),
        "the chat template makes prompts without the image's tokens: take an expert's processor",
    ),
    "overflow": (
        lambda folder: change(folder, NORM, lambda x: torch.full_like(x, math.inf)),
        "the logits of a prompt have NaN or Inf, probably by float16's range: merge with dtype: ",
    ),
    "a missing weight": (
        lambda folder: change(folder, NORM, lambda _: None),
        r"1 parameters of Qwen2VLForConditionalGeneration are in no file \(.*norm.weight\) and ",
    ),
    "another config": (
        lambda folder: change_json(folder / "config.json", text_config={"hidden_size": 6}),
        "the folder does not open as Qwen2VLForConditionalGeneration .* config.json is not that of",
    ),
    "other weights": (
        lambda folder: change(folder, Q, lambda x: x * 1.1),
        "the adapters on the base give other logits than the folder .* compare with merge_and_un",
    ),
    "a placeholder of another number": (
        lambda folder: change_json(folder / "config.json", image_token_id=7),
        "the model computes nothing of the prompt .*, probably since the processor is another mod",
    ),
    "a broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "the tokenizer does not open .*, probably since its files are not of one version: take an",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_work_is_one_sentence(broken, name):
    damage, text = BROKEN[name]
    damage(broken)
    check = check_merged(broken, device="cpu")
    assert re.match(text, check.failed[0]), check
    assert len(check.failed) == 1
    assert json.loads((broken / "merge_report.json").read_text())["check"]["failed"] == check.failed
    first = section(broken)[0]  # in the place of what was seen before the damage
    assert first.startswith("- Failed: ") and first.endswith(".")


def test_the_rest_is_seen_where_prompts_are_empty(broken):
    """The weights may be sound all the same."""
    (broken / "chat_template.jinja").write_text(EMPTY)
    check = check_merged(broken, device="cpu")
    assert check.prompt_tokens is None and check.logits_finite and check.answer is not None
    assert check.adapter_difference < 4 * check.adapter_rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("task_arithmetic", {}), ("optmerge", {"preset": "lora"}), ("tsv", {})],
)
def test_adapters_on_the_base_give_the_folders_logits(lora, tmp_path, dtype, method, options):
    base, experts = lora
    options = {"method": method, "method_options": options, "scaling_coefficient": 0.7}
    merge(base, experts, tmp_path / "out", dtype=dtype, **options)
    check = check_merged(tmp_path / "out", device="cpu")
    assert check.failed == [] and check.dtype == dtype and check.logits_finite
    assert check.adapter_difference <= 4 * check.adapter_rounding + 1e-4
    assert check.not_checked == [
        "prompts and answers in words: the folder has no tokenizer",
        "a greedy answer: no tokenizer writes it",
    ]
    change(tmp_path / "out", PROJECTION, lambda x: x + 0.1)
    assert "the adapters on the base give other" in check_merged(tmp_path / "out").failed[0]


def test_the_difference_by_hand(lora, tmp_path):
    """‖folder − adapters‖ / ‖adapters‖, of the logits of the first eight tokens."""
    base, experts = lora
    merge(base, {"e0": experts["e0"]}, tmp_path / "out", method="task_arithmetic", dtype="bfloat16")
    check = check_merged(tmp_path / "out", device="cpu")
    from peft import PeftModel

    ids = torch.arange(8)[None]
    merged = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    adapted = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(adapted, experts["e0"])
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.float() for model in (merged, adapted))
    expected = float((ours - theirs).norm() / theirs.norm())
    assert check.adapter_difference == pytest.approx(expected, rel=0.5) and expected > 1e-4


REASONS = {
    "ties": "the adapters applied to the base: ties works on single entries, which leaves the span",
    "optmerge": "the adapters applied to the base: optmerge with Adam works on single entries",
}


@pytest.mark.parametrize("method", REASONS)
def test_what_is_no_adapter_is_not_compared(lora, tmp_path, method):
    base, experts = lora
    merge(base, experts, tmp_path / "out", method=method)
    check = check_merged(tmp_path / "out", device="cpu")
    assert check.failed == [] and check.not_checked[-1].startswith(REASONS[method])


def test_whole_experts_have_no_adapters_to_compare(tiny, tmp_path):
    """And a model without a processor is asked by text."""
    merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    assert json.loads((tmp_path / "out/merge_report.json").read_text())["check"] is None
    assert "## Check" not in (tmp_path / "out/README.md").read_text()
    check = check_merged(tmp_path / "out", device="cpu")
    assert (check.failed, check.not_checked, check.adapter_difference) == ([], [], None)
    assert check.prompt_tokens > 0 and check.image_tokens is None and check.answer is not None


def test_an_expert_that_adapts_more_than_merged(lora, tmp_path):
    base, experts = lora
    merge(base, experts, tmp_path / "out", method="task_arithmetic", family="gemma2")
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    del report["parameters"][0]
    (tmp_path / "out/merge_report.json").write_text(json.dumps(report))
    check = check_merged(tmp_path / "out", device="cpu")
    assert "expert e0 adapts what did not merge (model.layers.0." in check.not_checked[-1]


def test_what_does_not_fit_is_not_loaded(shipped, broken, monkeypatch):
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(checking.psutil, "virtual_memory", lambda: Memory(2_000_000))
    monkeypatch.setattr("optmerge_core.evaluation.trial.run", None)
    check = check_merged(broken, device="cpu")
    size = sum(path.stat().st_size for path in broken.glob("*.safetensors")) * 1.2 / 1e9
    expected = f"the model, which takes {size:.1f} GB where 0.0 GB of memory are free"
    assert check.not_checked == [expected] and check.model_class is None
    assert section(broken) == [f"- Not checked: {expected}."]


def test_a_folders_own_code_is_not_run(broken):
    ran = broken / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Mine: pass\n"
    (broken / "modeling_mine.py").write_text(code)
    auto = {"AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    change_json(broken / "config.json", architectures=["Mine"], auto_map=auto)
    check = check_merged(broken, device="cpu")
    assert not ran.exists() and check.model_class is None and check.failed == []
    assert (
        "Python code in its folder, which is not run unless the recipe says" in check.not_checked[0]
    )
    assert "does not open as Mine" in check_merged(broken, trust_remote_code=True).failed[0]
    assert ran.exists()
    change_json(broken / "config.json", architectures=["Mine"], auto_map=None)
    check = check_merged(broken, device="cpu")
    assert check.not_checked == ["the model, whose class Mine is not one of transformers"]


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_what_also_speaks_is_asked_by_its_thinker(tmp_path, name):
    """The whole has no logits; and Qwen2.5-Omni's way to open cannot say what was missing."""
    base, model, expert = save(build(name), tmp_path / "base"), build(name, 1), tmp_path / "expert"
    if name == "qwen2_5_omni":  # of a mixture PEFT would adapt more than was asked for
        modules = LoraConfig(target_modules=r"thinker.*language_model.*q_proj")
        model = get_peft_model(build(name), modules)
        for own, parameter in model.named_parameters():
            if "lora_B" in own:
                parameter.data.fill_(0.1)
    model.save_pretrained(expert)
    merge(base, {"a": expert}, tmp_path / "out", method="task_arithmetic")
    check = check_merged(tmp_path / "out", device="cpu")
    assert check.failed == [] and check.logits_finite
    assert check.model_class == FAMILIES[name].model
    if name == "qwen2_5_omni":
        assert check.adapter_difference < 1e-5
    said = " ".join(check.not_checked)
    assert "prompts of pictures and sound" in said
    assert ("whether parameters are missing" in said) == (name == "qwen2_5_omni")


def test_an_answer_is_no_markup(broken):
    check = checking.Check(model_class="M", answer="<b>[x](y)\n## Load\n`z`|")
    checking.record(broken, check)
    (line,) = section(broken)
    assert r"\<b\>\[x\](y)\n\#\# Load\n\`z\`\|" in line


@pytest.fixture
def recipe(lora, tmp_path):
    base, experts = lora
    models = [{"model": str(folder), "name": name} for name, folder in experts.items()]
    path = tmp_path / "recipe.yaml"
    content = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    path.write_text(yaml.safe_dump(content | {"dtype": "float16"}))
    return str(path)


def test_the_command_checks_unless_told_not_to(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["merge", recipe, "--output", str(out), "--overwrite"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "Seen to work: the folder opens as Qwen2ForCausalLM (float16, " in said.out
    assert "opening the merged model" in said.err and "answering" in said.err
    assert "Not checked: prompts and answers in words: the folder has no tok" in said.out
    assert main([*command, "--no-check"]) == 0
    assert (
        "Seen" not in capsys.readouterr().out and "## Check" not in (out / "README.md").read_text()
    )
    assert main([*command, "--check"]) == 0
    assert section(out)[0].startswith("- Seen to work")


def test_the_command_says_what_fails(recipe, tmp_path, capsys):
    """A notice by default, as the folder is there; an error where the check was asked for."""
    command = ["merge", recipe, "--output", str(tmp_path / "out"), "--scaling-coefficient", "3e3"]
    assert main([*command]) == 0
    cause = "Failed: the logits of a prompt have NaN or Inf, probably by float16's range"
    assert f"notice: {tmp_path / 'out'}: {cause}" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--check"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'out'}: {cause}")
    assert (tmp_path / "out" / "model.safetensors").is_file()
