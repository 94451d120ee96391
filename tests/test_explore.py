"""The page of ``tl-contextmix explore``: who gets in, what is answered, what stops, what shows."""

from __future__ import annotations

import http.client
import json
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import tl_contextmix as cm
from tl_contextmix import exploring
from tl_contextmix.__main__ import main
from tl_contextmix.adapters import as_view
from tl_contextmix.core.interruption import Stoppable, Stopped
from tl_contextmix.exploring import one_at_a_time, question_form
from tl_contextmix.exploring.limits import ALWAYS_ESTIMATED, Limits, _works
from tl_contextmix.exploring.one_at_a_time import Busy, Explorer
from tl_contextmix.exploring.request_guard import HEADERS
from tl_contextmix.exploring.typed_questions import (
    SECTIONS_IN_WORDS,
    TypedQuestion,
    answered,
    as_typed,
    offered_methods,
)
from tl_contextmix.plotting import Page
from tl_contextmix.plotting.panels import Table
from tl_contextmix.reporting.sections import SECTIONS

pytestmark = pytest.mark.newest
TEXT = "the keys to the cabinet"


def over(call: Any, seconds: float = 60) -> Any:
    """A call once it is over."""
    end = time.monotonic() + seconds
    while call.state == "running" and time.monotonic() < end:
        time.sleep(0.01)
    assert call.state != "running"
    return call


# Stopping


