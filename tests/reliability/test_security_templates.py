"""Templates run in a sandbox, and no text of a user's becomes markup in a report."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.data.chat import render_chat
from lorica.data.record import RowError
from lorica.data.template import fill, template_problem
from lorica.errors import LoricaError
from lorica.report.page import html_report, markdown_report, report_parts
from lorica.report.reading import read_record
from tests.report.conftest import run_record, train_record
from tests.report.test_comparison import cell
from tests.report.test_judgement import judge_record
from tests.training.conftest import byte_tokenizer

QUESTION = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


# --- templates --------------------------------------------------------------------------------------------------------

REACHING = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages|attr('__class__') }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% set x = messages.append(1) %}",
    "{{ namespace.__init__.__globals__ }}",
]
UNWILLING = ["{{ 1 / 0 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ messages[9]['x'] }}", "{{ [] + '' }}"]


@pytest.mark.reliability("S8")
@pytest.mark.parametrize("template", REACHING)
def test_a_chat_template_reaches_nothing_outside_of_its_sandbox(template: str, tmp_path: Path) -> None:
    tokenizer, mark = byte_tokenizer(), tmp_path / "made"
    tokenizer.chat_template = template.replace("MARK", str(mark))
    with suppress(LoricaError):
        shown = render_chat(tokenizer, QUESTION, "rows.jsonl:1")
        assert not [word for word in ("class", "module", "built-in", "function") if word in shown], shown
    assert not mark.exists()


@pytest.mark.reliability("S8")
@pytest.mark.parametrize("template", UNWILLING)
def test_whatever_a_chat_template_raises_is_one_message(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(LoricaError, match=r"rows\.jsonl:1: the chat template refuses this conversation"):
        render_chat(tokenizer, QUESTION, "rows.jsonl:1")


@pytest.mark.reliability("S8")
@pytest.mark.parametrize("text", ["{row.__class__}", "{row[0]}", "{row!r}", "{row:>9}", "{0}", "{}", "{a b}"])
def test_the_prompts_of_a_stream_name_fields_and_nothing_else(text: str) -> None:
    assert "write a name alone between braces" in template_problem(text)


@pytest.mark.reliability("S8")
@given(st.text())
def test_what_a_row_holds_is_no_template(value: str) -> None:
    assert (
        fill("<{a}>", {"a": value + "{a} {{ 7 * 7 }} {a.__class__}"})[0]
        == f"<{value}{{a}} {{{{ 7 * 7 }}}} {{a.__class__}}>"
    )
    with pytest.raises(RowError):
        fill("{b}", {"a": value})


# --- reports ----------------------------------------------------------------------------------------------------------

TAGS = set(
    "html head meta title style body main article header h1 h2 h3 p dl div dt dd b span aside ul li section nav a "
    "details summary table thead tbody tr th td figure figcaption pre code svg g path line rect text circle "
    "desc".split()
)
ATTACKS = [
    "<script>alert(1)</script>", "</title><script>alert(1)</script>", "</style><script>alert(1)</script>",
    '" onload="alert(1)" x="', "' onclick='alert(1)", "<img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}",
    "<svg/onload=alert(1)>", "javascript:alert(1)", "</text></svg><iframe src=//evil>", "]]><!--", "&lt;script&gt;",
    "[x](javascript:alert(1))", "\n# heading\n<b>", "| a | b |", "<!-- ", "\x00<script>", "a\u2028<script>",
]  # fmt: skip

KEPT = {"kind", "schema", "schema_version", "source", "constraint", "method", "family", "date", "python"}
"""Fields by which records are told apart or that hold one of a few words."""

MAPPINGS = {"retention", "versions", "hardware", "data", "beside", "floors", "metric_names", "ties", "judge", "options"}
"""Fields whose names, too, are the user's."""


