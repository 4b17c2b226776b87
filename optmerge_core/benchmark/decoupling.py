"""DAMC's decoupling (Table 5) for training: features and text train adapters of their own.

Both are ordinary PEFT adapters of one specialist, active together; a mask on each adapter's output
keeps it to its kind of token.
"""

import torch
from peft.tuners.lora import LoraLayer

from optmerge_core.online import TEXT

FEATURES = "default"


def decouple(model, config, placeholder):
    """Add the adapter "text" to a PEFT model; its own now serves only the placeholders' tokens.

    placeholder: the number of the specialist's modality token. Returns the model.
    """
    model.add_adapter(TEXT, config)
    masks = {}

    def note(module, arguments, inputs):
        features = (inputs["input_ids"] == placeholder).unsqueeze(-1)
        masks[FEATURES], masks[TEXT] = features, ~features

    def keep(adapter):
        return lambda module, inputs, output: torch.where(masks[adapter], output, 0.0)

    model.register_forward_pre_hook(note, with_kwargs=True)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([FEATURES, TEXT])
            for adapter in (FEATURES, TEXT):
                layer.lora_B[adapter].register_forward_hook(keep(adapter))
    return model