def hooks(model: Any) -> int:
    """How many hooks sit on a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("at", [1, 40, 300, 700, 1300])
def test_work_stops_at_any_call_and_leaves_nothing_behind(causal, at):
    expected = cm.value_zeroing(causal, TEXT)
    before = hooks(causal)

    class Early(Stoppable):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if self.calls == at:
                self.stop()
            return super().__torch_function__(func, types, args, kwargs)

    mode = Early()
    with pytest.raises(Stopped), mode:
        # Of another text, so that the model runs.
        cm.log_prob_contributions(causal, f"{'the ' * (1 + at % 7)}cat", by="position")
    assert mode.calls > at, "what cleans up may call PyTorch"
    assert hooks(causal) == before
    # Its lock is free, for other threads too, and its numbers are what they were.
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(cm.value_zeroing(causal, TEXT)))
    thread.start()
    thread.join(30)
    assert found[0].equals(expected)
    with pytest.raises(Stopped):
        mode.check()


def test_a_call_stops_inside_of_a_step_and_the_next_one_is_answered(causal):
    explorer = Explorer(causal, Limits(causal))
    # Every method on eight sentences: seconds.
    call = explorer.ask(TypedQuestion(TEXT, ("comparison",)))
    while call.step != "comparison":
        time.sleep(0.01)
    with pytest.raises(Busy):
        explorer.ask(TypedQuestion(TEXT, ("prediction",)))
    before = call.mode.calls
    explorer.stop(call.name)
    assert over(call).state == "stopped"
    assert (call.html, call.done, call.mode.calls - before < 3000) == ("", 1, True)
    again = over(explorer.ask(TypedQuestion(TEXT, ("prediction",))))
    assert (again.state, again.done, again.steps) == ("done", 2, 3)
    explorer.stop(call.name)
    explorer.stop()
    assert explorer.call(again.name) is again
    assert explorer.call("unknown") is None
    for _ in range(8):
        over(explorer.ask(TypedQuestion("the keys", ("prediction",))))
    assert explorer.call(again.name) is None


# What is answered


def test_the_page_is_that_of_the_report(causal):
    question = TypedQuestion(TEXT, ("mixing", "prediction"), " are", " is")
    steps: list[str] = []
    with Stoppable():
        told = answered(causal, question, steps.append)
    expected = cm.report(causal, TEXT, target=" are", foil=" is", sections=["prediction", "mixing"])
    assert told.page.html() == expected.html()
    assert steps == ["maps", "prediction", "mixing"]
    assert told.likely[:2] == (" are", " were")


def test_everything_that_can_be_ticked_is_on_the_page_or_named(causal):
    assert tuple(SECTIONS_IN_WORDS) == tuple(SECTIONS)
    names = (*SECTIONS, *offered_methods())
    # What takes seconds is in the report's own tests.
    question = TypedQuestion(TEXT, tuple(name for name in names if name != "comparison"), " are")
    told = answered(causal, question, lambda step: None)
    titles = [section.title for section in told.page.sections]
    table = told.page.sections[-1].panels[0]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["encoder-layers", "decoder_lens"]
    assert all("encoder" in str(row[1]) for row in table.rows)
    # Each in a section of its own, and those that were skipped in the last one.
    assert len(titles) == len(question.sections) - 1 + len(offered_methods())
    assert {"alti", "attention_norms", "value_zeroing", "token_memory"} <= set(titles)
    assert not {"query_contributions", "attention_flow"} & set(offered_methods())
    parts = next(one for one in told.page.sections if one.title == "log_prob_contributions")
    assert "are" in Page(parts.panels).text()


@pytest.mark.parametrize("name", ["masked-lm", "encoder-decoder"])
def test_other_demo_models_are_answered(name):
    other = cm.load_demo(name)
    text = {
        "masked-lm": "the keys to the cabinet [MASK] old .",
        "encoder-decoder": "the bat burned .",
    }
    shown = ("prediction", "answer", "encoder-layers")
    call = over(Explorer(other, Limits(other)).ask(TypedQuestion(text[name], shown)))
    assert (call.state, call.message) == ("done", "")
    assert len(call.likely) > 3
    there = "What does each encoder layer already know?" in call.html
    assert there == (name == "encoder-decoder")
    assert ("chauve" in call.html) == there
    assert ("What was each word of the answer made of?" in call.html) == there
    assert ("the model has no decoder, which would say more" in call.html) != there
    form = question_form.form(other)
    assert ('value="encoder-layers"' in form, 'value="answer"' in form) == (there, there)


def test_warnings_are_notes_of_the_page(causal):
    processed = cm.load_demo("causal-lm")
    processed.enable_compatibility_mode(disable_warnings=True)
    page = answered(processed, TypedQuestion("the zebra", ("prediction",)), lambda step: None).page
    assert sum("zebra" in note for note in page.notes) == 1
    assert [note for note in page.notes if "weights" in note]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (TypedQuestion(TEXT, ("prediction",), target="areas of"), "one token"),
        (TypedQuestion(TEXT, ("prediction",), target=" nowhere else"), "token"),
        (TypedQuestion(TEXT, ("prediction",), pos=77), "77"),
        (TypedQuestion("the keys " * 40, ("prediction",)), "expected at most 64"),
    ],
    ids=["no token", "several", "position", "too long"],
)
def test_what_cannot_be_asked_is_explained(causal, question, message):
    call = over(Explorer(causal, Limits(causal)).ask(question))
    assert call.state == "refused"
    assert message in call.message
    assert "Traceback" not in call.message


def test_what_goes_wrong_is_told_here_and_there(causal, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("a secret of the machine\nsecond line")

    monkeypatch.setattr(one_at_a_time, "answered", broken)
    call = over(Explorer(causal, Limits(causal)).ask(TypedQuestion(TEXT, ("prediction",))))
    assert call.state == "failed"
    assert call.message.startswith("This failed, and should not have (RuntimeError: a secret")
    assert "second line" not in call.message
    assert "Traceback" in capsys.readouterr().err
    message = one_at_a_time._explained(RuntimeError("CUDA out of memory. Tried"))
    assert message.startswith("The memory of this machine is not enough.")


@pytest.mark.parametrize(
    "given",
    [
        [],
        {"show": ["mixing"]},
        {"text": "", "show": ["mixing"]},
        {"text": 3, "show": ["mixing"]},
        {"text": "a", "show": []},
        {"text": "a", "show": ["mine_triggers"]},
        {"text": "a", "show": [["mixing"]]},
        {"text": "a", "show": ["mixing"], "target": 3},
        {"text": "a", "show": ["mixing"], "pos": True},
        {"text": "a", "show": ["mixing"], "out": "/"},
    ],
    ids=repr,
)
def test_what_is_no_question_is_refused(given):
    with pytest.raises(cm.InvalidInput, match="; expected "):
        as_typed(given)


# Limits


def test_no_more_is_done_than_the_limits_allow(causal):
    question, limits = TypedQuestion(TEXT, ("mixing",)), Limits(causal, flops=1e6)
    call = over(Explorer(causal, limits).ask(question))
    assert (call.state, call.step) == ("refused", "estimate")
    found = re.search(
        r"got (\S+) FLOPs and (\S+) GiB for 6 tokens, most of it for (maps|mixing); "
        r"expected at most 1.0e\+06 FLOPs and 4 GiB\. .*--max-flops (\S+) --max-gib (\d+)\.",
        call.message,
    )
    assert found, call.message
    known = dict(limits._known)
    estimated = sum(cost[0] for (_, length), cost in known.items() if length == 6)
    told, enough = float(found[1]), float(found[4])
    assert 5e7 < estimated == pytest.approx(told, rel=0.06)
    assert told <= 1.06 * enough
    assert enough <= 2.2 * told
    # What it says is enough is enough, and nothing is estimated twice.
    limits.flops, limits.gib = enough, float(found[5])
    limits.require(as_view(causal), question, lambda step: None)
    # What a longer text may take a shorter one may.
    limits.flops = 5e9
    steps: list[str] = []
    limits.require(as_view(causal), TypedQuestion("the keys to the", ("mixing",)), steps.append)
    assert steps == ["estimate"]
    assert limits._known == known
    assert {length for _, length in known} == {6, 8}


def test_what_is_not_estimated_is_surely_little(causal):
    """The bound below which nothing is estimated holds for everything that can be ticked."""
    limits = Limits(causal)
    # What the model does for a section is what it does for methods, or more of it.
    question = TypedQuestion(TEXT, ("answer", "mixing", "components", "graph", *offered_methods()))
    works = [one for one in _works(as_view(causal), question) if one.name not in ALWAYS_ESTIMATED]
    length = 24
    for name, (flops, held) in limits._costs(works, length).items():
        assert flops <= 16 * length * 2 * limits._weights * length, name
        assert held <= length * limits._weights, name
    assert not limits.surely("memories", 1)
    assert limits.surely("mixing", 60)
    assert not limits.surely("mixing", 6000)


# Who gets in


@contextmanager
def served(explorer: Explorer | None, form: str, token: str = "t0ken") -> Iterator[str]:
    """The address of a server that runs as long as the block."""
    with exploring.listening("127.0.0.1", 0) as (listener, hosts):
        running = exploring.server(explorer, form, token, hosts)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://{hosts[0]}/{token}/"
        finally:
            running.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(causal: Any) -> Iterator[str]:
    with served(Explorer(causal, Limits(causal)), question_form.form(causal)) as found:
        yield found


def ask(
    address: str,
    path: str = "",
    body: bytes | None = None,
    method: str | None = None,
    root: str | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one request."""
    at = urlsplit(address)
    connection = http.client.HTTPConnection(at.netloc, timeout=10)
    target = (at.path if root is None else root) + path
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), target, body, named)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text


