"""mergekit files whose numbers differ by layer and by tensor, and those of its further methods.

As mergekit_cases.py, on models of three layers; mergekit's numbers for them are in
mergekit_layers_golden.safetensors.
"""

from pathlib import Path

import yaml
from mergekit_cases import NOISE, WEIGHTS, case

LAYERED = Path(__file__).with_name("mergekit_layers_golden.safetensors")
LAYERS = 3
MODELS = NOISE | {"near": 10_000, "nearer": 20_000, "far": 2}
"""Of the near ones, the products and sums of squares are below the 1e-6 of mergekit's methods."""

RISING, FALLING = [0, 0.5, 1], [1.25, 0.25]
"""The first has a number for each of three layers, the second for the ends."""
PARTS = [
    {"filter": "self_attn", "value": [0.25, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.75, 0.25]},
    {"value": 0.5},
]
"""A gradient for either half of a layer, one number for norms, embeddings and head."""
MLP = [{"filter": "mlp", "value": 0.4}]
"""Of the rest, what stands for all models counts, or the default."""
DENSE = [{"filter": "*", "value": [0.4, 0.9]}]


def pair(merge_method, first, second, base=True, weights=None, **parameters):
    """A file of two models, of which the first may be the base."""
    own = weights or ({}, {})
    models = [
        {"model": name} | ({"parameters": {"weight": weight}} if weights else {})
        for name, weight in zip((first, second), own, strict=True)
    ]
    content = {"merge_method": merge_method, "models": models}
    return content | ({"base_model": "base"} if base else {}) | {
        "parameters": parameters, "dtype": "float32",
    }  # fmt: skip


def sliced(end=LAYERS, start=0, **parameters):
    """A whole model written as a slice, as most files of SLERP are."""
    sources = [{"model": name, "layer_range": [start, end]} for name in ("base", "far")]
    return {
        "slices": [{"sources": sources}], "merge_method": "slerp", "base_model": "base",
        "parameters": parameters, "dtype": "float32",
    }  # fmt: skip


def many(merge_method, names, **parameters):
    """A file of models without numbers of their own."""
    content = {"merge_method": merge_method, "models": [{"model": name} for name in names]}
    return content | {"base_model": "base", "parameters": parameters, "dtype": "float32"}


BY_LAYER = (RISING, FALLING, 0.75)
SPREAD = (FALLING, MLP, PARTS)
LAMBDA = {"lambda": [{"filter": "mlp", "value": [0.2, 1.5]}, {"value": [1, 0.5]}]}
FLAGS = [{"filter": "mlp", "value": True}, {"value": False}]
THREE, NEAR = ("ocr", "vqa", "chart"), ("near", "nearer")

FILES = {
    "linear, by layer": case("linear", BY_LAYER),
    "linear, by filter, with the base": case("linear", SPREAD, base=True, weight=[0.5, 1]),
    "task_arithmetic, by layer": case("task_arithmetic", BY_LAYER, base=True),
    "task_arithmetic, all": case(
        "task_arithmetic", SPREAD, base=True, weight=0.75, normalize=FLAGS, **LAMBDA
    ),
    "ties, by layer": case("ties", BY_LAYER, ([0.3, 1], 0.5, RISING[1:]), base=True),
    "ties, all": case(
        "ties", SPREAD, (PARTS, MLP, 0.7), base=True, weight=1, density=DENSE,
        normalize=[True, False], **LAMBDA,
    ),
    "ties, one for all": case("ties", base=True, weight=PARTS, density=DENSE),
    "dare_linear, by layer": case("dare_linear", BY_LAYER, base=True, density=[1, 1.0]),
    "dare_ties, all": case("dare_ties", SPREAD, base=True, weight=1, normalize=FLAGS, **LAMBDA),
    "breadcrumbs": case("breadcrumbs", WEIGHTS, (0.3, 0.55, 0.9), base=True, gamma=0.2),
    "breadcrumbs, all": case(
        "breadcrumbs", SPREAD, (PARTS, 0.6, MLP), base=True, weight=1, gamma=[0.05, 0.3], **LAMBDA
    ),
    "breadcrumbs_ties": case("breadcrumbs_ties", WEIGHTS, base=True, density=0.6),
    "breadcrumbs_ties, all": case(
        "breadcrumbs_ties", BY_LAYER, (0.5, DENSE, PARTS), base=True, gamma=MLP,
        normalize=True,
    ),
    "della": case("della", WEIGHTS, base=True),
    "della, all": case("della", SPREAD, base=True, weight=1, normalize=FLAGS, **LAMBDA),
    "della_linear, by layer": case("della_linear", BY_LAYER, base=True, density=1, epsilon=0.1),
    "sce": many("sce", THREE),
    "sce, selected": many("sce", THREE, select_topk=0.4),
    "sce, by layer": many("sce", THREE, select_topk=[{"filter": "mlp", "value": RISING}]),
    "sce, near": many("sce", NEAR, int8_mask=True),
    "model_stock": many("model_stock", THREE),
    "model_stock, by filter": many("model_stock", ("base", *THREE), filter_wise=FLAGS),
    "model_stock, near": many("model_stock", NEAR),
    "slerp": pair("slerp", "base", "far", t=0.3),
    "slerp, close": pair("slerp", "ocr", "base", t=0.3),
    "slerp, all": pair("slerp", "base", "far", t=PARTS),
    "slerp, as a slice": sliced(t=[{"filter": "mlp", "value": [0, 1]}, {"value": RISING}]),
    "nuslerp": pair("nuslerp", "ocr", "far", weights=(1, 0.4)),
    "nuslerp, by layer": pair("nuslerp", "ocr", "far", weights=(PARTS, 0.4)),
    "nuslerp, by column": pair(
        "nuslerp", "ocr", "vqa", weight=1, nuslerp_flatten=False, nuslerp_row_wise=FLAGS
    ),
    "nuslerp, no base": pair("nuslerp", "vqa", "far", False, weights=(FALLING, PARTS)),
    "nuslerp, no base, by row": pair("nuslerp", "base", "far", False, weight=1,
                                     nuslerp_flatten=FLAGS),
}  # fmt: skip
ONE_LAYER = {
    "ties": FILES["ties, all"],
    "slerp": FILES["slerp, all"],
}
"""The same of models of one layer, which is a gradient's end."""

ROWS, WIDTH, DENSITY, EPSILON = 4000, 6, 0.6, 0.3
"""Of a tensor on which DELLA's drawing is counted."""


def layered_files():
    """Name -> (layers, text), in the order of the golden values."""
    files = {name: (LAYERS, content) for name, content in FILES.items()}
    files |= {f"{name}, one layer": (1, content) for name, content in ONE_LAYER.items()}
    return {
        name: (layers, yaml.safe_dump(content, sort_keys=False))
        for name, (layers, content) in files.items()
    }
