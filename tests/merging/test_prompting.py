"""Experts that are prompted, or generate, otherwise than the merged model: a notice for each."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from optmerge_core.merging.experts import open_models

Q = "model.layers.0.self_attn.q_proj.weight"


def model(folder, **files):
    """A model of one matrix and files beside it: name -> content, with __ for a dot."""
    folder.mkdir()
    save_file({Q: torch.ones(2, 2)}, folder / "model.safetensors")
    files = {"config__json": {"model_type": "llama"}} | files
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def tokenizer(*added, vocab=("a", "b")):
    tokens = [{"id": 2 + i, "content": token} for i, token in enumerate(added)]
    model = {"vocab": {word: i for i, word in enumerate(vocab)}}
    return {"added_tokens": tokens, "model": model}


def notices(tmp_path, base, **experts):
    folders = {name: model(tmp_path / name, **files) for name, files in experts.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_models(model(tmp_path / "base", **base), folders)
    return [str(warning.message) for warning in caught]


LACKS = "the tokenizer has {} tokens that the base's, which the merged model has, lacks ({}); "


@pytest.mark.parametrize(
    ("ours", "theirs", "count", "some"),
    [
        ({"tokenizer__json": tokenizer("<eos>")}, {"tokenizer__json": tokenizer("<eos>")}, 0, ""),
        (
            {"tokenizer__json": tokenizer("<eos>")},
            {"tokenizer__json": tokenizer("<eos>", "<box>", "a")},
            *(1, "<box>"),
        ),
        (  # of a vocabulary that was trained anew; one as a list of pairs
            {"tokenizer__json": tokenizer()},
            {
                "tokenizer__json": {
                    "model": {"vocab": [["a", -1.5], ["c", -2.0], ["d", 0], ["e", 1]]}
                }
            },
            *(3, "c, d, e"),
        ),
        (
            {"tokenizer__json": tokenizer()},
            {"tokenizer__json": tokenizer(*"wxyz")},
            *(4, "w, x, y, …"),
        ),
        (  # of two forms of a tokenizer
            {"vocab__json": {"a": 0, "b": 1}, "added_tokens__json": {"<eos>": 2}},
            {"tokenizer__json": tokenizer("<eos>", "<box>")},
            *(1, "<box>"),
        ),
        (  # a sentencepiece model tells nothing of its vocabulary, nor does no tokenizer at all
            {"added_tokens__json": {"<eos>": 2}},
            {"tokenizer__json": tokenizer("<eos>")},
            *(0, ""),
        ),
        ({}, {"tokenizer__json": tokenizer("<eos>")}, 0, ""),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": {"2": {"content": "<eos>"}}}},
            {"added_tokens__json": {"<eos>": 2, "<box>": 3}},
            *(1, "<box>"),
        ),
        ({"tokenizer__json": tokenizer()}, {"tokenizer__json": "{"}, 0, ""),
        ({"tokenizer__json": tokenizer()}, {"tokenizer__json": "[1]"}, 0, ""),
    ],
)
def test_tokens_that_only_an_expert_has(tmp_path, ours, theirs, count, some):
    found = notices(tmp_path, ours, ocr=theirs)
    assert len(found) == (count > 0)
    if count:
        assert found[0].startswith(
            f"expert ocr: {LACKS.format(count, some)}prompt the merged model"
        )


ONE, OTHER = "{{ messages }}", "<s>{{ messages }}"


@pytest.mark.parametrize(
    ("ours", "theirs", "differ"),
    [
        ({"chat_template__jinja": ONE}, {"chat_template__jinja": OTHER}, True),
        ({"chat_template__jinja": ONE}, {}, False),
        ({"chat_template__jinja": ONE}, {"chat_template__json": {"chat_template": ONE}}, False),
        (
            {"tokenizer_config__json": {"chat_template": ONE}},
            {"chat_template__jinja": ONE + "\n"},
            False,
        ),
        (
            {"tokenizer_config__json": {"chat_template": ONE}},
            {"tokenizer_config__json": {"chat_template": [{"name": "a", "template": ONE}]}},
            True,
        ),
    ],
)
def test_another_chat_template(tmp_path, ours, theirs, differ):
    found = notices(tmp_path, ours, ocr=theirs, vqa=theirs)
    assert len(found) == differ
    if differ:
        assert found[0].startswith("experts ocr, vqa: the chat template is not the base's, which")


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ({"temperature": 0.7}, {"temperature": 0.1}, "temperature 0.1 (the base 0.7)"),
        (
            {"do_sample": True, "top_k": 1},
            {},
            "",
        ),
        (
            {"do_sample": True, "top_k": 1},
            {"bos_token_id": 0},
            "do_sample False (the base True), top_k 50 (the base 1)",
        ),
        ({}, {"do_sample": False, "temperature": 1, "top_p": None, "use_cache": True}, ""),
        ({"transformers_version": "4.5"}, {"transformers_version": "5.2"}, ""),
        ({}, {"max_new_tokens": 512}, "max_new_tokens 512 (the base None)"),
    ],
)
def test_other_generation_settings(tmp_path, ours, theirs, text):
    files = [{"generation_config__json": content} for content in (ours, theirs)]
    found = notices(tmp_path, files[0], ocr=files[1], vqa={})
    assert found == [
        f"expert ocr: generation_config.json has {text}; the merged model has the base's settings"
    ] * bool(text)


def test_one_notice_for_each_difference(tmp_path):
    theirs = {"tokenizer__json": tokenizer("<box>"), "chat_template__jinja": ONE}
    base = {"tokenizer__json": tokenizer(), "chat_template__jinja": OTHER}
    found = notices(tmp_path, base, a=theirs, b=theirs, c={})
    assert [text[:13] for text in found] == ["experts a, b:"] * 2


def test_a_model_in_memory_has_no_files(tmp_path):
    base = model(tmp_path / "base", chat_template__jinja=ONE)
    open_models(base, {"a": {Q: torch.zeros(2, 2)}})
