"""What a mergekit file says, in this package's words.

mergekit (https://github.com/arcee-ai/mergekit, 0.1.5) requires `weight` for the experts of most
merges. A recipe that gives `weight` or `normalize` therefore means mergekit's definitions:

    linear            Σ wi θi / Σ wi
    task_arithmetic   θ0 + λ Σ wi τi, divided by Σ wi with `normalize`
    ties              the share `density` (1 if not given) of each τi is kept, by count; what agrees
                      with the sign of Σ wi τi is averaged with weights wi; without `normalize` it
                      is added
    dare_linear       each entry is kept with probability `density`, then as task_arithmetic
    dare_ties         the same, then as ties without trimming, by default without `normalize`
    breadcrumbs       the share `density` of each τi is kept, the largest but for the share `gamma`
                      of outliers; then as task_arithmetic
    breadcrumbs_ties  the same, then as ties without trimming, by default without `normalize`
    della             each entry is kept with a probability that rises with its rank in its row,
                      from `density` − `epsilon` to `density` + `epsilon`; then as ties without
                      trimming
    della_linear      the same, then as task_arithmetic
    nuslerp           on the arc between two τi, or without base_model two θi, at w2 / (w1 + w2)

Three have no weights, and are mergekit's where one is a recipe's merge_method; with `rule: paper`
among the parameters, SCE and Model Stock are their papers', as they are with `--method`:

    sce               of the entries that vary most among the τi, the share `select_topk`; what
                      agrees with the sign of their sum is averaged with weights by their squares,
                      equal ones where mean squares add up to less than 1e-6
    model_stock       θ0 + t · mean τi, with t of the angles between the τi, for each row with
                      `filter_wise`; a product of norms below 1e-6 counts as 1e-6
    slerp             on the arc from θ0 (t = 0) to the one expert (t = 1)

What DARE keeps is divided by `density`, and what DELLA keeps by its probability, as in their
papers; mergekit scales either to the magnitudes' sum before. Everything is computed in float32;
mergekit computes in `dtype`.

Each value may be a list over the layers or differ by filter, as `merging.varied` says; what stands
beside a model counts first, then what stands for all, then mergekit's default. A file's `slices`
are followed where there is one, with all layers of each model.

A recipe without weights means the methods as the OptMerge paper's released code has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optmerge_core.merging.varied import is_varied
from optmerge_core.study.values import anything, flag, leaves, mapped, value_of

NAMES = {"linear": "weight_average", "dare_linear": "dare_task_arithmetic"}
"""mergekit's name of a method -> the package's, where they differ."""

NORMALIZE = {
    "weight_average": True, "task_arithmetic": False, "ties": True, "dare_task_arithmetic": False,
    "dare_ties": False, "breadcrumbs": False, "breadcrumbs_ties": False, "della": True,
    "della_linear": False,
}  # fmt: skip
"""Method whose experts have weights -> whether mergekit divides by their sum unless told."""

RULES = {name: {"rule": "mergekit"} for name in ("sce", "model_stock")}
"""merge_method -> its options, unless the recipe says otherwise."""

BESIDE = {"weight": None, "density": 1.0, "gamma": 0.01, "epsilon": 0.15}
"""What an expert may have for itself -> mergekit's default for what no filter names."""

