"""`apt export` and `apt import`: what they take, and what they print. Imports torch only when a command runs."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from importlib.util import find_spec
from pathlib import Path

from apt.api import AptError, find_run

FORMATS = {
    "safetensors": "the weights in one file, with the profile and hashes in JSON beside it",
    "onnx": "one graph for full passes and for decoding with a cache, checked with onnxruntime",
    "torch-export": "a program for torch.export.load, checked after it is reloaded",
    "hf": "a folder for transformers' AutoModelForCausalLM, where the parts are those of Llama or Mixtral",
}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Format -> the libraries that it needs beyond the package's own."""

DTYPES = ("fp32", "bf16")
KEEP_DTYPE = ("safetensors", "hf")
"""The formats that are weights and no computation: these may be rounded."""


def configure_export(parser: ArgumentParser) -> None:
    """The arguments of `apt export`."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="the run's folder, or its name in runs/; the newest if left out"
    )
    parser.add_argument(
        "--format", required=True, choices=FORMATS, help="; ".join(f"{k}: {v}" for k, v in FORMATS.items())
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write; RUN/export/FORMAT if left out")
    parser.add_argument("--checkpoint", type=_checkpoint, metavar="C", help="best, last, or a step (last)")
    parser.add_argument("--state", metavar="S", help="an average of the weights that the run keeps, such as stable")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights, in safetensors and hf (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace an export that is there")


def run_export(args: Namespace) -> int:
    """Export a run. What can be refused without opening it is refused first."""
    if args.dtype != "fp32" and args.format not in KEEP_DTYPE:
        raise AptError(
            f"apt export: --dtype {args.dtype} with --format {args.format}: what computes is exported in fp32",
            hint="leave --dtype out",
        )
    missing = [name for name in NEEDS.get(args.format, ()) if find_spec(name) is None]
    if missing:
        raise AptError(
            f"apt export: --format {args.format} needs {', '.join(missing)}, which is not installed",
            hint=f'pip install "apt-plugin-quant[{args.format}]"',
        )
    run = find_run(args.run)
    out = args.out or run.path / "export" / args.format

    from apt_plugin_quant.export.exporting import export_run

    exported = export_run(
        run, out, args.format, checkpoint=args.checkpoint, state=args.state, dtype=args.dtype, force=args.force
    )
    print(f"{run.path}, step {exported.step}, as {args.format} in {out}")
    for name, size in exported.sizes.items():
        print(f"  {name}  {size / 1e6:,.1f} MB" if size >= 1e5 else f"  {name}  {size:,} bytes")
    for line in exported.checks:
        print(line)
    return 0


def configure_import(parser: ArgumentParser) -> None:
    """The arguments of `apt import`."""
    parser.add_argument(
        "source", choices=("hf",), help="what the folder is; hf: as transformers saves a Llama or Mixtral model"
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="with config.json, tokenizer.json and safetensors")
    parser.add_argument(
        "--out", type=Path, metavar="RUN", help="the run's folder; runs/NAME, after that of DIR, if left out"
    )
    parser.add_argument(
        "--train-path", metavar="P", help="the run's text: what apt eval measures, and apt train --resume goes on with"
    )


def run_import(args: Namespace) -> int:
    """Make a run of a model that was trained elsewhere."""
    from apt_plugin_quant.export.hf_import import import_hf

    imported = import_hf(args.folder, args.out, train_path=args.train_path)
    print(f"{args.folder} ({imported.title}) as the run {imported.run.path}")
    print(f"  go on with: apt generate {imported.run.path} --prompt TEXT")
    return 0


def _checkpoint(text: str) -> str:
    if text in ("best", "last") or re.fullmatch(r"(step-)?\d+", text, re.ASCII):
        return text.removeprefix("step-")
    raise ArgumentTypeError(f"expected best, last or a step, got {text!r}")
