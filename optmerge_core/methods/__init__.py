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
}
"""Method -> the file of its formula; `registry.METHODS` has the functions."""

TABLE_METHODS = (
    *("weight_average", "task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties", "tsv"),
    *("iso_c", "wudi", "optmerge", "swudi", "aswudi"),
)
"""Those that notebooks 03 to 06, the committed tables and the experiments compare, in this order.

`FILES` may have more: one that is added here makes these tables stale.
"""

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


def no_method(name: str) -> ValueError:
    return ValueError(f"there is no merge method {name!r}; methods are {', '.join(FILES)}")


def check_options_exist(method: str, options: Iterable[str], valid: list[str]) -> None:
    """Raise `ValueError` for an option that is not among the method's own, which it names."""
    for name in options:
        if name not in valid:
            known = f"its options are {', '.join(valid)}" if valid else "it has no options"
            raise ValueError(f"{method} has no option {name!r}; {known}")
