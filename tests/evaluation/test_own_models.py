"""The notebooks, and the evaluation, on checkpoints that the package did not make.

Tiny models with random weights of stock transformers classes, saved as people save them: bfloat16,
shards, a processor as on the hub. Their experts are named after no task.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from optmerge_core import check_merged, load_recipe, merge, open_checkpoint
from optmerge_core.benchmark.evaluator import EmbeddedEvaluator, evaluator_for
from optmerge_core.benchmark.models.tokenizer import PIECES, word_level
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.checkpoints.formats import side_files
from optmerge_core.evaluation import chat
from optmerge_core.evaluation.chat import load_processor
from optmerge_core.evaluation.evaluator import Evaluator, load_model
from optmerge_core.evaluation.expert_merging import Settings, learn
from optmerge_core.evaluation.questions import load_split, load_unlabelled
from optmerge_core.evaluation.selection import MergedTaskVectors
from optmerge_core.merging.experts import open_models
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.study.open import open_study

QUESTIONS = Path("data/benchmark/questions").resolve()
EXPERTS = ("maths", "charts", "scenes")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<image>", "<unk>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tokenizer(image):
    """A foreign vocabulary: words of its own, digits, no location tokens; padded on the right."""
    words = ["red", "blue", "circle", "what", "color", "is", "the", "user", "assistant"]
    pieces = [f"{space}{word}" for word in words for space in ("", "Ġ")] + [*"0123456789?,[]", "Ċ"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=word_level(SPECIAL + pieces, PIECES),
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
    )
    fast.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast.chat_template = TEMPLATE.replace("IMAGE", image)
    return fast


def qwen(folder):
    """A Qwen2.5-VL with the processor files of the hub, which name parts that need torchvision."""
    fast = tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    fast.save_pretrained(folder)
    pixels = {"min_pixels": 56 * 56, "max_pixels": 56 * 56, "patch_size": 14, "merge_size": 2}
    parts = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels | parts))
    number = fast.convert_tokens_to_ids
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    vision |= {"out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {"vocab_size": len(fast), "bos_token_id": None, "rope_parameters": rope}
    ids = {"eos_token_id": number("<|im_end|>"), "pad_token_id": number("<|endoftext|>")}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=TEXT | text | ids,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def llava(folder):
    """A LLaVA, whose tower's layers are named as the language model's are."""
    fast = tokenizer("<image>")
    pictures = CLIPImageProcessorPil(
        size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}
    )
    LlavaProcessor(
        pictures, fast, patch_size=14, vision_feature_select_strategy="full",
        num_additional_image_tokens=1, chat_template=fast.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = LlavaConfig(
        vision_config=vision,
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(fast)},
        image_token_id=fast.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def save_study(root, make, noise=0.02):
    """Folders of a base model and its experts, who differ in the language model's linear layers.

    The last expert is a LoRA adapter of some of them.
    """
    folder = root / "base"
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(folder).bfloat16()
        # A third of the vocabulary ends an answer, or random weights would never end one.
        model.generation_config.eos_token_id = list(
            range(0, model.config.text_config.vocab_size, 3)
        )
        model.save_pretrained(folder, max_shard_size="50KB")
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for expert in EXPERTS[:-1]:
            for name, parameter in model.named_parameters():
                if "language_model.layers" in name and parameter.ndim == 2:
                    change = noise * torch.randn(parameter.shape)
                    parameter.data.copy_(start[name] + change)
            model.save_pretrained(root / expert, max_shard_size="70KB")
        layers = r".*language_model\.layers\..*(q_proj|v_proj)"
        lora = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(root / EXPERTS[-1])
    return folder


@pytest.fixture(scope="module", params=[qwen, llava], ids=["qwen2_5_vl", "llava"])
def own(request, tmp_path_factory):
    """A study of stock checkpoints: `.base`, `.experts` (opened), `.names`, `.evaluator`."""
    root = tmp_path_factory.mktemp(request.param.__name__)
    folder = save_study(root, request.param)
    recipe = root / "own.yaml"
    models = [{"model": name} for name in EXPERTS]
    recipe.write_text(yaml.safe_dump({"base_model": "base", "models": models}))
    study = open_study(load_recipe(recipe))
    return SimpleNamespace(
        base=study.base,
        experts=study.experts,
        names=study.names,
        evaluator=Evaluator(folder, load_split(QUESTIONS, "validation", 2), device="cpu"),
    )


def test_answers_in_the_checkpoints_own_dtype_and_merges_no_tower(own):
    model = own.evaluator.model
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert len(own.names) == 14
    for name in own.names:
        place = own.evaluator.memory_name(name)
        assert place.startswith("model.language_model.layers."), place
        assert torch.equal(model.get_parameter(place), own.base[name])


def test_coefficients_are_learnt_on_pictures_and_questions_alone(own, tmp_path):
    """In bfloat16, by each expert's own file of questions, prompts by the checkpoint's template."""
    for expert, task in zip(EXPERTS, TASKS, strict=False):
        shutil.copy(QUESTIONS / "validation" / f"{task}.parquet", tmp_path / f"{expert}.parquet")
    evaluator = own.evaluator.asking(load_unlabelled(tmp_path, EXPERTS, 1))
    found = learn(own, evaluator, Settings(learning_rate=0.1, steps=4, regularisation=0.0))
    assert list(found.coefficients) == own.names and found.losses[-1] < found.losses[0]
    place = own.evaluator.memory_name(own.names[0])
    assert torch.equal(evaluator.model.get_parameter(place), own.base[own.names[0]])


def test_answers_are_what_generate_gives_one_by_one(own):
    evaluator = own.evaluator
    table = evaluator.answer()
    assert list(table["task"].unique()) == list(TASKS) and len(table) == 10
    data = load_split(QUESTIONS, "validation", 2)
    agree = 0
    for index in range(0, len(data), 3):
        inputs = chat.prepare(evaluator.processor, [data[index]])
        length = inputs["input_ids"].shape[1]
        tokens = evaluator.model.generate(
            **inputs.to("cpu", torch.bfloat16),
            max_new_tokens=evaluator.max_new_tokens,
            do_sample=False,
        )
        text = evaluator.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
        agree += text[:3] == table.loc[index, "prediction"][:3]
    assert agree >= 3  # of 4; bfloat16 rounds otherwise in a batch


def test_weights_replace_the_base_and_leave_it_unchanged(own):
    evaluator, names = own.evaluator, own.names
    before = evaluator.answer()["prediction"]
    expert = own.experts["maths"]
    as_expert = evaluator.answer(expert, names)["prediction"]
    assert torch.equal(
        evaluator.model.get_parameter(evaluator.memory_name(names[0])), expert[names[0]]
    )
    task_vectors = {n: expert[n].float() - own.base[n].float() for n in names}
    assert (evaluator.answer_merged(own.base, task_vectors, 1.0)["prediction"] == as_expert).all()
    # Another evaluator of the same model starts where this one left it, and finds its way back.
    other = evaluator.asking(load_split(QUESTIONS, "validation", 1))
    assert other.model is evaluator.model and len(other.samples) == 5
    half = names[: len(names) // 2]
    other.answer(own.experts["charts"], half)
    assert torch.equal(
        evaluator.model.get_parameter(evaluator.memory_name(names[-1])), own.base[names[-1]]
    )
    assert (evaluator.answer()["prediction"] == before).all()
    assert (as_expert != before).any()


def test_an_adapter_answers_as_what_it_adds_to_the_base(own):
    evaluator, adapter = own.evaluator, own.experts["scenes"]
    evaluator.answer(adapter, own.names)
    for name in own.names:
        parameter = evaluator.model.get_parameter(evaluator.memory_name(name))
        changed = "q_proj" in name or "v_proj" in name
        assert torch.equal(parameter, own.base[name]) != changed
        assert torch.equal(parameter, adapter[name].bfloat16())


def test_weights_that_do_not_fit_are_refused(own):
    with pytest.raises(ValueError, match=r"layers\.99.*another family"):
        own.evaluator.answer({"model.layers.99.mlp.up_proj.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        own.evaluator.answer({own.names[0]: torch.zeros(1, 1)})


@pytest.mark.parametrize(
    "family, stock", [("internvl", "InternVLProcessor"), ("qwen2_vl", "Qwen2VLProcessor")]
)
def test_asked_as_any_checkpoint_an_embedded_model_answers_the_same(
    family, stock, tmp_path, monkeypatch
):
    """By the stock processor, chat template and padded batches, without features kept."""
    base = Path("data/benchmark", family, "base")
    own = shutil.copytree(base, tmp_path / "base")
    for name in ("processor_config.json", "tokenizer_config.json", "config.json"):
        content = json.loads((own / name).read_text())
        changes = {"dtype": "float32"} if name == "config.json" else {"processor_class": stock}
        (own / name).write_text(json.dumps(content | changes))

    def plain(sample, side):
        picture = {"type": "image", "image": sample["image"]}
        content = [picture, {"type": "text", "text": sample["question"]}]
        return [{"role": "user", "content": content}]

    monkeypatch.setattr(chat, "messages", plain)
    data = load_split(QUESTIONS, "validation", 6)
    assert type(evaluator_for(own, data, device="cpu")) is Evaluator
    generic, embedded = Evaluator(own, data, batch_size=7, device="cpu"), evaluator_for(base, data)
    assert type(embedded) is EmbeddedEvaluator
    assert stock in [kind.__name__ for kind in type(generic.processor).__mro__]
    assert (generic.answer()["prediction"] == embedded.answer()["prediction"]).all()


def test_prompts_hold_the_pictures_tokens_and_are_padded_on_the_left(own):
    evaluator = own.evaluator
    items = [
        {"image": Image.new("RGB", (56, 56)), "question": question, "answer": "red", "task": "VQA"}
        for question in ("what ?", "what color is the circle ?")
    ]
    inputs = chat.prepare(evaluator.processor, items)
    first, second = inputs["attention_mask"]
    assert second.all() and not first[0] and first[-1]
    image = evaluator.model.config.image_token_id
    assert (inputs["input_ids"] == image).sum(1).tolist() == [
        4 if "grid" in str(inputs.keys()) else 5
    ] * 2


EMPTY = (  # it takes a conversation for its parts
    "{% for part in messages %}{% if 'text' in part %}{{ part.text }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("make", [qwen, llava])
def test_a_base_with_empty_prompts_is_asked_by_its_experts_template(make, tmp_path):
    folder = save_study(tmp_path, make)
    data = load_split(QUESTIONS, "validation", 1)
    expected = Evaluator(folder, data, device="cpu").answer()["prediction"]
    for path in side_files(folder):
        if path.name != "config.json":
            shutil.copy(path, tmp_path / "maths" / path.name)
    (folder / "chat_template.jinja").write_text(EMPTY)
    with pytest.raises(ValueError, match="base: the chat template makes empty prompts"):
        Evaluator(folder, data, device="cpu")
    experts = {name: str(tmp_path / name) for name in EXPERTS}
    with pytest.warns(UserWarning, match="processor and chat template are those of expert maths"):
        opened = open_models(folder, experts)
    evaluator = evaluator_for(folder, data, device="cpu", processor=opened.processor)
    assert (evaluator.answer()["prediction"] == expected).all()
    replaced = replace(opened.processor, template=TEMPLATE.replace("IMAGE", ""))
    with pytest.raises(ValueError, match="maths: .* without the image's tokens"):
        evaluator_for(folder, data, device="cpu", processor=replaced)


def test_a_merged_folder_of_stock_classes_is_seen_to_work(own, tmp_path):
    """Of whole experts and an adapter, so that there is no adapter of all to compare with."""
    experts = {name: own.base.folder.parent / name for name in EXPERTS}
    merge(own.base.folder, experts, tmp_path / "out", method="task_arithmetic")
    check = check_merged(tmp_path / "out", device="cpu")
    assert (check.failed, check.not_checked, check.adapter_difference) == ([], [], None)
    assert check.model_class == type(own.evaluator.model).__name__ and check.dtype == "bfloat16"
    features = 5 if "Llava" in check.model_class else 4
    assert check.image_tokens == features < check.prompt_tokens and check.logits_finite
    assert check.answer is not None


def test_a_processor_has_its_tokenizers_template_where_it_has_none(tmp_path):
    """As of folders that an older transformers saved."""
    llava(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    assert load_processor(tmp_path).chat_template == template


def test_a_checkpoints_own_code_is_not_run_unless_asked(tmp_path):
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    code += "from transformers import PreTrainedConfig\nclass Mine(PreTrainedConfig):\n"
    (tmp_path / "configuration_mine.py").write_text(code + "    model_type = 'mine'\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_processor):
        with pytest.raises(ValueError, match="trust_remote_code: true"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_processor_is_refused(tmp_path):
    tokenizer("").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no processor for pictures and text"):
        load_processor(tmp_path)


def test_merged_task_vectors_are_kept_only_while_there_is_room(own):
    made = []

    def merge(method):
        made.append(method)
        return merge_tensors(own.base, own.experts, own.names, method=method, device="cpu")

    methods = ["weight_average", "task_arithmetic"]
    roomy = MergedTaskVectors(merge, methods)
    for method in methods * 2:
        roomy[method]
    assert made == methods and list(roomy) == methods
    narrow = MergedTaskVectors(merge, methods, share=0.0)
    for method in methods * 2:
        assert torch.equal(narrow[method][own.names[0]], roomy[method][own.names[0]])
    assert made == methods * 3 and len(narrow.kept) == 1
    with pytest.raises(KeyError):
        roomy["wudi"]


NOTEBOOKS = {
    "00_benchmark": ["figxx_samples.png", "figxx_expert_matrix.png", "fig01_overview.csv"],
    "01_task_vectors": [],
    "02_noise_analysis": ["figxx_spectra.png", "tablexx_noise_floor.md", "figxx_rank_accuracy.csv"],
    "03_merging": ["fig03_wudi.png", "table08_rank_ratio.md", "table07_cost.md"],
    "05_evaluation": [
        "table02_full_finetuning.md",
        "table10_two_abilities.md",
        "tablexx_claims.md",
    ],
}
LEFT_OUT = ["tablexx_seeds.md", "table01_training_data.md", "figxx_training_loss.png"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A study whose numbers are as small as they may be: what counts is that every cell runs."""
    folder = tmp_path_factory.mktemp("own")
    base = save_study(folder, qwen)
    settings = json.loads((base / "generation_config.json").read_text())
    every = open_checkpoint(base).shape("lm_head.weight")[0]  # tokens: each ends an answer
    settings["eos_token_id"] = list(range(every))
    (base / "generation_config.json").write_text(json.dumps(settings))
    sizes = {"data": str(QUESTIONS), "validation_samples": 2, "test_samples": 3}
    study = {"name": "own", "base_model": "base", "models": [{"model": name} for name in EXPERTS]}
    study |= {"parameters": {"steps": 10}, "method_options": {"wudi": {"steps": 10}}}
    study |= {"scaling_coefficients": [1.0], "evaluation": sizes}
    (folder / "own.yaml").write_text(yaml.safe_dump(study))
    return folder / "own.yaml"


