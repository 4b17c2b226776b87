"""How the two toolkits ask: prompt, dtype, attention and image limits, which decide scores too.

As lmms-eval 0.7.3 and VLMEvalKit's sources of 2025 have them; what was not looked up says so. The
same model can score 44.7 in one and 58.3 in the other.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

UNKNOWN = "not looked up"
_OWN = "the model's code"
_DEFAULT, _FLASH = "transformers' default", "FlashAttention 2"
_PIXELS = "{min_pixels} to {max_pixels} pixels"

SETTINGS: dict[str, dict[str, tuple[str, str, str]]] = {
    "internvl_chat": {
        "lmms-eval": ("bfloat16", _OWN, "at most 6 tiles of 448 x 448 and a thumbnail"),
        "VLMEvalKit": (
            "bfloat16", _OWN,
            "at most 6 tiles; 12 for ChartQA, MMMU, OCRVQA, 18 for DocVQA, 24 for InfographicVQA",
        ),
    },
    "internvl": {"lmms-eval": ("bfloat16", _DEFAULT, "at most 12 tiles")},
    "qwen2_vl": {
        "lmms-eval": ("the checkpoint's", _DEFAULT, _PIXELS),
        "VLMEvalKit": ("the checkpoint's", _FLASH, _PIXELS),
    },
    "qwen2_5_vl": {
        "lmms-eval": ("bfloat16", _DEFAULT, _PIXELS),
        "VLMEvalKit": ("the checkpoint's", _FLASH, _PIXELS),
    },
    "qwen3_vl": {"lmms-eval": ("bfloat16", _DEFAULT, _PIXELS)},
    "llava": {"lmms-eval": ("the checkpoint's", _DEFAULT, "the processor's")},
    "llava_next": {
        "lmms-eval": ("the checkpoint's", _DEFAULT, "the processor's"),
        "VLMEvalKit": ("float16", f"{_FLASH} where it is installed", "the processor's"),
    },
    "llava_onevision": {
        "lmms-eval": ("the checkpoint's", _DEFAULT, "the processor's"),
        "VLMEvalKit": (UNKNOWN, UNKNOWN, UNKNOWN),
    },
    "qwen2_5_omni": {
        "lmms-eval": ("the checkpoint's", "eager", "as Qwen/Qwen2.5-Omni-7B's processor has them"),
        "VLMEvalKit": ("the checkpoint's", _FLASH, _PIXELS),
    },
    "qwen3_omni_moe": {"lmms-eval": ("the checkpoint's", _FLASH, "the processor's")},
}  # fmt: skip
"""model_type -> toolkit -> dtype, attention, what becomes of images, if nothing else is said."""
PIXELS = {
    "qwen2_vl": {"min_pixels": 3136, "max_pixels": 602112},
    "qwen2_5_vl": {"min_pixels": 200704, "max_pixels": 1605632},
    "qwen3_vl": {"min_pixels": 200704, "max_pixels": 1605632},
}
"""model_type -> lmms-eval's own limits of pixels."""

_WORD = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_NONE = "the question alone"
LMMS_EVAL = {
    "VizWiz": "When the provided information is insufficient, respond with 'Unanswerable'. "
    + _WORD,
    "GQA": _WORD,
    "MathVista": "what kind of number or letter to answer, by the question",
    "MATH-Vision": "before it: Please solve the problem step by step and put your answer in one "
    '"\\boxed{}".',
    "ChartQA": "Answer the question with a single word.",
    "TextVQA": _WORD,
    "MMMU": f"{_LETTER} Or: {_WORD}",
    "DocVQA": _WORD,
    "ScienceQA": _LETTER,
    "AI2D": _LETTER,
    "InfographicVQA": _WORD,
} | dict.fromkeys(
    ["RefCOCO", "RefCOCO+", "RefCOCOg"],
    "before it: how boxes are written (numbers from 0 to 1) and what is asked",
)
"""Benchmark -> what lmms-eval adds to the question, for models without an entry of their own."""
_LETTERS = dict.fromkeys(["MMMU", "ScienceQA", "AI2D"], _LETTER)
_WORDS = ["GQA", "ChartQA", "TextVQA", "OCRVQA", "DocVQA", "InfographicVQA"]
_MATHS = ["MathVista", "MATH-Vision"]
_SHORT = "Please try to answer the question with short words or phrases if possible."
_SELECT = "Please select the correct answer from the options above."
VLMEVALKIT = {
    "InternVLChat": dict.fromkeys(_WORDS, _WORD) | dict.fromkeys(_MATHS, _NONE) | _LETTERS,
    "Qwen2VLChat": dict.fromkeys([*_WORDS, *_MATHS], _SHORT) | dict.fromkeys(_LETTERS, _SELECT),
    "LLaVA_Next": _LETTERS,
}
"""VLMEvalKit's model class -> benchmark -> what it adds to the question."""


def settings(model_type: str, given: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """dtype, attention and images of a model type in both toolkits, one column a toolkit.

    given: toolkit -> arguments that are passed on, which win over the toolkit's own limits.
    """
    columns = {}
    for toolkit, (dtype, attention, images) in SETTINGS[model_type].items():
        limits = PIXELS.get(model_type, {}) | given.get(toolkit, {})
        columns[toolkit] = {
            "dtype": dtype,
            "attention": attention,
            "images": images.format_map(limits),
        }
    return pd.DataFrame(columns).rename_axis("setting")


def prompts(benchmarks: list[str], model_class: str | None) -> pd.DataFrame:
    """What each toolkit adds to a benchmark's question: a row a benchmark, a column a toolkit.

    model_class: VLMEvalKit's; None if it has none for the model.
    """
    table = {"lmms-eval": {name: LMMS_EVAL.get(name, "no task") for name in benchmarks}}
    if model_class:
        known = VLMEVALKIT.get(model_class, {})
        table["VLMEvalKit"] = {name: known.get(name, UNKNOWN) for name in benchmarks}
    return pd.DataFrame(table).rename_axis("benchmark")
