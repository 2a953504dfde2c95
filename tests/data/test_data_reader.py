"""Reading: every row is either read or refused at its own line, and nothing odd passes in silence."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorica.data import csv_rows, json_array, reader
from lorica.data.csv_rows import csv_records
from lorica.data.jsonl import json_records
from lorica.data.reader import open_source
from lorica.data.record import MAX_ROW_BYTES, Record
from lorica.errors import LoricaError
from lorica.json_file import MAX_DEPTH

GOOD = b'{"text": "a"}'


def rejected(path):
    return [row for row in json_records(path) if not isinstance(row, Record)]


@pytest.mark.reliability("R20")
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "malformed JSON: Expecting ',' delimiter at column 13"),
        (b'  {"text" "a"}', "malformed JSON: Expecting ':' delimiter at column 11"),
        (b'{"text": "a"} x', "malformed JSON: text after the row's end at column 14"),
        (b'{"text": "a", "text": "b"}', "duplicate key: 'text'"),
        (b'{"a": {"k": 1, "k": 2}}', "duplicate key: 'k'"),
        (b'{"text": NaN}', "number not allowed: NaN is no JSON number"),
        (b'{"text": -Infinity}', "number not allowed: -Infinity is no JSON number"),
        (b'{"text": 1e999}', "number not allowed: 1e999 is too large"),
        (b'{"text": "a\0b"}', "NUL byte: at byte 25"),
        (b'{"text": "\\ud800"}', "malformed JSON: lone surrogate \\ud800 in a string"),
        (b"[1, 2]", "wrong type: a row is a JSON object, got a list"),
        (b"7", "wrong type: a row is a JSON object, got a number"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", f"nested too deeply: the limit is {MAX_DEPTH} levels"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", f"nested too deeply: the limit is {MAX_DEPTH} levels"),
    ],
)
def test_bad_line_is_refused_with_its_reason_and_bytes(write, line, reason):
    path = write(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    rows = list(json_records(path))
    assert [row.line for row in rows] == [1, 2, 3]
    assert isinstance(rows[0], Record)
    assert isinstance(rows[2], Record)
    assert rows[1].reason == reason
    assert str(rows[1]) == f"{path}:2: {reason}"
    assert rows[1].raw == line


@pytest.mark.reliability("R22")
def test_encodings_are_guessed_with_the_byte_offset(write):
    (latin,) = rejected(write(GOOD + b"\n" + '{"text": "café"}'.encode("latin-1")))
    assert latin.reason.startswith("invalid UTF-8: byte 27 is 0xe9; the file looks like Windows-1252")
    wide = rejected(write('{"text": "a"}\n{"text": "b"}'.encode("utf-16"), "wide.jsonl"))
    assert wide
    assert all("UTF-16" in row.reason for row in wide)


@pytest.mark.reliability("R22")
def test_mark_line_ends_blank_lines_and_missing_newline_are_accepted_and_lines_are_the_files(write):
    path = write(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD)
    assert [(row.line, row.value) for row in json_records(path)] == [(1, {"text": "a"}), (4, {"text": "a"})]


@pytest.mark.reliability("R20")
def test_line_above_the_limit_is_refused_and_the_next_one_read(write):
    size = 10 * 10**6
    path = write(b'{"text": "' + b"x" * (size - 12) + b'"}\n' + GOOD)
    long, good = json_records(path)
    assert long.reason == f"line too long: {size} bytes, the limit is {MAX_ROW_BYTES}"
    assert (good.line, good.value) == (2, {"text": "a"})


@pytest.mark.reliability("R20")
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_array_rows_keep_the_lines_of_the_file(write, name):
    path = write('\ufeff[\n  {"text": "a"},\r\n\n  {\n "text": "b"}, 5,\n {"text": "c", "text": "d"}\n]\n', name)
    rows = list(json_records(path))
    assert [row.line for row in rows] == [2, 4, 5, 6]
    assert [row.value["text"] for row in rows[:2]] == ["a", "b"]
    assert [row.kind for row in rows[2:]] == ["wrong type", "duplicate key"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n{"a": 2}]', ":1: malformed JSON: expected ',' or ']'"),
        ('[{"a": 1},\n{"a": }]', ":2: malformed JSON: Expecting value at line 2, column 7"),
        ('[{"a": 1},\n]', ":2: malformed JSON: Expecting value"),
        ('[{"a": 1}', ":1: malformed JSON: expected ',' or ']'"),
        ('[{"a": 1}]\nx', ":2: text after the end"),
    ],
)
def test_broken_array_names_the_line(write, text, message):
    path = write(text, "data.json")
    with pytest.raises(LoricaError) as error:
        list(json_records(path))
    assert f"{path}{message}" in str(error.value)


def test_json_lines_inside_json_and_empty_array(write):
    assert len(list(json_records(write(GOOD + b"\n" + GOOD, "lines.json")))) == 2
    assert list(json_records(write("[ \n]", "empty.json"))) == []


texts = st.text(st.characters(codec="utf-8"))
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=4),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_lines_and_arrays_read_back_what_was_written(tmp_path, rows, ascii_only, indent):
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    lines.write_bytes(text.encode())
    array.write_bytes(json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode())
    assert [row.value for row in json_records(lines)] == rows
    assert [row.value for row in json_records(array)] == rows


@pytest.mark.reliability("R20")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(st.sampled_from([GOOD, b"{", b"\xff", b"\0", b'{"a":1}', b"", b" "]), max_size=6))
def test_every_line_that_is_not_blank_is_read_or_refused(tmp_path, content):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(content))
    expected = [i for i, line in enumerate(content, 1) if line.strip()]
    assert [row.line for row in json_records(path)] == expected


@pytest.mark.reliability("R20")
def test_csv_rows_span_lines_and_faults_have_their_line(write):
    path = write(b'prompt,completion\r\n"a\r\nb",c\r\n\r\nd\r\n"caf\xe9",e\r\nf,"g""h"\r\n"open,x\r\n', "data.csv")
    rows = list(csv_records(path))
    assert [row.line for row in rows] == [2, 5, 6, 7, 8]
    assert rows[0].value == {"prompt": "a\nb", "completion": "c"}
    assert rows[1].reason == "malformed CSV: 1 fields, the header has 2"
    assert rows[2].kind == "invalid UTF-8"
    assert rows[3].value == {"prompt": "f", "completion": 'g"h'}
    assert rows[4].kind == "malformed CSV"
    assert rows[1].raw == b"d"


def test_csv_takes_long_fields_and_leaves_the_process_limit_alone(write):
    before = csv.field_size_limit()
    path = write("text\n" + "x" * 200_000 + "\n", "data.csv")
    assert len(next(iter(csv_records(path))).value["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_csv_header_faults(write):
    with pytest.raises(LoricaError, match="names column 'a' more than once"):
        list(csv_records(write("a,a\n1,2\n", "data.csv")))


@pytest.mark.reliability("R20")
def test_parquet_rows_and_a_broken_file(tmp_path, write):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    rows = list(open_source(path).records())
    assert [(row.line, row.value) for row in rows] == [(1, {"text": "a"}), (2, {"text": None})]
    with pytest.raises(LoricaError, match="not a readable parquet file"):
        list(open_source(write(b"PAR1 no", "bad.parquet")).records())


@pytest.mark.reliability("R20")
def test_rows_of_a_table_have_the_limit_of_a_line(tmp_path, monkeypatch):
    """Counted are the bytes of the row as JSON."""
    longest = "\u00e4" * ((MAX_ROW_BYTES - len('{"text": ""}')) // 2)
    rows = [{"text": "a"}, {"text": longest}, {"text": longest + "b"}, {"text": "c"}]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    for source in (open_source(path), open_source("owner/name")):
        read = list(source.records())
        assert [row.line for row in read] == [1, 2, 3, 4]
        assert [type(row) is Record for row in read] == [True, True, False, True]
        reason = f"row too long: {MAX_ROW_BYTES + 1} bytes as JSON, the limit is {MAX_ROW_BYTES}"
        assert str(read[2]) == f"{source.name}:3: {reason}"
        assert len(read[2].raw) == MAX_ROW_BYTES


def test_rows_of_parquet_are_counted_through_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "ROWS_AT_A_TIME", 3)
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(10)]}), path, row_group_size=4)
    assert [(row.line, row.value["text"]) for row in open_source(path).records()] == [
        (i + 1, str(i)) for i in range(10)
    ]


def test_folder_reads_its_data_files_in_order_of_name(write, tmp_path):
    write([{"text": "b"}], "b.jsonl")
    write([{"text": "a"}], "a.json")
    write("nothing", "README.md")
    source = open_source(tmp_path)
    assert [row.value["text"] for row in source.records()] == ["a", "b"]
    before = source.sha256()
    write([{"text": "c"}], "b.jsonl")
    assert source.sha256() != before


def test_hash_is_that_of_the_bytes(write):
    assert open_source(write(GOOD)).sha256() == hashlib.sha256(GOOD).hexdigest()


@pytest.mark.reliability("R21")
def test_what_is_not_there_is_said_with_the_nearest_name(write, tmp_path):
    path = write(GOOD, "train.jsonl")
    with pytest.raises(LoricaError, match=r"no such file or folder. Did you mean .*train.jsonl"):
        open_source(tmp_path / "trian.jsonl")
    with pytest.raises(LoricaError, match=r"file type '\.txt' is not known"):
        open_source(path.rename(tmp_path / "train.txt"))
    with pytest.raises(LoricaError, match=r"holds no .* file; found: train\.txt"):
        open_source(tmp_path)


def test_hub_name_goes_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("owner/name", split="test", config_name="main")
    assert asked == [("owner/name", "main", "test")]
    assert [(row.where, row.value) for row in source.records()] == [
        ("owner/name:1", {"text": "a"}),
        ("owner/name:2", {"text": "b"}),
    ]


def test_hub_failure_is_one_clear_message(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LoricaError, match=r"owner/name: no such file .*Couldn't reach the Hub \(ConnectionError\)"):
        open_source("owner/name")


def test_validation_imports_no_torch(write):
    path = write(GOOD)
    code = f"import sys; from lorica.data import validate; validate({str(path)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(texts, values, max_size=3) | numbers, max_size=4),
    chunk=st.integers(16, 60),
    indent=st.sampled_from([None, 1]),
)
def test_an_array_reads_the_same_however_little_of_it_is_held(tmp_path, monkeypatch, rows, chunk, indent):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False, indent=indent).encode())
    monkeypatch.setattr(json_array, "_CHUNK", 2**20)
    whole = list(json_records(path))
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    assert list(json_records(path)) == whole
    assert [row.value for row in whole if isinstance(row, Record)] == [row for row in rows if isinstance(row, dict)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 60), wrong=st.sampled_from([b"", b"\xff", b"\0", b"]", b"{", b'"', b"NaN,", b",,"]))
def test_a_broken_array_is_told_the_same_however_little_of_it_is_held(tmp_path, monkeypatch, cut, wrong):
    path = tmp_path / "rows.json"
    text = '[{"text": "caf\u00e9"},\n {"text": "b"}, 12,\n\n {"text": "c\\n"}\n]\n'.encode()
    path.write_bytes(text[:cut] + wrong + text[cut + len(wrong) :])

    def outcome(chunk):
        monkeypatch.setattr(json_array, "_CHUNK", chunk)
        try:
            return list(json_records(path))
        except LoricaError as error:
            return str(error)

    # What is held when a byte is no UTF-8 decides whether the rows before it are told first, and the guess.
    expected = outcome(2**20)
    if isinstance(expected, list) or "UTF-8" not in expected + "NUL" * (b"\0" in text):
        assert outcome(16) == expected


@pytest.mark.reliability("R20")
@pytest.mark.parametrize("name", ["wide.jsonl", "wide.json", "wide.csv"])
def test_a_row_of_two_hundred_thousand_fields_takes_no_quadratic_time(write, name):
    keys = [f"k{number}" for number in range(200_000)]
    row = {"wide.csv": ",".join(keys) + ",k7\n1\n", "wide.jsonl": "{", "wide.json": "[{"}[name]
    if name != "wide.csv":
        row += ",".join(f'"{key}":1' for key in [*keys, "k7"]) + "}" + "]" * (name == "wide.json")
    path = write(row, name)
    if name == "wide.csv":
        with pytest.raises(LoricaError, match="names column 'k7' more than once"):
            list(csv_records(path))
    else:
        (found,) = rejected(path)
        assert found.reason == "duplicate key: 'k7'"


@pytest.mark.reliability("R20")
def test_a_quote_that_is_never_closed_swallows_no_file(write, monkeypatch):
    monkeypatch.setattr(csv_rows, "MAX_ROW_LINES", 5)
    path = write('text\na\n"open\n' + "\n".join("abcdefgh") + "\n", "data.csv")
    rows = list(csv_records(path))
    assert [row.line for row in rows] == [2, 3, 9, 10, 11]
    assert [type(row) is Record for row in rows] == [True, False, True, True, True]
    assert rows[1].kind == "line too long"
    assert rows[1].raw == b'"open\na\nb\nc\nd\ne'


@pytest.mark.reliability("R20")
def test_blanks_above_the_limit_are_no_blank_line(write):
    (long,) = rejected(write(b" " * (MAX_ROW_BYTES + 5) + GOOD + b"\n" + GOOD))
    assert long.kind == "line too long"
    assert len(long.raw) == MAX_ROW_BYTES


@pytest.mark.reliability("R20")
def test_an_array_element_above_the_limit_is_refused_and_one_without_end_told(write):
    long = b'[{"text": "' + b"x" * (MAX_ROW_BYTES + 2**20) + b'"},\n'
    path = write(long + GOOD + b"]", "data.json")
    (row,) = rejected(path)
    assert (row.line, row.kind, len(row.raw)) == (1, "line too long", MAX_ROW_BYTES)
    path = write(long + b'{"text": "' + b"y" * (2 * MAX_ROW_BYTES + 2**20) + b'"}]', "data.json")
    with pytest.raises(LoricaError, match=r"data\.json:2: line too long: no end of the row within"):
        list(json_records(path))
