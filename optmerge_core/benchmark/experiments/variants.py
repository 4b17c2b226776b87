"""Variants of methods that the paper's tables and notebooks compare."""

from optmerge_core.methods.optmerge import PRESETS


def ablation(study):
    """Table 4, step by step from WUDI to OptMerge's LoRA preset: label -> (method, options).

    Adam's learning rate is the study's for WUDI, SGD's the published one.
    """
    sgd = {"optimizer": "sgd", "learning_rate": PRESETS["lora"].learning_rate}
    return {
        "WUDI Merging": ("wudi", study.options("wudi")),
        "+ SGD": ("wudi", sgd),
        "+ Initialization": ("wudi", sgd | {"init": "mean"}),
        "+ Low-rank": ("optmerge", {"preset": "lora"}),
    }


def beyond():
    """What may do better than OptMerge without data: label -> (method, options).

    WUDI's loss minimised in one step, shrunk towards the sum of the task vectors, and OptMerge's
    LoRA preset at the learning rate published for merging modalities.
    """
    return {
        "Ridge": ("wudi", {"optimizer": "ridge"}),
        "OptMerge, SGD 5e-2": (
            "optmerge",
            {"preset": "lora", "learning_rate": PRESETS["modality"].learning_rate},
        ),
    }
