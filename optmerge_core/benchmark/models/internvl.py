"""A tiny InternVL: the real transformers classes, a real processor.

The layout is that of InternVL2.5-1B (a vision transformer, pixel shuffle, an MLP connector and a
Qwen2 language model), with about 0.9 M parameters instead of 0.9 B.
"""

import re

import torch
from transformers import (
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    ProcessorMixin,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from optmerge_core.benchmark.models.family import Prompts, text_config
from optmerge_core.benchmark.models.tokenizer import build_tokenizer, chat_template
from optmerge_core.benchmark.tasks.scenes import IMAGE_SIZE

IMAGE_TOKENS = 16
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


class ImageInternVLProcessor(Prompts, InternVLProcessor):
    """The stock InternVL processor for images alone.

    The stock class insists on a video processor, and that one on torchvision, of which there is no
    CPU build everywhere. The signature below is what transformers reads to know the parts.
    """

    placeholder = "<IMG_CONTEXT>"

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

    @property
    def block(self):
        return "<img>" + self.image_seq_length * "<IMG_CONTEXT>" + "</img>"

    def arrange(self, pixels, input_ids):
        return {"pixel_values": pixels}


AutoProcessor.register(InternVLConfig, ImageInternVLProcessor, exist_ok=True)


def build_processor():
    """The processor for 56 x 56 images, 16 image tokens each."""
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, crop_to_patches=False
    )
    return ImageInternVLProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(TOKENS),
        image_seq_length=IMAGE_TOKENS,
        chat_template=chat_template(ImageInternVLProcessor.placeholder),
    )


def build_model(tokenizer, seed=0, text_width=128, text_layers=4, vision_width=96, vision_layers=3):
    """A randomly initialised `InternVLForConditionalGeneration`; the seed decides every weight."""
    torch.manual_seed(seed)
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
        text_config={"model_type": "qwen2"} | text_config(tokenizer, text_width, text_layers),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config)
