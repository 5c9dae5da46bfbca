"""The Batch API against the loopback server: collect, submit, poll, pick up, fill."""

import asyncio
import json

import nbformat
import pytest
from conftest import ROOT
from filelock import FileLock
from llama_index.core.evaluation import CorrectnessEvaluator, PairwiseComparisonEvaluator
from server import Server, answer

from helpers import CallLog, check_run, cost_table, judge_rows, live, load_rows
from helpers import __main__ as command
from helpers.live import models
from helpers.live.budget import MAX_TOKENS, Budget
from helpers.live.collect import answer_requests
from helpers.log import Collected, run_stage
from helpers.settings import RunStopped

CREATED = ("POST", "/v1/batches")


@pytest.fixture(autouse=True)
def collecting(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-0000")
    monkeypatch.setenv("JUDGE_MODE", "collect")
    monkeypatch.setenv("POLL_SECONDS", "0.01")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "snapshot" / "calls.jsonl"


def judged(rows, path, model="gpt-4.1"):
    """Rows judged by a model; Collected if not all are answered."""
    llm = CallLog(path).llm(model, live(model), params={"temperature": 0})
    return asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="t"))


def collected(rows, path, *model):
    with pytest.raises(Collected):
        judged(rows, path, *model)
    return CallLog(path)


@pytest.fixture
def server(monkeypatch):
    with Server() as running:
        monkeypatch.setenv("TEACHER_MODEL", f"gpt-4.1@{running.url}")
        yield running


def test_requests_go_out_under_the_model_s_own_id_and_come_back_in_any_order(
    rows, path, server, monkeypatch, capsys
):
    log = collected(rows, path)
    assert answer_requests(log) == [] and len(log) == 12
    [batch] = server.batches.values()
    sent = [json.loads(line) for line in server.files[batch["input"]].splitlines()]
    assert {line["body"]["model"] for line in sent} == {"gpt-4.1"} and {
        line["body"]["max_tokens"] for line in sent
    } == {MAX_TOKENS}
    assert sorted(line["custom_id"] for line in sent) == sorted(
        request["custom_id"] for request in load_rows(log.requests_path)
    )
    assert {row["model"] for row in load_rows(path)} == {"gpt-4.1"}
    assert max(server.asked.values()) == 1
    done = judged(rows, path)
    for row in done:  # the server's replies depend on the prompt: each came to its row
        body = next(
            body for body in server.bodies if row["question"] in body["messages"][-1]["content"]
        )
        assert row["evaluations"][0]["text"] == server.reply(body["messages"])
    said = capsys.readouterr().out
    for part in (
        "batch batch_1 of 12 requests to gpt-4.1: started",
        "batch_1: in_progress, 0 of 12 answered",
        "batch_1: completed",
    ):
        assert part in said, said


def test_a_batch_costs_half(rows, path, server, monkeypatch):
    monkeypatch.setenv("PRICES", "gpt-4.1=2/8")
    log = collected(rows, path)
    answer_requests(log)
    usage = [row["usage"] for row in load_rows(path)]
    full = sum(2 * one["prompt_tokens"] + 8 * one["completion_tokens"] for one in usage) / 1e6
    assert Budget.of(CallLog(path)).spent() == pytest.approx(full / 2) and cost_table(log)["$"][
        "in all"
    ].item() == pytest.approx(full / 2, abs=1e-4)


def test_an_interrupted_wait_is_picked_up_by_its_id(rows, path, server, monkeypatch, capsys):
    log = collected(rows, path)

    def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer_requests(log)
    assert answer_requests(collected(rows, path)) == []
    assert (
        server.requests.count(CREATED) == 1
        and "batch batch_1 of 12 requests to gpt-4.1: picked up" in capsys.readouterr().out
    )
    judged(rows, path)


