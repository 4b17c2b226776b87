"""A tiny Qwen2-VL: the real transformers classes, a real processor, for the LoRA family.

The layout is that of Qwen2-VL-7B (a vision transformer over 2 x 2 merged patches, rotary positions
in three dimensions), with about 1.1 M parameters instead of 8 B.
"""

import torch
from transformers import (
    AutoProcessor,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from optmerge_core.benchmark.models.family import Prompts, text_config
from optmerge_core.benchmark.models.tokenizer import build_tokenizer, chat_template
from optmerge_core.benchmark.tasks.scenes import CELL, IMAGE_SIZE

PATCH = CELL // 2
VISION_START, IMAGE, VISION_END, VIDEO = (
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)


class ImageQwen2VLProcessor(Prompts, Qwen2VLProcessor):
    """The stock Qwen2-VL processor for images alone; the stock class insists on torchvision."""

    placeholder = VISION_START + IMAGE + VISION_END

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])

    @property
    def block(self):
        return VISION_START + (IMAGE_SIZE // CELL) ** 2 * IMAGE + VISION_END

    def arrange(self, pixels, input_ids):
        """Patches as `Qwen2VLImageProcessorPil` lays them out: 2 x 2 neighbours follow each other.

        pixels (b, 3, 56, 56) -> pixel_values (b·64, 3·2·7·7), each patch twice (two frames).
        """
        side = IMAGE_SIZE // CELL
        patches = pixels.unflatten(2, (side, 2, PATCH)).unflatten(-1, (side, 2, PATCH))
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, cell, patch in it, pixels
        frames = patches.unsqueeze(6).expand(*patches.shape[:6], 2, PATCH, PATCH)
        return {
            "pixel_values": frames.reshape(len(pixels) * 4 * side**2, -1),
            "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]).repeat(len(pixels), 1),
            "mm_token_type_ids": (input_ids == self.image_token_id).long(),
        }


AutoProcessor.register(Qwen2VLConfig, ImageQwen2VLProcessor, exist_ok=True)


def build_processor():
    """The processor for 56 x 56 images, 16 image tokens each."""
    tokens = {
        "vision_start_token": VISION_START,
        "vision_end_token": VISION_END,
        "image_token": IMAGE,
        "video_token": VIDEO,
    }
    return ImageQwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
        ),
        tokenizer=build_tokenizer(tokens),
        chat_template=chat_template(ImageQwen2VLProcessor.placeholder),
    )


def build_model(tokenizer, seed=0, text_width=128, text_layers=4, vision_width=96, vision_layers=3):
    """A randomly initialised `Qwen2VLForConditionalGeneration`; the seed decides every weight."""
    torch.manual_seed(seed)
    quarter = text_width // 4 // 2 // 4  # of a head's rotary frequencies
    config = Qwen2VLConfig(
        vision_config={
            "depth": vision_layers,
            "embed_dim": vision_width,
            "hidden_size": text_width,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "initializer_range": 0.06,
        },
        text_config=text_config(tokenizer, text_width, text_layers)
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2 * quarter, quarter, quarter],
            }
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)
