"""Online composition (Table 5): the specialists' language models stay apart in one Omni model.

Averaging the outputs of linear layers that read the same input is averaging their weights, so what
an online composition can add to a merge is to keep kinds of token apart: a modality's features pass
through that specialist's own weights, the text through common ones, and attention connects them.
It stores a language model for every kind of token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from optmerge_core.omni.model import OmniForConditionalGeneration

TEXT = "text"


class RoutedLinear(nn.Module):
    """A linear layer with one weight matrix (outputs, inputs) for each kind of token."""

    def __init__(self, weights: list[Tensor], bias: Tensor | None, kinds: Callable[[], Tensor]):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)
        self.bias = bias
        self.kinds = kinds

    def forward(self, inputs: Tensor) -> Tensor:
        kinds = self.kinds()
        outputs = inputs.new_empty(*inputs.shape[:-1], len(self.weights[0]))
        for kind, weight in enumerate(self.weights):
            rows = kinds == kind
            outputs[rows] = linear(inputs[rows], weight, self.bias)
        return outputs


def route(
    model: OmniForConditionalGeneration, weights: Mapping[str, Mapping[str, Tensor]]
) -> OmniForConditionalGeneration:
    """Give every kind of token its own linear layers, in place; returns the model.

    weights: "text" and each of the model's modalities -> parameter name -> weight; names as in the
    language model's checkpoint ("model.layers.0.mlp.up_proj.weight"), the same for all kinds;
    `online_weights` makes them.

    Raises ValueError where a kind, a parameter or a shape does not fit.
    """
    kinds = [TEXT, *model.specialists]
    if set(weights) != set(kinds):
        raise ValueError(f"weights for {', '.join(weights)}; needed: {', '.join(kinds)}")
    names = list(weights[TEXT])
    for kind in kinds:
        if different := set(names) ^ set(weights[kind]):
            raise ValueError(f"{kind}: {min(different)} is not given for every kind of token")
    modules = {n: n.removeprefix("model.").removesuffix(".weight") for n in names}
    for name, path in modules.items():
        own = model.language_model.get_submodule(path)
        if not isinstance(own, nn.Linear | RoutedLinear):
            raise ValueError(f"{name} is the weight of a {type(own).__name__}, not a linear layer")
        bias = own.bias
        shape = (own.weights[0] if isinstance(own, RoutedLinear) else own.weight).shape
        for kind in kinds:
            if weights[kind][name].shape != shape:
                given = tuple(weights[kind][name].shape)
                raise ValueError(f"{kind}: {name} has shape {given}, the model's {tuple(shape)}")
        matrices = [weights[kind][name].to(model.dtype) for kind in kinds]
        routed = RoutedLinear(matrices, bias, lambda: model.token_kinds)
        model.language_model.set_submodule(path, routed)
    return model


def online_weights(
    specialists: Mapping[str, Mapping[str, Tensor]],
    text: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """What `route` takes: a modality's tokens keep their specialist's weights, text has a mean.

    specialists: modality -> parameter name -> weight. text: the same for weights that specialists
    trained for text alone (DAMC); without it, text has the mean of the specialists (NaiveMC).
    """
    common = list((text or specialists).values())
    mean = {n: torch.stack([weights[n] for weights in common]).mean(0) for n in common[0]}
    return {TEXT: mean, **specialists}
