"""Edits of a function's syntax tree, by which tests/guards.py removes a guard from the source.

    edited(tree, "Saver.wait", (drop_operand("MAX_FAILED"),))     # `if final or failed >= MAX_FAILED` → `if final`

An edit finds its place by structure and by the names that the place mentions: called functions, attributes, constants,
comparison operators. Line breaks, comments and the names of local variables do not matter, and neither do leading
underscores. A place that is not there, or is there more than once, is a ValueError. Where a function has several equal
places, `which=(1, 2)` means the first of exactly two.

Texts that are put in may quote the source: `{}` is what they replace. Of a call, `{0}` is the first argument, `{all}`
all of them, `{func}` the function and `{of}` the object whose method it is. `{save}` is the only call of `save` in the
function, `{save.0}` its first argument, and `{parameter.0}` the function's first parameter.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

Function = ast.FunctionDef | ast.AsyncFunctionDef
Edit = Callable[[Function], None]
"""Changes a function's syntax tree in place; raises ValueError unless it finds exactly one place."""
Which = tuple[int, int] | None

N = TypeVar("N", bound=ast.AST)
T = TypeVar("T")
_COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


# Statements


def drop(call: str, *mentions: str, which: Which = None) -> Edit:
    """Removes a statement that is nothing but a call of this function, with arguments that mention these names."""

    def edit(function: Function) -> None:
        found = [s for s in _of_type(function, ast.Expr) if s.value in _calls(function, call, mentions)]
        _replace(function, _chosen(found, f"statements that call {call}", which), ast.Pass())

    return edit


def before(call: str, text: str, *mentions: str, which: Which = None) -> Edit:
    """Puts statements in front of the one that calls this function."""

    def edit(function: Function) -> None:
        found = _chosen(_calls(function, call, mentions), f"calls of {call}", which)
        statement = [s for s in _of_type(function, ast.stmt) if found in ast.walk(s)][-1]
        _replace(function, statement, [*ast.parse(_filled(text, function, found)).body, statement])

    return edit


def catch(error: str, text: str = "()") -> Edit:
    """Makes the handler of an exception catch another one; without a text it catches nothing."""

    def edit(function: Function) -> None:
        found = [h for h in _of_type(function, ast.ExceptHandler) if h.type and error in mentioned(h.type)]
        _chosen(found, f"handlers of {error}").type = _expression(text)

    return edit


# Conditions


def never(*mentions: str, raises: str = "", which: Which = None) -> Edit:
    """Makes the condition of an `if` or a conditional expression False.

    mentions: names in the condition. raises: a name in the `raise` that stands directly in the body.
    """
    return _condition(False, mentions, raises, which)


def always(*mentions: str, raises: str = "", which: Which = None) -> Edit:
    """Makes the condition True; arguments as for `never`."""
    return _condition(True, mentions, raises, which)


def _condition(value: bool, mentions: tuple[str, ...], raises: str, which: Which) -> Edit:
    def raised(node: ast.If | ast.IfExp) -> bool:
        body = node.body if isinstance(node, ast.If) else []
        return any(_mentions(statement, [raises]) for statement in body if isinstance(statement, ast.Raise))

    def edit(function: Function) -> None:
        conditions: list[ast.If | ast.IfExp] = [*_of_type(function, ast.If), *_of_type(function, ast.IfExp)]
        found = [n for n in conditions if _mentions(n.test, mentions) and (not raises or raised(n))]
        what = f"conditions on {_listed(mentions)}" + (f" that raise {raises}" if raises else "")
        _chosen(found, what, which).test = ast.Constant(value)

    return edit


def drop_operand(*mentions: str, which: Which = None) -> Edit:
    """Removes an operand of `and`, `or`, `&` or `|`."""

    def edit(function: Function) -> None:
        found = [
            (node, operand)
            for node in _of_type(function, ast.expr)
            for operand in _operands(node)
            if _mentions(operand, mentions)
        ]
        inner = [
            (node, operand)
            for node, operand in found
            if not any(other in ast.walk(operand) for other, _ in found)
        ]
        node, operand = _chosen(inner, f"operands with {_listed(mentions)}", which)
        rest = [other for other in _operands(node) if other is not operand]
        if isinstance(node, ast.BoolOp) and len(rest) > 1:
            node.values = rest
        else:
            _replace(function, node, rest[0])

    return edit


