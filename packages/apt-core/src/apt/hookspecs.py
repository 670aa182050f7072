"""The contract between the kernel and its plugins: every hook, and the order in which a run calls them.

A plugin is a module or an object with functions marked `@hookimpl` (found through the entry points `apt.providers`), or
any object whose method names match (`trainer.register_hook(obj)`). A function may take fewer arguments than its hook
has; arguments are only ever added. This is the run, as pseudocode:

    on_config_resolved(config)
    on_model_built(model, trainer)
    on_optimizer_built(optimizer, trainer)
    on_checkpoint_load(state, trainer)                        # a resumed run only
    on_training_start(trainer)
    for epoch in epochs:
        on_epoch_start(epoch, trainer)                        # also on entering an epoch again after a resume
        for step, batch in epoch:
            on_step_start(step, batch, trainer)
            for micro_batch in batch:                         # gradient accumulation
                logits = model(tokens)
                loss = cross_entropy(logits, targets) + sum(extra_losses(trainer, batch, logits, targets, model_state))
                loss.backward()
            on_before_optimizer_step(optimizer, trainer)      # gradients are complete, not yet clipped
            optimizer.step()
            on_step_end(step, loss, trainer)                  # neither, if `training.on_not_finite` passes a step over
            on_log(record)                                    # every training.log_every steps, and the epoch's last
            on_evaluation_end(metrics, trainer); on_log(record)     # every training.eval_every steps
            on_checkpoint_save(trainer)                       # every checkpoint.every steps, and when it is the best
        on_evaluation_end(metrics, trainer); on_log(record)
        on_epoch_end(epoch, trainer)
        on_checkpoint_save(trainer)
    on_training_end(trainer)

    on_exception(error, trainer)                              # whatever ends the run early, before it is raised
    on_plugin_failed(failure)                                 # one of the hooks above raised

    prompt = on_generation_start(prompt, generator)           # results chain: each sees what the last one made of it
    for each new token:
        logits = on_next_token(logits, generator)             # likewise

Among several plugins the order is pluggy's: `tryfirst`, then the one registered last first, then `trylast`.

Numbers. `epoch` counts from 0 and is shown as `Epoch 3/5 (epoch=2)`. `step` is the index of the optimizer step, from 0
over the whole run. `loss` is a detached 0-d tensor on the model's device: reading it with `.item()` waits for the
device, so do that seldom.

What a hook may rely on, `trainer`:

| attribute | what it is |
|---|---|
| `config` | the resolved profile, a frozen `apt.core.config.RunConfig` |
| `model` | the `torch.nn.Module` in training |
| `optimizer` | the `torch.optim.Optimizer` |
| `schedule` | the `apt.core.schedules.Schedule`, a pure function of epoch and step |
| `registry` | this run's own view of the providers |
| `providers` | {(kind, name): instance} of the providers in use |
| `tokenizer` | the `Tokenizer` in use |
| `device` | the `torch.device` of the model |
| `world` | the `apt.core.world.World`: the run's processes, of which this is `rank` |
| `run_dir` | the run's folder, a `pathlib.Path` |
| `epoch` | the epoch the run is in |
| `step` | how many optimizer steps are done: the hook's `step` before the update, `step + 1` after it |
| `steps_per_epoch`, `total_steps` | how long it is |
| `note(text)` | tells the user something: one line on the console and in the run's log |
| `last_saved()` | the step of the newest checkpoint, None if there is none; waits for one that is being written |
| `extra_metrics` | {name: number or 0-d tensor} to add to: they join the next record of `on_log` and are then cleared |

and `model_state`, a new dict for each micro-batch:

| key | what it is |
|---|---|
| `tokens` | int64 [B, T], the inputs; of an encoder-decoder, whose sources are `batch.source`, the targets' |
| `hidden` | [B, T, D], the last hidden states, after the final norm |
| `aux_loss` | 0-d tensor, the sum of what the FFN layers returned, or None |
| `document_ids` | int64 [B, T], or None where documents are not kept apart |

and `generator`, what generates text:

| attribute | what it is |
|---|---|
| `model` | the `torch.nn.Module` in use, in evaluation mode |
| `tokenizer` | its `Tokenizer` |
| `device` | the `torch.device` of the model |
| `options` | the parsed command line, an `argparse.Namespace` with the options of plugins; None in scripts |
| `note(text)` | tells the user something: one line on standard error, never among the text |
| `tokens` | int64 [B, T], prompts and what was generated; without prompts for an encoder-decoder; in `on_next_token` |
| `padding` | int64 [B], how many tokens at the left of each row of `tokens` are none of its own; in `on_next_token` |
| `hidden` | [B, D], the last hidden states after the final norm, of which these logits come; in `on_next_token` |

An average of the weights is kept as `optimizer.state[parameter][NAME]`, a floating-point tensor shaped like the
parameter, beside what AdamW keeps there: so it is saved and resumed with no code of its own, and `apt eval` and
`apt generate` use it in place of the weights with `--state NAME`. Write it only where the parameter's state is not
empty: AdamW takes an empty one as its sign to begin, and a parameter that was never trained needs no average.

A run may go on in several processes (`trainer.world`), each of which runs all of the above on its share of every batch.
What a plugin counts over tokens is then its process's own, until `trainer.world.sum(tensor)` has added it up: every
process must come to that call. `loss` and `metrics` are those of all processes; `on_log` and trackers are called in
process 0 alone, and it alone writes files. A hook that is switched off is switched off in all of them.
Under `hardware.parallel: fsdp` parameters, gradients and what the optimizer keeps of them are DTensors, of which each
process holds a shard, and to run the model takes all of them.

Failure has two kinds. A hook marked *observer* only looks: if it raises, the others still run, the traceback goes to
the run's log and one line to the console; after three failures it is switched off. Every other hook is an *effect*, and
so is every hook of a provider in use: under `on_plugin_error: drop` training goes on without it, said aloud and
recorded; under `stop` the run saves and ends.

A hook that takes longer than a minute is named aloud, and waited for: a signal that comes twice ends the run at once.
A loss of `extra_losses` that is NaN or infinite is named with its plugin, and goes the way of
`training.on_not_finite`. `trainer.config` is frozen to its bottom: whoever tries to change it gets an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from apt.core.hooks import Failure
    from apt.core.registry import Registry

API_VERSION = (1, 1)
"""(major, minor). A plugin module declares the one it was written for under the same name: another major, or a newer
minor, is refused with a message."""

PROJECT = "apt"

F = TypeVar("F", bound=Callable[..., Any])

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin's module as an implementation of the hook of its name."""


