"""Questions to real checkpoints: prompts by their own chat template, pictures, answers as said.

A model with a vocabulary of its own has to be told what form an answer should have.
"""

import re
from functools import partial
from pathlib import Path

from optmerge_core.checkpoints.formats import read_json
from optmerge_core.errors import extra
from optmerge_core.evaluation.metrics import Box, metric_of
from optmerge_core.merging.templates import prompt_fault

with extra("models"):
    import transformers
    from PIL import Image
    from transformers import AutoProcessor, ProcessorMixin

SIDE = 448  # pixels that the shorter side of a picture has at least
WORD = "Answer with a single word, a number in digits or the characters alone."
BOX = (
    "Answer with its box alone, as four numbers from 0 to {unit}: left, top, right, bottom, where "
    "{unit} is the picture's whole width or height."
)


def load_processor(folder, trust_remote_code=False, template=None):
    """The folder's processor; without its part for videos where that, or torchvision, is missing.

    `template` replaces its chat template; where it has none, it gets its tokenizer's. Raises
    `ValueError` for a folder that has none, or whose processor is Python code of its own that has
    not been allowed to run.
    """
    folder = Path(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, OSError) as error:
        if not re.search("torchvision|video processor", str(error), re.IGNORECASE):
            raise
        processor = _image_only(folder, error)
    except ValueError as error:
        raise ValueError(
            f"{folder}: its processor does not open ({str(error).splitlines()[0]}); if that is the "
            "checkpoint's own Python code, read it and let the recipe say trust_remote_code: true"
        ) from error
    if not hasattr(processor, "apply_chat_template") or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{folder}: no processor for pictures and text (found {type(processor).__name__}); "
            "copy the original's processor and tokenizer files beside the weights, or use the "
            "checkpoint's conversion to transformers, often named ...-hf"
        )
    own = getattr(processor, "chat_template", None)
    processor.chat_template = template or own or processor.tokenizer.chat_template
    return processor


def prompt_of(processor, content):
    """The prompt of a user's message, up to the model's answer, as its chat template writes it."""
    asked = [{"role": "user", "content": content}]
    return processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)


def check_prompts(processor, folder):
    """Raise `ValueError` where prompts would be empty, before anything is asked by them."""
    if problem := prompt_fault(partial(prompt_of, processor), pictures=True):
        raise ValueError(
            f"{folder}: {problem}, and answers to that would tell nothing; name an expert or a "
            "folder whose processor makes prompts (the recipe's processor)"
        )


def processor_class(folder):
    """The name of a folder's processor class, as its files say; "" where they do not."""
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    found = (read_json(folder / name) for name in files if (folder / name).is_file())
    return next((config["processor_class"] for config in found if "processor_class" in config), "")


def _image_only(folder, error):
    """A stock processor without its part for videos, which needs torchvision and its own file."""
    name = processor_class(folder)
    stock = getattr(transformers, name or "-", None)
    if not (isinstance(stock, type) and issubclass(stock, ProcessorMixin)):
        raise ImportError(
            f"{folder}: its processor does not open; is torchvision there?"
        ) from error

    class ImageOnly(stock):
        @classmethod
        def get_attributes(cls):
            return [part for part in super().get_attributes() if part != "video_processor"]

    try:
        return ImageOnly.from_pretrained(folder)
    except (ImportError, TypeError) as other:
        raise ImportError(f"{folder}: {name} needs torchvision; install it ({other})") from other


def least_side(processor):
    """Pixels that a picture's shorter side should have: SIDE, or what a fixed size makes of it."""
    size = getattr(processor.image_processor, "size", None)
    fixed = [size.get(key) for key in ("height", "width")] if hasattr(size, "get") else []
    return min([SIDE, *filter(None, fixed)])


def enlarged(image, side=SIDE):
    """In RGB, its shorter side at least `side` pixels (bicubic); larger ones are left alone."""
    image = image.convert("RGB")
    factor = side / min(image.size)
    if factor <= 1:
        return image
    return image.resize([round(s * factor) for s in image.size], Image.Resampling.BICUBIC)


def messages(sample, side=SIDE):
    """The conversation up to the model's answer; of the right answer only its form is told.

    side: pixels that the picture's shorter side has at least.
    """
    metric = metric_of(sample)
    form = BOX.format(unit=metric.unit) if isinstance(metric, Box) else WORD
    image = enlarged(sample["image"], side)
    text = f"{sample['question']}\n{form}"
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def prepare(processor, samples):
    """What `generate` takes for samples (image, question, answer, task), padded on the left."""
    side = least_side(processor)
    return processor.apply_chat_template(
        [messages(sample, side) for sample in samples],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