class Page(HTMLParser):
    """Collects what a browser would see: tags, attributes and what is in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def harmless(text: str) -> None:
    page = Page(text)
    assert set(page.tags) <= TAGS, set(page.tags) - TAGS
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert {name for name, _ in page.attributes} & {"src", "srcset", "action", "formaction", "xlink:href"} == set()
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")


def everywhere(value: Any, attack: str, name: str = "") -> Any:
    """Return a record with the attack behind every text."""
    if isinstance(value, dict):
        return {key: everywhere(item, attack, key) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item, attack, name) for item in value]
    return f"{value}{attack}" if isinstance(value, str) and name not in KEPT else value


def texts(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every text in a record, and with a last ``KEY`` to every name that is the user's."""
    if isinstance(value, str) and way[-1] not in KEPT:
        yield way
    elif isinstance(value, dict):
        for name, item in value.items():
            if way and way[-1] in MAPPINGS:
                yield (*way, name, KEY)
            yield from texts(item, (*way, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts(item, (*way, index))


KEY = object()


def replaced(record: dict[str, Any], way: tuple[Any, ...], attack: str) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    holder: Any = changed
    steps = way[:-2] if way[-1] is KEY else way[:-1]
    for step in steps:
        holder = holder[step]
    if way[-1] is KEY:
        holder[way[-2] + attack] = holder.pop(way[-2])
    else:
        holder[way[-1]] = f"{holder[way[-1]]}{attack}"
    return changed


RECORDS = {
    "run": cell("osft", "1", 0, (80, 90, 60), left_out=["some"], facts={"stores": "bases"}, name="half",
                beside={"a": {"rouge": [1.0, 2.0, 3.0]}}, metric_names={"a": "exact_match"}, floors={"a": 20.0},
                data={"a": {"train": {"kept": 3, "truncated": 1, "notices": ["cut"]}}},
                config={"settings": {"options": {"x": "y"}}}),
    "whole run": run_record(),
    "train": train_record(rejected={"old": 3.0}),
    "judge": judge_record(ties={"a tie in both orders": 1}),
    "inspection": {
        "schema": 1, "kind": "inspect", "model": "looked-at", "calibration": "self", "family": "llama",
    "options": {"model_name_or_path": "m"}, "versions": {"torch": "2"}, "command": "lorica inspect m",
    "layers": [run_record()["plan"][0] | {"spectrum": {"index": [0, 1], "sigma": [2.0, 1.0]}, "effective_rank": 1.9}],
    },
}  # fmt: skip
WAYS = [(name, way) for name, record in RECORDS.items() for way in texts(record)]


@pytest.mark.reliability("S8")
@settings(max_examples=40)
@given(st.sampled_from(WAYS), st.sampled_from(ATTACKS) | st.text("<>\"'&;/=-! \n{}%\x00scriptonload", max_size=40))
def test_no_text_of_a_record_becomes_markup(where: tuple[str, tuple[Any, ...]], attack: str) -> None:
    name, way = where
    try:
        record = read_record(replaced(RECORDS[name], way, attack))
    except LoricaError:
        return  # a name of a task that is there twice, and the like
    parts = report_parts([record])
    harmless(html_report(parts))
    quiet(markdown_report(parts))


def quiet(markdown: str) -> None:
    """Outside of code, which stands indented, nothing is left that Markdown would hand on as HTML or as a link."""
    for line in markdown.splitlines():
        if not line.startswith("    "):
            bare = line.replace("\\\\", "").replace("\\<", "").replace("\\[", "").replace("\\]", "")
            assert "<" not in bare, line
            assert "](" not in bare, line


@pytest.mark.reliability("S8")
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_becomes_markup_wherever_it_stands_at_once(attack: str) -> None:
    records = [read_record(everywhere(record, attack)) for record in RECORDS.values()]
    page = html_report(report_parts(records))
    harmless(page)
    quiet(markdown_report(report_parts(records)))
    if attack.startswith("<script"):
        assert page.count("&lt;script&gt;") > 10