def test_what_a_killed_fill_left_is_taken_from_the_same_batch(rows, path, server, monkeypatch):
    log, append = collected(rows, path), CallLog.append

    def killed(self, row):
        if len(self) == 5:
            raise KeyboardInterrupt
        return append(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(CallLog, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            answer_requests(log)
    log = collected(rows, path)
    assert len(load_rows(log.requests_path)) == 7 and answer_requests(log) == []
    assert server.requests.count(CREATED) == 1 and len(server.bodies) == 12
    judged(rows, path)


def test_one_request_that_failed_is_told_and_sent_anew(rows, path, server):
    server.fault = lambda body, before: (
        answer(400, "No.")
        if "Question 5?" in body["messages"][-1]["content"] and len(server.batches) == 1
        else None
    )
    wrong = answer_requests(log := collected(rows, path))
    assert len(log) == 11 and len(wrong) == 1 and "failed" in wrong[0] and "No." in wrong[0]
    assert (
        answer_requests(collected(rows, path)) == []
        and len(server.batches) == 2
        and len(server.bodies) == 13
    )
    judged(rows, path)


def test_a_batch_that_expires_keeps_what_it_answered(rows, path, server):
    server.batch = ("in_progress", "expired")
    wrong = answer_requests(log := collected(rows, path))
    assert len(log) == 6 and len(wrong) == 6 and all(line.endswith("no result") for line in wrong)
    server.batch = ("in_progress", "completed")
    assert answer_requests(collected(rows, path)) == [] and len(server.bodies) == 12
    judged(rows, path)


def test_a_batch_that_fails_says_why_and_the_next_run_starts_anew(rows, path, server):
    server.batch = ("validating", "failed")
    with pytest.raises(
        RunStopped, match=r"batch batch_1 failed: This line is not JSON. \(line 3\)"
    ):
        answer_requests(collected(rows, path))
    server.batch = ("completed",)
    assert answer_requests(collected(rows, path)) == [] and len(server.batches) == 2


def test_a_batch_that_is_refused_for_a_while_is_started_once(rows, path, server):
    server.gate = lambda method, path, before: (
        answer(503, "Sorry") if (method, path) == CREATED and before < 2 else None
    )
    assert answer_requests(collected(rows, path)) == []
    assert len(server.batches) == 1 and len(server.bodies) == 12


def test_a_batch_whose_reply_is_lost_is_not_started_again_unseen(rows, path, server):
    server.gate = lambda method, path, before: (
        "lost" if (method, path) == CREATED and before == 0 else None
    )
    with pytest.raises(RunStopped, match="may or may not have been started.*or it will be paid"):
        answer_requests(collected(rows, path))
    assert len(server.batches) == 1


def test_a_service_that_is_gone_while_we_wait_is_looked_for_again(rows, path, server, capsys):
    server.gate = lambda method, path, before: (
        answer(503, "Sorry") if "batch_1" in path and before < 8 else None
    )
    assert (
        answer_requests(collected(rows, path)) == []
        and "not seen (InternalServerError" in capsys.readouterr().out
    )


def test_a_batch_of_another_account_is_named_with_its_note(rows, path, server, monkeypatch):
    log = collected(rows, path)
    with monkeypatch.context() as patch:
        patch.setattr(
            models.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            answer_requests(log)
    server.batches.clear()
    with pytest.raises(
        RunStopped, match="batch_1 is not known to this account. Delete .*batches.json"
    ):
        answer_requests(collected(rows, path))
    log.close()
    # Meanwhile a live run would ask the same calls again.
    monkeypatch.setenv("JUDGE_MODE", "record")
    with pytest.raises(
        RunStopped,
        match="batches are under way, which ask the same calls; `make batch` waits for them",
    ):
        check_run(CallLog(path), {}, {})
    assert not server.bodies


def test_odd_line_ends_and_refusals_in_a_batch_s_results(rows, path, server, monkeypatch):
    server.reply = lambda messages: "4.0\nIt is\u2028so\x0band so."
    server.fault = lambda body, before: (
        {"content": None, "refusal": "No."}
        if "Question 3?" in body["messages"][-1]["content"]
        else None
    )
    keep = server._keep
    server._keep = lambda content, purpose: keep(
        "".join(
            json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in content.splitlines()
        ).encode()
        + b"not json\n"
        if purpose == "batch_output"
        else content,
        purpose,
    )
    [wrong] = answer_requests(log := collected(rows, path))
    assert "results.jsonl, line 13: not a result" in wrong and len(log) == 12
    log.close()
    done = judged(rows, path)
    assert [
        row["evaluations"][0].get("invalid") for row in done if row["question"] == "Question 3?"
    ] == ["cut off (finish_reason refusal)"]
    assert sum(row["evaluations"][0]["score"] == 4 for row in done) == 11


def test_a_batch_keeps_to_the_budget(rows, path, server, monkeypatch):
    log = collected(rows, path)
    for name, value, said in (
        ("BUDGET_CALLS", "11", "the budget of 11 calls is used up, and 12 more are asked for"),
        (
            "BUDGET_DOLLARS",
            "0.001",
            r"the budget of \$0.001 does not allow .*: \$0.0000 is spent, "
            r"and 12 more calls may cost \$0\.\d",
        ),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(RunStopped, match=said):
            answer_requests(log)
        monkeypatch.delenv(name)
    assert not server.requests
    monkeypatch.setenv("BUDGET_CALLS", "12")
    assert answer_requests(log) == []


def test_both_orders_of_a_pair_go_out_together(path, server):
    rows = [
        {
            "question": f"Which? {i}",
            "source": "So.",
            "answers": [{"text": "This."}, {"text": f"That {i}."}],
        }
        for i in range(5)
    ]

    def judged_pairs():
        judge = PairwiseComparisonEvaluator(llm=CallLog(path).llm("gpt-4.1", live("gpt-4.1")))
        return asyncio.run(judge_rows(rows, judge, name="t"))

    with pytest.raises(Collected, match="5 of 5 rows wait"):
        judged_pairs()
    log = CallLog(path)
    assert len(load_rows(log.requests_path)) == 10 and answer_requests(log) == []
    log.close()
    assert (
        all("invalid" not in row["evaluations"][0] for row in judged_pairs())
        and len(server.batches) == 1
    )


@pytest.mark.slow
def test_a_notebook_runs_through_batches_stage_by_stage(tmp_path, server, monkeypatch, capsys):
    code = """
from llama_index.core.evaluation import CorrectnessEvaluator
from helpers import CallLog, judge_rows, live, models_of, snapshot_folder
snapshot = snapshot_folder("correctness")
TEACHER = models_of(snapshot)["teacher"]
log = CallLog(snapshot / "calls.jsonl")
row = {"reference": "So.", "response_data": {"text": "So."}}
rows = [{"question": f"Why {i}?", **row} for i in range(4)]
for sample in (0, 1):
    llm = log.llm(TEACHER, live(TEACHER), params={"temperature": 0}, sample=sample)
    rows = await judge_rows(rows, CorrectnessEvaluator(llm=llm), name=f"t{sample}")
len(rows[0]["evaluations"])
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "01_correctness.ipynb")
    monkeypatch.setattr(command, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "notebooks"))
    monkeypatch.setenv("SNAPSHOT", str(tmp_path / "mine"))
    assert command.run_in_batches(["01_correctness"]) == 0
    assert (
        len(server.batches) == 2
        and len(load_rows(tmp_path / "mine" / "correctness" / "calls.jsonl")) == 8
    )
    assert (
        nbformat.read(tmp_path / "mine" / "01_correctness.ipynb", 4)
        .cells[0]
        .outputs[-1]["data"]["text/plain"]
        == "2"
    )
    server.fault = lambda body, before: answer(400, "No.")
    monkeypatch.setenv("SNAPSHOT", str(tmp_path / "other"))
    assert command.run_in_batches(["01_correctness"]) == 1
    said = capsys.readouterr()
    assert (
        "4 answers added, 8 in all" in said.out
        and "the batch answered none of its requests" in said.err
        and "make fill" not in said.err
    )


def test_models_without_a_batch_api_are_named(rows, path, monkeypatch):
    for model, said in (
        ("hf:mistralai/M", "this needs a model behind OpenAI's API"),
        ("stand-in-teacher", "is the name of recorded calls"),
    ):
        monkeypatch.setenv("TEACHER_MODEL", model)
        with pytest.raises(RunStopped, match=f"'{model}'.*{said}"):
            answer_requests(collected(rows, path, model))


def test_each_model_has_a_batch_of_its_own(rows, path, server, monkeypatch):
    monkeypatch.setenv("ANSWERER_MODEL", f"gpt-5-nano@{server.url}")
    log, models = CallLog(path), ("gpt-4.1", "gpt-5-nano")

    async def asked():
        stage = [log.llm(model).acomplete(row["question"]) for row in rows[:4] for model in models]
        return [reply.text for reply in await run_stage("t", stage)]

    with pytest.raises(Collected, match="8 of 8 rows wait"):
        asyncio.run(asked())
    assert answer_requests(log) == [] and len(set(asyncio.run(asked()))) == 4
    sent = [
        {(one["body"]["model"], "temperature" in one["body"]) for one in map(json.loads, lines)}
        for lines in (
            server.files[batch["input"]].splitlines() for batch in server.batches.values()
        )
    ]
    assert sent == [{("gpt-4.1", True)}, {("gpt-5-nano", False)}]


def test_a_busy_log_stops_the_batch_without_a_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]),
        tmp_path / "notebooks" / "01_correctness.ipynb",
    )
    monkeypatch.setattr(command, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(command, "_execute", lambda *given, **more: (None, "Collected"))
    monkeypatch.setenv("SNAPSHOT", str(tmp_path / "mine"))
    log = tmp_path / "mine" / "correctness" / "calls.jsonl"
    log.parent.mkdir(parents=True)
    with FileLock(f"{log}.lock"):
        assert command.run_in_batches(["01_correctness"]) == 1
    assert "01_correctness: stopped:" in (said := capsys.readouterr().err)
    assert "another process is recording to this log" in said
