"""No source of ours writes or reads a pickle: whoever can write a checkpoint, a cache or a store must not be able to
run code on the machine that opens it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from checkout import ROOT

PICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickle5",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
}

CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.jit.save", "torch.package.PackageImporter",
    "torch.distributed.checkpoint.save", "torch.distributed.checkpoint.load",
    "pandas.read_pickle", "numpy.savez", "numpy.savez_compressed",
}  # fmt: skip
"""What pickles inside."""

NUMPY = {"numpy.load", "numpy.save", "numpy.lib.format.read_array"}
"""What pickles inside unless it is told not to."""


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of one module."""
    tree = ast.parse(source)
    names = {"np": "numpy", "pd": "pandas"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                names[name.asname or name.name.partition(".")[0]] = (
                    name.name if name.asname else name.name.partition(".")[0]
                )
                if name.name.partition(".")[0] in PICKLERS:
                    yield node.lineno, f"import {name.name}"
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                names[name.asname or name.name] = f"{node.module}.{name.name}"
            if node.module.partition(".")[0] in PICKLERS:
                yield node.lineno, f"from {node.module} import"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func, names)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        allowed = keywords.get("allow_pickle")
        if called in CALLS:
            yield node.lineno, called
        if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
            yield node.lineno, "allow_pickle"
        if called in NUMPY and allowed is None:
            yield node.lineno, f"{called} without allow_pickle=False"
        if called in ("__import__", "importlib.import_module") and node.args:
            module = node.args[0]
            if isinstance(module, ast.Constant) and str(module.value).partition(".")[0] in PICKLERS:
                yield node.lineno, f"{called}({module.value!r})"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as "numpy.load"; "" for what is no chain of names."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return ""


def test_core_and_plugins_write_and_read_no_pickle() -> None:
    sources = sorted((ROOT / "packages").glob("*/src/**/*.py"))
    assert len(sources) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}" for path in sources for line, what in findings(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as plain",
        "from pickle import loads",
        "def f():\n    import joblib",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import save\nsave({}, 'x')",
        "import torch as t\nt.save({}, 'x')",
        "import numpy as np\nnp.load('x')",
        "from numpy import load as read\nread('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.save('x', y, allow_pickle=flag)",
        "import importlib\nimportlib.import_module('dill')",
        "import torch.distributed.checkpoint as dcp\ndcp.save({}, checkpoint_id='x')",
    ],
)
def test_the_lint_notices(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import numpy as np\nnp.save('x', y, allow_pickle=False)",
        "from safetensors.torch import load_file\nload_file('x')",
        "import json\njson.load(file)",
        "model.save('pickle')",
    ],
)
def test_the_lint_lets_pass(source: str) -> None:
    assert not list(findings(source))
