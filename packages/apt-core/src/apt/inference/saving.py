"""Writes a model that was not trained here, or not in this form, as a run of its own: what `load_run` opens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from apt.checkpoint.durable import cannot_write, make_folder, sync, write
from apt.checkpoint.lock import write_lock
from apt.checkpoint.rng import rng_state
from apt.checkpoint.store import Checkpoint, CheckpointStore
from apt.core.errors import CheckpointError
from apt.core.hooks import Hooks
from apt.core.profiles import dump_yaml
from apt.core.providers.tokenizer import Tokenizer
from apt.core.runs import RunFolder
from apt.inference.loading import LoadedRun
from apt.modeling.backbones.backbone import Backbone
from apt.modeling.compose import ModelBuilder


def save_run(path: Path | str, loaded: LoadedRun) -> RunFolder:
    """Write a run's folder: profile, lock, tokenizer, and one checkpoint with the model's weights and no optimizer.

    It is written aside and then renamed: at no moment is there half a run under that name.

    Args:
        path: the folder, which must not exist.
        loaded: what to write; its providers in use are those that the model was built with.

    Raises:
        CheckpointError: something is there already, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists already", hint="choose another folder, or remove it")
    run = RunFolder(path.with_name(f".{path.name}.tmp"))
    config, model, in_use = loaded.config, loaded.model, loaded.in_use
    weights = model.state_dict()
    try:
        make_folder(path.parent)
        shutil.rmtree(run.path, ignore_errors=True)
        make_folder(run.path)
        write(run.profile, dump_yaml(config.model_dump(mode="json")).encode())
        write_lock(run.lock, in_use.slots.values(), model, ModelBuilder(config, in_use).modules_by_slot(model))
        loaded.tokenizer.save(run.tokenizer)
        CheckpointStore(run.checkpoints).save(
            Checkpoint(
                step=loaded.step,
                epoch=0,
                batch_index=0,
                model=weights,
                optimizer={"state": {}, "param_groups": []},
                rng=rng_state(),
            )
        )
        sync(run.path)
        os.replace(run.path, path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(error, path, sum(tensor.nbytes for tensor in weights.values())) from error
    finally:
        shutil.rmtree(run.path, ignore_errors=True)
    return RunFolder(path)


def save_model(path: Path | str, builder: ModelBuilder, model: Backbone, tokenizer: Tokenizer) -> RunFolder:
    """Write a model that was made elsewhere as a run at step 0: it can be used, and trained from there on.

    Args:
        path: the folder, which must not exist.
        builder: what the model was built with.
        tokenizer: built by one of the builder's providers in use.

    Raises:
        CheckpointError: as `save_run`.
    """
    device = torch.device("cpu")
    return save_run(path, LoadedRun(builder.config, model, tokenizer, device, Hooks(), builder.in_use, 0))
