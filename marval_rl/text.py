"""Text that users write: files as editors save them, YAML as YAML 1.2 has it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

MAPPING = "a mapping, such as '{key: 1}'"  # what an error message says is expected

_STRING = "tag:yaml.org,2002:str"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def read_text(path: str | Path) -> str:
    """Reads a text file as editors save it: UTF-8 with or without a byte order mark, lines that end in \\n or \\r\\n.

    Raises:
        OSError: If the file cannot be read.
        UnicodeError: If it is not UTF-8.
    """
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise UnicodeError("it is UTF-16 (or binary), not UTF-8: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UnicodeError(f"line {line} is not UTF-8: save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_yaml(text: str, verbatim: Collection[str] = ()) -> Any:
    """Reads YAML with plain data only, as `yaml.safe_load`, but

    - numbers, dates and times as YAML 1.2 has them: 1e-6 is a number, 010 is ten, 1:30 and 2026-01-31 are text;
    - `yes`, `no`, `on` and `off` stay true and false, as Python's tools have them; as keys they are words;
    - a key that is written twice is an error that names both lines.

    Args:
        text: The YAML.
        verbatim: Keys at the top whose mappings have text for values, whatever it looks like.

    Raises:
        yaml.YAMLError: For anything else.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node)
        if isinstance(node, yaml.MappingNode):
            for key, block in node.value:
                if key.value in verbatim and isinstance(block, yaml.MappingNode):
                    _keep_text(block)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def parse_mapping(text: str) -> dict:
    """Reads a mapping that is written as YAML or JSON.

    Raises:
        ValueError: For anything else; the message says what is expected, and names a key that is written twice.
    """
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{MAPPING} ({yaml_problem(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(MAPPING)
    return value


def dump_yaml(value: Any, **options: Any) -> str:
    """Writes YAML that `load_yaml` reads back as it was; options as `yaml.dump` has them."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong, on one line, for an error message."""
    problem = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
    return f"{problem} (YAML indents with spaces, not tabs)" if "'\\t'" in problem else problem


class _Loader(yaml.SafeLoader):
    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0) if text[:2].lower() in ("0o", "0x") else int(text)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""


def _keep_text(mapping: yaml.MappingNode) -> None:
    for _, value in mapping.value:
        if isinstance(value, yaml.ScalarNode):
            value.tag = _STRING


def _check_keys(node: yaml.Node, seen: set[int] | None = None) -> None:
    """Refuses a key that a mapping has twice, at any depth; makes words of the keys yes, no, on and off."""
    seen = set() if seen is None else seen
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for element in node.value:
            _check_keys(element, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        _check_keys(value, seen)
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if key.tag == _BOOL and key.value.lower() not in ("true", "false"):
            key.tag = _STRING
        line = key.start_mark.line + 1
        if key.value in lines:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key.value!r} is written twice, in line {lines[key.value]} and in line {line}"
            )
        lines[key.value] = line


def _resolve_as_yaml_1_2() -> None:
    dropped = {_INT, _FLOAT, "tag:yaml.org,2002:timestamp"}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in dropped]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in ((_INT, _INTEGER), (_FLOAT, _NUMBER)):
        whole = re.compile(f"(?:{pattern.pattern})$")
        _Loader.add_implicit_resolver(tag, whole, list("-+.0123456789"))
        _Dumper.add_implicit_resolver(tag, whole, list("-+.0123456789"))
    _Loader.add_constructor(_INT, _Loader.construct_integer)
    _Loader.add_constructor(_FLOAT, _Loader.construct_number)


_resolve_as_yaml_1_2()
