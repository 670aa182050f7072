"""The calling of hooks: order, isolation, chains, and what is refused."""

from __future__ import annotations

import gc
import logging
import threading
import time
import types
import warnings
import weakref
from typing import Any

import pytest

from apt import hookspecs
from apt.core.errors import AptWarning, PluginError, TrainingError
from apt.core.hooks import MAX_OBSERVER_FAILURES, OBSERVERS, SPEC_NAMES, Hooks, has_hooks
from apt.hookspecs import hookimpl


def module(**functions: Any) -> types.ModuleType:
    made = types.ModuleType("a_plugin")
    vars(made).update(functions)
    return made


class Recorder:
    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name, self.seen = name, seen

    def on_step_end(self, step: int) -> None:
        self.seen.append((self.name, step))


def step_end(hooks: Hooks, step: int = 0) -> list[tuple[str, Any]]:
    return hooks.call("on_step_end", step=step, loss=None, trainer=None)


def test_every_spec_is_an_observer_or_an_effect_as_documented() -> None:
    effects = SPEC_NAMES - OBSERVERS
    assert effects == {
        "apt_register_providers", "apt_register_commands", "apt_register_options", "on_model_built",
        "on_optimizer_built",
        "extra_losses", "on_before_optimizer_step", "on_checkpoint_save", "on_checkpoint_load", "on_generation_start",
        "on_next_token",
    }  # fmt: skip
    for name in SPEC_NAMES:
        assert name in (hookspecs.__doc__ or "") or name.startswith("apt_register_")
        assert getattr(hookspecs, name).__doc__


def test_an_object_gets_the_arguments_it_names_and_the_last_registered_is_first() -> None:
    hooks, seen = Hooks(), []
    hooks.add(Recorder("first", seen))
    hooks.add(Recorder("second", seen))
    step_end(hooks, 7)
    assert seen == [("second", 7), ("first", 7)]


def test_tryfirst_and_trylast_are_kept() -> None:
    hooks, seen = Hooks(), []

    def marked(name: str, **options: bool) -> types.ModuleType:
        @hookimpl(**options)
        def on_step_end(step: int) -> None:
            seen.append(name)

        return module(on_step_end=on_step_end)

    hooks.add(marked("early", tryfirst=True), "early")
    hooks.add(marked("late", trylast=True), "late")
    hooks.add(marked("plain"), "plain")
    step_end(hooks)
    assert seen == ["early", "plain", "late"]


def test_an_unmarked_function_of_a_module_is_no_implementation() -> None:
    hooks = Hooks()
    hooks.add(module(on_step_end=lambda step: 1 / 0))
    assert step_end(hooks) == []


def test_results_come_with_the_plugin_that_gave_them_and_none_is_left_out() -> None:
    hooks = Hooks()

    class Stateful:
        def on_checkpoint_save(self, trainer: Any) -> dict[str, int]:
            return {"n": 1}

    class Stateless:
        def on_checkpoint_save(self, trainer: Any) -> None:
            return None

    hooks.add(Stateful(), "a")
    hooks.add(Stateless(), "b")
    assert hooks.call("on_checkpoint_save", trainer=None) == [("a", {"n": 1})]