def observer(spec: F) -> F:
    """Declare a hook that only looks: its failure never touches the run."""
    marked = hookspec(spec)
    marked.__dict__["observer"] = True
    return marked


# Registration


@hookspec
def apt_register_providers(registry: Registry) -> None:
    """Register providers, as import strings so that listing them imports nothing:
    `registry.register("router", "topk_moe", "apt_plugin_moe.router:MoERouter", version="1.0.0")`.

    What is registered is found out once, in a process of its own, and remembered: let it not depend on the machine."""


@hookspec
def apt_register_commands(commands: Any) -> None:
    """Add commands to the command line: `commands.add(name, help, configure, run)`, where `configure(parser)` adds
    arguments to an `argparse.ArgumentParser` and `run(args) -> int` is the command; it returns the exit code."""


@hookspec
def apt_register_options(command: str, options: Any) -> None:
    """Add options to a command of core; asked only when that command runs, and `train`, `generate`, `chat` and `eval`
    are those that ask. `options` is the `argparse` group of this plugin on it; what was given is in `trainer.options`
    or `generator.options`."""


# Build


@observer
def on_config_resolved(config: Any) -> None:
    """The profile is complete: `config` is a frozen `apt.core.config.RunConfig`. Providers are not built yet, and do
    not hear this."""