def compared(text: str, *mentions: str) -> Edit:
    """Puts another expression in the place of both sides of a comparison; `{}` is the side."""

    def edit(function: Function) -> None:
        found = [node for node in _of_type(function, ast.Compare) if _mentions(node, mentions)]
        node = _chosen(found, f"comparisons of {_listed(mentions)}")
        left, right = (_expression(_filled(text, function, side)) for side in (node.left, *node.comparators))
        node.left, node.comparators = left, [right]

    return edit


# Expressions


def argument(call: str, key: int | str, text: str | None) -> Edit:
    """Gives an argument, by position or by name, another value; None removes it."""

    def edit(function: Function) -> None:
        found = _chosen(_calls(function, call, ()), f"calls of {call}")
        value = None if text is None else _expression(_filled(text, function, found))
        if isinstance(key, int):
            found.args[key : key + 1] = [] if value is None else [value]
            return
        there = [keyword for keyword in found.keywords if keyword.arg == key]
        if value is None:
            found.keywords.remove(_chosen(there, f"arguments {key} of {call}"))
        elif there:
            there[0].value = value
        else:
            found.keywords.append(ast.keyword(key, value))

    return edit


def instead(call: str, text: str, *mentions: str, which: Which = None) -> Edit:
    """Puts another expression in the place of a call."""

    def edit(function: Function) -> None:
        found = _chosen(_calls(function, call, mentions), f"calls of {call}", which)
        _replace(function, found, _expression(_filled(text, function, found)))

    return edit


