"""Registers the toy's providers, by import string: listing them imports nothing of this package but this file."""

from apt.hookspecs import hookimpl

API_VERSION = (1, 0)


@hookimpl
def apt_register_providers(registry):
    registry.register("attention", "toy_linear", "apt_toy.attention:LinearAttention", version="0.1.0")
    registry.register("ffn", "toy_relu2", "apt_toy.ffn:SquaredReLU", version="0.1.0")
    registry.register("align", "toy_zloss", "apt_toy.loss:ZLoss", version="0.1.0")


@hookimpl
def apt_register_commands(commands):
    def run(args):
        print(f"hello {args.who}")
        return 0

    commands.add("toy-hello", "Greet somebody", lambda parser: parser.add_argument("who"), run)
