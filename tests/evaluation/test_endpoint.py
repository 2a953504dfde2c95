"""The judge behind an HTTP endpoint, against a server of this test on this machine."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lorica.errors import LoricaError
from lorica.evaluation.endpoint import EndpointJudge, read_verdict
from lorica.evaluation.judge import UNUSABLE, Verdict, compare, describe

KEY = "test-key-0123456789"
Reply = tuple[int, dict[str, str], Any]


def completion(text: str | None, model: str = "judge-2026-01") -> Reply:
    return 200, {}, {"model": model, "choices": [{"message": {"role": "assistant", "content": text}}]}


class Server(ThreadingHTTPServer):
    """Gives its replies one after the other, the last one again and again, and notes what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = []
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, dict(self.headers), body))
        status, headers, reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_the_request_holds_prompt_and_answers_in_order(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.replies = [completion('{"verdict": "B", "reason": "it is right"}')]
    judge = EndpointJudge(server.url, "judge", prompt_template="{prompt}|{first}|{second}|{other} {}")
    found = judge("2 + 2? {second}", "5 {first}", "4")
    assert found == Verdict("second", "it is right", '{"verdict": "B", "reason": "it is right"}')
    [(path, headers, body)] = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    message = {"role": "user", "content": "2 + 2? {second}|5 {first}|4|{other} {}"}
    assert body == {"model": "judge", "messages": [message], "temperature": 0.0}


def test_the_default_prompt_holds_each_text_once(server: Server) -> None:
    server.replies = [completion("tie")]
    EndpointJudge(server.url, "judge", temperature=None)("PROMPT", "ONE", "TWO")
    [(_, headers, body)] = server.asked
    assert "Authorization" not in headers
    assert "temperature" not in body
    content = body["messages"][0]["content"]
    assert [content.count(text) for text in ("PROMPT", "ONE", "TWO")] == [1, 1, 1]
    assert content.index("PROMPT") < content.index("ONE") < content.index("TWO")


def test_a_judge_that_prefers_the_better_answer_decides(server: Server) -> None:
    server.replies = [completion("B"), completion("A")]
    [found] = compare(["p"], ["bad"], ["good"], EndpointJudge(server.url, "judge"))
    assert found.outcome == "win"
    server.replies = [completion("B"), completion("I prefer A.")]
    [found] = compare(["p"], ["bad"], ["good"], EndpointJudge(server.url, "judge"))
    assert (found.outcome, found.reason) == ("tie", UNUSABLE)
    assert found.after_first is not None
    assert found.after_first.raw == "I prefer A."


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", "first"), (" b.\n", "second"), ("[[A]]", "first"), ("C", "tie"),
        ("Tie", "tie"), ('{"verdict": "a"}', "first"), ('```json\n{"verdict": "tie"}\n```', "tie"),
        ('{"verdict": "B", "x": 1}', "second"),
    ],
)  # fmt: skip
def test_a_letter_or_an_object_is_read(text: str, choice: str) -> None:
    assert read_verdict(text) == Verdict(choice, raw=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "The answer is A", "A B", "D", '{"verdict": "both"}', '{"answer": "A"}', '["A"]', '{"verdict": "A"',
     '{"verdict": "A"} {"verdict": "B"}', '{"verdict": null}', "[" * 100_000, "null"],
)  # fmt: skip
def test_anything_else_is_a_tie_that_says_so(text: str) -> None:
    found = read_verdict(text)
    assert (found.choice, found.usable, found.raw) == ("tie", False, text)
    assert found.reason


def test_no_content_is_unusable(server: Server) -> None:
    server.replies = [completion(None)]
    assert not EndpointJudge(server.url, "judge")("p", "a", "b").usable


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(server: Server, status: int) -> None:
    server.replies = [(status, {"Retry-After": "0"}, {}), (status, {}, {}), completion("A")]
    assert EndpointJudge(server.url, "judge", retries=2, backoff=0)("p", "a", "b").choice == "first"
    assert len(server.asked) == 3


