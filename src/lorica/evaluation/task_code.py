"""What an lm-evaluation-harness task file holds, read without running it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jinja2
import yaml
from jinja2 import nodes
from jinja2.sandbox import SandboxedEnvironment

from lorica.yaml_file import compose_yaml, top_names

_WHAT = "lm-eval task"
_PLAIN_TAGS = "tag:yaml.org,2002:"
_PLAIN = ("bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value")
_OFF = ("false", "no", "off")
_ATTRIBUTE_FILTERS = ("attr", "groupby", "map", "rejectattr", "selectattr")


def code_in_task(path: Path) -> list[str]:
    """Return every place of a task file, and of the files it includes, that would run code; nothing is run.

    These are: a YAML tag such as ``!function``; a template that reaches for a private attribute, or could call one
    whose name it computes, as the harness does not sandbox its templates; and a metric that the harness does not
    have, or with ``hf_evaluate``, as its code would be fetched.

    Raises:
        LoricaError: a file is missing or is no YAML; see ``lorica.yaml_file.compose_yaml``.
    """
    return [f"{file}:{node.start_mark.line + 1}: {what}" for file, node, what in _findings(path.resolve(), set())]


def is_group(path: Path) -> bool:
    """Tell whether a task file describes a group, which the harness cannot load from a file by its path."""
    return "group" in top_names(compose_yaml(path, _WHAT))


def _findings(path: Path, seen: set[Path]) -> Iterator[tuple[Path, yaml.Node, str]]:
    seen.add(path)
    root = compose_yaml(path, _WHAT)
    for node in _nodes(root):
        if not (node.tag.startswith(_PLAIN_TAGS) and node.tag.removeprefix(_PLAIN_TAGS) in _PLAIN):
            yield path, node, f"has the tag {node.tag}"
        if isinstance(node, yaml.ScalarNode) and _reaches(node.value):
            yield path, node, "has a template that reaches for private or computed attributes"
        for name, value in _settings(node):
            if name == "metric" and value.value not in _metrics():
                yield path, value, f"takes the metric {value.value!r} from elsewhere"
            if name == "hf_evaluate" and value.value.lower() not in _OFF:
                yield path, value, "takes a metric from the evaluate library (hf_evaluate)"
            if name == "include" and (file := (path.parent / value.value).resolve()) not in seen:
                yield from _findings(file, seen)


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield every node once, however many aliases stand for it."""
    waiting, seen = [root] if root is not None else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            if isinstance(node, yaml.MappingNode):
                waiting += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value


def _settings(node: yaml.Node) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yield the names of a mapping with their values, those of a list one by one."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(key, yaml.ScalarNode) and isinstance(item, yaml.ScalarNode):
                yield key.value, item


def _metrics() -> set[str]:
    import lm_eval.api.metrics  # noqa: F401  fills the registry
    from lm_eval.api.registry import metric_registry

    return set(metric_registry.keys())


def _reaches(template: str) -> bool:
    """Tell whether a Jinja template could run more than itself. What does not parse cannot.

    That takes a private attribute (``__class__`` and on), or a call together with a way to name one in disguise.
    """
    try:
        tree = SandboxedEnvironment().parse(template)
    except jinja2.TemplateError:
        return False
    keys = [node.arg for node in tree.find_all(nodes.Getitem)]
    names = [node.attr for node in tree.find_all(nodes.Getattr)]
    names += [str(key.value) for key in keys if isinstance(key, nodes.Const)]
    computed = any(not isinstance(key, nodes.Const | nodes.Slice) for key in keys)
    disguised = computed or any(node.name in _ATTRIBUTE_FILTERS for node in tree.find_all(nodes.Filter))
    calls = any(True for _ in tree.find_all((nodes.Call, nodes.CallBlock)))
    return any(name.startswith("_") for name in names) or (calls and disguised)