def test_only_the_right_address_is_answered(address):
    status, headers, text = ask(address)
    assert status == 200
    assert "<form" in text
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe-eval" not in headers["content-security-policy"]
    for root in (
        "/",
        "",
        "//",
        "/t0ke/",
        "/t0ken0/",
        "/T0KEN/",
        "/x/../t0ken/",
        "/%74/",
        "/favicon.ico",
    ):
        status, headers, text = ask(address, root=root or "*")
        assert (status, "t0ken" in text) == (403, False), root
        assert headers.items() >= HEADERS.items()
    for path in ("calls/none", "calls/none/page"):
        assert ask(address, path)[0] == 404
    assert ask(address, "elsewhere")[0] == 404


def test_only_the_right_host_is_answered(address):
    port = urlsplit(address).port
    hosts = (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        f"127.0.0.1.:{port}",
    )
    for host in (*hosts, f"localhost.evil.example:{port}", ""):
        status, headers, text = ask(address, Host=host)
        assert (status, "<form" in text) == (403, False), host
        assert "access-control-allow-origin" not in headers
    assert ask(address, Host=f"LOCALHOST:{port}")[0] == 200


def test_only_the_page_itself_may_send(address):
    body = json.dumps({"text": "the keys", "show": ["prediction"]}).encode()
    own = f"http://{urlsplit(address).netloc}"
    refused: list[dict[str, str]] = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": own.replace("http", "https")},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Origin": own},
    ]
    for headers in refused:
        assert ask(address, "calls", body, **headers)[0] == 403, headers
    assert ask(address, "calls", body, root="/", Origin=own)[0] == 403
    assert ask(address, "calls", method="OPTIONS", Origin="http://evil.example")[0] == 403
    assert ask(address, "calls", method="PUT", Origin=own)[0] == 405
    assert ask(address, "calls")[0] == 405
    status, _, text = ask(address, "calls", body, Origin=own, Sec_Fetch_Site="same-origin")
    assert status == 202
    name = json.loads(text)["name"]
    while (told := json.loads(ask(address, f"calls/{name}")[2]))["state"] == "running":
        time.sleep(0.02)
    assert told["state"] == "done"
    status, headers, page = ask(address, f"calls/{name}/page")
    assert status == 200
    assert "sandbox allow-scripts;" in headers["content-security-policy"] + ";"
    assert "What does the model predict?" in page


