"""Reads a recipe: YAML, then `a.b=c` overrides; every problem is reported in one ConfigError."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from longalign_ray.config import RunConfig, tree_of_first
from longalign_ray.errors import ConfigError

KeyPath = tuple[str, ...]

# For the kinds of error whose message in pydantic speaks of Python types.
REMEDIES = {"tuple_type": "give a list, e.g. [a, b]", "model_type": "give a section, e.g. {key: value}"}


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated recipe.

    Raises ConfigError listing every problem with its place (file and line, or the override), value, rule and remedy.
    """
    path = Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8; give the path of a YAML file") from error
    problems: list[str] = []
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date but is none
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}; a recipe is a mapping of sections, e.g. `run_dir: runs/x`"
        )
    places: dict[KeyPath, str] = {}
    if node is not None:
        _collect_places(node, (), path.name, places, problems)
    for name in [name for name, value in tree.items() if value is None and _fields_at((str(name),))]:
        del tree[name]  # a section all of whose settings are commented out
    for override in overrides:
        _apply_override(tree, override, places, problems)
    config, wrong = _validate(tree, places)
    problems += wrong + _problems_of_first(tree, places)
    if problems or config is None:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) in the recipe {path}:\n{listing}")
    return config


def dump_config(config: RunConfig) -> str:
    """YAML of the resolved config; reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validate(tree: dict[str, Any], places: dict[KeyPath, str]) -> tuple[RunConfig | None, list[str]]:
    """The config, or all problems.

    pydantic looks at the rules across fields only once every field is right. So that those are reported in the same
    go, what was wrong is left out and the rest is validated again; a rule that names a setting left out says nothing.
    """
    try:
        return RunConfig.model_validate(tree), []
    except ValidationError as error:
        details = error.errors()
    problems = [_describe(detail, places) for detail in details]
    rest = copy.deepcopy(tree)
    left_out = [_remove(rest, detail["loc"]) for detail in details if detail["loc"]]
    rest.setdefault("run_dir", "runs/x")
    try:
        RunConfig.model_validate(rest)
    except ValidationError as error:
        for detail in error.errors():
            problem, named = _describe(detail, places), re.findall(r"[a-z_]+(?:\.[a-z_]+)+", detail["msg"])
            if problem not in problems and not any(f"{n}.".startswith(f"{gone}.") for n in named for gone in left_out):
                problems.append(problem)
    return None, problems


def _problems_of_first(tree: dict[str, Any], places: dict[KeyPath, str]) -> list[str]:
    """What is wrong with the recipe that `before` describes; what it shares with the whole is reported there."""
    if not isinstance(tree.get("before"), dict):
        return []
    own = {path[1:]: place for path, place in places.items() if path[0] == "before"}
    problems = _validate(tree_of_first(tree), places | own)[1]
    shared = _validate({key: value for key, value in tree.items() if key != "before"}, places)[1]
    return [f"before.{problem}" for problem in problems if problem not in shared]


def _remove(tree: Any, location: tuple[int | str, ...]) -> str:
    """Takes the setting at `location` out of `tree`, a whole list for its element; returns its dotted name."""
    keys = [part for part in location if isinstance(part, str)]
    for key in keys[:-1]:
        tree = tree.get(key)
        if not isinstance(tree, dict):
            break
    else:
        tree.pop(keys[-1], None)
    return ".".join(keys)


def _collect_places(
    node: yaml.Node, prefix: KeyPath, file: str, places: dict[KeyPath, str], problems: list[str]
) -> None:
    """Line of every key; a key given twice is a problem, since YAML would silently keep the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        path = (*prefix, str(key_node.value))
        place = f"{file}, line {key_node.start_mark.line + 1}"
        if path in places:
            problems.append(f"{'.'.join(path)} is given twice ({places[path]} and {place}): remove one")
        places[path] = place
        _collect_places(value_node, path, file, places, problems)


def _apply_override(tree: dict[str, Any], override: str, places: dict[KeyPath, str], problems: list[str]) -> None:
    key, equals, raw = override.partition("=")
    keys = tuple(key.split("."))
    if not equals or not all(keys):
        problems.append(f"override {override!r} is not of the form section.key=value")
        return
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError):
        problems.append(f"override {override!r}: {raw!r} is not a YAML value; quote it")
        return
    branch = tree
    for depth, part in enumerate(keys[:-1], start=1):
        if not isinstance(branch.get(part), dict):
            branch[part] = {}
            places.pop(keys[:depth], None)
        branch = branch[part]
    branch[keys[-1]] = value
    for replaced in [path for path in places if path[: len(keys)] == keys]:
        del places[replaced]
    shown = f"{key}=..." if keys[-1].startswith("api_key") else override  # someone may have put a key there
    places[keys] = f"override {shown}"


def _describe(detail: Any, places: dict[KeyPath, str]) -> str:
    keys = tuple(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # a rule across fields; its message starts with the full name of one
        name = message.split(" ", 1)[0]
        return message + (f" ({places[tuple(name.split('.'))]})" if tuple(name.split(".")) in places else "")
    parts = [path for path in places if path[: len(keys)] == keys]
    wholes = [keys[:end] for end in range(len(keys) - 1, 0, -1)]
    known = next((path for path in (keys, *parts, *wholes) if path in places), None)
    place = f" ({places[known]})" if known else ""
    name = ".".join(keys)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], _fields_at(keys[:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_fields_at(keys[:-1]))}"
        return f"{name} is not a known key: {hint}{place}"
    if detail["type"] == "missing":
        return f"{name} is missing: add it to the recipe or give {name}=VALUE"
    message = REMEDIES.get(detail["type"]) or message[0].lower() + message[1:]
    return f"{name} = {detail['input']!r}: {message}{place}"


def _fields_at(keys: KeyPath) -> list[str]:
    """Names of the settings of a section; none where `keys` does not lead to one."""
    section: type[BaseModel] | None = RunConfig
    path = list(keys)
    while path:
        field = section.model_fields.get(path.pop(0)) if section else None
        section = _section_type(field.annotation) if field else None
        if field and get_origin(field.annotation) is dict:
            if not path:
                return []
            path.pop(0)  # the name of an entry
    return list(section.model_fields) if section else []


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class of `Section`, `Section | None` or `dict[str, Section]`."""
    candidates = get_args(annotation) or (annotation,)
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
