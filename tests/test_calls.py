"""Record, replay and collect at the LLM's interface; stages; fill."""

import asyncio
import json
import os
import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake import FakeLive
from llama_index.core.base.llms.types import ChatMessage, ImageBlock
from llama_index.core.evaluation import CorrectnessEvaluator
from llama_index.core.llms import MockLLM

from helpers import CallLog, fill, finetuning_events, judge_rows, live, load_rows
from helpers import __main__ as command
from helpers.log import Collected, MissingCall, call_key, make_row, run_stage
from helpers.settings import CallFailed, RunStopped
from helpers.student import LocalJudge


def judged(rows, log, live=None, concurrency=16, **settings):
    """(rows judged through a log, fine-tuning events)."""

    async def go():
        with finetuning_events() as events:
            done = await judge_rows(
                rows,
                CorrectnessEvaluator(llm=log.llm("m", live, params={"temperature": 0}, **settings)),
                name="teacher",
                concurrency=concurrency,
            )
        return done, events

    return asyncio.run(go())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calls.jsonl"


def test_recording_then_replaying_llama_index_s_mock_gives_the_same(path, rows):
    class CountingMock(MockLLM):
        def complete(self, *args, **kwargs):
            calls.append(1)
            return super().complete(*args, **kwargs)

    calls = []
    recorded = judged(rows, CallLog(path, "record"), CountingMock())
    assert len(calls) == len(rows)
    replayed = judged(rows, CallLog(path, "replay"), CountingMock())
    assert len(calls) == len(rows), "replay called the model"
    assert replayed == recorded
    assert recorded[0][0]["evaluations"][0]["text"] == recorded[1][0]["messages"][2]["content"]


def test_events_belong_to_their_rows_under_concurrency_and_shuffled_completion(path, rows):
    rows = rows * 4  # the same row several times: the pairing must not rest on the prompt's text
    in_order = judged(rows, CallLog(path, "record"), FakeLive(), concurrency=1)
    shuffled = judged(
        rows, CallLog(path.with_name("other.jsonl"), "record"), FakeLive(delay=0.05), concurrency=16
    )
    assert shuffled == in_order
    assert [event["row"] for event in shuffled[1]] == list(range(len(rows)))
    for row, event in zip(*shuffled):
        assert row["question"] in event["messages"][1]["content"]
        assert row["evaluations"][0]["text"] == event["messages"][2]["content"]


def test_equal_calls_at_once_are_paid_once(path, rows):
    live = FakeLive(delay=0.05)
    judged([rows[0]] * 10, CallLog(path, "record"), live)
    assert live.count == 1 and len(load_rows(path)) == 1


def test_samples_are_calls_of_their_own(path, rows):
    log, live = CallLog(path, "record"), FakeLive()
    for sample in (0, 1, 1):
        judged(rows[:1], log, live, sample=sample)
    assert live.count == 2 and [row["sample"] for row in load_rows(path)] == [0, 1]


def test_a_live_model_is_made_only_when_it_is_needed(path, rows):
    judged(rows, CallLog(path, "record"), FakeLive())
    with pytest.raises(RunStopped, match="is the name of recorded calls"):
        live("stand-in-teacher")()
    for mode in ("record", "replay"):
        judged(rows, CallLog(path, mode), live("stand-in-teacher"))
    with pytest.raises(
        TypeError, match="expected live\\(setting\\) or a LlamaIndex LLM, found str"
    ):
        CallLog(path).llm("m", "gpt-4.1")
    with pytest.raises(ValueError, match="needs a live model for 'm'"):
        judged(rows, CallLog(path.with_name("other.jsonl"), "record"), None)


def test_a_missing_call_names_log_stage_nearest_prompt_and_first_difference(path, rows):
    judged(rows[:6], CallLog(path, "record"), FakeLive())
    changed = {**rows[3], "reference": "The reference numbered 3."}
    with pytest.raises(MissingCall) as caught:
        judged([changed], CallLog(path, "replay"))
    said = str(caught.value)
    key = next(
        row["key"] for row in load_rows(path) if "Question 3?" in row["messages"][1]["content"]
    )
    for part in (
        str(path),
        "stage 'judge: teacher'",
        key[:12],
        "recorded:",
        "e number 3.",
        "e numbered 3.",
        "make record",
        "make collect",
    ):
        assert part in said, f"{part!r} is not in: {said}"


