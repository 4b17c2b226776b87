"""Merge methods on tensors only, one file a formula: task vectors in, one out.

Their names are here, for whoever asks for no more: torch, which the formulas need, takes seconds.
"""

import ast
from collections.abc import Iterable
from pathlib import Path

FILES = {
    "weight_average": "averages",
    "task_arithmetic": "averages",
    "ties": "ties",
    "dare_task_arithmetic": "dare",
    "dare_ties": "dare",
    "tsv": "tsv",
    "iso_c": "iso_c",
    "wudi": "wudi",
    "optmerge": "optmerge",
    "swudi": "swudi",
    "aswudi": "swudi",
    "iso_cts": "iso_cts",
    "dc_merge": "dc_merge",
    "ssam": "ssam",
    "orthomerge": "orthomerge",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs",
    "della": "della",
    "della_linear": "della",
    "sce": "sce",
    "model_stock": "model_stock",
    "slerp": "slerp",
    "nuslerp": "slerp",
}
"""Method -> the file of its formula; `registry.METHODS` has the functions."""

TABLE_METHODS = (
    *("weight_average", "task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties", "tsv"),
    *("iso_c", "wudi", "optmerge", "swudi", "aswudi"),
)
"""Those that notebooks 03 to 06, the committed tables and the experiments compare, in this order.

`FILES` may have more: one that is added here makes these tables stale.
"""

BASED = ("orthomerge", "slerp", "nuslerp")
"""Methods that are given the base's own tensor too, as `base` (nuslerp may do without)."""

DRAWN = ("dare_task_arithmetic", "dare_ties", "della", "della_linear")
"""Methods that draw at random, by a `generator` for each expert."""

EXPERTS = {"slerp": 1, "nuslerp": 2}
"""Methods for a number of experts, no more and no fewer."""

THEN = "then"
"""The option that all methods have: `registry.calibrated` follows them."""


def check_names(method: str, options: Iterable[str] = ()) -> None:
    """Raise `ValueError` for a method or an option that does not exist, naming those that do.

    The options are those of the file's source, which is read and not run.
    """
    if method not in FILES:
        raise no_method(method)
    source = Path(__file__).with_name(f"{FILES[method]}.py").read_text(encoding="utf-8")
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name == method:
            own = [*(x.arg for x in function.args.kwonlyargs), THEN]
            check_options_exist(method, options, own)


def check_count(method: str, experts: int) -> None:
    """Raise `ValueError` where a method is for another number of experts."""
    if (right := EXPERTS.get(method, experts)) != experts:
        beside = "the base model and one expert" if right == 1 else f"{right} experts"
        raise ValueError(f"{method} merges {beside}; {experts} experts are given")


def no_method(name: str) -> ValueError:
    return ValueError(f"there is no merge method {name!r}; methods are {', '.join(FILES)}")


def check_options_exist(method: str, options: Iterable[str], valid: list[str]) -> None:
    """Raise `ValueError` for an option that is not among the method's own, which it names."""
    for name in options:
        if name not in valid:
            known = f"its options are {', '.join(valid)}" if valid else "it has no options"
            raise ValueError(f"{method} has no option {name!r}; {known}")
