"""What APT loads of this package: the schemes, as import strings, and the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt.hookspecs import hookimpl

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

API_VERSION = (1, 1)


@hookimpl
def apt_register_providers(registry: Any) -> None:
    for name, provider, config in (
        ("int8", "Int8Weights", "Settings"),
        ("int8_dynamic", "Int8Dynamic", "Settings"),
        ("int4", "Int4Weights", "GroupSettings"),
    ):
        registry.register(
            "quant",
            name,
            f"apt_plugin_quant.providers:{provider}",
            version="1.0.0",
            config=f"apt_plugin_quant.config:{config}",
        )


@hookimpl
def apt_register_commands(commands: Any) -> None:
    commands.add(
        "quantize", "write a run again with its weights in fewer bits", _configure_quantize, _run_quantize_command
    )
    commands.add(
        "export",
        "write a run as safetensors, ONNX, a torch program or a Hugging Face folder",
        _configure_export,
        _run_export_command,
    )
    commands.add(
        "import", "make a run of a Hugging Face folder (Llama, Mixtral)", _configure_import, _run_import_command
    )


def _configure_quantize(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run_name", nargs="?", metavar="RUN", help="the run's folder, or its name in runs/; the newest if left out"
    )
    parser.add_argument(
        "--scheme",
        metavar="S",
        help="int8, int8_dynamic, int4 or another one that is installed; what the run was trained for if left out",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to write; RUN-SCHEME if left out")
    parser.add_argument("--group-size", metavar="G", help="int4: weights of a row that share one scale")
    parser.add_argument("--checkpoint", metavar="C", help="best, last, or the steps behind it (last)")
    parser.add_argument("--state", metavar="S", help="an average of the weights to take in their place, such as stable")


def _run_quantize_command(args: Namespace) -> int:
    from apt_plugin_quant.command import run_quantize_command

    return run_quantize_command(args)


def _configure_export(parser: ArgumentParser) -> None:
    from apt_plugin_quant.export.commands import configure_export

    configure_export(parser)


def _run_export_command(args: Namespace) -> int:
    from apt_plugin_quant.export.commands import run_export

    return run_export(args)


def _configure_import(parser: ArgumentParser) -> None:
    from apt_plugin_quant.export.commands import configure_import

    configure_import(parser)


def _run_import_command(args: Namespace) -> int:
    from apt_plugin_quant.export.commands import run_import

    return run_import(args)