def test_a_missing_call_that_differs_in_its_settings_says_which(path, rows):
    judged(rows[:2], CallLog(path, "record"), FakeLive())
    with pytest.raises(MissingCall, match=r"recorded with sample 0; this call has 1"):
        judged(rows[:1], CallLog(path, "replay"), sample=1)
    with pytest.raises(MissingCall, match="The log holds no calls"):
        judged(rows[:1], CallLog(path.with_name("none.jsonl"), "replay"))


def test_a_live_failure_is_an_invalid_row_and_is_asked_again(path, rows):
    done, events = judged(rows, CallLog(path, "record"), FakeLive(broken="Question 5?"))
    assert [i for i, row in enumerate(done) if row["evaluations"][0]["score"] is None] == [5]
    assert (
        done[5]["evaluations"][0]["invalid"] == "the call failed: ConnectionError: the line is dead"
    )
    assert [event["row"] for event in events] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11], (
        "a failed call leaves no event"
    )
    live = FakeLive()
    done, _ = judged(rows, CallLog(path, "record"), live)
    assert live.count == 1 and done[5]["evaluations"][0]["score"] is not None


def test_complete_and_streams_go_through_the_log(path):
    log, live = CallLog(path, "record"), FakeLive()
    llm = log.llm("m", live)
    text = llm.complete("a prompt").text
    assert asyncio.run(llm.acomplete("a prompt")).text == text
    assert [piece.delta for piece in llm.stream_complete("a prompt")] == [text]
    assert [
        piece.delta for piece in llm.stream_chat([ChatMessage(role="user", content="a prompt")])
    ] == [text]
    assert live.count == 1
    with pytest.raises(ValueError, match="holds text only"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="file:///x.png")])])


def test_a_stage_runs_every_job_before_it_fails():
    done = []

    async def job(i):
        await asyncio.sleep(0.001 * i)
        if i == 0:
            raise CallFailed("first")
        done.append(i)

    with pytest.raises(CallFailed, match="first") as caught:
        asyncio.run(run_stage("s", [job(i) for i in range(5)], 2))
    assert done == [1, 2, 3, 4] and "1 of 5 rows failed" in caught.value.__notes__[0]


def test_a_stage_keeps_its_bound_and_its_order():
    now, most = 0, 0

    async def job(i):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(random.random() / 100)
        now -= 1
        return i

    assert asyncio.run(run_stage("s", [job(i) for i in range(40)], 7)) == list(range(40))
    assert most == 7


def _record_in_child(path, asked, rows):
    judged(rows, CallLog(path, "record"), FakeLive(asked=asked, delay=0.03), concurrency=4)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork a process")
@pytest.mark.parametrize("kill_at", range(1, 21))
def test_sigkill_while_recording_loses_nothing_and_pays_nothing_twice(tmp_path, rows, kill_at):
    rows = [{**row, "question": f"{row['question']} {n}"} for n in range(2) for row in rows]
    undisturbed = judged(rows, CallLog(tmp_path / "undisturbed.jsonl", "record"), FakeLive())
    path, asked = tmp_path / "calls.jsonl", tmp_path / "asked"
    child = os.fork()
    if child == 0:
        _record_in_child(path, asked, rows)
    end = time.monotonic() + 30
    while time.monotonic() < end and (
        not asked.exists() or asked.read_bytes().count(b"\n") < kill_at
    ):
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    log = CallLog(path, "record")
    answered = {row["response"] for row in log.rows()}
    live = FakeLive()
    final = judged(rows, log, live)
    assert final == undisturbed
    assert live.count == len(rows) - len(answered), (
        "what was answered was asked again, or something was not asked"
    )
    assert live.count > 0, "the child was not killed in time"


