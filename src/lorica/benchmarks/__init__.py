"""Benchmarks: streams of tasks as YAML, with their prompts, orders and published figures, one folder each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from lorica.data.scored import Scored, Task
from lorica.data.stream import TaskStream, read_stream
from lorica.errors import LoricaError, did_you_mean, names_beside

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
    hint = did_you_mean(str(name_or_path), [*known, *names_beside(str(name_or_path))])
    raise LoricaError(
        f"unknown stream {str(name_or_path)!r}; known: {', '.join(known)}, or the path of a .yaml file.{hint}"
    )


def check_data(wanted: Iterable[tuple[TaskStream, Scored]], data_dir: str | None, *, trains: bool) -> None:
    """Refuse rows that are neither in a file nor on the hub, before anything is read or fetched.

    Args:
        wanted: what is trained or scored, with its stream, which is within ``data_dir`` already.
        data_dir: as it was given.
        trains: whether tasks need their training rows too.

    Raises:
        LoricaError: a file is missing that the hub has not either, or a ``data_dir`` was given and holds none of all.
            The message says what has to be there.
    """
    files = {(stream.name, file): (stream, scored) for stream, scored in wanted for file in _files_of(scored, trains)}
    absent = [(*files[key], key[1]) for key in files if not Path(files[key][0].path(key[1])).exists()]
    astray = data_dir is not None and len(absent) == len(files)
    if lost := [one for one in absent if astray or one[1].hub is None]:
        raise LoricaError(_what_lacks(lost, data_dir))


def _files_of(scored: Scored, trains: bool) -> list[str]:
    return [scored.train_file, scored.test_file] if trains and isinstance(scored, Task) else [scored.test_file]


def _what_lacks(lost: Sequence[tuple[TaskStream, Scored, str]], data_dir: str | None) -> str:
    stream, scored, file = lost[0]
    whose = f"stream {stream.name!r}, {'task' if isinstance(scored, Task) else 'ability'} {scored.name!r}"
    more = f" (and {len(lost) - 1} more of its files)" if len(lost) > 1 else ""
    if data_dir is None:
        path = file if stream.name in catalogue() else stream.path(file)
        return f"{whose}: no file {path}; give the folder that holds {file}{more} as --data_dir"
    folder = Path(data_dir).expanduser()
    what = "it holds no" if folder.is_dir() else "there is no such folder; it is to hold"
    near = [folder.parent, *(folder.iterdir() if folder.is_dir() else [])]
    hint = next((f". Did you mean {str(one)!r}?" for one in near if (one / file).exists()), "")
    return f"--data_dir {data_dir}: {what} {file}{more}; {whose} needs it{hint}"
