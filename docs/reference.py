"""Writes docs/reference.md: every hook, interface and helper that plugins may use, from the docstrings.

    python docs/reference.py

The sources are read and not imported.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "packages/apt-core/src/apt"
TARGET = HERE / "reference.md"

KINDS = (
    "attention", "ffn", "router", "align", "retrieval", "voter", "quant", "dataset", "tokenizer", "tracker",
)  # fmt: skip
LAYERS = ("masks", "kv_cache", "rope", "norm", "checks", "counting", "mode", "stand_in")

HEAD = """# Reference

What a plugin may use: the hooks, the interface of each kind of provider, the parts that layers are built from, the
conformance kit, and `apt.api`. How to write one is [plugins.md](plugins.md).

This file is written by `python docs/reference.py`, from the docstrings.
"""

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def render() -> str:
    """The whole reference."""
    return "\n".join([HEAD, *_hooks(), *_providers(), *_layers(), *_kit(), *_errors(), *_api()]).rstrip() + "\n"


def _hooks() -> Iterator[str]:
    module = _parse("hookspecs.py")
    about, _, rest = (ast.get_docstring(module) or "").partition("\n\n")
    yield f"## Hooks\n\n{about}\n\n{_prose(rest)}\n"
    for node in module.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = {ast.unparse(mark) for mark in node.decorator_list}
        if marks & {"hookspec", "observer"}:
            what = "effect" if "hookspec" in marks else "observer"
            what = "registration" if node.name.startswith("apt_") else what
            yield f"### `{node.name}`\n\n{_code(node)}\n\n*{what.capitalize()}.* {_prose(_doc(node))}\n"


def _providers() -> Iterator[str]:
    base = _parse("core/registry.py")
    yield f"## Providers\n\n{ast.get_docstring(_parse('core/providers/__init__.py'))}\n"
    yield from _classes(base, ["Provider"])
    yield from _classes(base, ["Registry"], methods=["register"])
    for kind in KINDS:
        module = _parse(f"core/providers/{kind}.py")
        yield f"## Kind `{kind}`\n\n{ast.get_docstring(module)}\n"
        names = _exported(module)
        # What a provider implements comes first, what it is handed after it.
        yield from _classes(module, sorted(names, key=lambda name: not name.endswith("Provider")))


def _layers() -> Iterator[str]:
    yield "## Parts of layers\n"
    for name in LAYERS:
        module = _parse(f"modeling/layers/{name}.py")
        yield f"### `apt.modeling.layers.{name}`\n\n{_prose(ast.get_docstring(module) or '')}\n"
        yield from _classes(module, _exported(module), level=4)


def _kit() -> Iterator[str]:
    about = ast.get_docstring(_parse("testing/__init__.py")) or ""
    yield f"## Tests\n\n{_prose(about)}\n"
    yield from _classes(_parse("testing/parametrize.py"), ["parametrize_with_checks"])


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    module = _parse("core/errors.py")
    yield f"{_prose(ast.get_docstring(module) or '')}\n\n| `apt.core.errors` | when |\n|---|---|"
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.bases:  # without one it is none to raise
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield f"| `{node.name}({bases})` | {_summary(node)} |"
    yield ""


def _api() -> Iterator[str]:
    module = _parse("api.py")
    yield f"## `apt.api`\n\n{ast.get_docstring(module)}\n\n| name | from | what it is |\n|---|---|---|"
    (homes,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    for name, home in sorted(homes.items(), key=lambda item: item[0].lower()):
        source = _parse(home.removeprefix("apt.").replace(".", "/") + ".py")
        yield f"| `{name}` | `{home}` | {_summary(_find(source, name))} |"
    yield ""


def _classes(
    module: ast.Module, names: list[str], *, level: int = 3, methods: list[str] | None = None
) -> Iterator[str]:
    """Classes and functions of a module, with the public methods and attributes of the classes."""
    for name in names:
        node = _find(module, name)
        if isinstance(node, DEFINITIONS):
            yield f"{'#' * level} `{name}`\n\n{_code(node)}\n\n{_prose(_doc(node))}\n"
        if not isinstance(node, ast.ClassDef):
            continue
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield f"{'#' * level} `{name}{f'({bases})' if bases else ''}`\n\n{_prose(_doc(node))}\n"
        if methods is None and (attributes := list(_attributes(node))):
            yield "| attribute | what it is |\n|---|---|"
            yield "\n".join(f"| `{code}` | {text} |" for code, text in attributes) + "\n"
        for method in node.body:
            wanted = isinstance(method, DEFINITIONS) and not method.name.startswith("_")
            if wanted and (methods is None or method.name in methods):
                yield f"{_code(method)}\n\n{_prose(_doc(method))}\n"


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """(declaration, docstring) of the annotated attributes; the docstring is the text behind it."""
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.target).startswith("_"):
            text = _string(after)
            yield ast.unparse(statement).replace("|", "\\|"), _one_line(text or "")


def _find(module: ast.Module, name: str) -> ast.stmt | None:
    """The statement of a module that defines a name."""
    for node in module.body:
        if isinstance(node, (ast.ClassDef, *DEFINITIONS)) and node.name == name:
            return node
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(target) == name for target in targets):
                return module.body[module.body.index(node) + 1]  # the docstring behind it
    return None


def _exported(module: ast.Module) -> list[str]:
    """The names in a module's `__all__`, in the order in which they are defined."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            return [found.name for found in module.body if getattr(found, "name", None) in names]
    raise LookupError("a module without __all__")


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The signature as a block of code, an argument a line where it is long."""
    given = node.args
    defaults: list[ast.expr | None] = [*[None] * (len(given.args) - len(given.defaults)), *given.defaults]
    parts = [_argument(arg, default) for arg, default in zip(given.args, defaults, strict=True) if arg.arg != "self"]
    if given.kwonlyargs:
        parts += ["*", *map(_argument, given.kwonlyargs, given.kw_defaults)]
    if given.kwarg:
        parts.append(f"**{_argument(given.kwarg, None)}")
    marks = [f"@{name}\n" for mark in node.decorator_list if (name := ast.unparse(mark)) in ("classmethod", "property")]
    end = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"def {node.name}({', '.join(parts)}){end}"
    if len(line) > 120:
        line = f"def {node.name}(\n    {(',' + chr(10) + '    ').join(parts)},\n){end}"
    return f"```python\n{''.join(marks)}{line}\n```"


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    value = f" = {ast.unparse(default)}" if default is not None else ""
    return f"{ast.unparse(arg)}{value}" if arg.annotation is not None else f"{arg.arg}{value.replace(' ', '')}"


def _doc(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""  # type: ignore[arg-type]


def _string(node: ast.AST | None) -> str | None:
    """The text of a statement that is nothing but a string."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return node.value.value if is_text else None  # type: ignore[union-attr]


def _summary(node: ast.AST | None) -> str:
    """The first paragraph of what a definition says of itself, as the cell of a table."""
    text = _string(node) or (_doc(node) if isinstance(node, (ast.ClassDef, *DEFINITIONS)) else "")
    return _one_line(inspect.cleandoc(text).partition("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """A docstring as Markdown: its sections Args, Returns and Raises as lists."""
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        if section := re.fullmatch(r"(Args|Returns|Raises|Yields)(?: .*)?:", line):
            inside = section[1]
            lines += ["", f"*{line.removesuffix(':')}*", ""]
        elif inside and line.startswith("    "):
            item = re.fullmatch(r"    ([\w*][^:]*): (.*)", line) if inside in ("Args", "Raises") else None
            rest = line[4:] if inside == "Returns" else f"  {line.strip()}"
            lines.append(f"- `{item[1]}`: {item[2]}" if item else rest)
        else:
            inside = inside if not line else ""
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _parse(path: str) -> ast.Module:
    return ast.parse((SOURCE / path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"{TARGET.relative_to(HERE.parent)} is as the docstrings are")