def results_of(requests, **changes) -> list[dict]:
    """A batch's results for its requests."""
    return [
        {
            "custom_id": request["custom_id"],
            "error": None,
            "response": {
                "status_code": 200,
                "body": {
                    "choices": [
                        {
                            "message": {
                                "role": "assistant",
                                "content": f"{1 + i % 5}\nReason {i}.",
                            },
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 3},
                },
            },
            **changes,
        }
        for i, request in enumerate(requests)
    ]


def write(path, results):
    path.write_text(
        "".join(
            (json.dumps(result) if isinstance(result, dict) else result) + "\n"
            for result in results
        )
    )


@pytest.fixture
def collected(path, rows):
    log = CallLog(path, "collect")
    with pytest.raises(Collected, match="12 of 12 rows wait"):
        judged(rows, log)
    return log


def test_collect_writes_batch_requests_and_fill_answers_them(collected, path, rows, tmp_path):
    requests = load_rows(collected.requests_path)
    assert len({request["custom_id"] for request in requests}) == len(rows)
    assert all(len(request["custom_id"]) <= 64 for request in requests)
    first = requests[0]
    assert (first["method"], first["url"]) == ("POST", "/v1/chat/completions")
    assert first["body"]["model"] == "m" and first["body"]["temperature"] == 0
    assert [message["role"] for message in first["body"]["messages"]] == ["system", "user"]
    write(tmp_path / "results.jsonl", results_of(requests)[::-1])  # batches come back in any order
    assert fill(collected, tmp_path / "results.jsonl") == []
    done, _ = judged(rows, CallLog(path, "replay"))
    assert [row["evaluations"][0]["score"] for row in done] == [1 + i % 5 for i in range(len(rows))]
    kept = load_rows(path)[0]
    assert (
        kept["usage"] == {"prompt_tokens": 7, "completion_tokens": 3}
        and kept["finish_reason"] == "stop"
    )
    judged(rows, CallLog(path, "collect"))  # all is answered: the run goes on


def test_collect_asks_only_for_what_is_missing(path, rows):
    judged(rows[:8], CallLog(path, "record"), FakeLive())
    log = CallLog(path, "collect")
    with pytest.raises(Collected, match="4 of 12 rows wait"):
        judged(rows, log)
    assert len(load_rows(log.requests_path)) == 4


def test_fill_keeps_the_good_and_lists_the_rest(collected, path, tmp_path):
    requests = load_rows(collected.requests_path)
    results = results_of(requests)
    ids = [request["custom_id"] for request in requests]
    results[1]["custom_id"] = "0-unknown"
    results[2] = {
        "custom_id": ids[2],
        "response": None,
        "error": {"code": "server_error", "message": "boom"},
    }
    results[3]["response"]["status_code"] = 429
    results[4]["response"]["body"]["choices"] = []
    results[5]["response"]["body"]["choices"][0]["message"]["content"] = 5
    results[8]["response"]["body"]["choices"][0]["message"]["content"] = (
        None  # a refusal: it was paid for, and is an empty reply
    )
    results += [json.loads(json.dumps(results[6])), "not json", {"no": "id"}]
    write(tmp_path / "results.jsonl", results)
    wrong = "\n".join(fill(collected, tmp_path / "results.jsonl"))
    assert len(CallLog(path, "replay")) == len(requests) - 6
    for said in (
        "line 2: 0-unknown: no such request",
        f"line 3: {ids[2]}: failed: ",
        "boom",
        f"line 4: {ids[3]}: failed",
        "429",
        "line 5: not a result",
        "line 6: not a result",
        f"line 13: {ids[6]}: answered 2 times",
        "line 14: not a result",
        "line 15: not a result",
        f"{ids[1]}: no result",
        f"{ids[4]}: no result",
    ):
        assert said in wrong, f"{said!r} is not in:\n{wrong}"
    assert (
        f"{ids[7]}" not in wrong and ids[8] not in wrong and load_rows(path)[-4]["response"] == ""
    )
    # A second file with the rest mends it; one that contradicts the log does not change it.
    later = results_of(requests)
    later[8]["response"]["body"]["choices"][0]["message"]["content"] = None
    later[7]["response"]["body"]["choices"][0]["message"]["content"] = "1\nChanged my mind."
    write(tmp_path / "later.jsonl", later)
    assert fill(collected, tmp_path / "later.jsonl") == [
        f"{tmp_path / 'later.jsonl'}, line 8: {ids[7]}: the log holds another answer, which stays"
    ]
    assert len(CallLog(path, "replay")) == len(requests)


def test_the_fill_command_ends_with_a_status(collected, tmp_path, monkeypatch, capsys):
    requests, results = load_rows(collected.requests_path), tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["helpers", "fill", str(collected.path), str(results)])
    write(results, results_of(requests)[:-1])
    assert command.main() == 1
    said = capsys.readouterr()
    assert "11 answers added" in said.out and "no result" in said.err
    write(results, results_of(requests))
    assert command.main() == 0
    assert "1 answers added, 12 in all" in capsys.readouterr().out


