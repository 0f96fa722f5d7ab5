"""Recipes: files of a training run's arguments (docs/training.md, "Recipes"). Keys are the flags' names."""

import argparse
import difflib
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and truth values: `1e-3` is a number and `no` is text, which PyYAML (YAML 1.1) turns round."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def find_recipe(name: Path, folder: Path | None) -> Path:
    """The file that `--config` means: one of that name or, for a bare name, the recipe in `folder`.

    Raises:
        ValueError: neither is there; the message lists the recipes.
    """
    if name.exists() or folder is None or len(name.parts) != 1:
        return name
    known = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name.name.removesuffix(".yaml") in known:
        return known[name.name.removesuffix(".yaml")]
    raise ValueError(f"--config {name}: no such file, and none of the recipes {', '.join(known)}")


def load_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Values for a parser's flags from a YAML or JSON file, or from the `run.json` of an earlier run.

    Raises:
        ValueError: no such file, no mapping of keys to values, unknown keys (the nearest known one is named), values
            of a wrong type or none of the choices. Messages name file, key, what was found and what was expected.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        values = yaml.load(path.read_bytes(), _Loader)  # a SafeLoader: data alone, no objects
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(values).__name__}")
    if {"arguments", "command", "versions"} <= values.keys():  # run.json
        values = values["arguments"]
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config")}
    result = {}
    for key, value in values.items():
        if key == "config":
            continue  # run.json tells which recipe it came from; its values are all here
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys are {sorted(actions)}"
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
        result[key] = _check(path, actions[key], value)
    return result


def _check(path: Path, action: argparse.Action, value: Any) -> Any:
    """The value as the flag would give it."""
    if value is None and action.default is None:
        return None
    is_switch = isinstance(action, argparse.BooleanOptionalAction) or isinstance(action.default, bool)
    kind: Any = bool if is_switch else action.type if action.type in (int, float) else str
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    # To Python, True is a whole number too, and a whole number is no float.
    fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == is_switch
    if action.choices is not None:
        expected, fits = f"one of {list(action.choices)}", fits and value in action.choices
    if not fits:
        raise ValueError(f"{path}: {action.dest}: found {value!r}, expected {expected}")
    return action.type(value) if callable(action.type) else value