@pytest.mark.slow
def test_every_notebook_runs_on_any_checkpoints(recipe):
    """What takes one recipe of capabilities, as `papermill -p recipe … -p device cpu` runs it."""
    folder, figures, said = recipe.parent, recipe.parent / "figures", ""
    parameters = {"recipe": str(recipe), "output_dir": str(figures), "device": "cpu"}
    for name, files in NOTEBOOKS.items():
        own = {"merged_dir": str(folder / "merged")} if name == "03_merging" else {}
        copy = folder / f"{name}.ipynb"
        papermill.execute_notebook(
            f"notebooks/{name}.ipynb",
            copy,
            parameters | own,
            kernel_name="python3",
            progress_bar=False,
            cwd="notebooks",
        )
        assert [file for file in files if not (figures / file).is_file()] == []
        outputs = [o for cell in nbformat.read(copy, 4).cells for o in cell.get("outputs", [])]
        said += "".join(o.text for o in outputs if o.get("name") == "stdout")
    assert [file for file in LEFT_OUT if (figures / file).exists()] == []
    assert "no training log" in said and "no other training seeds" in said
    assert "no row for it" in said and "here: " in said
    merged = open_checkpoint(folder / "merged" / "own")
    assert merged.shapes() == open_checkpoint(folder / "base").shapes()
    table = (figures / "table02_full_finetuning.csv").read_text()
    assert all(f"Individual {name}" in table for name in EXPERTS) and "Mixture" not in table