def test_the_real_openai_client_records_and_replays(path, rows, monkeypatch):
    """Against a chat-completions endpoint on loopback, as a live run would."""
    from llama_index.llms.openai import OpenAI

    bodies = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "gpt-4.1-mini",
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": "4.5\nGood."},
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        live = OpenAI(
            model="gpt-4.1-mini",
            api_key="not-a-key",
            api_base=f"http://127.0.0.1:{server.server_port}/v1",
        )
        done, _ = judged(rows, CallLog(path, "record"), live)
    finally:
        server.shutdown()
        server.server_close()
    assert len(bodies) == len(rows) and all(body["temperature"] == 0 for body in bodies)
    assert [row["evaluations"][0]["score"] for row in done] == [4.5] * len(rows)
    first = load_rows(path)[0]
    assert first["usage"]["total_tokens"] == 105 and first["finish_reason"] == "stop"
    assert "not-a-key" not in path.read_text(encoding="utf-8")
    assert judged(rows, CallLog(path, "replay"))[0] == done


def test_key_and_row_agree():
    call = {"model": "m", "messages": [], "params": {}, "sample": 0}
    assert make_row(call, "r")["key"] == call_key(**call)


def test_a_cell_that_is_interrupted_and_run_again_with_the_same_log_pays_nothing_twice(path, rows):
    """Some rows are written while a flush is under way; their tasks end before the next flush."""
    log, live = CallLog(path, "record"), FakeLive()
    many = [{**row, "question": f"{row['question']} {i}"} for i in range(3) for row in rows]

    async def interrupted():
        task = asyncio.ensure_future(
            judge_rows(
                many,
                CorrectnessEvaluator(llm=log.llm("m", live, params={"temperature": 0})),
                name="t",
            )
        )
        while live.count < 12:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await judge_rows(
            many, CorrectnessEvaluator(llm=log.llm("m", live, params={"temperature": 0})), name="t"
        )

    done = asyncio.run(interrupted())
    written = load_rows(path)
    assert (
        live.count == len(many) == len(written) == len({row["key"] for row in written}) == len(log)
    )
    assert all(row["evaluations"][0]["score"] for row in done)


def test_equal_calls_go_one_by_one_even_after_a_failure(path, rows):
    class FailsFirst(FakeLive):
        async def achat(self, messages, **kwargs):
            response = self.chat(messages)
            await asyncio.sleep(0.02)
            if self.count == 1:
                raise ValueError("a bad request")
            return response

    live = FailsFirst()
    done, _ = judged(
        [rows[0]] * 12, CallLog(path, "record"), live, concurrency=4
    )  # some wait, some come later
    assert (
        live.count == 2
        and sum("invalid" in row["evaluations"][0] for row in done) == 1
        and len(load_rows(path)) == 1
    )


def test_a_failed_call_s_lock_does_not_outlive_its_event_loop(path, rows):
    class Broken(FakeLive):
        async def achat(self, messages, **kwargs):
            self.chat(messages)
            await asyncio.sleep(0.01)
            raise ValueError("a bad request")

    log, live = CallLog(path, "record"), Broken()
    for _ in range(2):
        done, _ = judged([rows[0]] * 3, log, live, concurrency=3)
        assert all("a bad request" in row["evaluations"][0]["invalid"] for row in done)


def test_a_reply_that_was_cut_off_says_nothing_of_other_rows(path, rows):
    log = CallLog(path, "record")
    log.append(
        {
            **make_row(
                call := {
                    "model": "m",
                    "messages": [{"role": "user", "content": "Hi"}],
                    "params": {},
                    "sample": 0,
                },
                "Well,",
                None,
                "length",
            )
        }
    )
    assert call["model"] == log.llm("m").model_name and log.llm("m").complete("Hi").text == "Well,"
    judge = CorrectnessEvaluator(llm=LocalJudge(lambda item: (4.0, "."), model_name="rule"))
    assert not any(
        "invalid" in row["evaluations"][0] for row in asyncio.run(judge_rows(rows, judge, name="t"))
    )


@pytest.mark.parametrize(
    "concurrency, variable, said",
    [
        (-1, "16", "-1 calls at once"),
        (0, "16", "0 calls at once"),
        (None, "inf", "CONCURRENCY='inf'"),
        (None, "many", "CONCURRENCY='many'"),
    ],
)
def test_a_bad_bound_is_refused(concurrency, variable, said, monkeypatch, recwarn):
    async def job():
        return 1

    monkeypatch.setenv("CONCURRENCY", variable)
    with pytest.raises(ValueError, match=said):
        asyncio.run(run_stage("s", [job(), job()], concurrency))
    assert not recwarn.list, "a job was left behind"
