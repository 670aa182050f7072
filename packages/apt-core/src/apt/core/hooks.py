"""Calls hooks, and keeps a plugin that fails from taking the run with it.

pluggy checks signatures and keeps the order; the calls themselves are made here, one implementation at a time, because
isolation needs to know which implementation raised, and state is kept per plugin.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

from apt import hookspecs
from apt.core.errors import AptWarning, PeerLostError, PluginError, TrainingError, did_you_mean, in_a_line

if TYPE_CHECKING:
    import logging

MAX_OBSERVER_FAILURES = 3

SLOW_SECONDS = 60.0
"""A hook that is at work for longer is named: it may hang."""

GENERATION = frozenset({"on_generation_start", "on_next_token"})
"""The hooks that are called while text is generated."""

USE = GENERATION | {"on_model_built", "on_plugin_failed"}
"""The hooks that are called where a trained model is used."""

OnPluginError = Literal["drop", "stop"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """One hook of one plugin that raised."""

    plugin: str
    hook: str
    error: BaseException
    effect: bool
    """Whether the run lost something by it: False for an observer."""
    switched_off: bool
    """Whether the hook will not be called again."""
    process: int | None = None
    """Where it failed, if that was in another process of the run."""

    @property
    def where(self) -> str:
        return f"{self.plugin}.{self.hook}"

    def __str__(self) -> str:
        ending = ""
        if self.switched_off:
            what = "generation" if self.hook in GENERATION else "training"
            ending = (
                f"; {what} goes on without it"
                if self.effect
                else f"; switched off after {MAX_OBSERVER_FAILURES} failures"
            )
        elsewhere = "" if self.process is None else f" in process {self.process}"
        return f"{self.where} failed{elsewhere}: {in_a_line(self.error)}{ending}"


@dataclass(slots=True)
class _Call:
    plugin: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    effect: bool
    failures: int = 0


class _Manager(pluggy.PluginManager):
    """Takes plain objects too: their methods count as implementations where the names match."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        if isinstance(plugin, types.ModuleType):
            return super().parse_hookimpl_opts(plugin, name)
        if name in SPEC_NAMES:
            method = getattr(plugin, name)
            return _mark(method) or ({} if inspect.isroutine(method) else None)
        # Without running the properties of a plain object.
        return _mark(inspect.getattr_static(plugin, name, None))


def _mark(method: object) -> Any:
    """What `@hookimpl` says of it; None if it does not carry that."""
    method = getattr(method, "__func__", method)  # of a static method
    return getattr(method, f"{hookspecs.PROJECT}_impl", None) if inspect.isroutine(method) else None


SPEC_NAMES = {name for name, spec in vars(hookspecs).items() if hasattr(spec, f"{hookspecs.PROJECT}_spec")}
OBSERVERS = {name for name in SPEC_NAMES if getattr(getattr(hookspecs, name), "observer", False)}
TRAINING = {name for name in SPEC_NAMES if not name.startswith("apt_register_")} - GENERATION
"""The hooks that are called while a model is trained."""


