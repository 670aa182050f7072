"""The sections of a profile that belong to providers: `model.tva`, `model.moe`, `data.stdlib`, ...

Core does not know their keys. A provider brings a pydantic model for its own; a section that nothing in use reads is
kept and named in a warning, unless its name is a slip of one that is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from apt.core.catalogue import KINDS, SECTIONS, how_to_install
from apt.core.errors import AptError, AptWarning, ProviderError, did_you_mean
from apt.core.problems import Problem, bool_problems, json_schema, locate, raise_problems, validation_problems

if TYPE_CHECKING:
    from pydantic import BaseModel

    from apt.core.config import OpenSection, RunConfig
    from apt.core.registry import Registration, Registry
    from apt.core.yaml_loader import Path

PARENTS = tuple(dict.fromkeys(KINDS.values()))
"""The sections of a profile that hold sections of providers."""


def check_sections(
    config: RunConfig,
    registry: Registry,
    origins: Mapping[Path, str],
    absent: Container[str] = (),
    *,
    strict: bool = False,
) -> None:
    """Check every provider's section with the model of the provider that reads it.

    A section that several providers read has to fit one of them. One that no registered provider reads is passed over
    with an AptWarning.

    Args:
        registry: what is installed and selected.
        origins: where each value was given, as in `Profile.origins`.
        absent: packages that have been named as not installed: their sections need no second word.
        strict: whether a section that nothing reads is an error.

    Raises:
        ConfigError: a section does not fit, or its name is a slip of a known one; one line for each problem.
    """
    problems: list[Problem] = []
    for parent in PARENTS:
        readers = _readers(registry, parent)
        known = {*type(getattr(config, parent)).model_fields, *readers, *(SECTIONS if parent == "model" else ())}
        for name, section in getattr(config, parent).sections.items():
            path = (parent, name)
            if name in readers:
                problems += _check(section, readers[name], path, getattr(config, parent))
            elif near := did_you_mean(name, known - {name}) if name not in SECTIONS else None:
                problems.append(Problem(path, "unknown section", f"did you mean {near!r}?"))
            elif name in type(config).model_fields:
                problems.append(Problem(path, "unknown section", f"did you mean {name!r} at the top level?"))
            elif (package := SECTIONS.get(name)) not in absent:
                fix = "install the plugin that does, or take it out"
                if package:
                    fix = how_to_install(package, {claim.distribution for claim in registry.claims()})
                if strict:
                    problems.append(Problem(path, "no plugin in use reads it", fix))
                    continue
                warnings.warn(
                    f"{locate(path, origins)}kept, but no plugin in use reads it; {fix}", AptWarning, stacklevel=2
                )
    raise_problems(problems, origins)


def schema(registry: Registry) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a profile, the installed providers' sections included, for editors."""
    from pydantic.json_schema import models_json_schema

    from apt.core.config import RunConfig

    models: dict[tuple[str, str], list[type[BaseModel]]] = {}
    for parent in PARENTS:
        for name, claims in _readers(registry, parent).items():
            models[parent, name] = [model for model in _models(claims) if model and json_schema(model)]
    asked: dict[type[BaseModel], None] = dict.fromkeys([RunConfig, *(m for found in models.values() for m in found)])
    references, whole = models_json_schema([(model, "validation") for model in asked])
    definitions: dict[str, Any] = whole["$defs"]
    root = definitions.pop(_name(references[RunConfig, "validation"]))
    root["properties"] = {
        "extends": {"type": "string", "description": "Another profile, by path or name, that this one builds on."},
        **root["properties"],
    }
    for parent in PARENTS:
        holder = definitions[_name(root["properties"][parent])]
        holder["additionalProperties"] = {"type": "object"}
        for (section_parent, name), found in models.items():
            if section_parent == parent:
                branches = [references[model, "validation"] for model in found]
                holder["properties"][name] = {"anyOf": branches} if branches else {"type": "object"}
                for branch in branches:
                    definitions[_name(branch)].setdefault("properties", {}).setdefault("enabled", {"type": "boolean"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _name(reference: Mapping[str, Any]) -> str:
    """The definition that a reference points to."""
    return str(reference["$ref"]).rpartition("/")[2]


def _readers(registry: Registry, parent: str) -> dict[str, list[Registration]]:
    """{section: the providers that read it} of one parent."""
    readers: dict[str, list[Registration]] = {}
    for claim in registry.claims():
        if KINDS[claim.kind] == parent:
            readers.setdefault(claim.section, []).append(claim)
    return readers


def _models(claims: Iterable[Registration]) -> list[type[BaseModel] | None]:
    """The providers' config models, None for a provider that has none. One that cannot be imported is left out:
    building it will say why."""
    from pydantic import BaseModel

    models: list[type[BaseModel] | None] = []
    for claim in claims:
        try:
            model = claim.load_config()
        except ProviderError:
            continue
        models.append(model if isinstance(model, type) and issubclass(model, BaseModel) else None)
    return list(dict.fromkeys(models))


def _check(
    section: Mapping[str, Any], claims: Iterable[Registration], path: Path, around: OpenSection
) -> list[Problem]:
    """What is wrong with a section: nothing if it fits one of its readers, else what the first one says."""
    first: list[Problem] = []
    for model in _models(claims):
        problems = _problems(section, model, path, around) if model else []
        if not problems:
            return []
        first = first or problems
    return first


def _problems(section: Mapping[str, Any], model: type[BaseModel], path: Path, around: OpenSection) -> list[Problem]:
    from pydantic import ValidationError

    # Core reads `enabled` itself; a provider need not know it.
    data = {key: value for key, value in section.items() if key != "enabled" or "enabled" in model.model_fields}
    # What a provider requires may be given in the section around it: `data.train_path` for `data.files`.
    for name, field in model.model_fields.items():
        if field.is_required() and name not in data and getattr(around, name, None) is not None:
            data[name] = getattr(around, name)
    try:
        return bool_problems(data, model.model_validate(data), model, path)
    except ValidationError as error:
        return validation_problems(error, model, data, path)
    except AptError as error:
        return [Problem(path, error.message, error.hint)]
    except Exception:  # a fault of the model, not of the section: building the provider will say so
        return []
