"""What is changed in a module's source, and how a change is named."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.mutants import mutants_of, mutated

FUNCTION = """
class Gate:
    def open(self, who: int, most: int = 3) -> bool:
        "Say 7."
        log.info("asked %d", 5)
        self.count += 1
        if who < most and not self.shut:
            return who == 2
        raise ValueError(f"{who:03}")
"""


def changed(source: str) -> set[str]:
    """Return what each mutant makes of one expression or of several statements."""
    return {ast.unparse(mutated(source, mutant.number)) for mutant in mutants_of(source)}


@pytest.mark.parametrize(
    ("source", "mutants"),
    [
        ("a == b", {"a != b"}),
        ("a < b", {"a <= b"}),
        ("a >= b", {"a > b"}),
        ("a is b", {"a is not b"}),
        ("a not in b", {"a in b"}),
        ("x = a and b", {"x = a or b"}),
        ("x = not a", {"x = a"}),
        ("x = 1", {"x = 2", "x = 0"}),
        ("x = True", {"x = False"}),
        ("x = 1.5", {"x = 2.5", "x = 0.5"}),
        ("x: int = 1", {"x: int = 2", "x: int = 0"}),
        ("x = a if b else c", {"x = a if not b else c"}),
        ("x = [a for a in b if c]", {"x = [a for a in b if not c]"}),
        ("x.y = a", {"pass"}),
        ("del x[y]", {"pass"}),
        ("f()", {"pass"}),
        ("raise X", {"pass"}),
    ],
)
def test_each_kind_of_place_is_changed(source: str, mutants: set[str]) -> None:
    assert changed(source) - {"pass"} | {"pass"} & mutants == mutants


@pytest.mark.parametrize(
    "source",
    [
        '"""Words."""',
        "x = 'text'",
        "__all__ = ['x']",
        "log.warning('no')",
        "self._log.info(1)",
        "@f(slots=True)\nclass X:\n    y: Literal[1]",
    ],
)
def test_words_types_and_decorators_are_left_alone(source: str) -> None:
    assert changed(source) == set()


def test_a_mutant_is_named_by_its_function_its_line_and_the_change() -> None:
    named = [(mutant.where, mutant.line, mutant.change) for mutant in mutants_of(FUNCTION)]
    head, test = "def open(self, who: int, most: int = 3) -> bool:", "if who < most and not self.shut:"
    assert named == [
        ("Gate.open", head, "3 -> 4"),
        ("Gate.open", head, "3 -> 2"),
        ("Gate.open", "self.count += 1", "1 -> 2"),
        ("Gate.open", "self.count += 1", "1 -> 0"),
        ("Gate.open", "self.count += 1", "removed"),
        ("Gate.open", test, "< -> <="),
        ("Gate.open", test, "not removed"),
        ("Gate.open", test, "and -> or"),
        ("Gate.open", test, "negated"),
        ("Gate.open", "return who == 2", "2 -> 3"),
        ("Gate.open", "return who == 2", "2 -> 1"),
        ("Gate.open", "return who == 2", "== -> !="),
        ("Gate.open", "return who == 2", "returns None"),
        ("Gate.open", 'raise ValueError(f"{who:03}")', "removed"),
    ]


def test_equal_changes_of_one_line_have_names_of_their_own() -> None:
    assert [mutant.change for mutant in mutants_of("x = a == 1 or a == 1")] == [
        "1 -> 2", "1 -> 0", "== -> !=", "1 -> 2 (2)", "1 -> 0 (2)", "== -> != (2)", "or -> and",
    ]  # fmt: skip


def test_every_mutant_of_this_module_compiles_and_differs() -> None:
    source = FUNCTION
    original = ast.unparse(ast.parse(source))
    for mutant in mutants_of(source):
        tree = mutated(source, mutant.number)
        compile(tree, "gate.py", "exec")
        assert ast.unparse(tree) != original, mutant