class Hooks:
    """The plugins that listen to one run.

    Args:
        on_plugin_error: "drop" goes on without an effect that failed, "stop" raises TrainingError.
        logger: gets the tracebacks.
    """

    def __init__(self, on_plugin_error: OnPluginError = "drop", logger: logging.Logger | None = None) -> None:
        self.on_plugin_error = on_plugin_error
        self.loss_behind: Callable[[BaseException], PeerLostError | None] = lambda error: None
        """Which loss of another process of the run an error tells of."""
        self.failures: list[Failure] = []
        self._logger = logger
        self.manager = _Manager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self._providers: set[str] = set()
        self._calls: dict[str, list[_Call]] = {}
        self._at_work: tuple[str, str] | None = None
        self._off: set[tuple[str, str]] = set()
        self._to_switch_off: set[tuple[str, str]] = set()

    def add(self, plugin: object, name: str | None = None, *, provider_in_use: bool = False) -> str:
        """Let a plugin listen; returns the name it listens under.

        Args:
            plugin: a module with `@hookimpl` functions, or any object whose method names match hooks.
            name: its name in messages and checkpoints; its class's name if left out, numbered if taken.
            provider_in_use: all its hooks are then effects: losing one changes what the run computes.

        Raises:
            PluginError: an implementation does not fit its hook.
        """
        if isinstance(plugin, type):
            raise PluginError(f"{plugin.__name__} is a class", hint=f"register an instance: {plugin.__name__}()")
        if not isinstance(plugin, types.ModuleType) and not has_hooks(plugin):
            _check_unknown(type(plugin).__name__, plugin)
            raise PluginError(
                f"{type(plugin).__name__} has no method with the name of a hook", hint="see apt.hookspecs"
            )
        if self.manager.is_registered(plugin):
            raise PluginError(f"{type(plugin).__name__} is registered already", hint="register each object once")
        name = self._free_name(name or getattr(plugin, "__name__", None) or type(plugin).__name__)
        try:
            self.manager.register(plugin, name)
            for caller in self.manager.get_hookcallers(plugin) or []:
                _check_implementation(name, caller, plugin)
            _check_unknown(name, plugin)
        except (pluggy.PluginValidationError, PluginError, ValueError) as error:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            message = str(error).replace("\n", " ")
            raise PluginError(f"plugin {name!r} does not keep the contract: {message}") from error
        if provider_in_use:
            self._providers.add(name)
        self._rebuild()
        return name

    def add_providers(self, providers: Mapping[tuple[str, str], object]) -> None:
        """Let the providers in use listen that have hooks, each as "kind.name"."""
        for (kind, name), provider in providers.items():
            if has_hooks(provider):
                self.add(provider, f"{kind}.{name}", provider_in_use=True)

    def names(self) -> list[str]:
        """The plugins that listen, in the order in which they were added."""
        return [name for name, _ in self.manager.list_name_plugin()]

    def call(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call every implementation of `hook`; returns (plugin, result) for each result that is not None.

        An effect that has failed is not called again, not even in what is left of the step.

        Raises:
            TrainingError: an effect failed under "stop".
        """
        results: list[tuple[str, Any]] = []
        for call in self._calls.get(hook, ()):
            result = self._result(call, hook, arguments)
            if result is not None:
                results.append((call.plugin, result))
        return results

    def call_one(self, plugin: str, hook: str, **arguments: Any) -> None:
        """Call `hook` of one plugin alone, if it implements it."""
        for call in self._calls.get(hook, ()):
            if call.plugin == plugin:
                self._result(call, hook, arguments)

    def chain(self, hook: str, argument: str, value: T, check: Callable[[Any], str | None], **arguments: Any) -> T:
        """Pass `value` through every implementation of `hook`; one that returns None leaves it as it is.

        Args:
            argument: the hook's argument that `value` is.
            check: says what is wrong with a result, None if nothing is; a wrong one counts as a failure.
        """
        for call in self._calls.get(hook, ()):
            result = self._result(call, hook, {**arguments, argument: value}, check)
            value = value if result is None else result
        return value

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """Inside this block a failed effect stops nothing: the run is ending already."""
        before, self.on_plugin_error = self.on_plugin_error, "drop"
        try:
            yield
        finally:
            self.on_plugin_error = before

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside this block a hook that does not come to its end is named, once, while the run waits for it."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), name="apt-hooks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def listening(self, hook: str) -> bool:
        """Whether anyone implements `hook`."""
        return hook in self._calls

    def report(self, plugin: str, hook: str, error: Exception) -> None:
        """A hook returned something that cannot be used: treat it as if it had raised `error`."""
        for call in self._calls.get(hook, ()):
            if call.plugin == plugin:
                self._caught(call, hook, error)

    def pending(self) -> list[tuple[str, str, str, str]]:
        """What `settle` will switch off: plugin, hook, and the kind and the text of the last error."""
        if not self._to_switch_off:
            return []
        last = {(f.plugin, f.hook): f.error for f in self.failures}
        return [(*key, type(last[key]).__name__, str(last[key])) for key in sorted(self._to_switch_off)]

    def lose(self, process: int, plugin: str, hook: str, kind: str, text: str) -> None:
        """Switch off, at the next `settle`, what has failed in another process of the run."""
        if (plugin, hook) in self._to_switch_off | self._off:
            return
        error = type(kind, (Exception,), {})(text)  # the name says it: the class may not be importable here
        failure = Failure(plugin, hook, error, self._is_effect(plugin, hook), True, process)
        self.failures.append(failure)
        self._to_switch_off.add((plugin, hook))
        self._log("%s", failure, exc_info=failure.error)
        warnings.warn(str(failure), AptWarning, stacklevel=2)

    def settle(self) -> None:
        """Switch off what has failed too often. Called at step boundaries alone, so that a step is of one piece."""
        if self._to_switch_off:
            self._off |= self._to_switch_off
            self._to_switch_off = set()
            self._rebuild()

    @property
    def dropped(self) -> list[str]:
        """ "plugin.hook" of the effects that training goes on without."""
        effects = {f.where for f in self.failures if f.effect and f.switched_off}
        return sorted(effects | {f"{plugin}.{hook}" for plugin, hook in self._off if self._is_effect(plugin, hook)})

    def switch_off(self, wheres: Iterable[str]) -> None:
        """Leave out these "plugin.hook": what a resumed run had lost before."""
        self._off |= {(plugin, hook) for plugin, _, hook in (where.rpartition(".") for where in wheres)}
        self._rebuild()

    def _result(
        self, call: _Call, hook: str, arguments: dict[str, Any], check: Callable[[Any], str | None] | None = None
    ) -> Any:
        """What one implementation returns; None if it fails, or is an effect that has failed before."""
        if call.effect and call.failures:
            return None
        before, self._at_work = self._at_work, (call.plugin, hook)
        try:
            result = call.function(*map(arguments.__getitem__, call.arguments))
            if result is not None and check is not None and (wrong := check(result)):
                raise TypeError(wrong)
        except PeerLostError:
            raise  # no fault of the plugin's
        except (Exception, SystemExit) as error:
            if (lost := self.loss_behind(error)) is not None:
                raise lost from error
            self._caught(call, hook, error)
            return None
        finally:
            self._at_work = before
        return result

    def _caught(self, call: _Call, hook: str, error: BaseException) -> None:
        call.failures += 1
        key = (call.plugin, hook)
        stop = call.effect and self.on_plugin_error == "stop"
        switched_off = not stop and (call.effect or call.failures >= MAX_OBSERVER_FAILURES)
        failure = Failure(call.plugin, hook, error, call.effect, switched_off)
        self.failures.append(failure)
        self._log("%s", failure, exc_info=failure.error)
        if switched_off:
            self._to_switch_off.add(key)
        if not stop:
            warnings.warn(str(failure), AptWarning, stacklevel=4)
            # A traceback holds the frames, and they the step's tensors. The log has it.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        if hook != "on_plugin_failed":
            self.call("on_plugin_failed", failure=failure)
        if stop:
            raise TrainingError(
                f"{failure}", hint="mend the plugin, or set on_plugin_error: drop to go on without it"
            ) from error

    def _watch(self, over: threading.Event) -> None:
        seen, since = None, math.inf
        while not over.wait(SLOW_SECONDS / 4):
            at_work = self._at_work  # taken once: the hook may come to its end meanwhile
            if at_work is None or at_work is not seen:  # each call has a tuple of its own
                seen, since = at_work, time.monotonic()
            if at_work is None or time.monotonic() - since < SLOW_SECONDS:
                continue
            since = math.inf
            text = (
                f"{at_work[0]}.{at_work[1]} has been at work for {SLOW_SECONDS:.0f} s, and the run waits for it; "
                "a signal that comes twice, such as Ctrl-C, ends the run at once"
            )
            self._log("%s", text)
            warnings.warn(text, AptWarning, stacklevel=2)

    def _log(self, *message: object, **options: Any) -> None:
        from apt.core.logging import get_logger  # not at the top: listing plugins needs none, and it costs a few ms

        (self._logger or get_logger()).error(*message, **options)

    def _is_effect(self, plugin: str, hook: str) -> bool:
        return hook not in OBSERVERS or plugin in self._providers

    def _rebuild(self) -> None:
        failures = {(c.plugin, hook): c.failures for hook, calls in self._calls.items() for c in calls}
        self._calls = {}
        for hook in SPEC_NAMES:
            # pluggy keeps implementations in reverse: the last one is called first.
            for impl in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
                key = (impl.plugin_name, hook)
                if key not in self._off:
                    effect = self._is_effect(*key)
                    call = _Call(impl.plugin_name, impl.function, impl.argnames, effect, failures.get(key, 0))
                    self._calls.setdefault(hook, []).append(call)

    def _free_name(self, name: str) -> str:
        taken, number, free = set(self.names()), 2, name
        while free in taken:
            free, number = f"{name}-{number}", number + 1
        return free


def has_hooks(obj: object) -> bool:
    """Whether an object has a method with the name of a hook, or one that is marked as another's."""
    kind = type(obj)
    return any(callable(getattr(kind, name, None)) for name in SPEC_NAMES) or any(
        _mark(inspect.getattr_static(kind, name, None)) for name in dir(kind)
    )


def _check_implementation(name: str, caller: Any, plugin: object) -> None:
    for impl in caller.get_hookimpls():
        if impl.plugin is not plugin:
            continue
        if impl.hookwrapper or impl.wrapper:
            raise PluginError(f"{caller.name} is a hook wrapper, which the run does not call")
        if impl.kwargnames:
            wrong = ", ".join(impl.kwargnames)
            raise PluginError(f"{caller.name} gives {wrong} a default, which would hide the value it is called with")
        kinds = {parameter.kind for parameter in inspect.signature(impl.function).parameters.values()}
        if not impl.argnames and kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            raise PluginError(f"{caller.name} names no argument, and gets those alone that it names")


def _check_unknown(name: str, plugin: object) -> None:
    """Warn of methods that look like hooks and are none: a slip there would silently do nothing."""
    for attribute in dir(type(plugin) if not isinstance(plugin, types.ModuleType) else plugin):
        if attribute in SPEC_NAMES or not attribute.startswith(("on_", "apt_", "extra_")):
            continue
        if near := did_you_mean(attribute, SPEC_NAMES):
            warnings.warn(
                f"{name}.{attribute} is no hook and will not be called; did you mean {near}?", AptWarning, stacklevel=4
            )
