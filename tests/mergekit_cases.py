"""mergekit files and the tiny models they merge: what tests and make_mergekit_golden.py share.

Models and files follow from seeds alone, by numpy's and Python's own generators, which give the
same on every machine. mergekit's numbers for them are in mergekit_golden.safetensors.
"""

import hashlib
import json
from pathlib import Path
from random import Random

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

GOLDEN = Path(__file__).with_name("mergekit_golden.safetensors")
EXPERTS = ("ocr", "vqa", "chart")
MORE = (*EXPERTS, "grounding")
NOISE = dict.fromkeys(MORE, 100)
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = (0.25, 0.5, 1.25)  # sums that cancel exactly do so in any precision
DENSITIES = (0.3, 0.55, 0.9)
RANDOM_FILES = 230

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 5,
    "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 2, "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": (4, 4), "self_attn.k_proj": (2, 4), "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4), "mlp.gate_proj": (6, 4), "mlp.up_proj": (6, 4),
    "mlp.down_proj": (4, 6), "input_layernorm": (4,), "post_attention_layernorm": (4,),
}  # fmt: skip


def shapes(layers):
    """Parameter -> shape, in the order of the golden values."""
    numbered = [(number, *item) for number in range(layers) for item in LAYER.items()]
    return {
        "lm_head.weight": (5, 4),
        "model.embed_tokens.weight": (5, 4),
        **{f"model.layers.{number}.{name}.weight": shape for number, name, shape in numbered},
        "model.norm.weight": (4,),
    }


SHAPES = shapes(1)


def write_models(root, dtypes=DTYPES, layers=1, divisors=NOISE):
    """`root/<dtype>/<name>` for the base and experts that differ in every parameter.

    divisors: expert -> what the standard normal numbers are divided by that it adds to the base's
    weights, which are such numbers divided by 2.
    In the 16-bit dtypes, many entries of an expert have the same magnitude, and experts cancel
    exactly.
    """
    for dtype in dtypes:
        for number, name in enumerate(("base", *divisors)):
            base, own = np.random.default_rng(0), np.random.default_rng(number)
            tensors = {}
            for parameter, shape in shapes(layers).items():
                start = torch.from_numpy(base.standard_normal(shape) / 2).to(getattr(torch, dtype))
                noise = torch.from_numpy(own.standard_normal(shape) / divisors.get(name, 1))
                tensors[parameter] = start + noise.to(start.dtype) if number else start
            folder = root / dtype / name
            folder.mkdir(parents=True)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            config = CONFIG | {"num_hidden_layers": layers, "dtype": dtype}
            (folder / "config.json").write_text(json.dumps(config))


def case(merge_method, weights=None, densities=None, base=False, listed=False, **parameters):
    """A mergekit file: weights and densities beside the models, the rest for all of them."""
    beside = {"weight": weights, "density": densities}
    models = [
        {
            "model": name,
            "parameters": {key: values[i] for key, values in beside.items() if values},
        }
        for i, name in enumerate(EXPERTS)
    ]
    content = {"merge_method": merge_method, "models": [{"model": "base"}] * listed + models}
    content |= {"base_model": "base"} if base else {}
    return content | {"parameters": parameters, "dtype": "float32"}


CASES = {
    "linear": case("linear", WEIGHTS),
    "linear_unscaled": case("linear", (0.5, 0.75, -0.25), normalize=False),
    "linear_counts_the_base": case("linear", base=True, weight=0.7),
    "task_arithmetic": case("task_arithmetic", WEIGHTS, base=True, **{"lambda": 0.6}),
    "task_arithmetic_mean": case("task_arithmetic", WEIGHTS, base=True, normalize=True),
    "task_arithmetic_cancels": case("task_arithmetic", (1, -2, 1), base=True, normalize=True),
    "ties": case("ties", WEIGHTS, DENSITIES, True, True, int8_mask=True, **{"lambda": 1.3}),
    "ties_sum": case("ties", WEIGHTS, DENSITIES, base=True, normalize=False),
    "ties_negative": case("ties", (1.0, -0.5, 0.75), base=True, density=0.5),
    "ties_one_for_all": case("ties", base=True, weight=0.5, density=0.33),
    "ties_whole": case("ties", WEIGHTS, base=True),
    "dare_linear": case("dare_linear", WEIGHTS, (1.0,) * 3, base=True),
    "dare_linear_mean": case("dare_linear", WEIGHTS, base=True, normalize=True, rescale=False),
    "dare_ties": case("dare_ties", WEIGHTS, base=True, density=1.0, **{"lambda": 0.8}),
}