def read(name: str, text: str) -> Edit:
    """Puts another expression where a variable or an attribute of this name is read."""

    def edit(function: Function) -> None:
        found = [
            node
            for node in _nodes(function)
            if isinstance(node, ast.Name | ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and same(_dotted(node)[-1], name)
        ]
        node = _chosen(found, f"places that read {name}")
        _replace(function, node, _expression(_filled(text, function, node)))

    return edit


def assigned(name: str, text: str) -> Edit:
    """Assigns another value to a variable or an attribute, also where several are assigned in one statement."""

    def edit(function: Function) -> None:
        pairs = [
            pair
            for statement in _of_type(function, ast.Assign)
            for target in statement.targets
            for pair in _pairs(target, statement.value)
        ]
        found = [value for target, value in pairs if _dotted(target) and same(_dotted(target)[-1], name)]
        value = _chosen(found, f"assignments to {name}")
        _replace(function, value, _expression(_filled(text, function, value)))

    return edit


def _pairs(target: ast.expr, value: ast.expr) -> Iterable[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return zip(target.elts, value.elts, strict=True)
    return [(target, value)]


# The function in the package


def edited(package: Path, function: str, edits: Sequence[Edit]) -> tuple[Path, str]:
    """The file that defines a function, and its text after the edits, comments lost.

    package: the folder of the package's source. function: its qualified name, with as many modules in front as tell
    it from others: `Saver.save`, `checkpoint.find`. Underscores count only where functions differ in nothing else.
    Raises ValueError unless the function and each place in it are found once.
    """
    known = _functions_of(package)
    wanted = function.split(".")
    found = [names for names in known if _ends_with(names, wanted)]
    exact = [names for names in found if list(names[-len(wanted) :]) == wanted]
    names = _chosen(exact or found, f"functions called {function}")
    path = known[names]
    module = ast.parse(path.read_text(encoding="utf-8"))
    node = dict(functions(module))[".".join(names[len(_modules(package, path)) :])]
    for edit in edits:
        untouched = ast.dump(node)
        edit(node)
        if ast.dump(node) == untouched:
            raise ValueError(f"an edit of {function} changes nothing")
    return path, ast.unparse(ast.fix_missing_locations(module)) + "\n"


@lru_cache
def _functions_of(package: Path) -> dict[tuple[str, ...], Path]:
    """The file of every function in a package, by the parts of its dotted name."""
    return {
        (*_modules(package, path), *name.split(".")): path
        for path in sorted(package.rglob("*.py"))
        for name, _ in functions(ast.parse(path.read_text(encoding="utf-8")))
    }


def _modules(package: Path, path: Path) -> tuple[str, ...]:
    return path.relative_to(package).with_suffix("").parts


def functions(tree: ast.AST, outside: str = "") -> Iterator[tuple[str, Function]]:
    """Every function of a module with its qualified name, methods and nested functions included."""
    for node in ast.iter_child_nodes(tree):
        name = outside
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{outside}.{node.name}" if outside else node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from functions(node, name)


# How places are found


def same(a: str, b: str) -> bool:
    """Whether two names are equal but for underscores around them."""
    return a.strip("_") == b.strip("_")


def mentioned(tree: ast.AST) -> set[str]:
    """Names, attributes, keywords, texts and comparison operators in a piece of source, without underscores around."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id.strip("_"))
        elif isinstance(node, ast.Attribute):
            found.add(node.attr.strip("_"))
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg.strip("_"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.strip("_"))
        elif isinstance(node, ast.Compare):
            found |= {_COMPARISONS[type(op)] for op in node.ops if type(op) in _COMPARISONS}
    return found


def _mentions(tree: ast.AST, names: Iterable[str]) -> bool:
    return {name.strip("_") for name in names} <= mentioned(tree)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes below a node in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        yield node
        yield from _nodes(node)


def _of_type(tree: ast.AST, kind: type[N]) -> list[N]:
    return [node for node in _nodes(tree) if isinstance(node, kind)]


def _calls(function: Function, name: str, mentions: Iterable[str]) -> list[ast.Call]:
    """Calls of `name`, which may have objects in front (`bad.restore`), with arguments that mention the names."""
    return [
        call
        for call in _of_type(function, ast.Call)
        if _ends_with(_dotted(call.func), name.split("."))
        and all(any(_mentions(part, [m]) for part in (*call.args, *call.keywords)) for m in mentions)
    ]


def _dotted(node: ast.AST) -> list[str]:
    """The names of `a.b.c`; only those behind the last call or index when there is one, as in `f(x).b.c`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else names


def _ends_with(names: Sequence[str], wanted: Sequence[str]) -> bool:
    return len(names) >= len(wanted) and all(map(same, names[-len(wanted) :], wanted))


def _operands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BoolOp):
        return node.values
    binary = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr)
    return [node.left, node.right] if binary and isinstance(node, ast.BinOp) else []


def _chosen(found: Sequence[T], what: str, which: Which = None) -> T:
    number, total = which or (1, 1)
    if len(found) != total:
        raise ValueError(f"{len(found)} {what} where {total} was to be found")
    return found[number - 1]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "anything"


# How they are changed


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST | list[ast.stmt]) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        return self._new if node is self._old else self.generic_visit(node)


def _replace(function: Function, old: ast.AST, new: ast.AST | list[ast.stmt]) -> None:
    _Swap(old, new).generic_visit(function)


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _filled(text: str, function: Function, node: ast.AST) -> str:
    """A text with the source that it quotes put in."""

    def quoted(match: re.Match[str]) -> str:
        name, number = match[1], match[2]
        if name == "parameter":
            return function.args.args[int(number)].arg
        if name == "all" and isinstance(node, ast.Call):
            return ", ".join(map(ast.unparse, (*node.args, *node.keywords)))
        return f"({ast.unparse(_quoted(name, number, function, node))})"

    return re.sub(r"\{(\w*)(?:\.(\d+))?\}", quoted, text)


def _quoted(name: str, number: str | None, function: Function, node: ast.AST) -> ast.AST:
    if not name:
        return node
    if isinstance(node, ast.Call):
        if name.isdigit():
            return node.args[int(name)]
        if name == "func":
            return node.func
        if name == "of" and isinstance(node.func, ast.Attribute):
            return node.func.value
    call = _chosen(_calls(function, name, ()), f"calls of {name}")
    return call if number is None else call.args[int(number)]
