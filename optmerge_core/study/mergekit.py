"""What a mergekit file says, in this package's words.

mergekit (https://github.com/arcee-ai/mergekit, 0.1.5) requires `weight` for the experts of a
merge. A recipe that gives `weight` or `normalize` therefore means mergekit's definitions:

    linear           Σ wi θi / Σ wi
    task_arithmetic  θ0 + λ Σ wi τi, divided by Σ wi with `normalize`
    ties             the share `density` (1 if not given) of each τi is kept, by count; what agrees
                     with the sign of Σ wi τi is averaged with weights wi, without `normalize` added
    dare_linear      each entry is kept with probability `density`, then as task_arithmetic
    dare_ties        the same, then as ties without trimming, by default without `normalize`

What DARE keeps is divided by `density`, as in its paper; mergekit scales it to the magnitudes' sum
before. Everything is computed in float32; mergekit computes in `dtype`.

A recipe without them means the methods as the OptMerge paper's released code has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NAMES = {"linear": "weight_average", "dare_linear": "dare_task_arithmetic"}
"""mergekit's name of a method -> the package's, where they differ."""

SHARED = ("weight_average", "task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties")
FLAGS = ("normalize", "rescale", "int8_mask")
TEMPLATES = Path(__file__).with_name("chat_templates")
"""The chat templates that mergekit has names for, in files of these names."""


def translate(content: dict[str, Any], same: Callable[[Any, Any], bool]) -> dict[str, Any]:
    """A recipe's content without the keys that only mergekit has, said by those this package has.

    `same`: whether two locations are spellings of one. A warning says what has no effect;
    `ValueError` names a key that cannot be followed.
    """
    content = dict(content)
    for key in ("slices", "modules"):
        if content.pop(key, None) is not None:
            raise ValueError(
                f"{key}: models cannot be cut or put together by layers here; list whole models "
                "under models"
            )
    _check_tokenizer(content, same)
    if content.get("chat_template") is not None:
        content["chat_template"] = chat_template(content["chat_template"])
    if (dtype := content.pop("out_dtype", None)) is not None:
        content["dtype"] = dtype
    parameters, method = content.get("parameters"), content.get("merge_method")
    if method == "linear" and isinstance(parameters, dict) and "lambda" in parameters:
        raise ValueError(
            "parameters.lambda: mergekit's linear has none; leave it out, or call the method "
            "weight_average to scale the mean task vector"
        )
    if isinstance(models := content.get("models"), list) and models:
        models = [{"model": entry} if isinstance(entry, str) else entry for entry in models]
        models = [_without_plus(entry, content.get("base_model"), same) for entry in models]
        content["models"] = models
        if method in ("linear", "weight_average") and isinstance(models[0], dict):
            # A mean does not need a base model: counted from any of the models it is the same.
            content.setdefault("base_model", models[0].get("model"))
    return content


def chat_template(value: Any) -> str:
    """What mergekit means by its key: "auto" as it is, a name of its own as Jinja, or Jinja.

    Raises `ValueError` for anything else.
    """
    named = {path.stem: path for path in TEMPLATES.glob("*.jinja")}
    if isinstance(value, str) and value in named:
        return named[value].read_text(encoding="utf-8").strip()
    if value == "auto" or isinstance(value, str) and len(value) >= 20 and "{" in value:
        return str(value)
    names = ", ".join(sorted(named))
    raise ValueError(f"chat_template {value!r}: give auto, {names}, or a template in Jinja")


def _check_tokenizer(content: dict[str, Any], same: Callable[[Any, Any], bool]) -> None:
    """Take out what says that the tokenizer is the base model's; anything else is an error."""
    tokenizer = content.pop("tokenizer", None) or {}
    source, known = content.pop("tokenizer_source", None), isinstance(tokenizer, dict)
    if tokenizer and source is not None:
        raise ValueError("tokenizer and tokenizer_source are both given; keep one")
    source = tokenizer.get("source") if known and tokenizer else tokenizer or source
    of_base = source in (None, "base") or same(source, content.get("base_model"))
    if not of_base or not known:
        raise ValueError(
            f"tokenizer_source {source!r}: the tokenizer and its vocabulary are the base model's "
            "here; write base, and give experts the base model's vocabulary"
        )
    for key in tokenizer.keys() - {"source"}:
        if tokenizer[key]:
            raise ValueError(f"tokenizer.{key}: the base model's vocabulary is kept; leave it out")


def _without_plus(entry: Any, base_model: Any, same: Callable[[Any, Any], bool]) -> Any:
    """mergekit's `model: base+adapter` is here the adapter alone, if that base is base_model."""
    location = entry.get("model") if isinstance(entry, dict) else None
    for plus in re.finditer(r"\+", location if isinstance(location, str) else ""):
        if same(location[: plus.start()], base_model):
            return entry | {"model": location[plus.end() :]}
    return entry