def test_two_objects_of_one_class_get_two_names() -> None:
    hooks = Hooks()
    assert [hooks.add(Recorder("", [])) for _ in range(3)] == ["Recorder", "Recorder-2", "Recorder-3"]


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3)])
def test_an_observer_that_raises_is_isolated_and_switched_off_after_three(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        def on_step_end(self) -> None:
            self.calls += 1
            raise error

    hooks, seen, broken = Hooks(), [], Broken()
    hooks.add(Recorder("healthy", seen))
    hooks.add(broken, "broken")
    with caplog.at_level(logging.ERROR, logger="apt"), pytest.warns(AptWarning, match="broken.on_step_end failed"):
        for step in range(6):
            step_end(hooks, step)
            hooks.settle()
    assert len(seen) == 6
    assert broken.calls == MAX_OBSERVER_FAILURES
    assert hooks.failures[-1].switched_off
    assert hooks.dropped == [], "an observer takes nothing from the run"
    assert all(record.exc_info for record in caplog.records)


def test_an_effect_that_has_failed_is_not_called_again_not_even_in_its_step() -> None:
    class Broken:
        calls = 0

        def extra_losses(self) -> None:
            self.calls += 1
            raise ValueError

    hooks, broken = Hooks(), Broken()
    hooks.add(broken, "broken")
    arguments = dict.fromkeys(("trainer", "batch", "logits", "targets", "model_state"))
    with pytest.warns(AptWarning) as warned:
        for _ in range(2):  # two micro-batches of one step
            hooks.call("extra_losses", **arguments)
    assert (broken.calls, len(warned)) == (1, 1)
    assert hooks.listening("extra_losses"), "it is taken out at the end of the step"
    hooks.settle()
    assert not hooks.listening("extra_losses")
    hooks.call("extra_losses", **arguments)
    assert broken.calls == 1
    assert hooks.dropped == ["broken.extra_losses"]


def test_an_effect_that_fails_stops_the_run_under_stop() -> None:
    class Broken:
        def on_before_optimizer_step(self) -> None:
            raise ValueError("no")

    hooks = Hooks("stop")
    hooks.add(Broken(), "broken")
    with pytest.raises(TrainingError, match=r"broken\.on_before_optimizer_step failed: ValueError: no"):
        hooks.call("on_before_optimizer_step", optimizer=None, trainer=None)


def test_every_hook_of_a_provider_in_use_is_an_effect() -> None:
    class Broken:
        def on_step_end(self) -> None:
            raise ValueError

    hooks = Hooks()
    hooks.add(Broken(), "router.x", provider_in_use=True)
    with pytest.warns(AptWarning, match="training goes on without it"):
        step_end(hooks)
    hooks.settle()
    assert hooks.dropped == ["router.x.on_step_end"]


def test_what_a_resumed_run_had_lost_stays_off() -> None:
    hooks, seen = Hooks(), []
    hooks.add(Recorder("x", seen), "router.x", provider_in_use=True)
    hooks.switch_off(["router.x.on_step_end"])
    step_end(hooks)
    assert seen == []
    assert hooks.dropped == ["router.x.on_step_end"]


def test_a_chain_passes_on_what_the_last_one_made() -> None:
    class Add:
        def on_next_token(self, logits: int) -> int:
            return logits + 1

    class Nothing:
        def on_next_token(self, logits: int, generator: Any) -> None:
            return None

    class Broken:
        def on_next_token(self, logits: int) -> int:
            raise ValueError

    hooks = Hooks()

    class Wrong:
        def on_next_token(self) -> str:
            return "forty"

    def check(result: object) -> str | None:
        return None if isinstance(result, int) else "no number"

    for plugin in (Add(), Nothing(), Broken(), Wrong(), Add()):
        hooks.add(plugin)
    with pytest.warns(AptWarning, match=r"Broken\.on_next_token failed") as warned:
        assert hooks.chain("on_next_token", "logits", 40, check, generator=None) == 42
    assert any("Wrong.on_next_token failed: TypeError: no number" in str(w.message) for w in warned)


def test_a_failure_is_announced_and_an_announcer_that_fails_does_not_recurse() -> None:
    class Broken:
        def on_step_end(self) -> None:
            raise ValueError

        def on_plugin_failed(self, failure: Any) -> None:
            heard.append(failure.where)
            raise ValueError

    heard: list[str] = []
    hooks = Hooks()
    hooks.add(Broken(), "broken")
    with pytest.warns(AptWarning):
        step_end(hooks)
    assert heard == ["broken.on_step_end"]


def test_a_failure_under_stop_is_announced_before_it_is_raised_and_can_be_forgiven() -> None:
    class Broken:
        def extra_losses(self) -> None:
            raise ValueError("no")

        def on_plugin_failed(self, failure: Any) -> None:
            heard.append(failure.where)

    heard: list[str] = []
    arguments = dict.fromkeys(("trainer", "batch", "logits", "targets", "model_state"))
    hooks = Hooks("stop")
    hooks.add(Broken(), "broken")
    with pytest.raises(TrainingError):
        hooks.call("extra_losses", **arguments)
    assert heard == ["broken.extra_losses"]
    hooks = Hooks("stop")
    hooks.add(Broken(), "broken")
    with hooks.forgiving(), pytest.warns(AptWarning):
        hooks.call("extra_losses", **arguments)
    assert hooks.on_plugin_error == "stop"


def test_a_failure_that_is_kept_holds_no_tensors() -> None:
    class Big: ...

    class Broken:
        def extra_losses(self, logits: Big) -> None:
            raise ValueError

    # A logger apart from the others: pytest keeps what they are told.
    hooks, big = Hooks(logger=logging.Logger("apart")), Big()
    hooks.add(Broken())
    gone = weakref.ref(big)
    arguments = dict.fromkeys(("trainer", "batch", "targets", "model_state"))
    with pytest.warns(AptWarning):
        hooks.call("extra_losses", logits=big, **arguments)
    del big
    gc.collect()
    assert gone() is None
    assert hooks.failures


def test_an_object_is_registered_once() -> None:
    hooks, seen = Hooks(), []
    recorder = Recorder("x", seen)
    hooks.add(recorder)
    with pytest.raises(PluginError, match="registered already"):
        hooks.add(recorder)
    step_end(hooks, 1)
    assert seen == [("x", 1)]


def test_keyboard_interrupt_is_never_swallowed() -> None:
    class Stopped:
        def on_step_end(self) -> None:
            raise KeyboardInterrupt

    hooks = Hooks()
    hooks.add(Stopped())
    with pytest.raises(KeyboardInterrupt):
        step_end(hooks)


def wrapper() -> types.ModuleType:
    @hookimpl(wrapper=True)
    def on_step_end(step: int) -> Any:
        yield

    return module(on_step_end=on_step_end)


class UnknownArgument:
    def on_step_end(self, stp: int) -> None: ...


class Anything:
    def on_step_end(self, *args: Any, **kwargs: Any) -> None: ...


class DefaultArgument:
    def on_step_end(self, step: int = 0) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (UnknownArgument(), "stp"),
        (DefaultArgument(), "default"),
        (Anything(), "names no argument"),
        (wrapper(), "wrapper"),
    ],
)
def test_an_implementation_that_does_not_fit_is_refused_and_leaves_nothing_behind(plugin: object, words: str) -> None:
    hooks = Hooks()
    with pytest.raises(PluginError, match=words):
        hooks.add(plugin, "misfit")
    assert hooks.names() == []
    assert step_end(hooks) == []


