"""Regions and conditions typed as text: read by Python's parser, never run as Python.

A condition is taken apart into its syntax tree, and only what is listed in this file is built up again,
from closures. A name, call, attribute or string has no closure, so there is nothing to escape from.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from types import EllipsisType
from typing import Any

from zarr_dask_stream.errors import UsageError

__all__ = ["IndexExpression", "parse_region_text"]

Index = tuple[int, ...]
Evaluate = Callable[[Index], Any]

_MAX_TEXT = 1000  # keeps the parser's recursion shallow
_PART = re.compile(r"\s*([+-]?\d+)?\s*(:)?\s*([+-]?\d+)?\s*(:)?\s*([+-]?\d+)?\s*", re.ASCII)


def parse_region_text(text: str) -> tuple[int | slice | EllipsisType, ...]:
    """Read a region in NumPy's notation.

    Raises
    ------
    UsageError
        Naming the part that is neither an integer, a slice nor three dots.

    Examples
    --------
    >>> parse_region_text("0:10, 5, ..., -3:")
    (slice(0, 10, None), 5, Ellipsis, slice(-3, None, None))
    """
    inside = text.strip().removeprefix("[").removesuffix("]").strip().removesuffix(",")
    return tuple(_parse_part(part.strip(), text) for part in inside.split(","))


def _parse_part(part: str, text: str) -> int | slice | EllipsisType:
    if part == "...":
        return ...
    found = _PART.fullmatch(part)
    if not part or not found:
        raise UsageError(f"region {text!r}: expected integers, slices and ... as in '0:10,5,...', got {part!r}")
    start, colon, stop, second_colon, step = found.groups()
    if colon is None:
        if start is None or stop is not None or second_colon is not None:
            raise UsageError(f"region {text!r}: expected an integer, a slice or ..., got {part!r}")
        return int(start)
    return slice(*(None if number is None else int(number) for number in (start, stop, step)))


class IndexExpression:
    """A condition on the grid index, as a function of it.

    ``i0``, ``i1`` ... (or ``index[0]``, ``index[-1]`` ...) are the chunk's place in the grid along each
    axis. Beside them there are integers, ``+ - * // %``, comparisons (chained ones and ``in (1, 2)``
    too), ``and``, ``or``, ``not`` and parentheses.

    Parameters
    ----------
    text : str
        The condition.

    Raises
    ------
    UsageError
        Naming what is not part of this language.

    Examples
    --------
    >>> wanted = IndexExpression("i0 % 2 == 0 and 10 <= i1 < 20")
    >>> wanted((4, 12)), wanted((4, 20)), wanted((3, 12))
    (True, False, False)
    >>> IndexExpression("__import__('os')")
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.UsageError: where "__import__('os')": a call is not part of the language: i0, i1, ... \
or index[0], index[1], ...; integers; + - * // %; comparisons and in (1, 2, ...); and, or, not
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._axes: set[int] = set()
        self._evaluate = self._build(self._parse().body)

    def __call__(self, index: Index) -> bool:
        """Whether the chunk at `index` is wanted."""
        return bool(self._evaluate(index))

    def __repr__(self) -> str:
        return f"IndexExpression({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexExpression) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexExpression, (self.text,)  # closures don't pickle; the text says it all

    def check(self, ndim: int) -> None:
        """Raise UsageError if an axis is named that an array of `ndim` axes does not have."""
        for axis in sorted(self._axes):
            if not -ndim <= axis < ndim:
                raise UsageError(f"where {self.text!r}: there is no axis {axis}, the array has {ndim}")

    # -- from text to closures ------------------------------------------------------------------------

    def _parse(self) -> ast.Expression:
        if len(self.text) > _MAX_TEXT:
            raise UsageError(f"where: the condition has {len(self.text)} characters, and {_MAX_TEXT} are allowed")
        try:
            return ast.parse(self.text.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
            raise UsageError(f"where {self.text!r} can't be understood: {reason}; an example is 'i0 < 10'") from None

    def _refuse(self, node: ast.AST, what: str = "") -> UsageError:
        kind = what or _WORDS.get(type(node), type(node).__name__)
        return UsageError(f"where {self.text!r}: {kind} is not part of the language: {_LANGUAGE}")

    def _build(self, node: ast.expr) -> Evaluate:
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                return lambda _: number
            case ast.Name(id=name) if re.fullmatch(r"i[0-9]{1,2}", name):
                return self._axis(int(name[1:]))
            case ast.Subscript(value=ast.Name(id="index"), slice=place):
                return self._axis(self._constant(place))
            case ast.BoolOp(op=op, values=values):
                return _join([self._build(value) for value in values], every=isinstance(op, ast.And))
            case ast.UnaryOp(op=ast.Not() | ast.USub() as op, operand=operand):
                return _apply(operator.not_ if isinstance(op, ast.Not) else operator.neg, self._build(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _combine(_ARITHMETIC[type(op)], self._build(left), self._build(right))
            case ast.Compare():
                return self._comparison(node)
            case ast.BinOp(op=op):
                raise self._refuse(node, f"the operator {type(op).__name__}")
            case ast.Name(id=name):
                raise self._refuse(node, f"the name {name!r}")
        raise self._refuse(node)

    def _axis(self, axis: int) -> Evaluate:
        self._axes.add(axis)
        return operator.itemgetter(axis)

    def _constant(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
                return -number
        raise self._refuse(node, "what is not an integer, at this place,")

    def _comparison(self, node: ast.Compare) -> Evaluate:
        terms = [node.left, *node.comparators]
        links: list[Evaluate] = []
        for left, op, right in zip(terms, node.ops, terms[1:], strict=False):
            if isinstance(op, ast.In | ast.NotIn):
                links.append(self._membership(left, right, wanted=isinstance(op, ast.In)))
            elif type(op) in _COMPARISONS:
                links.append(_combine(_COMPARISONS[type(op)], self._build(left), self._build(right)))
            else:
                raise self._refuse(op, f"the comparison {type(op).__name__}")
        return links[0] if len(links) == 1 else _join(links, every=True)

    def _membership(self, left: ast.expr, right: ast.expr, *, wanted: bool) -> Evaluate:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            raise self._refuse(right, "what follows 'in' without being a list of integers")
        value = self._build(left)
        members = frozenset(self._constant(element) for element in right.elts)
        return lambda index: (value(index) in members) is wanted


_LANGUAGE = "i0, i1, ... or index[0], index[1], ...; integers; + - * // %; comparisons and in (1, 2, ...); and, or, not"
_WORDS: dict[type[ast.AST], str] = {
    ast.Call: "a call",
    ast.Attribute: "an attribute",
    ast.Constant: "a constant other than an integer",
    ast.Lambda: "a function",
    ast.Subscript: "a subscript of anything but index",
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _apply(function: Callable[[Any], Any], operand: Evaluate) -> Evaluate:
    return lambda index: function(operand(index))


def _combine(function: Callable[[Any, Any], Any], left: Evaluate, right: Evaluate) -> Evaluate:
    return lambda index: function(left(index), right(index))


def _join(conditions: list[Evaluate], *, every: bool) -> Evaluate:
    """Chain with ``and`` or ``or``: like Python's, they give the value that decided."""
    *firsts, last = conditions

    def evaluate(index: Index) -> Any:
        for condition in firsts:
            value = condition(index)
            if bool(value) is not every:
                return value
        return last(index)

    return evaluate
