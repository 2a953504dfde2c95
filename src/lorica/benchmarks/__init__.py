"""Benchmarks: streams of tasks as YAML, with their prompts, orders and published figures, one folder each."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lorica.data.stream import TaskStream, read_stream
from lorica.errors import LoricaError, did_you_mean

STREAM_FILE = "stream.yaml"


def catalogue() -> dict[str, Path]:
    """Return the files of the streams that come with Lorica, by name."""
    folders = sorted(Path(str(files(__name__))).iterdir())
    return {folder.name: folder / STREAM_FILE for folder in folders if (folder / STREAM_FILE).is_file()}


def find_stream(name_or_path: str | Path) -> TaskStream:
    """Return a stream by the name of a benchmark, or by the path of its YAML file.

    Raises:
        LoricaError: there is neither, or the file is no stream.
    """
    known = catalogue()
    if str(name_or_path) in known:
        return read_stream(known[str(name_or_path)])
    path = Path(name_or_path).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return read_stream(path)
    hint = did_you_mean(str(name_or_path), known)
    raise LoricaError(
        f"unknown stream {str(name_or_path)!r}; known: {', '.join(known)}, or the path of a .yaml file.{hint}"
    )
