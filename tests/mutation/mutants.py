"""Small changes of a module's source, one at a time, that its tests should notice. Pure."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Mutant", "mutants_of", "mutated"]

_FLIPS: Final[Mapping[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_SIGNS: Final[Mapping[type[ast.AST], str]] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.And: "and",
    ast.Or: "or",
}
_ORDERS: Final = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_LOGS: Final = ("log", "_log", "logger")
"""What a line of a log says decides nothing."""


@dataclass(frozen=True, slots=True, order=True)
class Mutant:
    """One change of one module. All but the number holds while other lines of the module change."""

    where: str
    """The function or class that has it, with dots; empty for the module itself."""
    line: str
    """The text of the line that is changed, without its indentation."""
    change: str
    """Such as `< -> <=`, `removed`, or `returns None`."""
    number: int
    """Its place among the module's mutants."""


def mutants_of(source: str) -> Sequence[Mutant]:
    """Return all mutants of a module, in order."""
    changes = _Changes(None)
    changes.visit(ast.parse(source))
    lines, seen, found = source.splitlines(), Counter[tuple[str, int, str]](), list[Mutant]()
    for number, (where, at, change) in enumerate(changes.found):
        seen[where, at, change] += 1
        nth = "" if seen[where, at, change] == 1 else f" ({seen[where, at, change]})"
        found.append(Mutant(where, lines[at - 1].strip(), change + nth, number))
    return found


def mutated(source: str, number: int) -> ast.Module:
    """Return the module with one change made."""
    tree = ast.parse(source)
    _Changes(number).visit(tree)
    return ast.fix_missing_locations(tree)


class _Changes(ast.NodeTransformer):
    """Meets every place that can be changed, in order, and makes the change of one number."""

    def __init__(self, wanted: int | None) -> None:
        self.found: list[tuple[str, int, str]] = []
        self._wanted = wanted
        self._where: list[str] = []

    def _makes(self, node: ast.expr | ast.stmt, change: str) -> bool:
        self.found.append((".".join(self._where), node.lineno, change))
        return len(self.found) - 1 == self._wanted

    # -- what is left alone: types, decorators, words

    def _visit_named(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> ast.AST:
        self._where.append(node.name)
        if not isinstance(node, ast.ClassDef):
            defaults = node.args
            defaults.defaults = [self.visit(each) for each in defaults.defaults]
            defaults.kw_defaults = [each and self.visit(each) for each in defaults.kw_defaults]
        node.body = [self.visit(each) for each in node.body]
        self._where.pop()
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _visit_named

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    # -- expressions

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        for place, sign in enumerate(node.ops):
            other = _FLIPS[type(sign)]
            if self._makes(node, f"{_SIGNS[type(sign)]} -> {_SIGNS[other]}"):
                node.ops[place] = other()
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        if self._makes(node, f"{_SIGNS[type(node.op)]} -> {_SIGNS[other]}"):
            node.op = other()
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and self._makes(node, "not removed"):
            return node.operand
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if isinstance(value, bool):
            others: list[int | float | bool] = [not value]
        elif isinstance(value, int | float):
            others = [value + 1, value - 1]
        else:
            return node
        for other in others:
            if self._makes(node, f"{value!r} -> {other!r}"):
                return ast.copy_location(ast.Constant(other), node)
        return node

    def _negated(self, test: ast.expr) -> ast.expr:
        """Change a condition into its opposite where no other mutant is the same."""
        orders = isinstance(test, ast.Compare) and (len(test.ops) > 1 or isinstance(test.ops[0], _ORDERS))
        flips = isinstance(test, ast.Compare) and not orders
        negative = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        test = self.visit(test)
        if not flips and not negative and self._makes(test, "negated"):
            return ast.copy_location(ast.UnaryOp(ast.Not(), test), test)
        return test

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node.test = self._negated(node.test)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        node.iter = self.visit(node.iter)
        node.ifs = [self._negated(each) for each in node.ifs]
        return node

    # -- statements

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node
        return self._visit_branch(node)

    def visit_While(self, node: ast.While) -> ast.AST:
        return self._visit_branch(node)

    def _visit_branch(self, node: ast.If | ast.While) -> ast.AST:
        node.test = self._negated(node.test)
        node.body = [self.visit(each) for each in node.body]
        node.orelse = [self.visit(each) for each in node.orelse]
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        plain = node.value is None or (
            isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool | None)
        )
        if not plain and self._makes(node, "returns None"):
            return ast.copy_location(ast.Return(ast.Constant(None)), node)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant) or _is_log(node.value):
            return node
        return self._removed(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if any(isinstance(each, ast.Name) and each.id == "__all__" for each in node.targets):
            return node
        kept = all(isinstance(each, ast.Attribute | ast.Subscript) for each in node.targets)
        return self._removed(node) if kept else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def _removed(self, node: ast.stmt) -> ast.AST:
        self.generic_visit(node)
        return ast.copy_location(ast.Pass(), node) if self._makes(node, "removed") else node

    visit_AugAssign = visit_Delete = visit_Raise = visit_Continue = visit_Break = _removed


def _is_log(value: ast.expr) -> bool:
    called = value.func if isinstance(value, ast.Call) else None
    owner = called.value if isinstance(called, ast.Attribute) else None
    name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
    return name in _LOGS
