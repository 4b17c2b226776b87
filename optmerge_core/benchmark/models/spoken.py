"""The study `smol_omni`: SmolLM2 taught in text, and on it a model that sees and one that hears.

All are built, not shipped: the common language model of SmolLM2 and an adapter, as the base of the
study smol is; the specialists of it and a tower, InternVL's class with the study smol's tower and
projector, Voxtral's with Whisper's encoder. What ships of a specialist is a LoRA adapter with the
projector that it trained; so Voxtral's own is of zeros. One tokenizer serves all, in which the
places of pictures and of sound are SmolLM2's spare tokens.
"""

import copy
from pathlib import Path

import torch

from optmerge_core.benchmark.models import ear, smol
from optmerge_core.benchmark.models.built import built
from optmerge_core.benchmark.models.family import stop_at_the_end
from optmerge_core.benchmark.tasks.english.drawing import CELLS
from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.omni.model import specialist_class
from optmerge_core.places import checkout

MODALITIES = ("vision", "speech")
BUILD = "python -m optmerge_core.benchmark smol-omni-base"
"""the command that the logs name, and then a recipe whose models have not been built"""
LANGUAGE = "language_model"
ADAPTER = "language_model_adapter"
IMAGE = f"<img>{'<IMG_CONTEXT>' * CELLS**2}</img>"
START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
SIGHT = "sight.safetensors"


def prompt(exchange, picture="told", voice="written", tokens=ear.TOKENS):
    """What is asked: the picture, what is heard, what is written, a line each; as smol's template.

    picture: "seen", "told" or None; voice: "heard", "written" or None. A part of None is left out.
    tokens: of sound.
    """
    shown, asked = exchange.shown, exchange.asked
    lines = []
    if shown is not None and picture:
        lines.append(IMAGE if picture == "seen" else shown.told)
    if voice:
        lines.append(ear.AUDIO * tokens if voice == "heard" else asked.heard)
    if asked.written:
        lines.append(asked.written)
    return START + "\n".join(lines) + END


def places():
    """Input's name -> the number of the token in whose place its features stand."""
    tokenizer = smol.build_tokenizer()
    return {
        "pixel_values": tokenizer.context_image_token_id,
        "frames": tokenizer.convert_tokens_to_ids(ear.AUDIO),
    }


# ---------------------------------------------------------------- folders that are built


def folders(place=None, sight=None):
    """Build what is missing of the study's models; returns what has a log: name -> folder.

    place: as training leaves it (default: data/benchmark/smol_omni); sight: the file with tower and
    projector of the study smol (default: beside it, in smol/). Raises `ValueError` where what is
    built is not what was trained.
    """
    place = Path(place or checkout() / "data" / "benchmark" / "smol_omni")
    sight = Path(sight or place.parent / "smol" / SIGHT)
    base, found = place / LANGUAGE, {}
    builds = {
        LANGUAGE: (lambda folder: build_language_model(folder, place / ADAPTER), ADAPTER),
        "specialists/vision": (lambda folder: build_vision(folder, base, sight), str(sight)),
        "specialists/speech": (lambda folder: build_speech(folder, base), "language_model"),
    }
    for name, (build, of) in builds.items():
        if Path(place, f"{name}.json").exists():
            found[name] = built(place / name, build, f"restore {of}")
    return found


def build_language_model(folder, adapter):
    """SmolLM2 and what an adapter's folder taught it, float16; returns the weights' SHA-256."""
    model = smol.add_products(copy.deepcopy(smol.language_model()), adapter)
    tokenizer = smol.build_tokenizer()
    stop_at_the_end(model, tokenizer).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path(folder, "chat_template.jinja").write_text(smol.CHAT_TEMPLATE)
    return Checkpoint(folder).sha256()["model.safetensors"]


def build_vision(folder, language_model, sight):
    """An InternVL on the folder `language_model`, with the tower and projector of a file."""
    if not sight.is_file():
        raise ValueError(
            f"{sight} is not there: the study smol's base has to be trained first, or another "
            "file with tower and projector named (--sight)"
        )
    processor = smol.build_processor()
    model = with_language_model(smol.build_model(processor.tokenizer), language_model)
    smol.put(model, sight).half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return Checkpoint(folder).sha256()["model.safetensors"]


def build_speech(folder, language_model):
    """A Voxtral on the folder `language_model`, with Whisper's encoder and a projector of zeros."""
    tokenizer = smol.build_tokenizer()
    model = with_language_model(ear.build_ear(tokenizer), language_model)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.zero_()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ear.feature_extractor().save_pretrained(folder)
    return Checkpoint(folder).sha256()["model.safetensors"]


def with_language_model(model, folder):
    """A specialist whose language model becomes that of a folder."""
    weights = Checkpoint(folder)
    own = {n.removeprefix("model."): weights[n].float() for n in weights if n != "lm_head.weight"}
    model.get_decoder().load_state_dict(own)
    model.lm_head.weight.data.copy_(own["embed_tokens.weight"])
    return model


def open_specialist(folder):
    """A built specialist, float32, in its own class."""
    kind = specialist_class(Checkpoint(folder).config())
    return kind.from_pretrained(folder, dtype=torch.float32)
