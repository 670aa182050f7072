"""Cross-entropy over held-out text."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from apt.core.errors import UsageError
from apt.core.runs import RunFolder
from apt.core.schedules import Schedule
from apt.core.world import World
from apt.data.loader import NO_TARGET, Batch, Loader
from apt.data.prepare import prepare_data
from apt.evaluation.answers import Exam
from apt.inference.generator import Generator
from apt.inference.loading import load_run
from apt.modeling.layers.mode import evaluation_mode


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    batch_size: int,
    device: torch.device,
    batches: int | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """Predict every token of a split once, in evaluation mode and full precision.

    Args:
        model: a backbone; its mode is put back afterwards.
        loader: the split.
        batch_size: sequences at a time.
        device: where the model is.
        batches: stop after so many; None measures all.
        world: the processes to share the batches with, each of which calls this; each returns the same.

    Returns:
        "val_loss" (mean nats per token), "perplexity" (its exponential) and "val_tokens" (how many were predicted).
    """
    world = world or World()
    total, tokens = 0.0, 0
    with evaluation_mode(model):
        for stand_in, own in _own_batches(loader, batch_size, batches, world):
            batch = (stand_in if own is None else own).to(device)
            logits_BTV = model(batch.tokens, **batch.context).logits
            if own is None:
                continue
            tokens += int((own.targets != NO_TARGET).sum())
            losses = F.cross_entropy(
                logits_BTV.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
            )
            total += losses.item()  # a float has 64 bits on every device
    total, tokens = world.sum(torch.tensor([total, tokens], dtype=torch.float64)).tolist()
    loss = total / tokens
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "val_tokens": float(tokens)}


def _own_batches(
    loader: Loader, batch_size: int, limit: int | None, world: World
) -> Iterator[tuple[Batch, Batch | None]]:
    """The batches of this process, second of each pair. Others may have one more: then the first is to be run and not
    counted, for a model in shards runs in all processes or in none."""
    own = loader.eval_batches(batch_size, limit=limit, share=(world.rank, world.size))
    if world.is_first:  # which has the most
        return ((batch, batch) for batch in own)
    return zip_longest(loader.eval_batches(batch_size, limit=limit, share=(0, world.size)), own)


def evaluate_run(
    run: RunFolder,
    *,
    device: str = "auto",
    checkpoint: str | int | None = None,
    state: str | None = None,
    batches: int | None = None,
    voter: str | None = None,
    options: Namespace | None = None,
    **plugins: Any,
) -> dict[str, float]:
    """Evaluate a checkpoint of a run on the run's own held-out text, and on its questions if it has some.

    Args:
        run: the run's folder.
        device: as `hardware.device`.
        checkpoint: "last", "best" or a step; None for the last one.
        state: an average of the weights to measure in their place, as `load_run` takes it.
        batches: stop after so many; None measures all.
        voter: answers the questions too; the profile's if left out.
        options: the parsed command line, for plugins that have options of their own there.
        **plugins: `plugins`, `no_plugin`, `no_plugins`, `strict`, `overrides`, as `load_run` takes them.

    Returns:
        "step", and what `evaluate` and `Exam.take` return.

    Raises:
        CheckpointError, DataError, ConfigError: the run, or the text it was trained on, cannot be read.
    """
    loaded = load_run(run, device=device, checkpoint=checkpoint, state=state, **plugins)
    data = prepare_data(loaded.config, loaded.in_use, tokenizer_path=run.tokenizer)
    config = loaded.config
    metrics = evaluate(loaded.model, data.val, config.training.batch_size, loaded.device, batches)
    if config.data.answers_path is not None:
        generator = Generator(loaded, options=options)
        name = voter or config.model.voter_name
        schedule = Schedule(config)
        schedule.steps_per_epoch = len(data.train)
        last = max(loaded.step - 1, 0)  # the step whose weights these are
        exam = Exam(config, schedule, generator.voter(name) if name is not None else None)
        metrics |= exam.take(generator, last // schedule.steps_per_epoch, last)
    elif voter is not None:
        raise UsageError("a voter answers questions, and this run has none", hint="give --data.answers_path FILE.jsonl")
    return {"step": float(loaded.step), **metrics}