def test_what_is_sent_is_read_with_care(address):
    for body in (b"", b"{", b"\xff\xfe", b"[]", b'{"text": "a"}', b"[" * 100_000):
        status, _, text = ask(address, "calls", body)
        assert status == 422, body[:10]
        assert "expected" in json.loads(text)["message"]
    status, _, text = ask(address, "calls", b'{"text": "' + b"a" * 1_000_001 + b'"}')
    assert (status, "over 1,000,000 bytes" in text) == (422, True)


def test_one_question_at_a_time(causal, monkeypatch):
    go = threading.Event()

    def waiting(*_: object) -> None:
        while not go.is_set():
            torch.zeros(1).add(1)
            time.sleep(0.001)
        raise cm.InvalidInput("enough")

    monkeypatch.setattr(one_at_a_time, "answered", waiting)
    body = json.dumps({"text": TEXT, "show": ["prediction"]}).encode()
    with served(Explorer(causal, Limits(causal)), "") as address:
        first = json.loads(ask(address, "calls", body)[2])["name"]
        status, _, text = ask(address, "calls", body)
        assert (status, "answers another question" in text) == (409, True)
        assert ask(address, f"calls/{first}/stop", b"")[0] == 204
        while json.loads(ask(address, f"calls/{first}")[2])["state"] == "running":
            time.sleep(0.02)
        assert json.loads(ask(address, f"calls/{first}")[2])["state"] == "stopped"
        go.set()
        second = json.loads(ask(address, "calls", body)[2])["name"]
        while (told := json.loads(ask(address, f"calls/{second}")[2]))["state"] == "running":
            time.sleep(0.02)
        assert (told["state"], told["message"]) == ("refused", "enough")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_nothing_but_this_machine_is_listened_to(host, capsys):
    arguments = ["explore", "causal-lm", "--host", host, "--no-browser"]
    assert main(arguments) == 2
    assert "the page is for this machine alone" in capsys.readouterr().err


def test_what_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(exploring, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["explore", "--no-browser"]) == 2
    assert 'pip install "tl-contextmix[explore]"' in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["explore", "nowhere", "--no-browser"]) == 2
    assert "cannot load the model" in capsys.readouterr().err
    with exploring.listening("localhost", 0) as (_, hosts):
        taken = hosts[0].rpartition(":")[2]
        assert main(["explore", "--port", taken, "--no-browser"]) == 2
    assert f"cannot listen on port {taken}" in capsys.readouterr().err


def test_the_browser_is_given_a_file_that_others_cannot_read(monkeypatch):
    opened: queue.Queue[Path] = queue.Queue()

    def looked(address: str) -> bool:
        path = Path(address.removeprefix("file://"))
        assert path.stat().st_mode & 0o077 == 0
        assert "url=http://127.0.0.1:1/t&amp;0/" in path.read_text()
        opened.put(path)
        return True

    monkeypatch.setattr("webbrowser.open", looked)
    with exploring._opened("http://127.0.0.1:1/t&0/"):
        path = opened.get(timeout=10)
        assert path.exists()
    assert not path.exists()
