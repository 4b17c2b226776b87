"""Whose processor, tokenizer and chat template the merged model has, and what is wrong with one."""

import json
import re
import warnings

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers.utils.chat_template_utils import render_jinja_template

from optmerge_core import (
    join,
    load_plan,
    load_recipe,
    merge,
    merge_part,
    open_checkpoint,
    plan_merge,
)
from optmerge_core.merging.templates import PICTURE, QUESTION, TEXT, environment, fault
from optmerge_core.study.open import settings

Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
EMPTY = (  # of Qwen/Qwen2-VL-7B: it takes a conversation for its parts
    "{% if messages is string %}{{ messages }}{% else %}{% for content in messages %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in "
    "content %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
)
PARTS = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
CONTENT = "{% for message in messages %}{{ '<s>' + message.content }}{% endfor %}"
PRINTED = "{% for message in messages %}{{ message.content }}{% endfor %}"
BLIND = PARTS.replace("<image>", "")
STRICT = "{{ raise_exception('no system prompt') }}"
TRAINED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
VISION = {"model_type": "qwen2_vl", "vision_config": {}}
TOKENS = {"<eos>": 0, "<image>": 1, "red": 2, "blue": 3}


def model(folder, number=0, template=None, tokens=TOKENS, pictures=True, **files):
    """A model of one matrix and four embeddings, its processor's files; __ stands for a dot."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(number)
    tensors = {Q: torch.randn(2, 2, generator=draw), EMBEDDINGS: torch.ones(5, 2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    contents = {"config__json": VISION} if pictures else {"config__json": {"model_type": "llama"}}
    if tokens is not None:
        contents["tokenizer__json"] = {"model": {"vocab": tokens}}
        contents["tokenizer_config__json"] = {"eos_token": "<eos>", "name": folder.name}
    if pictures:
        contents["preprocessor_config__json"] = {"processor_class": "Qwen2VLProcessor"}
    if template is not None:
        contents["chat_template__json"] = {"chat_template": template}
    for name, content in (contents | files).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def merged(tmp_path):
    """A function that merges a base and experts of these files; folder, report and notices."""

    def run(base, experts, **options):
        models = [model(tmp_path / "base", **base)]
        models += [model(tmp_path / x, ord(x[0]), **files) for x, files in experts.items()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folders = dict(zip(experts, models[1:], strict=True))
            report = merge(models[0], folders, tmp_path / "out", method="ties", **options)
        return tmp_path / "out", report, [str(warning.message) for warning in caught]

    return run


def files_of(folder, *others):
    """The side files that decide prompts, with their content."""
    names = ("chat_template.json", "chat_template.jinja", "preprocessor_config.json",
             "tokenizer.json", "tokenizer_config.json", *others)  # fmt: skip
    return {x: (folder / x).read_text() for x in names if (folder / x).is_file()}


CASES = {
    "a list of contents": (EMPTY, "leave out the user's text", "leave out the user's text"),
    "parts": (PARTS, None, None),
    "one text alone": (CONTENT, None, "does not render a picture and a text"),
    "whatever is said": (PRINTED, None, "without the image's tokens"),
    "no pictures": (BLIND, None, "without the image's tokens"),
    "an error": (STRICT, "render a text .no system prompt", "a picture and a text .no system"),
    "no Jinja": ("{% for", "does not render a text", "does not render a picture and a text"),
    "what training marks": (TRAINED, None, "without the image's tokens"),
    "none": (None, "there is no chat template", "there is no chat template"),
    "several": (
        [{"name": "default", "template": PARTS}, {"name": "a", "template": ""}],
        None,
        None,
    ),
    "no default": ({"tools": PARTS}, "no chat template of the name default", "of the name default"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_with_a_template(tmp_path, name):
    template, *expected = CASES[name]
    for pictures, text in zip((False, True), expected, strict=True):
        found = fault(tmp_path, template, pictures)
        assert found is None if text is None else re.search(text, found)


@pytest.mark.parametrize("template", [EMPTY, PARTS, BLIND, PRINTED, TRAINED])
def test_a_template_is_rendered_as_transformers_does(tmp_path, template):
    """The same prompts, so the same verdict, of the same special tokens."""
    variables = {"bos_token": "<s>", "add_generation_prompt": True}
    for content in (QUESTION, [TEXT], [PICTURE, TEXT]):
        messages = [{"role": "user", "content": content}]
        ours = environment().from_string(template).render(messages=messages, **variables)
        (theirs,), _ = render_jinja_template(
            conversations=[messages], chat_template=template, **variables
        )
        assert ours == theirs


def test_the_base_keeps_its_own_where_it_makes_prompts(merged):
    folder, report, notices = merged({"template": PARTS}, {"ocr": {"template": PARTS}})
    assert report.processor == "base" and notices == []
    assert files_of(folder) == files_of(folder.with_name("base"))
    assert "processor" not in report.recipe() and "chat_template" not in report.recipe()


def test_the_experts_are_taken_where_the_base_makes_empty_prompts(merged):
    """As of the paper's Table 3, whose authors copied an expert's."""
    own = {"template": PARTS}
    folder, report, notices = merged({"template": EMPTY}, {"ocr": own, "vqa": own, "chart": {}})
    assert report.processor == "ocr" and report.chat_template is None
    assert files_of(folder) == files_of(folder.with_name("ocr"))
    assert notices == [
        "base model: the chat template makes empty prompts, which leave out the user's text; "
        "processor and chat template are those of expert ocr, the template that of all experts who "
        "have one (ocr, vqa)"
    ]
    card = (folder / "README.md").read_text()
    assert "Processor, tokenizer and chat template are those of expert ocr." in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["processor"] == "ocr"


def test_other_settings_of_the_image_processor_are_told(merged):
    other = {"processor_class": "Qwen2VLProcessor", "max_pixels": 9}
    experts = {"a": {"template": PARTS}}
    experts["b"] = {"template": PARTS, "preprocessor_config__json": other}
    _, report, notices = merged({"template": EMPTY}, experts)
    assert report.processor == "a" and notices[0].endswith("processor's settings of b differ")


NEW = TOKENS | {"<box>": 4}
MOVED = TOKENS | {"red": 3, "blue": 2}
NOT_TAKEN = {
    "two templates": ([{"template": PARTS}, {"template": CONTENT}], "of a, b are not one"),
    "as empty": ([{"template": EMPTY + " "}] * 2, "expert a: the chat template makes empty"),
    "more tokens": ([{"template": PARTS, "tokens": NEW}] * 2, "expert a: .*1 tokens that the base"),
    "other tokens": (
        [{"template": PARTS, "tokens": MOVED}] * 2,
        "'red' is number 3, and the base'",
    ),
    "no tokenizer": ([{"template": PARTS, "tokens": None}] * 2, "has no tokenizer, and the base"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_experts_who_do_not_agree_are_not_taken(merged, name):
    (one, other), text = NOT_TAKEN[name]
    folder, report, notices = merged({"template": EMPTY}, {"a": one, "b": other})
    assert report.processor == "base"
    assert files_of(folder) == files_of(folder.with_name("base"))
    first = notices[0]
    assert first.startswith("base model: the chat template makes empty prompts")
    assert re.search(text, first) and first.endswith("processor (--processor) a | b | folder")


def test_no_expert_has_another(merged):
    _, report, notices = merged({"template": EMPTY}, {"a": {}})
    assert report.processor == "base" and "no expert has another; name the folder" in notices[0]


def test_a_base_without_a_template_gets_the_experts(merged):
    own = {"template": CONTENT, "pictures": False}
    folder, report, notices = merged({"pictures": False}, {"a": own, "b": own})
    assert report.processor == "a" and "there is no chat template; processor and" in notices[0]
    assert "chat_template.json" in files_of(folder)


def test_nobody_has_a_template(merged):
    _, report, notices = merged({"pictures": False}, {"a": {"pictures": False}})
    assert report.processor == "base" and notices == []


@pytest.mark.parametrize("whose", ["expert", "folder"])
def test_a_named_processor_gives_all_of_its_files(merged, tmp_path, whose):
    """None of the base's stays beside them, and none that describes the model is taken."""
    own = {
        "generation_config__json": {"top_k": 7},
        "processing_own__py": "#",
        "LICENSE__txt": "own",
    }
    theirs = {"generation_config__json": {"top_k": 9}, "processing_my__py": "#", "merges__txt": ""}
    theirs |= {"special_tokens_map__json": {}, "chat_template__jinja": PARTS}
    base = {"template": PARTS, "vocab__json": {}, **own}
    if whose == "folder":
        place = model(tmp_path / "place", 9, **theirs)
        folder, report, notices = merged(base, {"a": {}}, processor=place)
        assert report.processor == str(place) and notices == []
    else:
        folder, report, notices = merged(base, {"a": {}, "place": theirs}, processor="place")
        assert report.processor == "place" and ["generation_config" in x for x in notices] == [True]
    found = {path.name for path in folder.iterdir()}
    assert found == {
        "config.json", "generation_config.json", "LICENSE.txt", "model.safetensors", "README.md",
        "merge_report.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "merges.txt", "chat_template.jinja", "processing_my.py",
    }  # fmt: skip
    more = ("special_tokens_map.json", "merges.txt", "processing_my.py")
    assert files_of(folder, *more) == files_of(tmp_path / "place", *more)
    assert json.loads((folder / "generation_config.json").read_text()) == {"top_k": 7}
    assert report.recipe()["processor"] == report.processor