def test_the_wait_doubles_unless_the_endpoint_names_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("lorica.evaluation.endpoint.time.sleep", waits.append)
    busy = [{}, {}, {"Retry-After": "7"}, {"Retry-After": "3600"}, {"Retry-After": "tomorrow"}]
    server.replies = [*((503, headers, {}) for headers in busy), completion("A")]
    EndpointJudge(server.url, "judge", retries=5, backoff=5)("p", "a", "b")
    assert waits == [5, 10, 7, 60, 60]


def test_an_endpoint_that_stays_busy_is_an_error(server: Server) -> None:
    server.replies = [(429, {}, {"error": "slow down"})]
    with pytest.raises(LoricaError, match=r"status 429: .*slow down"):
        EndpointJudge(server.url, "judge", retries=2, backoff=0)("p", "a", "b")
    assert len(server.asked) == 3


def test_a_refused_request_is_not_sent_again_and_the_key_not_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.replies = [(401, {}, {"error": f"wrong key {KEY}"})]
    judge = EndpointJudge(server.url, "judge", backoff=0)
    with pytest.raises(LoricaError, match=r"status 401: .*wrong key <secret>") as caught:
        judge("p", "a", "b")
    assert len(server.asked) == 1
    assert KEY not in repr((caught.value, vars(judge), describe(judge)))


def test_a_redirect_is_not_followed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.replies = [(302, {"Location": f"http://127.0.0.1:{server.server_port}/elsewhere"}, {}), completion("A")]
    with pytest.raises(LoricaError, match="status 302"):
        EndpointJudge(server.url, "judge", backoff=0)("p", "a", "b")
    assert [path for path, _, _ in server.asked] == ["/v1/chat/completions"]


@pytest.mark.parametrize("reply", [{"choices": []}, {"object": "list"}, [], b"<html>hello</html>"])
def test_an_endpoint_of_another_kind_is_an_error(server: Server, reply: Any) -> None:
    server.replies = [(200, {}, reply)]
    with pytest.raises(LoricaError, match="no chat completion came back"):
        EndpointJudge(server.url, "judge")("p", "a", "b")


def test_an_endpoint_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(LoricaError, match=rf"judge {url}/chat/completions: .*refused"):
            EndpointJudge(url, "judge", retries=1, backoff=0)("p", "a", "b")


def test_an_endpoint_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(LoricaError, match="timed out"):
            EndpointJudge(url, "judge", timeout=0.1, retries=1, backoff=0)("p", "a", "b")


def test_what_is_published_names_the_model_that_answered_but_no_key(server: Server) -> None:
    server.replies = [completion("A", "judge-1"), completion("A", "judge-2")]
    judge = EndpointJudge(
        f"{server.url}/chat/completions?api-key={KEY}", "judge", prompt_template="{prompt}{first}{second}"
    )
    judge("p", "a", "b")
    judge("p", "a", "b")
    assert describe(judge) == {
        "name": "judge",
        "answered_as": ["judge-1", "judge-2"],
        "url": f"{server.url}/chat/completions",
        "prompt_template": "{prompt}{first}{second}",
        "temperature": 0.0,
    }
    assert server.asked[0][0] == f"/v1/chat/completions?api-key={KEY}"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "begins with https://"),
        ("ftp://example.org/v1", "begins with https://"),
        ("example.org/v1", "begins with https://"),
        ("https://", "begins with https://"),
        ("https://example.org:port/v1", "cannot be read"),
        ("https://name:word@example.org/v1", "holds a user name or password"),
        ("https://example.org/v1", "OPENAI_API_KEY is not set"),
    ],
)
def test_a_url_that_cannot_serve_is_refused(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(LoricaError, match=message) as caught:
        EndpointJudge(url, "judge")
    assert "word@" not in str(caught.value)


def test_a_key_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(LoricaError, match="unencrypted"):
        EndpointJudge("http://example.org/v1", "judge")
    EndpointJudge("http://example.org/v1", "judge", api_key_env=None)
    EndpointJudge("https://example.org/v1", "judge")
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(LoricaError, match="holds what no key is made of") as caught:
        EndpointJudge("https://example.org/v1", "judge")
    assert KEY not in str(caught.value)


def test_a_template_without_a_place_is_refused() -> None:
    with pytest.raises(LoricaError, match=r"has no \{second\}"):
        EndpointJudge("http://localhost/v1", "judge", prompt_template="{prompt} {first}")
