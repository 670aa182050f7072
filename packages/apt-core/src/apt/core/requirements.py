"""Which requirements this environment meets, in pip's own words."""

from __future__ import annotations

from collections.abc import Sequence


def missing_requirements(requirements: Sequence[str]) -> list[tuple[str, str]]:
    """(requirement, what is wrong with it) of each that is not met, such as
    ("flash-attn>=2.5", "flash-attn>=2.5 is not installed")."""
    from importlib_metadata import PackageNotFoundError, version
    from packaging.requirements import InvalidRequirement, Requirement

    missing = []
    for text in requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            missing.append((text, f"{text!r} is no requirement that pip understands"))
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        wanted.marker = None
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            missing.append((str(wanted), f"{wanted} is not installed"))
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            missing.append((str(wanted), f"{wanted} is not met by the installed {found}"))
    return missing
