"""Errors: one tree, documented, each also a builtin; nothing else is raised, nothing caught is passed over silently."""

import ast
import builtins
import inspect
import pathlib
import re

import pytest

import kvbm_jax
from kvbm_jax import errors
from kvbm_jax.errors import KvbmError

pytestmark = pytest.mark.core

PACKAGE = pathlib.Path(kvbm_jax.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "errors.md"
BROAD = {"Exception", "BaseException"}
# What is no error of the library's, and is raised all the same.
PROTOCOL = {
    "AttributeError": "a module's __getattr__",
    "StopIteration": "the end of an iterator",
    "StopAsyncIteration": "the end of an asynchronous one",
    "NotImplementedError": "a kernel that does not serve a case; dispatch takes another",
    "argparse.ArgumentTypeError": "wrong usage of the command line",
    "SystemExit": "wrong usage of the command line",
}
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def is_commented(file, first, last):
    """Whether a line of these has a comment, in words."""
    return any(re.search(r"#.*[a-z]{3}", line) for line in file.read_text().splitlines()[first - 1 : last])


def caught_by(handler):
    if handler.type is None:
        return {"everything"}
    nodes = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(node) for node in nodes}


def uses(handler):
    """What a handler does with the error: raises, logs, or looks at it."""
    found = set()
    for node in (inner for statement in handler.body for inner in ast.walk(statement)):
        if isinstance(node, ast.Raise):
            found.add("raises")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"_LOG.exception", "_LOG.warning", "_LOG.info"}:
            found.add("logs")
        elif isinstance(node, ast.Name) and node.id == handler.name:
            found.add("looks")
    return found


def is_silent(handler):
    """Whether a handler does nothing at all."""
    return all(isinstance(statement, ast.Pass | ast.Continue) for statement in handler.body)


def nodes_of(kind):
    return [(file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def where(file, node):
    return f"{file.relative_to(PACKAGE)}:{node.lineno}"


def test_what_catches_everything_says_why_and_does_something_with_it():
    found = []
    for file, handler in nodes_of(ast.ExceptHandler):
        caught = caught_by(handler)
        assert "everything" not in caught, f"{where(file, handler)}: a bare except"
        if caught & BROAD:
            done = uses(handler)
            found.append(handler)
            assert done, f"{where(file, handler)}: {caught} is swallowed"
            if "raises" not in done:
                assert is_commented(file, handler.lineno, handler.lineno), f"{where(file, handler)}: no reason is given"
    assert found  # the test has seen something


def test_what_is_passed_over_says_why():
    for file, handler in nodes_of(ast.ExceptHandler):
        if is_silent(handler):
            last = handler.body[-1].end_lineno
            assert is_commented(file, handler.lineno, last), (
                f"{where(file, handler)}: {caught_by(handler)} is passed over"
            )
    suppressed = [(f, call) for f, call in nodes_of(ast.Call) if ast.unparse(call.func) == "contextlib.suppress"]
    assert suppressed
    for file, call in suppressed:
        assert not {ast.unparse(argument) for argument in call.args} & BROAD, where(file, call)
        assert is_commented(file, call.lineno - 1, call.lineno), f"{where(file, call)}: no reason is given"


def test_what_reads_bytes_with_msgspec_expects_bad_text_too():
    """It raises UnicodeDecodeError for it, which is none of its own errors."""
    tries = [(file, node) for file, node in nodes_of(ast.Try) if any(".decode(" in ast.unparse(s) for s in node.body)]
    found = 0
    for file, node in tries:
        caught = set().union(*map(caught_by, node.handlers))
        if caught & {"msgspec.MsgspecError", "msgspec.DecodeError"}:
            found += 1
            assert caught & {"UnicodeError", "UnicodeDecodeError"}, where(file, node)
    assert found >= 5


def test_only_errors_of_the_library_are_raised():
    own = {name: set() for name in errors.__all__}
    for file, raised in nodes_of(ast.Raise):
        if raised.exc is None:
            continue
        error = raised.exc.func if isinstance(raised.exc, ast.Call) else raised.exc
        name = ast.unparse(error)
        if name in own:
            own[name].add(file)
        elif hasattr(builtins, name) or "." in name:
            assert name in PROTOCOL or not is_class(name), f"{where(file, raised)}: raises {name}"
    unused = {name for name, files in own.items() if not files}
    # The root is raised where nothing narrower fits; what is made by a function is found by its name alone.
    text = "\n".join(file.read_text() for file in FILES if file.name != "errors.py")
    assert {name for name in unused if not re.search(rf"\b{name}\(", text)} == set()


def is_class(name):
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


def test_classes_of_errors_are_in_the_tree_or_private():
    """Errors that callers can meet are those of `errors`; others never leave their module."""
    for file, node in nodes_of(ast.ClassDef):
        bases = {ast.unparse(base) for base in node.bases}
        if bases & (BROAD | set(errors.__all__) | {name for name in dir(builtins) if is_class(name)}):
            assert file.name == "errors.py" or node.name.startswith("_"), f"{where(file, node)}: {node.name}"


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "KvbmError"])
def test_each_error_is_the_builtin_that_fits(name):
    error = getattr(errors, name)
    assert issubclass(error, KvbmError)
    fitting = [
        base for base in error.__mro__ if base.__module__ == "builtins" and base not in {Exception, BaseException}
    ]
    assert fitting[:-1], f"{name} is no builtin but {fitting}"
    with pytest.raises(fitting[0]):
        raise error("8 blocks; use fewer")
    assert str(error("8 blocks; use fewer")) == "8 blocks; use fewer"


def test_all_errors_are_exported_and_documented_as_they_are():
    classes = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, KvbmError)}
    assert classes == set(errors.__all__)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    told = {name: (re.findall(r"`(\w+)`", bases), text) for name, bases, text in rows}
    assert told == {
        name: ([base.__name__ for base in getattr(errors, name).__bases__], summary(getattr(errors, name)))
        for name in errors.__all__
    }


def summary(error):
    return " ".join(inspect.getdoc(error).split())
