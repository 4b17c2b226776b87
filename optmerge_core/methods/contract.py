"""What every merge method promises: task vectors in, one merged task vector out, options by name.

The checks live here, once, so that the methods themselves are nothing but their equations.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods import BASED, check_count, check_options_exist

Method = Callable[..., Tensor]
Stack = Float[Tensor, "experts *shape"]
"""The task vectors of one parameter, which for a matrix are matrices."""
Matrices = Float[Tensor, "experts m n"]
Matrix = Float[Tensor, "m n"]
Share = float | Sequence[float]
"""Of the entries, the same for all experts or one for each."""
Weights = Sequence[float] | None
"""One number for each expert, by which its task vector counts; None: all the same."""


def merge_method(*, matrices_only: bool = False) -> Callable[[Method], Method]:
    """Turn an equation into a merge method: check its input, then call it without gradients.

    The method takes task vectors (experts, *shape), float32 or float64, and returns (*shape);
    (experts, matrices, m, n), of a mixture of experts, are merged matrix by matrix. With
    `matrices_only`, any other shape than (experts, m, n) gets the experts' mean.
    An option the method does not have is a ValueError naming those it has. A method with the
    keyword `base` (those of `BASED`) gets the base's own (*shape), in the task vectors' dtype.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        @torch.no_grad()
        def checked(task_vectors: Tensor, **options: Any) -> Tensor:
            check_option_names(method, options)
            check_task_vectors(task_vectors)
            check_count(method.__name__, len(task_vectors))
            bases: Any = itertools.repeat({})
            if method.__name__ in BASED:
                base = check_base(method, task_vectors, options.get("base"))
                bases = bases if base is None else ({"base": matrix} for matrix in base)
            if task_vectors.ndim == 4:
                pairs = zip(task_vectors.unbind(1), bases, strict=False)
                return torch.stack([method(x, **options | own) for x, own in pairs])
            if matrices_only and task_vectors.ndim != 3:
                return task_vectors.mean(dim=0)
            return method(task_vectors, **options)

        return checked

    return decorate


def check_option_names(method: Method, options: Mapping[str, Any]) -> None:
    """Raise a ValueError if `options` has a name that is no keyword of the method."""
    parameters = inspect.signature(method).parameters.values()
    valid = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    check_options_exist(method.__name__, options, valid)


def check_task_vectors(task_vectors: Tensor) -> None:
    """Raise a ValueError unless this is a stack of at least one float32 or float64 tensor."""
    if task_vectors.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"task_vectors are {task_vectors.dtype}; methods work in float32 or float64: "
            "convert with .float() before merging and back afterwards"
        )
    if task_vectors.ndim == 0 or len(task_vectors) == 0:
        raise ValueError(
            f"task_vectors have shape {tuple(task_vectors.shape)}; the first dimension counts "
            "the experts and there must be at least one"
        )


def check_base(method: Method, task_vectors: Tensor, base: Tensor | None) -> Tensor | None:
    """The base's tensor; a ValueError unless it is one, or none where the method may do without."""
    required = inspect.signature(method).parameters["base"].default is inspect.Parameter.empty
    shape, dtype = task_vectors.shape[1:], task_vectors.dtype
    if base is None and required or base is not None and (base.shape, base.dtype) != (shape, dtype):
        found = "none" if base is None else f"{tuple(base.shape)} {base.dtype}"
        raise ValueError(
            f"{method.__name__} needs base, the base's own tensor, {tuple(shape)} {dtype}; {found} "
            "is given"
        )
    return base


def check_choice(name: str, value: object, valid: Iterable[object]) -> None:
    """Raise a ValueError unless the value of option `name` is among the valid ones."""
    valid = list(valid)
    if value not in valid:
        raise ValueError(f"{name} is {value!r}; valid are {', '.join(map(repr, valid))}")


def fills(null_directions: str) -> bool:
    """Whether the option says "fill". Raises a ValueError for what is neither that nor "zero"."""
    check_choice("null_directions", null_directions, ("zero", "fill"))
    return null_directions == "fill"


def check_share(name: str, value: float, *, zero: bool = False) -> None:
    """Raise a ValueError unless value lies in (0, 1], or in [0, 1) with `zero`."""
    if not (0 <= value < 1 if zero else 0 < value <= 1):
        raise ValueError(f"{name} is {value}; it must lie in {'[0, 1)' if zero else '(0, 1]'}")


def per_expert(name: str, values: float | Sequence[float], experts: int) -> list[float]:
    """One number for each expert, from one for all or a sequence, which must have that length."""
    values = list(values) if isinstance(values, Sequence) else [values] * experts
    if len(values) != experts:
        raise ValueError(f"{name} has {len(values)} values for {experts} experts")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} {values}: finite numbers are expected")
    return values
