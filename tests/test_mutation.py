"""The tool that puts faults into the package draws the same ones each time, and real ones."""

import ast

from mutation import OTHER, ROOT, drawn, faults


def test_a_seed_draws_the_same_faults_each_different_and_none_without_effect():
    found = list(drawn(0, 20))
    assert found[:5] == list(drawn(0, 5))
    assert len({(path, text) for path, _, _, _, text in found}) == 20
    assert len({kind for _, _, kind, _, _ in found}) > 5
    for path, line, _, change, text in found:
        original = (ROOT / path).read_text()
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(original))
        assert 1 <= line <= len(original.splitlines()) and " -> " in change


def test_every_slip_by_hand():
    def slips(text: str) -> list[str]:
        (statement,) = ast.parse(text).body
        node = statement.value if isinstance(statement, ast.Expr) else statement
        node = node.args if isinstance(node, ast.FunctionDef) else node
        return [ast.unparse(ast.fix_missing_locations(new)) for _, new in faults(node)]

    assert slips("a < b") == ["a <= b"] and slips("a + b") == ["a - b"]
    assert slips("not a") == ["a"] and slips("a and b") == ["a or b"]
    assert slips("x if a else b") == ["b if a else x"]
    assert slips("if a:\n    b") == ["if not a:\n    b"]
    assert slips("0.5") == ["1.5", "500.0"] and slips("0") == ["1"] and slips("True") == ["False"]
    assert slips("f(1, a=2, **b)") == ["f(1, **b)"]
    assert slips("def f(a=1, *, b=False, c=None): ...") == [
        "a=2, *, b=False, c=None", "a=1000, *, b=False, c=None", "a=1, *, b=True, c=None"
    ]  # fmt: skip
    assert all(OTHER[OTHER[operator]] is operator for operator in OTHER)
