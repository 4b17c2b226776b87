"""A recipe's YAML as its text says it: numbers in any form people write, no key given twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d+)?", re.IGNORECASE)

MAX_NODES = 100_000
"""Values that a recipe may have; a few aliases of aliases can stand for billions."""


def numeric(value: Any) -> Any:
    """The number in a text: in quotes, or in a form YAML 1.1 takes for one, as 1e-5, 1.5e3 or -.5.

    In a list or mapping each of them.
    """
    if isinstance(value, dict):
        return {key: numeric(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numeric(item) for item in value]
    if not isinstance(value, str) or not NUMBER.fullmatch(value):
        return value
    return int(value) if re.fullmatch(r"[-+]?[\d_]+", value) else float(value)


def parse(text: str) -> Any:
    """What `yaml.safe_load` gives, where it is what the text says.

    Raises `ValueError` for a key given twice, for numbers that YAML 1.1 reads in another base than
    people do, and for aliases that grow out of bounds.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise ValueError(f"with its aliases written out it has more than {MAX_NODES} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Values that a node stands for, those behind aliases counted each time."""
    if node not in sizes:
        sizes[node] = MAX_NODES + 1  # what a node that contains itself sees
        _check_said_once(node)
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        sizes[node] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[node]


def _check_said_once(node: yaml.Node) -> None:
    """Raise `ValueError` for a key of which PyYAML takes the last, and for 010, which is 8 to it.

    Likewise for 1:30, which is 90.
    """
    keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    seen: dict[tuple[str, Any], int] = {}
    for key in keys:
        name, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if name in seen:
            raise ValueError(f"lines {seen[name]} and {line}: {key.value} is given twice; keep one")
        seen[name] = line
    octal = node.tag.endswith(":int") and re.match(r"[-+]?0[\d_]", node.value)
    if octal or node.tag.endswith((":int", ":float")) and ":" in node.value:
        raise ValueError(
            f"line {node.start_mark.line + 1}: {node.value} is a number in base 8 or 60 to YAML; "
            "write it in base 10, or a name in quotes"
        )
