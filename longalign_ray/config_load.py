"""Reads a recipe: YAML, then `a.b=c` overrides; every problem is reported in one ConfigError."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from longalign_ray.config import RunConfig
from longalign_ray.errors import ConfigError

KeyPath = tuple[str, ...]


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated recipe.

    Raises ConfigError listing every problem with its place (file and line, or the override), value, rule and remedy.
    """
    path = Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; give the path of a YAML file") from error
    problems: list[str] = []
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}; a recipe is a mapping of sections, e.g. `run_dir: runs/x`"
        )
    places: dict[KeyPath, str] = {}
    if node is not None:
        _collect_places(node, (), path.name, places, problems)
    for override in overrides:
        _apply_override(tree, override, places, problems)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += [_describe(detail, places) for detail in error.errors()]
        config = None
    if problems or config is None:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) in the recipe {path}:\n{listing}")
    return config


def dump_config(config: RunConfig) -> str:
    """YAML of the resolved config; reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
    except yaml.YAMLError:
        problems.append(f"override {override!r}: {raw!r} is not a YAML value; quote it")
        return
    branch = tree
    for part in keys[:-1]:
        if not isinstance(branch.get(part), dict):
            branch[part] = {}
        branch = branch[part]
    branch[keys[-1]] = value
    places[keys] = f"override {override}"


def _describe(detail: Any, places: dict[KeyPath, str]) -> str:
    keys = tuple(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # a rule across fields; its message starts with the full name of one
        name = message.split(" ", 1)[0]
        return message + (f" ({places[tuple(name.split('.'))]})" if tuple(name.split(".")) in places else "")
    known = next((keys[:end] for end in range(len(keys), 0, -1) if keys[:end] in places), None)
    place = f" ({places[known]})" if known else ""
    name = ".".join(keys)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], _fields_at(keys[:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_fields_at(keys[:-1]))}"
        return f"{name} is not a known key: {hint}{place}"
    if detail["type"] == "missing":
        return f"{name} is missing: add it to the recipe or give {name}=VALUE"
    return f"{name} = {detail['input']!r}: {message[0].lower()}{message[1:]}{place}"


def _fields_at(keys: KeyPath) -> list[str]:
    section: Any = RunConfig
    for key in keys:
        if not (isinstance(section, type) and issubclass(section, BaseModel) and key in section.model_fields):
            return []
        section = section.model_fields[key].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
