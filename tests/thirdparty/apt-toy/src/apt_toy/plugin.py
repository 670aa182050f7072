"""Registers the toy's providers, by import string: listing them imports nothing of this package but this file."""

from apt.hookspecs import hookimpl

API_VERSION = (1, 0)


@hookimpl
def apt_register_providers(registry):
    registry.register("attention", "toy_diff", "apt_toy.attention:DifferentialAttention", version="0.1.0")
    registry.register("ffn", "toy_relu2", "apt_toy.ffn:SquaredReLU", version="0.1.0")
    registry.register("align", "toy_zloss", "apt_toy.loss:ZLoss", version="0.1.0")
    registry.register("tracker", "toy_spark", "apt_toy.tracker:Sparkline", version="0.1.0")


@hookimpl
def apt_register_commands(commands):
    commands.add("toy-lambda", "Show how much each layer of a run takes away", _configure, _run)


@hookimpl
def apt_register_options(command, options):
    if command == "train":
        options.add_argument("--toy-goal", type=float, metavar="L", help="say when the loss is first below L")


@hookimpl
def on_step_end(step, loss, trainer):
    goal = getattr(trainer.options, "toy_goal", None)
    if goal is not None and loss.item() < goal:
        trainer.options.toy_goal = None
        trainer.note(f"the loss is below {goal:g} after {step + 1} steps")


def _configure(parser):
    parser.add_argument("run_dir", metavar="RUN", help="the run's folder")


def _run(args):
    from apt_toy.command import run

    return run(args)