def method_options(
    method: str,
    parameters: dict[str, Any],
    beside: Sequence[dict[str, Any]],
    own: dict[str, Any],
) -> dict[str, Any]:
    """Options of a method from a recipe's `parameters`, those beside each expert, and its `own`.

    What stands beside an expert counts before what stands in the recipe, as in mergekit, and both
    before `own`. Raises `ValueError` for what has no counterpart: other keys beside a model, values
    by layer or filter.
    """
    for key in sorted({key for own in beside for key in own} - {"weight", "density"}):
        raise ValueError(f"{key!r} beside a model: only weight and density are understood")
    weights, densities = (_values(key, parameters, beside) for key in ("weight", "density"))
    flags = {key: parameters[key] for key in FLAGS if key in parameters}
    options = {
        key: value
        for key, value in parameters.items()
        if key not in ("lambda", "weight", "density", *flags)
    }
    if method not in SHARED:
        if any(weight not in (None, 1) for weight in weights):
            raise ValueError(f"weight of {method}: only 1 is understood; scale by lambda")
        return own | options | flags | _one_or_list("density", densities)
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{key} {value!r}: true or false is expected")
    if "normalize" in flags or weights != [None] * len(weights):
        options |= _weighing(method, weights, flags.get("normalize"))
        if method in ("weight_average", "task_arithmetic"):
            densities = [None] * len(densities)  # mergekit takes one, but trims nothing by it
        elif not {"drop_rate", "density"} & {*options, *own}:
            densities = [1.0 if density is None else density for density in densities]
    options |= _trimming(method, densities, options)
    options = own | options
    _check_rescale(method, flags.get("rescale"), options)
    return options


def _weighing(method: str, weights: list[float | None], normalize: bool | None) -> dict[str, Any]:
    """`weights`, `normalize` and `rule` by mergekit's definitions, where they change something.

    A sum that is divided by Σ wi is the sum with weights wi / Σ wi.
    """
    if None in weights and weights != [None] * len(weights):
        missing = weights.index(None) + 1
        raise ValueError(f"weight: expert {missing} of {len(weights)} has none; give each one")
    weights = [1.0 if weight is None else weight for weight in weights]
    total, by_entry = sum(weights), method in ("ties", "dare_ties")
    if normalize is None:
        normalize = method in ("weight_average", "ties")
    if method == "weight_average" and not normalize and not math.isclose(total, 1, abs_tol=1e-6):
        raise ValueError(
            f"normalize false of linear: weights that add up to {total:g} would scale the base "
            "model too; give weights that add up to 1"
        )
    options = {"rule": "mergekit"} if by_entry else {}
    options |= {"normalize": False} if by_entry and not normalize else {}
    if not by_entry and normalize and method != "weight_average" and abs(total) >= 1e-8:
        weights = [weight / total for weight in weights]
    same = len(set(weights)) == 1 and weights[0] > 0
    if set(weights) != {1.0} and not (method == "weight_average" and same):
        options["weights"] = weights
    return options


def _trimming(
    method: str, densities: list[float | None], options: dict[str, Any]
) -> dict[str, Any]:
    """`density`, which mergekit has for trimming and for dropping, as `density` or `drop_rate`."""
    if not method.startswith("dare_") or densities == [None] * len(densities):
        return _one_or_list("density", densities)
    if "drop_rate" in options:
        raise ValueError(f"give drop_rate and density together under method_options.{method}")
    # The share that DARE keeps; nothing is trimmed after it.
    dropped = [density and 1 - density for density in densities]
    after = {"density": 1.0} if method == "dare_ties" else {}
    return _one_or_list("drop_rate", dropped) | after


def _check_rescale(method: str, rescale: bool | None, options: dict[str, Any]) -> None:
    """DARE's rest is rescaled and TIES's is not, which is the default in mergekit too."""
    if rescale is False and method.startswith("dare_") and options.get("drop_rate") != 0:
        raise ValueError(f"rescale false of {method}: what is kept is rescaled here; leave it out")
    if rescale and method == "ties" and options.get("density") != 1:
        raise ValueError("rescale true of ties: what is kept is not rescaled here; leave it out")


def _values(
    key: str, parameters: dict[str, Any], beside: Sequence[dict[str, Any]]
) -> list[float | None]:
    values = [own.get(key, parameters.get(key)) for own in beside]
    return [value if value is None else number(key, value) for value in values]


def _one_or_list(key: str, values: list[float | None]) -> dict[str, Any]:
    """{} where nothing is given, one value where all agree, else the list."""
    if len(set(values)) > 1:
        if None in values:
            raise ValueError(f"{key} {values}: some experts have none; give each one")
        return {key: values}
    return {} if values[0] is None else {key: values[0]}


def number(key: str, value: Any) -> float:
    """The value itself; a list, mergekit's gradient over layers, or a filter is a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{key} {value!r}: one finite number is expected, the same for all layers and tensors"
        )
    return value
