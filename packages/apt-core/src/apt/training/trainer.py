"""The training loop. What it calls, and when, is the pseudocode of `apt.hookspecs`; one step is `training/step.py`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from apt.checkpoint.lock import read_lock, recorded_layouts
from apt.checkpoint.rng import torch_rng_state
from apt.core.config import RunConfig
from apt.core.device import move, tune_cpu_memory, use_bf16
from apt.core.discovery import Plugins
from apt.core.errors import AptWarning, ConfigError, PeerLostError, TrainingError
from apt.core.hooks import TRAINING, Hooks
from apt.core.in_use import ProvidersInUse
from apt.core.logging import get_logger
from apt.core.monitor import ResourceMonitor
from apt.core.problems import COMMAND_LINE
from apt.core.profiles import Profile, resolve
from apt.core.providers import Provider
from apt.core.runs import RunFolder
from apt.core.schedules import Schedule
from apt.core.world import World
from apt.data.loader import Batch
from apt.data.prepare import prepare_data
from apt.evaluation.answers import Exam
from apt.evaluation.evaluate import evaluate
from apt.inference.generator import Generator
from apt.inference.loading import LoadedRun
from apt.modeling.compose import ModelBuilder
from apt.training.choice import choose_plugins
from apt.training.compiling import CompiledBlocks
from apt.training.distributed import mean_of, own_device, own_micro_batches, own_numbers, reduced, seed_all, share_cores
from apt.training.ending import before_training, in_training, interrupted
from apt.training.finite import FiniteGuard
from apt.training.memory import check_memory
from apt.training.opening import open_run, refuse_what_is_not_in
from apt.training.optim import build_optimizer, learning_rate
from apt.training.plan import use_side_providers
from apt.training.progress import Progress
from apt.training.saving import RunSaver
from apt.training.sharding import shard, shards_of, whole
from apt.training.signals import StopRequest, catch_signals
from apt.training.step import BatchLoss, accumulate_gradients, clip_gradients, dry_run, free_name, update
from apt.training.window import Window, not_finite, plain_numbers


class Trainer:
    """Trains one model, as a profile says.

    Args:
        source: a profile's path or name, a plain dict, a `RunConfig`, or a profile that is resolved already.
        overrides: {"training.max_epochs": 5, ...}, dotted keys over the profile's own; not for one that is resolved.
        plugins, no_plugin, no_plugins: which plugins may be used, as the command line's options of those names; or what
            `choose_plugins` found.
        strict: every fallback and every effect that fails is an error.
        run_dir: the run's folder; a new one under the profile's `output_dir` if left out.
        resume: the run to go on with; its last good checkpoint is loaded.
        frozen: a lock; every plugin that it does not hold, or not in this version and of these files, is refused.
        quiet: show nothing.
        options: what plugins' own command-line options were set to.

    Raises:
        ConfigError, PluginError: the profile or the choice of plugins cannot be used.
        CheckpointError: a lock cannot be read.

    The attributes that hooks may rely on are the table in `apt.hookspecs`; those that need the model exist once `train`
    has called `on_model_built`.
    """

    saver: RunSaver
    """What saves the run; there once its folder is open."""

    def __init__(
        self,
        source: str | Path | Mapping[str, Any] | RunConfig | Profile,
        *,
        overrides: Mapping[str, Any] | None = None,
        plugins: Iterable[str] | Plugins | None = None,
        no_plugin: Iterable[str] = (),
        no_plugins: bool = False,
        strict: bool = False,
        run_dir: str | Path | None = None,
        resume: RunFolder | None = None,
        frozen: Path | None = None,
        quiet: bool = False,
        options: Any = None,
    ) -> None:
        self.profile = source if isinstance(source, Profile) else resolve(source, overrides)
        self.config: RunConfig = self.profile.config
        _refuse_quantised(self.config)
        self.options = options
        self.strict = strict
        self.world = World.of_environment()
        self.run = resume or (RunFolder(Path(run_dir)) if run_dir else None)
        self.resumed = resume is not None
        self.lock = read_lock(resume.lock) if resume else None
        if not isinstance(plugins, Plugins):
            plugins = choose_plugins(
                self.profile, self.lock, plugins=plugins, no_plugin=no_plugin, no_plugins=no_plugins, strict=strict
            )
        self.plugins = plugins
        self.registry = plugins.registry
        if frozen is not None:
            refuse_what_is_not_in(frozen, self)
        layouts = recorded_layouts(self.lock) if self.lock else None
        self.in_use = ProvidersInUse(self.registry, self.config.sections, strict=strict, layouts=layouts)
        self.schedule = Schedule(self.config)
        self.logger = get_logger(f"run.{id(self):x}")
        self.hooks = Hooks("stop" if strict else self.config.on_plugin_error, self.logger)
        self.hooks.loss_behind = self.world.loss_behind
        for plugin in self.plugins.listeners(TRAINING):
            self.hooks.add(plugin.module, plugin.name)
        self.progress = Progress(quiet=quiet or not self.world.is_first)
        self.hooks.add(self.progress, "progress")
        self.extra_metrics: dict[str, float | Tensor] = {}
        self.epoch = self.step = self.batch_index = 0
        self.best_val_loss = math.inf
        self.metrics: dict[str, float] = {}
        self.evaluated_step = -1
        self.carried_states: dict[str, Any] = {}
        self.plugin_of_loss: dict[str, str] = {}
        self.epoch_closed = True
        self.guard = FiniteGuard(self.config.training.on_not_finite)
        self._stop = StopRequest()
        self._signum: int | None = None
        self._begun = self._looping = self._updating = False
        self._rng_before_step: dict[str, Any] | None = None

    def register_hook(self, hook: object) -> None:
        """Let an object listen: its methods whose names match hooks are called.

        Raises:
            PluginError: a method does not fit its hook.
        """
        self.hooks.add(hook)

    def note(self, text: str) -> None:
        """Tell the user something about the run: one line on the console and in run.log."""
        self.progress.note(text)
        self.logger.info("%s", text)

    @property
    def run_dir(self) -> Path:
        """The run's folder; it is made once everything is built."""
        assert self.run is not None, "the run's folder is made by train()"
        return self.run.path

    @property
    def providers(self) -> dict[tuple[str, str], Provider]:
        """{(kind, name): instance} of the providers in use."""
        return self.in_use.providers

    # The loop

    def train(self) -> Path:
        """Run from where the run stands to its end; returns the run's folder. A trainer trains once.

        Raises:
            AptError: what a user can mend. The last good checkpoint is never lost by it.
            Interrupted: Ctrl-C or SIGTERM, after the step was finished and saved.
        """
        if self._begun:
            raise TrainingError(
                "this trainer has trained already", hint="make a new one; resume=RunFolder(...) goes on"
            )
        self._begun = True
        with ExitStack() as stack:
            try:
                stack.enter_context(self.world.unhurried())
                stack.enter_context(self.hooks.watched())
                with self.world.watching():
                    self.world.meet()
                    self.hooks.call("on_config_resolved", config=self.config)
                    self._build_parts(stack)
                    first = next(self.data.train.epoch(0, share=self._share)).split(self._micro_batches)[0]
                    dry_run(self.model, first, self.device, self._autocast)
                    # Nothing is made of a run that is refused; where one that is resumed stands is known only then.
                    if is_refused_early := self.strict and not self.resumed:
                        self._check_length()
                    open_run(self, stack)
                    if not is_refused_early:
                        self._check_length()
                    self._loss = reduced(self._batch_loss, self.model, self.world)
                    stack.enter_context(self.world.unhurried())
                    self._stop = stack.enter_context(catch_signals())
                    self._fit()
            except SystemExit as error:
                # Whoever calls it in a layer: a run that stops early never ends with exit code 0.
                failure = RuntimeError(f"sys.exit({error.code!r}) was called")
                self._end_early(failure)
                raise failure from error
            except BaseException as error:
                self._end_early(error)
                raise
        return self.run_dir

    def _fit(self) -> None:
        self._looping, self.window = True, Window(self.data.train.tokens_per_batch)
        self.hooks.call("on_training_start", trainer=self)
        all_asked = False
        while self.step < self.total_steps or not self.epoch_closed:
            from_its_start = self.batch_index == 0
            self._run_epoch()
            if from_its_start and not all_asked and (unread := ", ".join(self.schedule.unread())):
                self._pass_over(f"schedules: nothing in a whole epoch has asked for {unread}", "take it out")
            all_asked = all_asked or from_its_start
        self.saver.wait()
        self.hooks.call("on_training_end", trainer=self)

    def _pass_over(self, what: str, fix: str) -> None:
        """Say what was asked for and is passed over; raise ConfigError where nothing is to be."""
        if self.strict:
            raise ConfigError(what, hint=f"{fix}, or train without --strict")
        self.logger.warning("%s", what)
        warnings.warn(what, AptWarning, stacklevel=2)

    def _run_epoch(self) -> None:
        self.epoch_closed = False
        self.hooks.call("on_epoch_start", epoch=self.epoch, trainer=self)
        if self.batch_index and self._is_due(self.config.training.eval_every) and self.evaluated_step != self.step:
            self._evaluate_and_save()  # the run was stopped before it came to that
        for batch in self.data.train.epoch(self.epoch, start=self.batch_index, share=self._share):
            if self.step >= self.total_steps:
                break
            self._run_step(batch.to(self.device))
            if self._signum is not None:
                self._log()
                self._save(wait=True)
                raise interrupted(self, self._signum)
            self.saver.check()
            if self.step >= self.total_steps or self.batch_index >= self.steps_per_epoch:
                break
            self._evaluate_and_save()
        self._log()
        self._evaluate(answers=True)
        self.hooks.call("on_epoch_end", epoch=self.epoch, trainer=self)
        self.epoch_closed = True
        if self.batch_index >= self.steps_per_epoch:
            self.epoch, self.batch_index = self.epoch + 1, 0
        self._save()

    def _evaluate_and_save(self) -> None:
        """Between two steps of an epoch, what is due there."""
        checkpoint = self.config.checkpoint
        improved = self._evaluate() if self._is_due(self.config.training.eval_every) else False
        if (improved and checkpoint.keep_best) or self._is_due(checkpoint.every):
            self._save()

    def _run_step(self, batch: Batch) -> None:
        step, training = self.step, self.config.training
        self._rng_before_step = torch_rng_state()
        own_numbers(self.world, training.seed, step)
        self.hooks.call("on_step_start", step=step, batch=batch, trainer=self)
        if (listening := self.hooks.listening("extra_losses")) != (self._batch_loss.extra_losses is not None):
            self._batch_loss.extra_losses = self._extra_losses if listening else None  # slow, on a module
        loss = accumulate_gradients(self._loss, batch.split(self._micro_batches), self.world)
        loss.total = self.world.mean(loss.total)
        self.hooks.call("on_before_optimizer_step", optimizer=self.optimizer, trainer=self)
        wrong = self.guard.wrong_in_step(self, loss, self._parameters)
        norm = None if wrong else self._update()
        self.step, self.batch_index, self._updating = step + 1, self.batch_index + 1, False
        self._rng_before_step = None
        if wrong:
            self.guard.pass_over(self, wrong)
        else:
            self.window.add(loss, norm)
            self.hooks.call("on_step_end", step=step, loss=loss.total, trainer=self)
        self._agree()
        if self.step % training.log_every == 0:
            self._log()

    def _update(self) -> Tensor | None:
        norm = clip_gradients(self._parameters, self.config.training.gradient_clip)
        self._updating = True  # from here on the weights are those of no step
        update(self.optimizer, learning_rate(self.step, self.total_steps, self.config.training))
        return norm

    def _agree(self) -> None:
        """Between two steps: whether to stop, and which hooks to call no more, for all processes alike."""
        pending = self.hooks.pending()
        signum, failing = self.world.maximum([self._stop.signum or 0, len(pending)])
        self._signum = signum or None
        if failing:
            for process, lost in enumerate(self.world.gather(pending)):
                for plugin, hook, kind, text in lost:
                    self.hooks.lose(process, plugin, hook, kind, text)
            self.hooks.settle()

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    # What the loop calls

    def _log(self) -> None:
        """A record of the steps since the last one, if there are any."""
        if not self.window:
            return
        losses = self.window.losses
        facts = mean_of(self.world, self.window.close())
        facts["learning_rate"] = learning_rate(self.step - 1, self.total_steps, self.config.training)
        if wrong := not_finite(facts):
            raise self.guard.error(self, self.guard.of_losses(self, losses) or ", ".join(wrong))
        self._record("train", facts)

    def _evaluate(self, *, answers: bool = False) -> bool:
        """Measure the held-out text, and with `answers` the questions; returns whether the loss is the best so far."""
        with self.window.off_the_clock():
            training = self.config.training
            size, batches = training.batch_size, training.eval_batches
            metrics = evaluate(self.model, self.data.val, size, self.device, batches, self.world)
            if answers and self.exam is not None:
                with whole(self.model):
                    metrics |= self.exam.take(self._generator(), self.epoch, self.step - 1)
            self.metrics, self.evaluated_step = metrics, self.step
            improved = metrics["val_loss"] < self.best_val_loss
            self.best_val_loss = min(self.best_val_loss, metrics["val_loss"])
            self.hooks.call("on_evaluation_end", metrics=MappingProxyType(metrics), trainer=self)
            self._record("eval", {**metrics, "memory": self._monitor.sample().memory})
        return improved

    def _generator(self) -> Generator:
        loaded = LoadedRun(self.config, self.model, self.tokenizer, self.device, self.hooks, self.in_use, self.step)
        return Generator(loaded, options=self.options)

    def _record(self, event: str, facts: Mapping[str, float]) -> None:
        """Hand a record to whoever keeps them, with what plugins have added to `extra_metrics`."""
        if not self.world.is_first:
            self.extra_metrics.clear()
            return
        record: dict[str, Any] = {"event": event, "step": self.step - 1, "epoch": self.epoch, **facts}
        for name, value in plain_numbers(self.extra_metrics).items():
            record[free_name(record, name)] = value
        self.extra_metrics.clear()
        if self.hooks.dropped:
            record["dropped"] = self.hooks.dropped
        self.hooks.call("on_log", record=MappingProxyType(record))

    def _save(self, *, wait: bool = False) -> None:
        with self.window.off_the_clock():
            self.saver.save(wait=wait)

    def last_saved(self) -> int | None:
        """The step of the newest checkpoint, if there is one; the save that is on its way is waited for."""
        return self.saver.last()

    def _extra_losses(
        self, batch: Batch, logits: Tensor, targets: Tensor, model_state: dict[str, Any]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        results = self.hooks.call(
            "extra_losses", trainer=self, batch=batch, logits=logits, targets=targets, model_state=model_state
        )
        for plugin, result in results:
            if _are_losses(result):
                own = {name if name not in losses else f"{plugin}.{name}": loss for name, loss in result.items()}
                losses |= own
                self.plugin_of_loss |= dict.fromkeys(own, plugin)
            else:
                self.hooks.report(plugin, "extra_losses", TypeError("it must return a dict of 0-d tensors by name"))
        return losses

    # Building

    def _build_parts(self, stack: ExitStack) -> None:
        """Data, model, optimizer: everything that can be refused, before anything is written."""
        config, training = self.config, self.config.training
        self.device = own_device(config.hardware.device, self.world)
        self._micro_batches = own_micro_batches(training, self.world)
        self._share = (self.world.rank, self.world.size)
        shards = shards_of(config, self.world)
        stack.enter_context(self.world.joined(self.device))
        if config.hardware.threads:
            torch.set_num_threads(config.hardware.threads)
        else:
            share_cores(self.world)
        if self.device.type == "cpu":
            tune_cpu_memory()
        check_memory(config, self.registry, self.device, config.model.vocab_size, self.world)
        seed_all(training.seed)
        tokenizer_path = self.run.tokenizer if self.resumed and self.run else None
        with self.world.one_first("data"):
            self.data = prepare_data(
                config, self.in_use, tokenizer_path=tokenizer_path, progress=self.progress.preparing
            )
        self.tokenizer = self.data.tokenizer
        self.steps_per_epoch = len(self.data.train)
        self.schedule.steps_per_epoch = self.steps_per_epoch
        self.measure()
        builder = ModelBuilder(config, self.in_use, device=self.device, trains=True)
        vocab_size = config.model.vocab_size or self.tokenizer.vocab_size
        if vocab_size < self.tokenizer.vocab_size:
            raise ConfigError(
                f"model.vocab_size {vocab_size} is smaller than the tokenizer's {self.tokenizer.vocab_size}",
                hint="leave model.vocab_size out (null), and the tokenizer's is taken",
            )
        if config.model.vocab_size is None:
            check_memory(config, self.registry, self.device, vocab_size, self.world)
        self.model = builder.build_model(vocab_size=vocab_size)
        if shards == 1:  # else block by block, where it goes
            move(self.model, self.device)
        self.modules_by_slot = builder.modules_by_slot(self.model)
        use_side_providers(config, self.in_use, self.model)
        voter: Any = self.providers.get(("voter", config.model.voter_name or ""))
        self.exam = Exam(config, self.schedule, voter) if config.data.answers_path else None
        self.hooks.add_providers(
            {slot: made for slot, made in self.providers.items() if self.world.is_first or slot[0] != "tracker"}
        )
        self.hooks.call("on_model_built", model=self.model, trainer=self)
        bf16 = use_bf16(training.mixed_precision, self.device, config.model.d_model)
        if shards > 1:
            shard(self.model, self.world, self.device, bf16=bf16)
        self.optimizer = build_optimizer(self.model, training)
        self.hooks.call("on_optimizer_built", optimizer=self.optimizer, trainer=self)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._autocast = torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()
        self._batch_loss = BatchLoss(CompiledBlocks(self.model) if training.compile else self.model, self._autocast)
        self._monitor = ResourceMonitor()

    def measure(self) -> None:
        """Set the step that the run ends with, seen from where it stands. Steps are not always a multiple of an
        epoch's: in a run that goes on with another batch size its epochs have had other numbers of them."""
        training = self.config.training
        left = (training.max_epochs - self.epoch) * self.steps_per_epoch - self.batch_index
        self.total_steps = min(self.step + left, training.max_steps or 2**62)
        self.schedule.total_steps = self.total_steps

    def _check_length(self) -> None:
        """Say what of the profile lies beyond the end of the run."""
        training, origins = self.config.training, self.profile.origins
        for name in self.schedule.unreached():
            self._pass_over(f"schedules.{name}: the run ends before it begins", "take it out, or train for longer")
        steps, epochs = (origins.get(("training", key)) for key in ("max_steps", "max_epochs"))
        cut = training.max_steps is not None and training.max_steps < training.max_epochs * self.steps_per_epoch
        if cut and epochs == COMMAND_LINE != steps:
            self._pass_over(
                f"training.max_epochs: {training.max_epochs}: the profile's training.max_steps, {training.max_steps}, "
                "ends the run before",
                "give --training.max_steps too (null for no limit)",
            )

    # The end

    def _end_early(self, error: BaseException) -> None:
        """Save the run if its state is that of a finished step, then say why it ends."""
        failed = self.world.first_failure(error)
        self.logger.error("the run ends early: %s", error, exc_info=error)
        killed = isinstance(error, PeerLostError) and failed is None
        saved = self._looping and self.saver.rescue(
            error, between_updates=not self._updating, rng=self._rng_before_step, killed=killed
        )
        with self.hooks.forgiving():
            self.hooks.call("on_exception", error=error, trainer=self)
        self.world.end_together()
        told = in_training(self, error, failed, saved) if self._looping else before_training(self, error, failed)
        if told is not None:
            raise told from error


def _are_losses(result: object) -> bool:
    """Whether a plugin has returned what can be added to the loss: real numbers, 0-d, each with a name."""
    return isinstance(result, Mapping) and all(
        isinstance(name, str) and isinstance(loss, Tensor) and loss.ndim == 0 and not loss.is_complex()
        for name, loss in result.items()
    )


def _refuse_quantised(config: RunConfig) -> None:
    """Raise ConfigError for a model whose weights are kept in few bits: a step would be lost in their rounding."""
    if config.model.quant_name:
        raise ConfigError(
            f"model.quant_name: {config.model.quant_name}: a quantised model cannot be trained",
            hint="go on with the run it was made from; to train weights for a scheme, set model.qat_name",
        )
