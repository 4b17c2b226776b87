"""Small faults, drawn by a seed and put into a copy of the package one by one: who notices?

    python tests/mutation.py --seed 0 --faults 50

A fault that the tests of its room let pass survives: either no test holds the right value, or the
program does the same with it. Prints a line for each fault as it is tried, and the count.
"""

import argparse
import ast
import copy
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("methods", "merging", "checkpoints", "study")
COPIED = ("optmerge_core", "tests", "data", "notebooks", "figures", "pyproject.toml", "README.md")
MEMORY = 8 << 30  # bytes that the tests of a fault may take
OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changed(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of the node with other values of some fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def faults(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind, what stands in the node's place) for each slip that the node allows."""
    match node:
        case ast.Compare(ops=[op, *rest]) if type(op) in OTHER:
            yield "comparison", changed(node, ops=[OTHER[type(op)](), *rest])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OTHER:
            yield "arithmetic", changed(node, op=OTHER[type(op)]())
        case ast.BoolOp(op=op):
            yield "boolean", changed(node, op=OTHER[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "not or minus dropped", operand
        case ast.If(test=test) | ast.While(test=test):
            yield "condition", changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test]):
            yield "condition", changed(node, ifs=[ast.UnaryOp(ast.Not(), test)])
        case ast.IfExp(body=body, orelse=orelse):
            yield "branches swapped", changed(node, body=orelse, orelse=body)
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (("constant", ast.Constant(x)) for x in (value + 1, 1000 * value) if x)
        case ast.Call(keywords=keywords):
            for keyword in keywords:
                if keyword.arg:
                    rest = [other for other in keywords if other is not keyword]
                    yield "keyword dropped", changed(node, keywords=rest)
        case ast.arguments():
            for field in ("defaults", "kw_defaults"):
                values = getattr(node, field)
                for place, value in enumerate(values):
                    for _, new in faults(value) if value else ():
                        wrong = [*values[:place], new, *values[place + 1 :]]
                        yield "default", changed(node, **{field: wrong})


def sites(tree: ast.AST, line: int = 1) -> Iterator[tuple[int, str, ast.AST, ast.AST]]:
    """(line, kind, node, new node) of all faults; none in texts of errors, types, decorators."""
    line = getattr(tree, "lineno", line)
    yield from ((line, kind, tree, new) for kind, new in faults(tree))
    for name, value in ast.iter_fields(tree):
        if name not in ("annotation", "returns", "decorator_list", "defaults", "kw_defaults"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Raise):
                    yield from sites(child, line)


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def drawn(seed: int, count: int) -> Iterator[tuple[Path, int, str, str, str]]:
    """(file, line, kind, change, text of the file) of different faults: a kind first, then one."""
    kinds: dict[str, list] = {}
    for path in sorted(p for room in ROOMS for p in (ROOT / "optmerge_core" / room).glob("*.py")):
        for number, (_, kind, _, _) in enumerate(sites(ast.parse(path.read_text()))):
            kinds.setdefault(kind, []).append((path, number))
    generator = random.Random(seed)
    for _ in range(count):
        of_kind = kinds[generator.choice(sorted(kinds))]
        path, number = of_kind.pop(generator.randrange(len(of_kind)))
        tree = ast.parse(path.read_text())
        before = ast.unparse(tree)
        line, kind, node, new = list(sites(tree))[number]
        after = ast.unparse(ast.fix_missing_locations(Replace(node, new).visit(tree)))
        pairs = zip(before.splitlines(), after.splitlines(), strict=True)
        x, y = next(pair for pair in pairs if pair[0] != pair[1])
        start = len(os.path.commonprefix([x, y]))
        change = " -> ".join(text[max(0, start - 30) : start + 40].strip() for text in (x, y))
        yield path.relative_to(ROOT), line, kind, change, after


def seconds_to_pass(tests: list[str], copied: Path, patience: float) -> float | None:
    """How long the tests take on the copy; None if one fails, or takes too long or much memory."""

    def limit() -> None:
        os.nice(10)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    start = time.perf_counter()
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=copied, preexec_fn=limit, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(copied), "PYTHONDONTWRITEBYTECODE": "1",
                          "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        return time.perf_counter() - start if run.wait(patience) == 0 else None
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=50)
    arguments = parser.parse_args()
    survivors, seconds = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in COPIED:
            copy_of = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy_of(ROOT / name, copied / name)
        for path, line, kind, change, text in list(drawn(arguments.seed, arguments.faults)):
            room, own = path.parts[1], f"test_{path.stem}.py"
            files = sorted((copied / "tests" / room).glob("test_*.py"))
            files += [copied / "tests/test_main.py"] * (room in ("merging", "study"))
            tests = sorted(map(str, files), key=lambda file, own=own: not file.endswith(f"/{own}"))
            if room not in seconds:
                seconds[room] = seconds_to_pass(tests, copied, patience=3600)
            if seconds[room] is None:
                sys.exit(f"{room}: its tests fail, or take an hour, without any fault")
            whole = (copied / path).read_text()
            (copied / path).write_text(text)
            survived = seconds_to_pass(tests, copied, 60 + 3 * seconds[room]) is not None
            (copied / path).write_text(whole)
            survivors += survived
            verdict = "survived" if survived else "killed"
            print(f"{verdict:8}  {path}:{line}  {kind}: {change}", flush=True)
    print(f"{survivors} of {arguments.faults} faults survived")


if __name__ == "__main__":
    main()
