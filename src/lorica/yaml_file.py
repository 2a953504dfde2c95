"""YAML as data: every file that Lorica reads, within limits, and never as Python objects."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lorica.errors import LoricaError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 200_000
"""Values in a file, those that an alias stands for counted at each of its places."""

MAX_DIGITS = 100
"""Of a number: PyYAML takes time that grows with the square of them."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"

_WRONG_TAG = (ValueError, LookupError, AttributeError, TypeError, OverflowError)
"""What PyYAML raises where a tag does not fit its value, as in ``!!timestamp x`` and ``!!bool x``."""


def read_yaml(path: str | Path, what: str) -> Any:
    """Return what a YAML file holds: dictionaries, lists and plain values.

    Args:
        path: the file.
        what: it is to be, for messages.

    Raises:
        LoricaError: see ``compose_yaml``; or it holds a tag such as ``!!python/object``, or a value that is none.
    """
    root = compose_yaml(path, what)
    try:
        return None if root is None else yaml.constructor.SafeConstructor().construct_document(root)
    except (yaml.YAMLError, *_WRONG_TAG) as error:
        raise LoricaError(f"{path}: not YAML of plain values: {_line(error)}") from error


def compose_yaml(path: str | Path, what: str) -> yaml.Node | None:
    """Return the nodes of a YAML file, of which nothing has been made yet; None where it is empty.

    Args: as for ``read_yaml``.

    Raises:
        LoricaError: not readable, no YAML, a key given twice, over 1 MB, nested deeper than 50, more than 200,000
            values with those of its aliases, or an alias within what it stands for.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise LoricaError(f"{path}: over {MAX_BYTES:,} bytes; that is no {what}")
        return _Nodes(data.decode("utf-8-sig")).get_single_node()
    except OSError as error:
        raise LoricaError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoricaError(f"{path}: not YAML: {_line(error)}") from error


def top_names(root: yaml.Node | None) -> set[str]:
    """Return the names at the top of a file: none where it holds something else than names with values."""
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    return {key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)}


class _Nodes(yaml.SafeLoader):
    """Composes nodes and refuses, on the way, what would become too large or too deep."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}
        """Values and depth of each node that is complete."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._open += 1
        if self._open > MAX_DEPTH:
            raise _refusal(f"nested deeper than {MAX_DEPTH}", self.peek_event())
        alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        self._open -= 1
        if not alias:
            self._measure(node)
        elif node not in self._sizes:
            raise _refusal("an alias within what it stands for", node)
        return node

    def _measure(self, node: Any) -> None:
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
            inner = [part for pair in node.value for part in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        sizes = [self._sizes[part] for part in inner]
        total, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if total > MAX_NODES:
            raise _refusal(f"more than {MAX_NODES:,} values, with those of its aliases", node)
        if depth > MAX_DEPTH:
            raise _refusal(f"nested deeper than {MAX_DEPTH}", node)
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise _refusal(f"a number of more than {MAX_DIGITS} digits", node)
        self._sizes[node] = (total, depth)


def _refuse_twice(node: yaml.MappingNode) -> None:
    scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
    counts = Counter((key.tag, key.value) for key in scalars)
    for key in reversed(scalars):
        if counts[key.tag, key.value] > 1:
            raise _refusal(f"the key {key.value!r} is given twice", key)


def _refusal(what: str, where: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=where.start_mark)


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {' '.join(str(getattr(error, 'problem', error)).split())}"
    return " ".join(str(error).split())
