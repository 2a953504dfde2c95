"""docs/methods.md says of every method what the code does: its options, their defaults, what it stores."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, Field, fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorica.data.stream import MethodSettings
from lorica.methods import METHODS, Targets

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "docs" / "results" / "methods.json").read_text(encoding="utf-8"))
SECTIONS = dict(re.findall(r"^## ([a-z-]+)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))

every_method = pytest.mark.parametrize("name", METHODS)


def script() -> Any:
    spec = spec_from_file_location("methods_table", ROOT / "scripts" / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(name: str) -> MethodSettings:
    (block,) = re.findall(r"```yaml\n(.*?)```", SECTIONS[name], re.S)
    ((key, values),) = yaml.safe_load(block).items()
    assert key == name
    return MethodSettings.model_validate(values)


def own_options(name: str) -> dict[str, Field[Any]]:
    shared = {f.name for f in fields(Targets)}
    return {f.name: f for f in fields(METHODS[name].options_type) if f.name not in shared}


def default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def test_a_section_for_each_method_in_their_order() -> None:
    assert list(SECTIONS) == list(METHODS)


@every_method
def test_the_example_is_a_method_with_all_its_options_and_defaults(name: str) -> None:
    settings = settings_of(name)
    assert settings.method == name
    METHODS[name].build(settings.options)
    if name != "osft":  # its example is the demo's setting; the others list what there is
        assert settings.options == {key: default(option) for key, option in own_options(name).items()}


@every_method
def test_every_option_is_named_in_its_section(name: str) -> None:
    for option in own_options(name):
        assert re.search(rf"\b{option}\b", SECTIONS[name]), option


@every_method
def test_a_section_says_what_is_carried_at_which_rate_and_how_far_it_is_tested(name: str) -> None:
    text = " ".join(SECTIONS[name].split())
    assert re.search(rf"\*Rate\* x {METHODS[name].learning_rate_scale:g}(?!\d)", text)
    assert "*Status*: " in text
    carries = text.partition("*Carries*")[2]
    assert carries.startswith(" nothing") == METHODS[name].stores.startswith("nothing")
    assert ("grows with the tasks" in text.lower()) == ("grows with the tasks" in METHODS[name].stores)


def test_the_tables_are_what_the_script_makes_of_the_results() -> None:
    assert script().with_tables(PAGE, RECORD) == PAGE, "run: python scripts/methods_table.py --no-run"


def test_the_results_cover_every_method_and_bear_out_what_it_says() -> None:
    counts = RECORD["carried_bytes"]
    assert [label for label in counts if "," not in label] == list(METHODS)
    for label, (first, second, third) in counts.items():
        stores = METHODS[label.partition(",")[0]].stores
        if "grows with the tasks" in stores:
            assert 0 < first < second < third, label
        else:
            assert first == second == third, label
        assert (first == 0) == (stores.startswith("nothing") and "," not in label), label


def test_sizes_are_readable() -> None:
    size = script().size
    assert [size(n) for n in (0, 1888, 3_809_280)] == ["0", "1.9 kB", "3.81 MB"]
