"""YAML is data: bounded in size, depth and aliases, every key once, and never a Python object."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorica.benchmarks import catalogue, find_stream
from lorica.errors import LoricaError
from lorica.evaluation.task_code import code_in_task, is_group
from lorica.scoring import _is_ours
from lorica.values import read_config
from lorica.yaml_file import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_yaml

LAUGHS = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

CHAIN = "a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))

READERS: dict[str, Callable[[Path], Any]] = {
    "yaml": lambda path: read_yaml(path, "file"),
    "configuration": read_config,
    "stream": find_stream,
    "lm-eval task": code_in_task,
    "lm-eval group": is_group,
    "task or stream": lambda path: _is_ours(str(path)),
}

HOSTILE = {
    "billion laughs": (LAUGHS, rf"line \d+: more than {MAX_NODES:,} values, with those of its aliases"),
    "alias of itself": ("a: &a [*a]\n", "line 1: an alias within what it stands for"),
    "deep": ("[" * 100_000, f"line 1: nested deeper than {MAX_DEPTH}"),
    "deep mapping": ("{a: " * 100_000, f"line 1: nested deeper than {MAX_DEPTH}"),
    "deep by aliases": (CHAIN, f"nested deeper than {MAX_DEPTH}"),
    "key twice": ("one: 1\ntwo: 2\none: 3\n", "line 3: the key 'one' is given twice"),
    "key twice inside": ("a:\n  - b: {c: 1,\n     c: 2}\n", "line 3: the key 'c' is given twice"),
    "number": (f"a: {'9' * 5000}\n", "line 1: a number of more than 100 digits"),
    "sexagesimal": (f"a: 1{':59' * 5000}\n", "line 1: a number of more than 100 digits"),
    "unknown alias": ("a: *nowhere\n", "undefined alias"),
    "not closed": ("a: [1,\n", "not YAML"),
    "control character": ("a: \x01\n", "not YAML"),
}  # fmt: skip


@pytest.mark.reliability("S6")
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_hostile_is_one_error_soon(
    text: str, message: str, reader: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    began = time.perf_counter()
    with pytest.raises(LoricaError, match=message) as caught:
        reader(path)
    assert time.perf_counter() - began < 5
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 500


@pytest.mark.reliability("S6")
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_a_large_file_is_not_read(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(LoricaError, match=f"over {MAX_BYTES:,} bytes"):
        reader(path)


@pytest.mark.reliability("S6")
@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch MARK]", "!!python/name:os.system", "!!python/object:os.error {}",
            "!!python/module:os", "!!python/object/new:os.system [touch MARK]", "!own x"],
)  # fmt: skip
def test_a_python_object_is_refused_and_not_made(tag: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "object.yaml", tmp_path / "made"
    path.write_text(f"a: 1\nb: {tag.replace('MARK', str(mark))}\n")
    for reader in (READERS["yaml"], READERS["configuration"], READERS["stream"]):
        with pytest.raises(LoricaError, match=r"object\.yaml: not YAML of plain values: line 2: .*constructor"):
            reader(path)
    assert len(code_in_task(path)) == 1
    assert not mark.exists()


@pytest.mark.reliability("S6")
def test_odd_values_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    for text in ("a: 2001-99-99\n", "? [1]\n: 2\n", "a: !!int x\n", "a: !!binary a\n"):
        path.write_text(text)
        with pytest.raises(LoricaError, match=r"odd\.yaml: not YAML of plain values"):
            read_yaml(path, "file")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.reliability("S6")
@given(plain)
def test_plain_data_is_read_as_safe_load_reads_it(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("plain") / "plain.yaml"
    text = yaml.safe_dump(data, allow_unicode=True)
    path.write_text(text, encoding="utf-8", newline="")
    assert repr(read_yaml(path, "file")) == repr(yaml.safe_load(text))


def test_aliases_and_merges_within_the_limits_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("\ufeffbase: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\nlist: [*base, *base]\n")
    both = {"a": 1, "b": 2}
    assert read_yaml(path, "file") == {"base": both, "more": {"a": 1, "b": 3}, "list": [both, both]}


def test_every_stream_that_comes_with_lorica_is_within_the_limits() -> None:
    assert all(find_stream(name).tasks or find_stream(name).held_out for name in catalogue())


SIGNS = st.text("[]{}:,&*!-?|>%@`'\"#~=<0123459abeonyxTZ._ \n\t\\", max_size=60)


@pytest.mark.reliability("S6")
@given(st.text(max_size=40) | SIGNS | st.binary(max_size=40))
def test_any_text_is_data_or_one_error(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))
    for reader in READERS.values():
        try:
            reader(path)
        except LoricaError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