FLAGS = ("normalize", "rescale", "int8_mask")
RENAMED = {"nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
LISTS = ("weights", "drop_rate")
"""Of these, which mergekit has not, a list is no gradient but one value for each expert."""

CUT = (
    "models cannot be cut or put together by layers here; list whole models under models, or in "
    "one slice all layers of each"
)
TEMPLATES = Path(__file__).with_name("chat_templates")
"""The chat templates that mergekit has names for, in files of these names."""


def translate(content: dict[str, Any], same: Callable[[Any, Any], bool]) -> dict[str, Any]:
    """A recipe's content without the keys that only mergekit has, said by those this package has.

    `same`: whether two locations are spellings of one. A warning says what has no effect;
    `ValueError` names a key that cannot be followed.
    """
    content = dict(content)
    if content.pop("modules", None) is not None:
        raise ValueError(f"modules: {CUT}")
    if (slices := content.pop("slices", None)) is not None:
        content |= _whole(slices, content)
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
        if method == "nuslerp" and isinstance(models[0], dict) and "base_model" not in content:
            content["base_model"] = models[0].get("model")
            options = content.get("method_options") or {}
            if isinstance(options, dict) and isinstance(own := options.get("nuslerp") or {}, dict):
                content["method_options"] = options | {"nuslerp": {"of": "weights"} | own}
    return content


def _whole(slices: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """`models`, `layer_range`, `parameters` of a file whose one slice has all layers of each model.

    How many layers there are is looked at when the models are opened. `ValueError` for all else.
    """
    match slices:
        case [{"sources": [{"layer_range": [0, end]}, *_] as sources, **more}]:
            ranges = [one.get("layer_range") for one in sources if isinstance(one, dict)]
        case _:
            raise ValueError(f"slices: {CUT}")
    cut = ranges != [[0, end]] * len(sources) or content.get("models")
    if cut or more.keys() - {"base_model", "parameters"}:
        raise ValueError(f"slices: {CUT}")
    general, own = content.get("parameters") or {}, more.get("parameters") or {}
    if not isinstance(general, dict) or not isinstance(own, dict):
        raise ValueError("parameters: a mapping is expected, of a slice too")
    first = {key: value_of(key, [x, general.get(key)], None, anything) for key, x in own.items()}
    models = [{key: x for key, x in one.items() if key != "layer_range"} for one in sources]
    found = {"models": models, "layer_range": [0, end], "parameters": general | first}
    return found | ({"base_model": more["base_model"]} if more.get("base_model") else {})


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
    before `own`. Raises `ValueError` for what has no counterpart, as other keys beside a model.
    """
    for key in sorted({key for expert in beside for key in expert} - BESIDE.keys()):
        raise ValueError(f"{key!r} beside a model: only {', '.join(BESIDE)} are understood")
    weights, densities = (_values(key, parameters, beside) for key in ("weight", "density"))
    defaults = {"normalize": NORMALIZE.get(method)}
    flags = {
        key: value_of(key, [parameters[key]], defaults.get(key), flag)
        for key in FLAGS
        if key in parameters
    }
    options = {
        RENAMED.get(key, key): value if key in LISTS else value_of(key, [value], None, anything)
        for key, value in parameters.items()
        if key not in ("lambda", *BESIDE, *FLAGS)
    }
    for key in ("gamma", "epsilon"):
        options |= _one_or_list(key, _values(key, parameters, beside))
    if method not in NORMALIZE:
        if method == "nuslerp":
            options |= _weights(weights)
        elif any(weight not in (None, 1) for weight in weights):
            raise ValueError(f"weight of {method}: only 1 is understood; scale by lambda")
        ignored = method in (*RULES, "slerp", "nuslerp")  # in mergekit too
        options |= ({} if ignored else flags) | _one_or_list("density", densities)
        return RULES.get(method, {}) | own | options
    if "normalize" in flags or weights != [None] * len(weights):
        options |= _weighing(method, weights, flags.get("normalize"))
        if method in ("weight_average", "task_arithmetic"):
            densities = [None] * len(densities)  # mergekit takes one, but trims nothing by it
        elif not {"drop_rate", "density"} & {*options, *own}:
            densities = [1.0 if density is None else density for density in densities]
    options |= _trimming(method, densities, options)
    if "rescale" in flags and method in ("della", "della_linear"):
        options["rescale"] = flags.pop("rescale")
    options = own | options
    _check_rescale(method, flags.get("rescale"), options)
    return options


def _weighing(method: str, weights: list[Any], normalize: Any) -> dict[str, Any]:
    """`weights`, `normalize` and `rule` by mergekit's definitions, where they change something."""
    options = _weights(weights)
    if normalize is None:
        normalize = NORMALIZE[method]
    if method == "weight_average":
        if normalize is not True:
            _check_sum(options.get("weights", [1.0] * len(weights)), normalize)
        same = all(weight == weights[0] for weight in weights) and not is_varied(weights[0])
        return {} if same and (weights[0] is None or weights[0] > 0) else options
    if method in ("ties", "dare_ties"):
        options["rule"] = "mergekit"
    if normalize is not (method in ("ties", "dare_ties", "della")):  # their own default
        options["normalize"] = normalize
    return options


def _weights(weights: list[Any]) -> dict[str, Any]:
    """`weights`, unless all are 1 or none is given. Raises `ValueError` where some are."""
    if weights == [None] * len(weights):
        return {}
    if None in weights:
        missing = weights.index(None) + 1
        raise ValueError(f"weight: expert {missing} of {len(weights)} has none; give each one")
    return {} if all(weight == 1 for weight in weights) else {"weights": weights}


def _check_sum(weights: list[Any], normalize: Any) -> None:
    """Raise `ValueError` unless a linear merge needs no division by the sum of these weights."""
    vary = is_varied(normalize) or any(map(is_varied, weights))
    if vary or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        found = "differ by layer or filter" if vary else f"add up to {sum(weights):g}"
        raise ValueError(
            f"normalize false of linear: weights that {found} would scale the base model too; give "
            "weights that add up to 1"
        )


def _trimming(method: str, densities: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """`density`, which mergekit has for trimming and for dropping, as `density` or `drop_rate`."""
    if not method.startswith("dare_") or densities == [None] * len(densities):
        return _one_or_list("density", densities)
    if "drop_rate" in options:
        raise ValueError(f"give drop_rate and density together under method_options.{method}")
    # The share that DARE keeps; nothing is trimmed after it.
    dropped = [
        kept if kept is None else mapped(kept, lambda share: 1 - share) for kept in densities
    ]
    after = {"density": 1.0} if method == "dare_ties" else {}
    return _one_or_list("drop_rate", dropped) | after


def _check_rescale(method: str, rescale: Any, options: dict[str, Any]) -> None:
    """DARE's rest is rescaled and others' is not, which is the default in mergekit too."""
    said = [] if rescale is None else leaves(rescale)
    if False in said and method.startswith("dare_") and options.get("drop_rate") != 0:
        raise ValueError(f"rescale false of {method}: what is kept is rescaled here; leave it out")
    trims = method in ("ties", "breadcrumbs", "breadcrumbs_ties")
    if True in said and trims and options.get("density") != 1:
        raise ValueError(
            f"rescale true of {method}: what is kept is not rescaled here; leave it out"
        )


def _values(key: str, parameters: dict[str, Any], beside: Sequence[dict[str, Any]]) -> list[Any]:
    """Of each expert; None where nothing is said."""
    return [value_of(key, [own.get(key), parameters.get(key)], BESIDE[key]) for own in beside]


def _one_or_list(key: str, values: list[Any]) -> dict[str, Any]:
    """{} where nothing is given, one value where all agree, else the list."""
    if any(value != values[0] for value in values):
        if None in values:
            raise ValueError(f"{key} {values}: some experts have none; give each one")
        return {key: values}
    return {} if values[0] is None else {key: values[0]}
