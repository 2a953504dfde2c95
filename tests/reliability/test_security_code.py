"""What the source does not do: read from the source, so that it holds for code that no test runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_architecture import FILES, calls, imports, name_of, parse

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
ARCHIVERS = {"tarfile", "zipfile", "gzip", "lzma", "py7zr", "rarfile"}
CLIENTS = {"socket", "http", "urllib", "requests", "httpx", "httpx2", "aiohttp", "ftplib", "smtplib", "websockets"}
RUNNERS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "pty.spawn"}
PICKLING = {
    "torch.save", "torch.load", "np.save", "np.savez", "np.load", "numpy.save", "numpy.load", "torch.hub.load",
    "datasets.load_from_disk", "shutil.unpack_archive",
}  # fmt: skip

TREES = {name_of(file): parse(file) for file in FILES}
CALLS = [(file, ast.unparse(call.func), call) for file, tree in TREES.items() for call in calls(tree)]


def importers(modules: set[str]) -> dict[str, set[str]]:
    """Return the files that import some modules, with those they import."""
    found = {file: modules & {name.split(".")[0] for name in imports(tree)} for file, tree in TREES.items()}
    return {file: names for file, names in found.items() if names}


def options(name: str) -> Iterator[tuple[str, str, ast.expr]]:
    """Yield the file, the function and the value wherever an argument is given by name."""
    for file, function, call in CALLS:
        for keyword in call.keywords:
            if keyword.arg == name:
                yield file, function, keyword.value


@pytest.mark.reliability("S1", "S2", "S10")
def test_nothing_pickles_unpickles_or_unpacks() -> None:
    assert importers(PICKLERS | ARCHIVERS) == {}
    assert [(file, name) for file, name, _ in CALLS if name in PICKLING] == []
    assert [one for *one, value in options("weights_only") if ast.unparse(value) != "True"] == []


@pytest.mark.reliability("S10")
def test_what_is_compressed_is_expanded_up_to_a_length_alone() -> None:
    """A few bytes can stand for gigabytes."""
    expanded = [(file, len(call.args)) for file, name, call in CALLS if name.endswith(".decompress")]
    assert expanded == [("artefacts/bits.py", 2)] * 2
    assert importers({"zlib", "bz2"}).keys() == {"artefacts/bits.py"}


@pytest.mark.reliability("S1")
def test_no_text_is_run_as_code_and_no_shell_is_started() -> None:
    assert [(file, name) for file, name, _ in CALLS if name in RUNNERS] == []
    assert [one for *one, _ in options("shell")] == []


@pytest.mark.reliability("S6")
def test_yaml_is_read_in_one_place() -> None:
    """Another reader would be without the limits."""
    assert {file for file, name, _ in CALLS if name.startswith("yaml.")} == {"yaml_file.py"}
    made = {name.split("(")[0] for _, name, _ in CALLS if name.startswith("yaml.")}
    assert made == {"yaml.MarkedYAMLError", "yaml.constructor.SafeConstructor"}
    bases = {ast.unparse(base) for node in ast.walk(TREES["yaml_file.py"]) if isinstance(node, ast.ClassDef)
             for base in node.bases}  # fmt: skip
    assert bases == {"yaml.SafeLoader"}
    assert not [name for tree in TREES.values() for name in imports(tree) if name.startswith("yaml.")]


@pytest.mark.reliability("S8")
def test_templates_are_made_in_a_sandbox_and_markup_in_one_place() -> None:
    environments = {(file, name) for file, name, _ in CALLS if name.endswith("Environment")}
    assert {name for _, name in environments} == {"SandboxedEnvironment"}
    pages = [ast.unparse(value) for file, _, value in options("autoescape")]
    assert pages == ["True"]
    assert not [one for one in CALLS if one[1].endswith(("Template", ".from_string")) and "jinja" in one[1].lower()]
    assert {file for file, name, _ in CALLS if name in ("Markup", "markupsafe.Markup")} == {"report/svg.py"}


@pytest.mark.reliability("S16")
def test_the_network_is_used_by_the_judge_s_endpoint_and_the_hub_s_client_alone() -> None:
    assert importers(CLIENTS) == {"evaluation/endpoint.py": {"http", "urllib"}}
    assert importers({"huggingface_hub"}).keys() == {"hub.py"}


@pytest.mark.reliability("S5")
def test_code_of_a_model_is_trusted_by_nobody_s_own_decision() -> None:
    assert [one for *one, value in options("trust_remote_code") if isinstance(value, ast.Constant)] == []
    assert len(list(options("trust_remote_code"))) > 5