@hookspec
def on_model_built(model: nn.Module, trainer: Any) -> None:
    """The model is on its device, its weights initial. Change it in place; the optimizer is built next.

    Called too where a run is opened to generate or evaluate, so that the model is the one that was trained: there
    `trainer` is None, and the weights are loaded next."""


@hookspec
def on_optimizer_built(optimizer: Optimizer, trainer: Any) -> None:
    """The optimizer holds every parameter; a resumed run has not loaded its state yet."""


# Loop


@observer
def on_training_start(trainer: Any) -> None:
    """Everything is built, and loaded if the run resumes; `trainer.step` is the first step to come."""


@observer
def on_epoch_start(epoch: int, trainer: Any) -> None:
    """An epoch begins, or is entered again after a resume in the middle of it."""


@observer
def on_step_start(step: int, batch: Any, trainer: Any) -> None:
    """`batch` holds the tokens of the whole step, accumulation included, or this process's share of them: an
    `apt.data.loader.Batch`."""


@hookspec
def extra_losses(
    trainer: Any, batch: Any, logits: Tensor, targets: Tensor, model_state: dict[str, Any]
) -> Mapping[str, Tensor] | None:
    """Losses to add to the cross-entropy of one micro-batch before `backward`, by name: 0-d tensors, weights applied,
    on the scale of a mean per token.

    Args:
        batch: the micro-batch.
        logits: [B, T, V], with their graph.
        targets: int64 [B, T]; -100 where there is no target.
        model_state: the table above.
    """


@hookspec
def on_before_optimizer_step(optimizer: Optimizer, trainer: Any) -> None:
    """The gradients of the step are complete; clipping and the step itself come next."""


@observer
def on_step_end(step: int, loss: Tensor, trainer: Any) -> None:
    """The weights are updated. `loss` is the mean over the step's tokens, extra losses included."""


@observer
def on_epoch_end(epoch: int, trainer: Any) -> None:
    """The epoch's last step is done, or the run's, if `training.max_steps` ends it in mid-epoch."""


@observer
def on_training_end(trainer: Any) -> None:
    """The run has ended well and its last checkpoint is on disk."""


# Evaluation, log


@observer
def on_evaluation_end(metrics: Mapping[str, float], trainer: Any) -> None:
    """`metrics` holds "val_loss" (nats per token) and what else was measured."""


@observer
def on_log(record: Mapping[str, Any]) -> None:
    """One record of the run's metrics, JSON-compatible, with "event", "step" and "epoch"."""


# State


@hookspec
def on_checkpoint_save(trainer: Any) -> dict[str, Any] | None:
    """State to keep in the checkpoint, per plugin: nested dicts and lists of tensors, numbers, strings and None."""


@hookspec
def on_checkpoint_load(state: dict[str, Any], trainer: Any) -> None:
    """What this plugin's `on_checkpoint_save` returned; called only if the checkpoint holds something for it."""


# Generation


@hookspec
def on_generation_start(prompt: str, generator: Any) -> str | None:
    """Another prompt to use instead, or None to leave it as it is. In a chat it is the message, without what was said
    before."""


@hookspec
def on_next_token(logits: Tensor, generator: Any) -> Tensor | None:
    """Other next-token logits [B, V] to sample from, or None to leave them as they are. Those of tokens that are none
    of the tokenizer's are -inf. They are scores, before temperature and the like; log-probabilities are scores too.

    Rows are texts that are generated side by side; one that has ended leaves. Where a vote is held they are its
    candidates."""


# Errors


@observer
def on_exception(error: BaseException, trainer: Any) -> None:
    """The run ends early because of `error`."""


@observer
def on_plugin_failed(failure: Failure) -> None:
    """A hook of some plugin raised. Failures of this very hook are logged and not announced."""
