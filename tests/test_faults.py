"""What a server or another program can do to a paid run: odd replies, endless ones, wrong hosts."""

import asyncio
import contextlib
import gzip
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time

import pytest
from aiohttp import web
from fake import FakeLive
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.evaluation import CorrectnessEvaluator
from server import Server, answer
from test_costs import judged

from helpers import CallLog, check_run, embedding_of, fill, judge_rows, live, load_rows
from helpers.live import models
from helpers.log import Collected, MissingCall
from helpers.settings import RunStopped


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-0000")
    monkeypatch.setenv("JUDGE_MODE", "record")


def choice(content, **more):
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop", **more}]}


PARTS = [{"type": "text", "text": "4.0\n"}, "Because.", {"type": "image"}]
TOKENS = {"content": [{"top_logprobs": [{"token": "4"}, 7]}, None]}
GONE = {"choices": None, "error": {"message": "upstream died, key sk-abcdef1234", "code": "x"}}
# What a 200 may hold: the score that is read, or what the row says, and the logged text.
ANSWERED = {
    "half a character": (choice("4.0\n\ud800!"), 4.0, "4.0\n\ud800!"),
    "half a character in a name": ({"model": "m\ud800", "system_fingerprint": "\udfff"}, 4.0, None),
    "parts": (choice(PARTS), 4.0, "4.0\nBecause."),
    "a number": (choice(4), 4.0, "4"),
    "an object": (choice({"score": 4}), 4.0, '{"score": 4}'),
    "usage is a list": ({"usage": [1, 2]}, 4.0, None),
    "usage is NaN": ({"usage": {"prompt_tokens": float("nan")}}, 4.0, None),
    "log-probabilities of another form": (choice("4.0\nx", logprobs=TOKENS), 4.0, "4.0\nx"),
    "a refusal": (
        {"choices": [{"message": {"content": None, "refusal": "No 4.0 from me."}}]},
        "cut off (finish_reason refusal)",
        "No 4.0 from me.",
    ),
    "an error": (GONE, 'no choice in the reply: "upstream died, key [key]"', ""),
    "an error that is a text": ({"choices": [], "error": "no luck"}, "no luck", ""),
    "choices are null": ({"choices": None}, "no choice in the reply", ""),
    "a choice is a text": ({"choices": ["4.0"]}, "no choice in the reply", ""),
    "no message": ({"choices": [{"finish_reason": "stop"}]}, "empty reply", ""),
    "a finish reason that is none": (choice("4.0", finish_reason={"a": 1}), "cut off", "4.0"),
    "an error at the end": (choice("4.0", finish_reason="error"), "finish_reason error", "4.0"),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_what_was_answered_is_kept_and_not_paid_again(name, rows, tmp_path):
    body, expected, text = ANSWERED[name]
    with Server(
        reply=lambda messages: "4.0\nOf course.", fault=lambda *_: {"body": body}
    ) as server:
        for _ in range(2):
            log, done = judged(rows[:2], tmp_path / "c.jsonl", server)
            for row in done:
                said = row["evaluations"][0]
                if isinstance(expected, float):
                    assert said["score"] == expected and "invalid" not in said
                else:
                    assert said["score"] is None and expected in said["invalid"]
        assert len(server.bodies) == 2 and len(log) == 2
    assert [row["response"] for row in log.rows()] == [
        text or ("" if text == "" else "4.0\nOf course.")
    ] * 2
    log.close()
    assert len(CallLog(tmp_path / "c.jsonl", "replay")) == 2


def test_an_error_with_a_status_in_a_200_is_met_like_that_status(rows, tmp_path):
    def fault(body, before):
        error = {"message": "Slow down", "code": 429}
        return web.json_response({"error": error}) if before < 2 else None

    with Server(fault=fault) as server:
        log, done = judged(rows[:1], tmp_path / "c.jsonl", server)
        assert done[0]["evaluations"][0]["score"] and len(server.bodies) == 3
        error = {"error": {"message": "Pay first", "code": 402}}
        server.fault = lambda *_: web.json_response(error)
        with pytest.raises(RunStopped, match="no credit left: .*Pay first"):
            judged(rows[1:], tmp_path / "c.jsonl", server)


def test_the_model_that_replied_is_in_the_row_where_it_is_another(rows, tmp_path):
    for name, model in (("same", "gpt-4.1"), ("other", "gpt-4.1-2025-04-14"), ("none", 7)):
        path = tmp_path / f"{name}.jsonl"
        with Server(fault=lambda *_: {"body": {"model": model}}) as server:  # noqa: B023
            judged(rows[:1], path, server)
        [row] = load_rows(path)
        assert row.get("replied_by") == (model if name == "other" else None)
        assert len(CallLog(path, "replay")) == 1


# Nothing hangs


def endless(status=200):
    """Sends one space after another, for ever."""

    async def stream(request):
        response = web.StreamResponse(status=status, headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.05)
        return response

    return stream


class Streams(Server):
    """Every POST and GET is answered by a handler."""

    def __init__(self, handler):
        super().__init__()
        self.handler = handler
        self._chat = self._embeddings = self._model = handler


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_that_does_not_end_is_given_up(status, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLY_SECONDS", "0.4")
    monkeypatch.setattr(models, "ATTEMPTS", 2)
    with Streams(endless(status)) as server:
        _, [row] = judged(rows[:1], tmp_path / "c.jsonl", server)
        assert "no whole reply in REPLY_SECONDS" in row["evaluations"][0]["invalid"]
        log, name = CallLog(tmp_path / "e.jsonl"), f"gpt-4.1@{server.url}"
        llm = log.llm("gpt-4.1", live(name))
        with pytest.raises(Exception, match="REPLY_SECONDS|TimeoutError"):
            llm.chat([ChatMessage(content="x")])
        with pytest.raises(Exception, match="REPLY_SECONDS"):
            embedding_of(name, log).get_text_embedding("x")
        with pytest.raises(Exception, match="REPLY_SECONDS"):
            asyncio.run(embedding_of(name, log).aget_text_embedding("x"))
        with pytest.raises(RunStopped, match="REPLY_SECONDS"):
            check_run(log, {"teacher": name}, {"teacher": 1})


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("packed", [False, True])
def test_a_reply_that_is_too_large_is_not_read(status, packed, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLY_MEGABYTES", "1")
    sent = []

    async def large(request):
        body = json.dumps(choice("4.0\n" + "x" * 30_000_000)).encode()
        headers = {"Content-Type": "application/json"}
        headers |= {"Content-Encoding": "gzip"} if packed else {}
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        body = gzip.compress(body) if packed else body
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), 10_000):
                await response.write(body[start : start + 10_000])
                sent.append(start)
        return response

    with Streams(large) as server:
        _, [row] = judged(rows[:1], tmp_path / "c.jsonl", server)
        assert "REPLY_MEGABYTES" in row["evaluations"][0]["invalid"]
        assert len(server.requests) == 1 and (packed or len(sent) < 2000)


# Messages


@contextlib.contextmanager
def tls(folder):
    """The port of a server with a certificate that nobody signed."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with contextlib.suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.mark.parametrize("case", ["refused", "DNS", "TLS", "proxy", "URL", "no host"])
def test_an_address_that_cannot_be_reached_is_named_with_the_cause(
    case, rows, tmp_path, monkeypatch
):
    port, attempts, stack = free_port(), [], contextlib.ExitStack()
    if case == "DNS":  # no name server here
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        def fails(*_, **__):
            raise unknown

        monkeypatch.setattr(socket, "getaddrinfo", fails)
    if case == "proxy":
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    secure = stack.enter_context(tls(tmp_path)) if case == "TLS" else 0
    url, cause = {
        "refused": (f"http://127.0.0.1:{port}", "ConnectionRefusedError"),
        "DNS": ("http://models.example", "gaierror: .*Name or service not known"),
        "TLS": (f"https://localhost:{secure}", "certificate verify failed: self-signed"),
        "proxy": (
            "http://models.example",
            f"through the proxy http://127.0.0.1:{port}: ConnectionRefused",
        ),
        "URL": ("models.example", "no http or https URL"),
        "no host": ("http:///v1", "no http or https URL"),
    }[case]
    wait = models._wait
    monkeypatch.setattr(models, "_wait", lambda state: (attempts.append(1), wait(state))[1])
    server = type("Nowhere", (), {"url": f"{url}/v1" if case != "no host" else url})
    said = f"{url}.*{cause}"
    with stack:
        if case in ("refused", "proxy"):  # the server may come back
            _, [row] = judged(rows[:1], tmp_path / "c.jsonl", server)
            assert attempts and re.search(said, row["evaluations"][0]["invalid"])
        else:
            with pytest.raises(RunStopped, match=said):
                judged(rows, tmp_path / "c.jsonl", server)
            assert not attempts, "asked again in vain"
        with pytest.raises(RunStopped, match=said):
            log = CallLog(tmp_path / "c.jsonl")
            check_run(log, {"teacher": f"gpt-4.1@{server.url}"}, {"teacher": 1})


def test_an_error_page_is_cut_to_a_line(rows, tmp_path):
    style = "<style>body {color: red}</style><script>alert(1)</script>"
    page = (
        f"<!DOCTYPE html><html><head>{style}</head>\n<h1>502 Bad Gateway</h1>" + "<p>x</p>\n" * 999
    )
    with Server(
        fault=lambda *_: web.Response(status=502, text=page, content_type="text/html")
    ) as server:
        _, [row] = judged(rows[:1], tmp_path / "c.jsonl", server)
        assert len(server.bodies) == models.ATTEMPTS, "a server's fault is asked again"
    said = row["evaluations"][0]["invalid"]
    assert "502 Bad Gateway x x x" in said and len(said) < 700 and "\n" not in said
    assert "<" not in said and "alert" not in said and "color" not in said


def test_a_redirect_is_not_followed(rows, tmp_path):
    with Server() as other:
        headers = {"Location": f"{other.url}/chat/completions"}
        with Server(fault=lambda *_: web.Response(status=307, headers=headers)) as server:
            with pytest.raises(RunStopped, match=f"redirects to '{other.url}/chat/completions'"):
                judged(rows, tmp_path / "c.jsonl", server)
        gate = lambda *_: web.Response(  # noqa: E731
            status=308, headers={"Location": f"{other.url}/models/gpt-4.1"}
        )
        with Server(gate=gate) as server, pytest.raises(RunStopped, match="redirects to"):
            check_run(
                CallLog(tmp_path / "c.jsonl"), {"teacher": f"gpt-4.1@{server.url}"}, {"teacher": 1}
            )
        assert not other.requests


def test_a_billing_limit_stops_the_run(rows, tmp_path):
    limit = "billing_hard_limit_reached"
    with Server(fault=lambda *_: answer(429, "Billing hard limit", limit)) as server:
        with pytest.raises(RunStopped, match="no quota left"):
            judged(rows, tmp_path / "c.jsonl", server, concurrency=1)
        assert len(server.bodies) == 1


def test_a_date_to_wait_for_is_taken_by_the_server_s_clock():
    class Refused(Exception):
        def __init__(self, **headers):
            self.response = type("Response", (), {"headers": headers, "status_code": 429})()

    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    later = {"retry-after": "Wed, 21 Oct 2015 07:28:20 GMT"}
    assert models.retry_after(Refused(**later, date=date)) == 20
    assert models.retry_after(Refused(**later)) == 0, "by our clock, this is long ago"
    assert (
        models.retry_after(Refused(**{"retry-after": f"{date[:12]}99999999999{date[16:]}"})) is None
    )


# The log under a run


@pytest.mark.parametrize("change", ["replaced", "deleted", "truncated", "appended"])
def test_a_log_that_is_changed_under_a_run_stops_it(change, rows, tmp_path):
    path = tmp_path / "c.jsonl"
    many = [{**row, "question": f"{row['question']} {i}"} for i in range(5) for row in rows]
    at = []

    def fault(body, before):
        at.append(time.monotonic())
        if len(at) == 20:
            text = path.read_text(encoding="utf-8")
            if change == "replaced":  # as an editor does
                (tmp_path / "new").write_text(text, encoding="utf-8")
                os.replace(tmp_path / "new", path)
            elif change == "deleted":
                path.unlink()
            elif change == "truncated":
                path.write_text(text[: len(text) // 2], encoding="utf-8")
            else:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(text.splitlines()[0] + "\n")
        return None

    with Server(fault=fault) as server:
        how = "deleted" if change == "deleted" else "replaced or changed"
        with pytest.raises(RunStopped, match=f"{how}.*while this run was recording"):
            judged(many, path, server, concurrency=4)
        assert 20 <= len(server.bodies) <= 24, "what could not be kept was asked for"
        held = len(load_rows(path)) if change in ("replaced", "appended") else 0
        if change == "truncated":
            assert b"\0" not in path.read_bytes()
        with pytest.warns() if change == "truncated" else contextlib.nullcontext():
            done = judged(many, path, server)[1]
        assert all(row["evaluations"][0]["score"] for row in done)
        assert held >= 16 or change in ("deleted", "truncated")


# Nothing is paid twice in a snapshot


def test_a_row_of_another_notebook_s_log_is_copied_and_not_paid_again(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAPSHOT", str(tmp_path / "mine"))
    first, second = (tmp_path / "mine" / part / "calls.jsonl" for part in ("one", "two"))
    elsewhere = tmp_path / "other" / "one" / "calls.jsonl"
    with Server() as server:
        judged(rows, first, server)[0].close()
        log, done = judged(rows[:5], second, server)
        assert len(server.bodies) == 12 and len(log) == 5
        assert all(row in load_rows(first) for row in load_rows(second))
        vector = embedding_of(f"e@{server.url}", CallLog(first)).get_text_embedding("a text")
        log = CallLog(second)
        again = embedding_of(f"e@{server.url}", log).get_text_embedding("a text")
        asked = server.requests.count(("POST", "/v1/embeddings"))
        assert again == vector and asked == 1
        # A replay needs its own log only, and it looks into no other.
        monkeypatch.setenv("JUDGE_MODE", "replay")
        first.unlink()
        assert judged(rows[:5], second, server)[1] == done
        with pytest.raises(MissingCall):
            judged(rows[5:], second, server)
        monkeypatch.setenv("JUDGE_MODE", "record")
        judged(rows[:5], elsewhere, server)
        assert len(server.bodies) == 17, "a log outside the snapshot borrows nothing"


def test_a_collecting_run_borrows_too_and_asks_a_model_on_this_machine(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAPSHOT", str(tmp_path))
    with Server() as server:
        judged(rows[:7], tmp_path / "one" / "calls.jsonl", server)[0].close()
        monkeypatch.setenv("JUDGE_MODE", "collect")
        with pytest.raises(Collected, match="5 of 12 rows wait"):
            judged(rows, tmp_path / "two" / "calls.jsonl", server)
    assert len(load_rows(tmp_path / "two" / "requests.jsonl")) == 5
    monkeypatch.setattr(models, "_local", lambda model: FakeLive())
    log = CallLog(tmp_path / "three" / "calls.jsonl")
    llm = log.llm("small", live("local:small"))
    done = asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="t"))
    assert all(row["evaluations"][0]["score"] for row in done) and len(log) == 12
    assert not log.requests_path.exists()


def test_a_filled_row_names_its_results_file_and_the_model_that_replied(
    tmp_path, rows, monkeypatch
):
    monkeypatch.setenv("JUDGE_MODE", "collect")
    log, path = CallLog(tmp_path / "calls.jsonl"), tmp_path / "answers-07.jsonl"
    with pytest.raises(Collected):
        asyncio.run(judge_rows(rows[:2], CorrectnessEvaluator(llm=log.llm("m")), name="t"))
    bodies = [{**choice([{"type": "text", "text": "4.0"}]), "model": m} for m in ("m", "m-2")]
    results = [
        {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}}
        for request, body in zip(load_rows(log.requests_path), bodies)
    ]
    path.write_text("".join(map("{}\n".format, map(json.dumps, results))), encoding="utf-8")
    assert fill(log, path) == []
    one, two = load_rows(tmp_path / "calls.jsonl")
    assert one["batch"] == two["batch"] == "answers-07" and one["response"] == "4.0"
    assert "replied_by" not in one and two["replied_by"] == "m-2"
    assert len(CallLog(tmp_path / "calls.jsonl", "replay")) == 2
