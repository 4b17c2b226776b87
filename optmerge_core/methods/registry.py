"""Merge methods: pure functions from a stack of task vectors to one merged task vector.

A method takes (experts, *shape) and returns (*shape) in the same dtype, on the same device. It
knows nothing of names, files or models, and scaling the result is not its business:
merged model = base model + scaling coefficient · merged task vector.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from optmerge_core.methods import BASED, EXPERTS, FILES, THEN, check_count, no_method
from optmerge_core.methods.blocks import Blocks, MergedBlock
from optmerge_core.methods.contract import Method, check_option_names
from optmerge_core.methods.svc import svc
from optmerge_core.methods.ties import ties_blocks


def merges_in_blocks(method: str, options: Mapping[str, Any]) -> bool:
    """Whether `merge_blocks` can do what `METHODS[method]` does with these options."""
    if options.get(THEN) is not None:  # which needs whole matrices
        return False
    if method == "dare_ties":  # as a mergekit file has it: nothing hangs on other entries
        return options.get("density") == 1 and options.get("rule") == "mergekit"
    return method in ("weight_average", "task_arithmetic", "dare_task_arithmetic", "ties")


def merge_blocks(method: str, blocks: Blocks, **options: Any) -> Iterator[MergedBlock]:
    """(entries, block, merged entries), the values of `METHODS[method]`, block by block.

    Some entries may come once more at the end, without their block. For what `merges_in_blocks`,
    with checked options; DARE has a generator for each expert, which draws block after block.
    """
    options.pop(THEN, None)  # None, which a recipe may say
    if method == "ties":
        yield from ties_blocks(blocks, **options)
        return
    for entries in blocks.places():
        block = blocks.read(entries)
        yield entries, block, METHODS[method](block, **options)


EVEN = ("tsv", "iso_c", "iso_cts")
"""Methods that even out what experts share themselves."""


def calibrated(then: Any, method: str, merged: Tensor, task_vectors: Tensor) -> Tensor:
    """A method's result after what follows it: nothing (None), "svc" or {"svc": {"alpha": 0.5}}.

    alpha is 1 after `EVEN`, else 1 / experts, unless given. Raises `ValueError` for anything else.
    """
    alpha = 1.0 if method in EVEN else 1 / len(task_vectors)
    match then:
        case None:
            return merged
        case "svc":
            return svc(merged, task_vectors, alpha)
        case {"svc": {"alpha": given, **others}, **more} if not others and not more:
            return svc(merged, task_vectors, given)
    raise ValueError(f"then {then!r}: write svc, or {{svc: {{alpha: 0.5}}}}")


def _followed(method: Method) -> Method:
    """The method with `then`, the option that all have: see `calibrated`."""

    @functools.wraps(method)
    def followed(task_vectors: Tensor, *, then: Any = None, **options: Any) -> Tensor:
        check_option_names(followed, options)
        return calibrated(then, method.__name__, method(task_vectors, **options), task_vectors)

    signature, keyword = inspect.signature(method), inspect.Parameter.KEYWORD_ONLY
    option = inspect.Parameter(THEN, keyword, default=None, annotation=Any)
    parameters = [*signature.parameters.values(), option]
    followed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return followed


class _Methods(dict[str, Method]):
    """The methods by name; asking for one that isn't there is a ValueError naming all."""

    def __missing__(self, name: str) -> Method:
        raise no_method(name)


METHODS: Mapping[str, Method] = _Methods(
    (name, _followed(getattr(import_module(f"optmerge_core.methods.{file}"), name)))
    for name, file in FILES.items()
)


def check_options(method_name: str, options: Mapping[str, Any], experts: int | None = None) -> None:
    """Raise now, before any long work, the ValueError these options would raise in a merge.

    Names are compared with the method's own, values tried on 1×1 matrices of zeros, as many as
    there are values in a list with one for each expert; with `experts`, it must have that length.
    Of many steps, one is tried.
    `thresholds` and `generator`, which depend on the task vectors, are seen by name only, and so is
    `base`.
    """
    method = METHODS[method_name]
    check_option_names(method, options)
    if experts is not None:
        check_count(method_name, experts)
    later = ("generator", "thresholds", "on_step", "base")
    tried = {k: v for k, v in options.items() if k not in later}
    if method_name in BASED:
        tried["base"] = torch.zeros(1, 1)
    if isinstance(tried.get("steps"), int):
        tried["steps"] = min(tried["steps"], 1)
    lengths = [len(value) for value in tried.values() if isinstance(value, list | tuple)]
    count = (experts or max(*lengths, 1)) if lengths else EXPERTS.get(method_name, 1)
    method(torch.zeros(count, 1, 1), **tried)
