"""The benchmark's tokenizer: words, single characters, single digits and location tokens."""

import re
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optmerge_core.benchmark.tasks.samples import TASKS, sample
from optmerge_core.benchmark.tasks.scenes import BIN, CHARACTERS, IMAGE_SIZE

PIECES = r" ?[a-z]+| ?[A-Z0-9]|\s|[^\sA-Za-z0-9]"


def word_level(words, pieces):
    """A tokenizer of whole pieces of text (a regular expression) that decodes without loss.

    words: the vocabulary in the order of its numbers, with Ġ for a space; "<unk>" must be in it.
    """
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def vocabulary():
    """What the training questions and answers are made of, sorted, with Ġ for a space."""
    text = " ".join(
        f"{question} {answer}"
        for task in TASKS
        for level in ("grid", "caption", "easy", "full")
        for i in range(300)
        for question, answer, _ in sample(task, "train", i, level).turns
    )
    singles = [f"{space}{c}" for space in ("", " ") for c in sorted(set(CHARACTERS + "0123456789"))]
    pieces = set(re.findall(PIECES, re.sub(r"<loc\d+>", "", text))) | set(singles)
    words = {w for piece in pieces for w in (piece, piece.strip())} - {""}
    words |= {" ", "\n", "user", "assistant"}
    return sorted(w.replace(" ", "Ġ").replace("\n", "Ċ") for w in words)


def build_tokenizer(named):
    """A tokenizer whose decoding is lossless; named: attribute -> special token of a family."""
    locations = [f"<loc{i}>" for i in range(IMAGE_SIZE // BIN + 1)]
    ordered = (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), "<unk>"]
        + locations
        + vocabulary()
    )
    tokenizer = word_level(ordered, PIECES)
    tokenizer.add_tokens(locations)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens=named | {"start_of_turn_token": "<|im_start|>"},
        clean_up_tokenization_spaces=False,
    )


def chat_template(image):
    """A Qwen chat template in which an image part is written as `image`."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