REFUSED = {
    "unknown": ({}, "nobody", "'nobody' is neither base, nor an expert .a., nor a folder"),
    "other numbers": ({"tokens": MOVED}, "a", "2 tokens .'red' is number 3, and the base's 2"),
    "another word": (
        {"tokens": {"<eos>": 0, "<image>": 1, "rouge": 2}},
        *("a", "1 tokens .'rouge' is number 2, which is 'red' of the base"),
    ),
    "no embedding": (
        {"tokens": TOKENS | {"<box>": 5}},
        *("a", "'<box>' is number 5, and the base has 5 embeddings"),
    ),
    "no tokenizer": ({"tokens": None}, "a", "has no tokenizer, and the base has"),
    "no image processor": ({"pictures": False, "config__json": VISION}, "a", "no image processor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_processor_that_cannot_be_the_merged_models(merged, tmp_path, name):
    files, processor, text = REFUSED[name]
    with pytest.raises(ValueError, match=f"processor .*{text}"):
        merged({"template": PARTS}, {"a": {"template": PARTS} | files}, processor=processor)
    assert not (tmp_path / "out").exists()


def test_an_expert_in_memory_has_no_processor(tmp_path):
    base = model(tmp_path / "base", template=PARTS)
    with pytest.raises(ValueError, match="processor 'a': that expert is a model in memory"):
        merge(base, {"a": dict(open_checkpoint(base))}, tmp_path / "out", processor="a")


def test_what_is_worth_a_notice(merged):
    files = {"template": PARTS, "tokens": NEW}
    _, report, notices = merged({"template": PARTS}, {"a": files}, processor="a")
    assert report.processor == "a" and len(notices) == 1
    assert "1 tokens that the base's lacks (<box>); their embeddings are the base's" in notices[0]


def test_named_with_an_empty_template(merged):
    _, report, notices = merged({"template": EMPTY}, {"a": {"template": PARTS}}, processor="base")
    assert report.processor == "base" and notices[0].startswith("processor base: the chat template")
    assert (
        "experts" not in notices[0]
        and "expert a: the chat template is not the base's" in notices[1]
    )


def test_tokens_that_nothing_tells_of(merged):
    """Of a sentencepiece model alone: the same file, or a notice."""
    own = {"template": PARTS, "tokens": None}
    theirs = {"same": own | {"tokenizer__model": "x"}, "other": own | {"tokenizer__model": "y"}}
    _, _, notices = merged(own | {"tokenizer__model": "x"}, theirs, processor="other")
    assert notices == ["processor other: its tokens cannot be compared with the base's, whose "
                       "embeddings are kept"]  # fmt: skip


def test_mergekits_chat_template(merged):
    """Auto is what most have, of base and experts; the file beats what else the folder says."""
    base = {"template": CONTENT, "pictures": False, "chat_template__jinja": CONTENT}
    base["tokenizer_config__json"] = {"chat_template": CONTENT}
    own = {"template": PARTS, "pictures": False}
    folder, report, notices = merged(base, {"a": own, "b": own, "c": {}}, chat_template="auto")
    assert report.processor == "base" and report.chat_template == PARTS and notices == []
    assert files_of(folder).keys() == {"chat_template.jinja", "preprocessor_config.json",
                                       "tokenizer.json", "tokenizer_config.json"} - {
        "preprocessor_config.json"
    }  # fmt: skip
    assert (folder / "chat_template.jinja").read_text() == PARTS
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"chat_template": PARTS}
    assert "The chat template is the recipe's." in (folder / "README.md").read_text()


def test_a_template_without_a_place_for_pictures_is_told(merged):
    _, _, notices = merged({"template": PARTS}, {"a": {}}, chat_template=BLIND)
    assert notices == [
        "processor base: the chat template makes prompts without the image's tokens; choose "
        "another by processor"
    ]


@pytest.mark.parametrize("template", ["auto", "chatml"])
def test_a_template_that_is_none(merged, template):
    with pytest.raises(ValueError, match=f"chat_template '{template}'"):
        merged({"pictures": False}, {"a": {"pictures": False}}, chat_template=template)


def test_a_plan_keeps_what_was_asked(tmp_path):
    """Another process gives the output the same side files."""
    own = {"template": PARTS}
    experts = {name: model(tmp_path / name, n, **own) for n, name in enumerate("ab", 1)}
    base = model(tmp_path / "base", template=PARTS)
    options = {"processor": "b", "chat_template": PARTS}
    plan = plan_merge(base, experts, tmp_path / "out", method="ties", **options)
    again = load_plan(plan.save(tmp_path / "plan.json"))
    for part in range(len(again.parts)):
        merge_part(again, part)
    report = join(again)
    assert (report.processor, report.chat_template) == ("b", options["chat_template"])
    found = files_of(tmp_path / "out")
    assert found.pop("chat_template.jinja") == options["chat_template"]
    expected = files_of(tmp_path / "b")
    del expected["chat_template.json"]
    assert '"name": "b"' in expected["tokenizer_config.json"]
    assert found == expected


def test_a_recipe_says_whose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "elsewhere"):
        model(tmp_path / name, len(name), template=PARTS)
    path = tmp_path / "recipe.yaml"
    content = {"base_model": "base", "models": [{"model": "a", "name": "ocr"}]}
    for given in ("base", "ocr", "elsewhere", None):
        path.write_text(yaml.safe_dump(content | {"processor": given}))
        recipe = load_recipe(path)
        assert recipe.processor == given == settings(recipe)["processor"]
    path.write_text(yaml.safe_dump(content | {"processor": "a/b"}))
    with pytest.raises(ValueError, match=r"processor: 'a/b' is neither base, .* \(ocr\)"):
        load_recipe(path)
    path.write_text(yaml.safe_dump(content | {"processor": "ocr", "merges": "modalities"}))
    with pytest.raises(ValueError, match="every specialist keeps its own"):
        load_recipe(path)


def test_the_output_is_not_inside_the_processors_folder(tmp_path):
    base, expert, place = (model(tmp_path / x, len(x), template=PARTS) for x in ("b", "ex", "pro"))
    with pytest.raises(ValueError, match="holds the processor"):
        merge(base, {"a": expert}, place, method="ties", processor=place, overwrite=True)
    assert (place / "model.safetensors").is_file()
