"""A tiny InternVL: the real transformers classes, a real tokenizer and a real processor.

The layout is that of InternVL2.5-1B (a vision transformer, pixel shuffle, an MLP connector and a
Qwen2 language model), with about 0.9 M parameters instead of 0.9 B.
"""

import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from .scenes import BIN, CHARACTERS, IMAGE_SIZE
from .tasks import TASKS, sample

IMAGE_TOKENS = 16
PIECES = r" ?[a-z]+| ?[A-Z0-9]|\s|[^\sA-Za-z0-9]"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    """Words, single characters, single digits and location tokens; decoding is lossless."""
    text = " ".join(
        f"{question} {answer}"
        for task in TASKS
        for level in ("grid", "caption", "easy", "full")
        for i in range(300)
        for question, answer, _ in sample(task, "train", i, level).turns
    )
    locations = [f"<loc{i}>" for i in range(IMAGE_SIZE // BIN + 1)]
    singles = [f"{space}{c}" for space in ("", " ") for c in sorted(set(CHARACTERS + "0123456789"))]
    pieces = set(re.findall(PIECES, re.sub(r"<loc\d+>", "", text))) | set(singles)
    words = {w for piece in pieces for w in (piece, piece.strip())} - {""} | {
        " ",
        "\n",
        "user",
        "assistant",
    }
    ordered = (
        list(SPECIAL)
        + ["<unk>"]
        + locations
        + sorted(w.replace(" ", "Ġ").replace("\n", "Ċ") for w in words)
    )
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(ordered)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(locations)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "start_of_turn_token": "<|im_start|>",
        },
        clean_up_tokenization_spaces=False,
    )


class ImageInternVLProcessor(InternVLProcessor):
    """The stock InternVL processor for images alone.

    The stock class insists on a video processor, and that one on torchvision, of which there is no
    CPU build everywhere. The signature below is what transformers reads to know the parts.
    """

    def __init__(
        self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None
    ):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id
        self.video_token = tokenizer.video_token
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})")


AutoProcessor.register(InternVLConfig, ImageInternVLProcessor, exist_ok=True)


def build_processor():
    """The processor for 56 x 56 images, 16 image tokens each."""
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, crop_to_patches=False
    )
    return ImageInternVLProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        image_seq_length=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer, seed=0, text_width=128, text_layers=4, vision_width=96, vision_layers=3):
    """A randomly initialised `InternVLForConditionalGeneration`; the seed decides every weight."""
    torch.manual_seed(seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = InternVLConfig(
        vision_config={
            "hidden_size": vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 4,
            "intermediate_size": 2 * vision_width,
            "image_size": (IMAGE_SIZE, IMAGE_SIZE),
            "patch_size": (7, 7),
            "initializer_range": 0.06,
            "layer_scale_init_value": 1.0,
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "initializer_range": 0.06,
            "vocab_size": len(tokenizer),
            "hidden_size": text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 2 * text_width,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": eos,
            "pad_token_id": pad,
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    model.generation_config.bos_token_id = None
    return model


def prompt(question):
    """The chat template applied to one image and one question, up to the answer."""
    return f"<|im_start|>user\n<IMG_CONTEXT>{question}<|im_end|><|im_start|>assistant\n"
