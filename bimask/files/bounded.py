"""YAML and JSON of strangers, read within bounds: the one reader of both.

A file must be a regular one, and is refused by its size before it is read, by depth, number of values
and aliases while it is read. So nothing that it says costs more than some seconds and 500 MiB.

Numbers of YAML are those of YAML 1.2: `1e-1` is one, which PyYAML alone takes for text.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_BYTES = 2**19  # a study of 800 victims
MAX_YAML_NODES = 50_000  # with what aliases stand for
COMMENT = 2**10  # bytes that are left for one
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_VALUES = 2_000_000
MAX_DEPTH = 40  # containers in containers
MAX_DIGITS = 100  # of a whole number, so that it is still a float
EXPONENT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
FLOAT = "tag:yaml.org,2002:float"
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def require_regular(path: Path | str, most: int) -> None:
    """Refuse what is no regular file, such as a pipe or a device, which could be without end.

    Raises:
        OSError: no such file, or none that is regular.
        ValueError: it has more than `most` bytes.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    if status.st_size > most:
        raise ValueError(f"{status.st_size} bytes, but at most {most} are read")


def read_bytes(path: Path | str, most: int) -> bytes:
    """A file's content; errors as of `require_regular`."""
    require_regular(path, most)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grew, or its file system knows no sizes
        raise ValueError(f"more than {most} bytes, which is all that is read")
    return content


def read_yaml(path: Path | str) -> Any:
    """What a YAML file says.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: too large, no YAML, or beyond a bound; a sentence's end with line and column.
    """
    return parsed_yaml(read_bytes(path, MAX_YAML_BYTES))


def parsed_yaml(content: bytes, look: Callable[[yaml.Node], object] = lambda _: None) -> Any:
    """What a YAML text says; ValueError as of `read_yaml`.

    Args:
        look: is given its nodes, which know their lines, before merged ones are moved.
    """
    try:
        loader = _Loader(content.decode())
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            look(root)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error


def dump_yaml(content: Mapping[str, Any]) -> str:
    """YAML in the order of `content`; text that looks like a number to `read_yaml` is quoted."""
    text: str = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False)
    return text


def require_rereadable(content: Mapping[str, Any]) -> None:
    """Refuse content whose `dump_yaml` with a short comment above would not be read again.

    Raises:
        ValueError: too many values or bytes.
    """
    nodes, level = 0, [content]
    while level and nodes <= MAX_YAML_NODES:
        inner: list[Any] = []
        for one in level:
            parts = [*one, *one.values()] if isinstance(one, Mapping) else list(one)
            nodes += len(parts)
            inner += [part for part in parts if isinstance(part, (Mapping, list, tuple))]
        level = inner
    if nodes >= MAX_YAML_NODES:
        raise ValueError(f"more than {MAX_YAML_NODES} values")
    if (size := len(dump_yaml(content).encode()) + COMMENT) > MAX_YAML_BYTES:
        raise ValueError(f"{size} bytes, but at most {MAX_YAML_BYTES} are read")


def read_json(path: Path | str, most: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: more than `most` bytes, no JSON, or beyond a bound.
    """
    return parsed_json(read_bytes(path, most))


def parsed_json(
    content: bytes, most_keys: int = MAX_JSON_VALUES, most_values: int = MAX_JSON_VALUES
) -> Any:
    """What JSON says; `most_keys` are those of one object, repeated ones counted. ValueError as of
    `read_json`."""
    if (marks := sum(map(content.count, (b",", b"[", b"{")))) > most_values:
        raise ValueError(f"up to {marks} values, but at most {most_values} are read")

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > most_keys:
            raise ValueError(f"{len(pairs)} keys in one place, but at most {most_keys} are read")
        return dict(pairs)

    try:
        found = json.loads(content, parse_int=_whole, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("nested too deep") from None
    _require_shallow(found)
    return found


def _require_shallow(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, (dict, list))
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, (dict, list))
    ]:
        if (depth := depth + 1) >= MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, but at most {MAX_DIGITS} are read")
    return int(digits)


class _Loader(yaml.SafeLoader):
    """Counts while it reads: `sizes` has for every finished node how many it stands for, and how deep
    it is, aliases followed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0
        self.sizes: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        self.nodes += 1
        self._require(self.depth <= MAX_DEPTH, f"nested deeper than {MAX_DEPTH}", mark)
        self._require(self.nodes <= MAX_YAML_NODES, f"more than {MAX_YAML_NODES} values", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if alias:
            self._require(node in self.sizes, "an alias of what it is in", mark)
        else:
            self.sizes[node] = self._size(node)
        count, height = self.sizes[node]
        self._require(height <= MAX_DEPTH, f"nested deeper than {MAX_DEPTH} with its aliases", mark)
        self._require(
            count <= MAX_YAML_NODES, f"more than {MAX_YAML_NODES} values with its aliases", mark
        )
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        sizes = [self.sizes[one] for one in inner]
        return 1 + sum(n for n, _ in sizes), 1 + max((height for _, height in sizes), default=0)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except MALFORMED as error:  # what constructors raise on `!!int x`, 2001-13-01 and the like
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"not a valid {kind}", node.start_mark
            ) from error

    @staticmethod
    def _require(holds: bool, problem: str, mark: yaml.Mark) -> None:
        if not holds:
            raise yaml.composer.ComposerError(None, None, problem, mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if not all(isinstance(key, str) for key in found):
            raise yaml.constructor.ConstructorError(
                None, None, "a key is no text; put it in quotes", node.start_mark
            )
        return found

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if node.tag in (FLOAT, "tag:yaml.org,2002:int") and len(value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark
            )
        return value


class _Dumper(yaml.SafeDumper):
    """Knows the same numbers as the reader."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))
