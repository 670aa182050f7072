"""Checkpoints of a training loop of 1.x, in the kernel's store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from apt.checkpoint.codec import decode
from apt.checkpoint.manifest import folders_of, read_manifest
from apt.checkpoint.rng import rng_state
from apt.checkpoint.store import Checkpoint, CheckpointStore
from apt.core.errors import CheckpointError
from apt_model.modeling._model import APTModel

ALL = 2**31
BEST = "is_best"


class CheckpointManager:
    """Saves a model, its optimizer and its scheduler, and puts them back; every checkpoint is kept.

    Args:
        save_dir: the checkpoints lie in its folder `checkpoints`.
        model_name: nothing is called after it any more.
        save_freq: epochs between checkpoints, for the loop that asks for it.
        logger: a `logging.Logger` that hears of each.
    """

    def __init__(
        self, save_dir: str | Path, model_name: str = "apt_model", save_freq: int = 1, logger: Any = None
    ) -> None:
        self.save_dir, self.model_name, self.save_freq, self.logger = Path(save_dir), model_name, save_freq, logger
        self.store = CheckpointStore(self.save_dir / "checkpoints", keep_last=ALL)

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        epoch: int,
        global_step: int,
        loss_history: list[float],
        metrics: dict[str, float] | None = None,
        tokenizer: Any = None,
        config: Any = None,
        is_best: bool = False,
    ) -> str:
        """Save; returns the checkpoint's folder. One of the same step is replaced.

        Args:
            optimizer, scheduler: their state is saved; None if there is none.
            metrics: numbers.
            tokenizer, config: `save_model` keeps those; here they say nothing.

        Raises:
            CheckpointError: it cannot be written, or a state holds what a checkpoint cannot keep.
        """
        saved = self.store.save(
            Checkpoint(
                step=global_step,
                epoch=epoch,
                batch_index=0,
                model=_weights_of(model).state_dict(),
                optimizer=optimizer.state_dict() if optimizer else {"state": {}, "param_groups": []},
                rng=rng_state(),
                extra={"scheduler": scheduler.state_dict() if scheduler else None, "loss_history": list(loss_history)},
                metrics={**(metrics or {}), BEST: float(is_best)},
            )
        )
        if self.logger:
            self.logger.info("saved %s", saved)
        return str(saved)

    def load_checkpoint(
        self,
        model: nn.Module,
        optimizer: Any = None,
        scheduler: Any = None,
        checkpoint_path: str | Path | None = None,
        best: bool = False,
        latest: bool = False,
    ) -> tuple[int, int, list[float], dict[str, float]]:
        """Put a model, and an optimizer and a scheduler, into the state of a checkpoint.

        Args:
            checkpoint_path: what `save_checkpoint` returned; else
            best: the last one that was saved with `is_best`; else
            latest: the newest that is whole.

        Returns:
            Its epoch, step, losses and metrics.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it does not fit the model.
        """
        checkpoint = self.store.load(self._step(checkpoint_path, best, latest))
        try:
            _weights_of(model).load_state_dict(checkpoint.model)
            if optimizer and checkpoint.optimizer["param_groups"]:
                optimizer.load_state_dict(checkpoint.optimizer)
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint does not fit: {text}", hint="build the model it is of") from error
        if scheduler and (state := checkpoint.extra.get("scheduler")):
            scheduler.load_state_dict(state)
        if self.logger:
            self.logger.info("loaded step %d, epoch %d", checkpoint.step, checkpoint.epoch)
        metrics = {name: value for name, value in checkpoint.metrics.items() if name != BEST}
        return checkpoint.epoch, checkpoint.step, checkpoint.extra.get("loss_history", []), metrics

    def _step(self, path: str | Path | None, best: bool, latest: bool) -> int | None:
        folders = folders_of(self.store.folder)
        if path is not None:
            wanted = Path(path).resolve()
            if step := [step for step, folder in folders.items() if folder.resolve() == wanted]:
                return step[0]
            raise CheckpointError(f"{path} is no checkpoint of {self.store.folder}", hint="name one that it returned")
        if best:
            flagged = [step for step, folder in folders.items() if _is_best(folder, step)]
            if not flagged:
                raise CheckpointError(f"no checkpoint in {self.store.folder} is the best", hint="use latest=True")
            return max(flagged)
        if not latest:
            raise CheckpointError("which checkpoint?", hint="give checkpoint_path, best=True or latest=True")
        return None


def _is_best(folder: Path, step: int) -> bool:
    return bool(decode(read_manifest(folder, step)["metrics"], {}).get(BEST, 0))


def _weights_of(model: nn.Module) -> nn.Module:
    return model.backbone if isinstance(model, APTModel) else model