ROUNDED = {  # what cancels in the experts hangs on the rounding of the weights
    "ties_rounded": case("ties", (0.2, 0.5, 1.1), DENSITIES, base=True),
    "ties_third": case("ties", base=True, weight=0.3, density=0.5),
    "dare_ties_rounded": case("dare_ties", (0.7, 0.6, 0.1), base=True),
}

DROPPED = case("dare_linear", base=True, weight=1.0, density=0.5)
DROPPED |= {"models": DROPPED["models"][:1]}
"""Half of one expert's entries are 0, by numbers that mergekit draws."""


def random_file(seed):
    """(dtype of the models, text of a mergekit file): methods, keys and forms of numbers at random.

    Of DARE only what is not random itself, and of 16-bit arithmetic, which mergekit does where
    `dtype` says so, only the methods that trim nothing.
    """
    draw = Random(seed)
    method = draw.choice(("linear", "task_arithmetic", "ties", "ties", "dare_linear", "dare_ties"))
    trims, dare = method in ("ties", "dare_ties"), method.startswith("dare_")
    parameters, beside = {}, [{} for _ in range(draw.randint(1, 4))]

    def give(key, values, chance=0.5):
        """One value for all, or each model its own."""
        if draw.random() < chance:
            parameters[key] = _written(draw, draw.choice(values))
            beside[0] |= {key: _written(draw, draw.choice(values))} if draw.random() < 0.2 else {}
        else:
            for own in beside:
                own[key] = _written(draw, draw.choice(values))

    give("weight", (1, 1, 0.5, 0.3, 0.75, -0.25, 2, 1e-3, 1.25, 0) if method != "linear" else
         (1, 0.5, 0.3, 0.75, -0.25, 2, 1e-3, 1.25))  # fmt: skip
    if method == "ties" or draw.random() < 0.3 and method != "linear":
        give("density", (1,) if dare else (0.1, 0.33, 0.5, 0.2, 0.75, 0.9, 1))
    if draw.random() < 0.4:
        parameters["normalize"] = draw.choice(("true", "false", "yes", "off"))
    if method != "linear":
        if draw.random() < 0.5:
            parameters["lambda"] = _written(draw, draw.choice((0.1, 0.3, 0.7, 1, 1.5, -1, 2)))
        if draw.random() < 0.3:
            parameters["int8_mask"] = draw.choice(("true", "false"))
        if draw.random() < 0.3 and not trims:
            parameters["rescale"] = draw.choice(("true", "false"))
    names = draw.sample(MORE, len(beside))
    lines = [f"merge_method: {method}", "models:"]
    if method != "linear" and draw.random() < 0.5:
        lines.append(draw.choice(("- model: base", "- {model: base}")))
    for name, own in zip(names, beside, strict=True):
        lines.append(f"- model: {name}")
        lines += ["  parameters:"] * bool(own) + [f"    {key}: {own[key]}" for key in own]
    if method != "linear" or "weight" in parameters and draw.random() < 0.5:  # the base's too
        lines.append("base_model: base")
    lines += ["parameters:"] * bool(parameters)
    lines += [f"  {key}: {value}" for key, value in parameters.items()]
    lines.append(f"dtype: {'float32' if trims else draw.choice(('float32', *DTYPES))}")
    if draw.random() < 0.2:
        lines.append(f"out_dtype: {draw.choice(DTYPES)}")
    return draw.choice(DTYPES), "\n".join(lines) + "\n"


def _written(draw, number):
    """A number in one of the forms that people write."""
    forms = [f"{number}", f"{number:e}", f'"{number}"', f"{number:.3E}", f"{float(number)}"]
    if 0 < abs(number) < 1:
        forms += [f"{number:.4f}".replace("0.", "."), f"{number * 1000:g}e-3"]
    if number >= 1:
        forms += [f"+{number}", f"{number}e0", f"{number:.2f}e+0"]
    return draw.choice(forms)


def all_files():
    """Name -> (dtype of the models, text of the file), in the order of the golden values."""
    fixed = {
        f"{name}, {dtype}": (dtype, yaml.safe_dump(content, sort_keys=False))
        for name, content in (CASES | ROUNDED).items()
        for dtype in DTYPES[:2]
    }
    return fixed | {f"random {seed}": random_file(seed) for seed in range(RANDOM_FILES)}


def digest(files):
    """Of models and files: golden values are of these, or have to be made again."""
    return hashlib.sha256(json.dumps([CONFIG, SHAPES, files]).encode()).hexdigest()
