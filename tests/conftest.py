"""Tiny models of the real classes, saved as transformers saves them, shared by all tests."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jaxtyping import install_import_hook

# Types and shapes in the signatures of methods/ hold wherever a test calls them; an int is a float.
BEARTYPE = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook("optmerge_core.methods", BEARTYPE)

EXPERTS = ("chart", "ocr", "vqa")
SLOW_NOTEBOOKS = ("03", "04", "05", "06", "07", "playground")
"""How the names of those begin that take a minute or more, and so do their solutions."""


@pytest.hookimpl(tryfirst=True)  # before what `-m` leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first: what takes longest is not begun when one worker has no more to do."""
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.stem.startswith(SLOW_NOTEBOOKS):
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.suffix != ".ipynb")


@pytest.fixture(autouse=True)
def no_remembered_answers(monkeypatch):
    """A test's model speaks for itself; notebooks may hear what it said before."""
    monkeypatch.delenv("OPTMERGE_ANSWERS", raising=False)


def save_side_files(folder: Path) -> None:
    """A real tokenizer and image processor, and a remote-code file, beside a model's weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<image>", "what", "colour", "red", "blue"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)
    GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    (folder / "modeling_custom.py").write_text("# remote code travels along\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """Folders of a 2-layer InternVL: `.base` and `.experts` (name -> folder), float16, sharded.

    Experts differ from the base by small noise on the language model's linear layers, and are
    sharded otherwise than the base. Tests must not write into these folders.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    root = tmp_path_factory.mktemp("tiny")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [7, 7],
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=2, image_seq_length=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(config).half()
        model.save_pretrained(root / "base", max_shard_size="20KB")
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for expert in EXPERTS:
            for name, parameter in model.named_parameters():
                if "language_model.layers" in name and parameter.ndim == 2:
                    noise = 0.002 * torch.randn(parameter.shape)
                    parameter.data.copy_(start[name] + noise)
            model.save_pretrained(root / expert, max_shard_size="35KB")
    for folder in root.iterdir():
        save_side_files(folder)
    return SimpleNamespace(
        base=root / "base", experts={name: root / name for name in EXPERTS}, root=root
    )


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> SimpleNamespace:
    """Specialists for vision, audio and video on one language model (tests/specialists.py)."""
    from specialists import make_family

    return make_family(tmp_path_factory.mktemp("specialists"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in hub (tests/hub.py), empty, which this process takes for the hub."""
    import huggingface_hub
    from hub import Hub

    with Hub(tmp_path / "hub") as server:
        server.root.mkdir()
        server.use(monkeypatch, tmp_path / "cache")
        yield server
    huggingface_hub.close_session()
