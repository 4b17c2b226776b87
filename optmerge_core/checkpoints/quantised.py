"""Quantised checkpoints: FP8 with its scales is read exactly, all others are refused.

FP8 as transformers' `FineGrainedFP8Config` and DeepSeek-V3 store it: beside a weight in 8 bits lies
`<weight>_scale_inv`, one number for each block of rows and columns (or one for all), by which the
block is multiplied. What merges of it is float32, and so is the output where no dtype is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.weights import Renamed, Weights

SETTINGS = "quantization_config"
SCALE, ACTIVATION = "_scale_inv", "activation_scale"
_OPENED = "dequantise it, AutoModelForImageTextToText.from_pretrained(FOLDER{})"
_BY_CONFIG = _OPENED.format(", quantization_config={}Config(dequantize=True)")
REMEDY = {
    "bitsandbytes": f"{_OPENED.format('')}.dequantize()",
    "compressed-tensors": _BY_CONFIG.format("CompressedTensors"),
    "mxfp4": _BY_CONFIG.format("Mxfp4"),  # as gpt-oss is published
}
"""Method -> what to do about it; of others, take the model that was quantised."""


class Dequantised(Renamed):
    """A checkpoint in FP8 as float32 weights: each is the product of number and scale."""

    def __init__(self, weights: Weights, settings: dict[str, Any]):
        self.block: list[int] = settings.get("weight_block_size") or [0, 0]
        self.scales = {name: scale for name in weights if (scale := name + SCALE) in weights}
        aside = {*self.scales.values(), *(n for n in weights if n.endswith(ACTIVATION))}
        super().__init__(weights, {name: name for name in weights if name not in aside})
        for name, scale in self.scales.items():
            self._check(name, weights.shape(name), scale, weights.shape(scale))

    def _check(
        self, name: str, shape: tuple[int, ...], scale: str, scales: tuple[int, ...]
    ) -> None:
        if math.prod(scales) == 1:
            return
        expected = [math.ceil(n / b) for n, b in zip(shape[-2:], self.block, strict=True) if b]
        if [*scales] != [*shape[:-2], *expected]:
            raise CheckpointError(
                f"{self.folder}: {scale} has shape {scales} beside {name} of {shape}, which does "
                f"not fit blocks of {self.block}; download the checkpoint again"
            )

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        if name not in self.scales:
            return tensor
        scale = self.weights[self.scales[name]].float()
        if scale.numel() > 1:
            for dim, size in ((-2, self.block[0]), (-1, self.block[1])):
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, tensor.shape[dim])
        return tensor.float() * scale

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.scales else self.weights.dtype(name)

    def config(self) -> dict[str, Any]:
        """config.json without the quantisation, of float32 weights."""
        config = {key: value for key, value in self.weights.config().items() if key != SETTINGS}
        return config | {key: "float32" for key in ("dtype", "torch_dtype") if key in config}

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        with_scales = [part for n in names for part in (n, self.scales.get(n)) if part]
        return self.weights.streamed(with_scales)


def dequantised(weights: Weights) -> Weights:
    """The weights as numbers that merge: themselves, or what FP8 stands for.

    Raises `CheckpointError` for another quantisation.
    """
    settings = weights.config().get(SETTINGS)
    if not settings:
        return weights
    method = settings.get("quant_method")
    if method == "fp8":
        return Dequantised(weights, settings)
    remedy = "take the model that it was made from, as its card says"
    if str(method) in REMEDY:
        remedy = f"{REMEDY[str(method)]}.save_pretrained(OTHER), or better, {remedy}"
    raise CheckpointError(f"{weights.folder}: quantised by {method}; {remedy}")