def test_a_method_that_is_nearly_a_hook_is_pointed_out() -> None:
    class Slip:
        def on_epoch_started(self, epoch: int) -> None: ...

    class Other(Slip):
        def on_step_end(self) -> None: ...

    with pytest.warns(AptWarning, match="did you mean on_epoch_start"):
        Hooks().add(Other())
    with pytest.warns(AptWarning, match="did you mean on_epoch_start"), pytest.raises(PluginError, match="no method"):
        Hooks().add(Slip())
    with pytest.raises(PluginError, match=r"register an instance: Other\(\)"):
        Hooks().add(Other)


def test_properties_of_an_object_are_not_run() -> None:
    class Lazy:
        @property
        def expensive(self) -> int:
            raise AssertionError("looked at")

        def on_step_end(self) -> None: ...

    Hooks().add(Lazy())
    assert has_hooks(Lazy())
    assert not has_hooks(object())


def test_a_method_that_is_marked_as_a_hook_is_one_whatever_its_name() -> None:
    seen: list[Any] = []

    class Marked:
        @property
        def expensive(self) -> int:
            raise AssertionError("looked at")

        @hookimpl(specname="on_step_end")
        def count(self, step: int) -> None:
            seen.append(("count", step))

    class Both(Marked):
        def on_step_start(self, step: int) -> None:
            seen.append(("start", step))

        def helper(self) -> None:
            raise AssertionError("no hook")

    hooks = Hooks()
    assert has_hooks(Marked())
    hooks.add(Marked())
    step_end(hooks, 3)
    assert seen == [("count", 3)]
    hooks, seen[:] = Hooks(), []
    hooks.add(Both())
    hooks.call("on_step_start", step=4, batch=None, trainer=None)
    step_end(hooks, 4)
    assert seen == [("start", 4), ("count", 4)]


# A hook that hangs


class Sleeper:
    """Does not come back before it is told to, as long as nobody interrupts it."""

    def __init__(self) -> None:
        self.awake = threading.Event()

    def on_step_start(self) -> None:
        assert self.awake.wait(30)


def test_a_hook_that_does_not_come_back_is_named_once_while_the_run_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.core.hooks.SLOW_SECONDS", 0.02)
    hooks, sleeper, said = Hooks(), Sleeper(), []
    hooks.add(sleeper)
    monkeypatch.setattr(warnings, "warn", lambda message, *more, **options: said.append(message))
    with hooks.watched():
        threading.Timer(0.3, sleeper.awake.set).start()
        hooks.call("on_step_start")
        time.sleep(0.1)
    assert said == [
        "Sleeper.on_step_start has been at work for 0 s, and the run waits for it; "
        "a signal that comes twice, such as Ctrl-C, ends the run at once"
    ]
    assert not any(thread.name == "apt-hooks" for thread in threading.enumerate())


def test_nobody_is_named_who_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.core.hooks.SLOW_SECONDS", 0.1)
    hooks = Hooks()

    class Quick:
        def on_step_start(self) -> None:
            hooks.call("on_epoch_start")  # one hook within another one

        def on_epoch_start(self) -> None:
            pass

    hooks.add(Quick())
    with warnings.catch_warnings(), hooks.watched():
        warnings.simplefilter("error")
        for _ in range(30):
            hooks.call("on_step_start")
            time.sleep(0.01)
    assert hooks.failures == []
