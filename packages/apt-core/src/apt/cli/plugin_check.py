"""`apt plugin-check`: does a provider keep the contract of its kind?"""

from __future__ import annotations

import copy
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from apt.core.catalogue import KINDS
from apt.core.discovery import BUILTIN
from apt.core.errors import HINT, AptError, ConfigError, UsageError, did_you_mean

if TYPE_CHECKING:
    from apt.core.registry import Registration, Registry
    from apt.testing.run import Result


def run_plugin_check_command(args: Namespace) -> int:
    """Check the provider `args.provider` ("kind:name"), or every one that a plugin other than core's brings.

    Returns:
        0 if no check failed, 1 if one did.

    Raises:
        UsageError: the provider or a setting is not spelt as it has to be.
        ConfigError, ProviderError, ConflictError: it does not exist, or cannot be built here.
    """
    from apt.core.discovery import discover

    registry = discover().registry_of_a_run()
    if args.provider is not None:
        claim = _find(registry, args.provider)
        return _check(claim, _settings(args.set), slow=args.slow, device=args.device)
    if args.set:
        raise UsageError("apt plugin-check: --set is for one provider", hint="name it: apt plugin-check KIND:NAME")
    claims = [claim for claim in registry.claims() if claim.plugin != BUILTIN]
    if not claims:
        print("no plugin beside core's own brings a provider; core's: apt plugin-check attention:tva_default")
        return 0
    return _check_all(claims, slow=args.slow, device=args.device)


def _check_all(claims: list[Registration], *, slow: bool, device: str) -> int:
    code, unchecked = 0, []
    for claim in claims:
        try:
            code = max(code, _check(claim, {}, slow=slow, device=device))
        except AptError as error:
            unchecked.append(claim.slot)
            print(f"{claim.slot} is not checked: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        print()
    checked = len(claims) - len(unchecked)
    left = f"; not checked: {', '.join(unchecked)}" if unchecked else ""
    print(f"{checked} of {len(claims)} providers checked, {'some failed' if code else 'none failed'}{left}")
    return code


def _check(claim: Registration, settings: Mapping[str, Any], *, slow: bool, device: str) -> int:
    """Check one provider, line by line, and keep the result."""
    from apt.cli.screen import heading
    from apt.testing import record
    from apt.testing.run import cases

    version = claim.version or claim.distribution_version or "unknown"
    package = " ".join(part for part in (claim.distribution, claim.distribution_version) if part) or claim.plugin
    words = ", ".join(f"{key}={value}" for key, value in settings.items())
    build = _builder(claim, settings)
    every = cases(claim.kind, build, getattr(claim.load(), "expected_failures", None), name=claim.name, device=device)
    _try_out(every[0].subject, settings)
    print(heading(f"{claim.slot} {version} ({package})") + (f" with {words}" if words else ""), flush=True)
    started, counts = time.monotonic(), Counter[str]()
    with warnings.catch_warnings():
        # What a provider warns of on odd inputs would stand between the lines.
        warnings.simplefilter("ignore")
        for case in every:
            if case.check.slow and not slow:
                counts["slow"] += 1
                continue
            result = case.run()
            counts[result.outcome] += 1
            print(_line(result), flush=True)
    passed, failed = counts["ok"], counts["FAILED"]
    skipped = counts["skipped"] + counts["slow"]
    notes = [
        f"{counts['expected']} expected to fail" if counts["expected"] else "",
        f"{counts['skipped']} skipped" if counts["skipped"] else "",
        f"{counts['slow']} slow not run (--slow)" if counts["slow"] else "",
    ]
    total = f"{passed} of {passed + failed} checks passed in {time.monotonic() - started:.0f} s"
    print(", ".join([total, *filter(None, notes)]))
    record.write(
        record.Record(
            claim.kind,
            claim.name,
            claim.distribution,
            version,
            passed,
            failed,
            skipped + counts["expected"],
            words,
        )
    )
    return 1 if failed else 0


def _line(result: Result) -> str:
    reason = f": {result.message}" if result.message else ""
    return f"  {result.outcome:<8}  {result.check.name}{reason}"


def _builder(claim: Registration, settings: Mapping[str, Any]) -> Callable[[], Any]:
    """Builds the provider with these settings."""
    from apt.core.registry import Registry

    provider_class = claim.load()

    def build() -> Any:
        # A registry for each, so that no instance is handed out twice, and the same errors as in a run.
        registry = Registry()
        registry.register(claim.kind, claim.name, provider_class)
        return registry.get(claim.kind, claim.name, copy.deepcopy(dict(settings)), fallback=False)

    return build


def _try_out(subject: Any, settings: Mapping[str, Any]) -> None:
    """Raise what is wrong with this machine or with the settings; what is wrong with the provider, the checks say."""
    from apt.testing.check import CheckFailure
    from apt.testing.run import isolated

    with isolated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            subject.try_out()
        except ConfigError as error:
            fix = "give its keys with --set KEY=VALUE"
            raise ConfigError(error.message, hint=f"{fix}; {error.hint}" if error.hint else fix) from error
        except AptError:
            raise
        except CheckFailure as error:
            # That no size fits is the provider's fault, unless somebody chose what does not fit.
            if settings and isinstance(error.__cause__, ConfigError):
                raise ConfigError(str(error), hint="change what --set gives") from error
        except (Exception, SystemExit):
            return


def _find(registry: Registry, text: str) -> Registration:
    kind, colon, name = text.partition(":")
    if not colon:
        slots = [claim.slot for claim in registry.claims()]
        near = did_you_mean(text, slots, cutoff=HINT) or next((s for s in slots if s.endswith(f":{text}")), None)
        hint = f"did you mean {near}?" if near else "such as attention:tva_default; apt plugin-list shows them"
        raise UsageError(f"apt plugin-check: expected KIND:NAME, got {text!r}", hint=hint)
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS, cutoff=HINT)
        hint = f"did you mean {near}?" if near else f"the kinds are {', '.join(KINDS)}"
        raise ConfigError(f"there is no provider kind {kind!r}", hint=hint)
    return registry.find(kind, name)


def _settings(texts: list[str]) -> dict[str, Any]:
    """{key: value} of KEY=VALUE, values as YAML."""
    from apt.core.profiles import parse_override

    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.strip()):
            raise UsageError(f"apt plugin-check: --set {text}: expected KEY=VALUE", hint="such as --set r=2")
        settings[key.strip()] = parse_override(key.strip(), value)
    return settings


__all__ = ["run_plugin_check_command"]
