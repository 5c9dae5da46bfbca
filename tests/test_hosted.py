"""Fine-tuning a hosted student, against the loopback server with OpenAI's own client."""

import asyncio
import json

import pytest
from llama_index.core.evaluation import CorrectnessEvaluator
from server import Server, answer

from helpers import CallLog, cost_table, hosted_students, judge_rows, load_rows, save_events
from helpers.live import models
from helpers.live.budget import Budget
from helpers.rows import DamagedFile
from helpers.settings import RunStopped

CREATED = ("POST", "/v1/fine_tuning/jobs")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-0000")
    monkeypatch.setenv("JUDGE_MODE", "record")
    monkeypatch.setenv("POLL_SECONDS", "0.01")


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "events.jsonl"
    save_events(
        path,
        [
            {
                "messages": [
                    {"role": "system", "content": "Judge."},
                    {"role": "user", "content": f"Row {i}."},
                    {"role": "assistant", "content": f"{1 + i % 5}\nSo."},
                ]
            }
            for i in range(12)
        ],
    )
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "snapshot" / "calls.jsonl"


def students(server, chats, path):
    return hosted_students(f"gpt-4.1-mini@{server.url}", chats, CallLog(path))


def test_a_job_goes_its_way_and_its_model_judges(chats, path, rows, capsys):
    with Server() as server:
        tuned = students(server, chats, path)["hosted"]
        [(id, job)] = server.jobs.items()
        assert job["model"] == "gpt-4.1-mini"
        assert job["method"] == {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3}},
        }
        assert server.files[job["training_file"]] == chats.read_bytes()
        done = asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=tuned), name="t"))
        assert all(row["evaluations"][0]["score"] for row in done)
        assert {body["model"] for body in server.bodies} == {f"ft:gpt-4.1-mini:org:soft-name:{id}"}
    assert statuses(capsys) == ["started", "queued", "running", "succeeded"]


def statuses(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [line.split(": ")[-1] for line in lines if line.startswith("fine-tuning job")]


def test_waiting_shows_each_status_once(chats, path, capsys):
    states = ("validating_files", "queued", "queued", "queued", "running", "running", "succeeded")
    with Server(job=states) as server:
        students(server, chats, path)
    assert statuses(capsys) == ["started", "queued", "running", "succeeded"]


@pytest.mark.parametrize(
    "status, message",
    [
        (400, "Model gpt-3.5-turbo is not available for fine-tuning"),
        (403, "You are not allowed to create fine-tuning jobs"),
        (404, "The model does not exist"),
    ],
)
def test_a_refusal_raises_at_once_with_the_services_words_and_the_way_out(
    chats, path, status, message
):
    with Server(gate=gate_of_creation(lambda before: answer(status, message))) as server:
        with pytest.raises(RunStopped) as failed:
            students(server, chats, path)
        assert server.requests.count(CREATED) == 1
    said = str(failed.value)
    assert message in said
    assert "none from accounts that had none before" in said and "LocalFinetuneEngine" in said


def gate_of_creation(fault):
    return lambda method, path, before: fault(before) if (method, path) == CREATED else None


def test_a_job_that_is_refused_for_a_while_is_started_once(chats, path):
    refusing = gate_of_creation(lambda before: answer(500, "Sorry") if before < 2 else None)
    with Server(gate=refusing) as server:
        assert "hosted" in students(server, chats, path)
        assert len(server.jobs) == 1 and server.requests.count(CREATED) == 3


def test_a_job_whose_reply_is_lost_is_not_started_again_unseen(chats, path):
    with Server(gate=gate_of_creation(lambda before: "lost" if before < 1 else None)) as server:
        with pytest.raises(
            RunStopped, match="may or may not have been started.*or it will be paid"
        ):
            students(server, chats, path)
        assert len(server.jobs) == server.requests.count(CREATED) == 1


@pytest.mark.parametrize(
    "last, said",
    [
        ("failed", r"ftjob-1 failed: Line 3 is too long. \(invalid_training_file\)"),
        ("cancelled", "ftjob-1 was cancelled"),
    ],
)
def test_a_job_that_fails_says_why(chats, path, last, said):
    with Server(job=("queued", "running", last)) as server:
        with pytest.raises(RunStopped, match=said):
            students(server, chats, path)


def test_a_bad_file_is_not_uploaded(chats, path, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        chats.read_text(encoding="utf-8").replace('"assistant"', '"user"', 1), encoding="utf-8"
    )
    with Server() as server:
        with pytest.raises(DamagedFile, match="bad.jsonl, line 1: expected messages of the roles"):
            students(server, bad, path)
        assert not server.requests


def test_one_base_url_setting_reaches_the_fine_tuning_client(chats, tmp_path, monkeypatch):
    for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL"):
        with Server() as server:
            monkeypatch.setenv(name, server.url)
            log = CallLog(tmp_path / name / "calls.jsonl")
            tuned = hosted_students("gpt-4.1-mini", chats, log)["hosted"]
            assert tuned.complete("Who?").text and len(server.jobs) == len(server.bodies) == 1
            monkeypatch.delenv(name)


def test_students_are_started_once_picked_up_and_replayed(
    chats, tmp_path, rows, monkeypatch, capsys, path
):
    def judged(log, model):
        students, done = hosted_students(model, chats, log), rows[:2]
        for name, llm in students.items():
            done = asyncio.run(judge_rows(done, CorrectnessEvaluator(llm=llm), name=name))
        return done

    assert hosted_students("minilm", chats, CallLog(path)) == {}
    with Server(job=("queued", "running")) as server:
        model = f"gpt-4.1-mini@{server.url}"
        monkeypatch.setenv("FINETUNING_HOURS", "0.00001")
        with pytest.raises(RunStopped, match="ftjob-1 is 'running' after 1e-05 hours.*run again"):
            hosted_students(model, chats, CallLog(path))
        note = json.loads(path.with_name("finetuning_job.json").read_text(encoding="utf-8"))
        assert note["id"] == "ftjob-1" and note["fine_tuned_model"] is None, (
            "the job is noted before it is waited for"
        )
        server.job = ("running", "running", "running", "succeeded")
        monkeypatch.setenv("FINETUNING_HOURS", "1")
        live_rows = judged(CallLog(path), model)
        assert [e["llm"] for e in live_rows[0]["evaluations"]] == ["hosted", "hosted_base"] and len(
            server.jobs
        ) == 1
        assert {row["model"] for row in load_rows(path)} == {
            "ft:gpt-4.1-mini:org:soft-name:ftjob-1",
            "gpt-4.1-mini",
        }
        again = len(server.requests)
        assert judged(CallLog(path), model) == live_rows and len(server.requests) == again
    monkeypatch.setenv("JUDGE_MODE", "replay")
    log = CallLog(path)
    assert judged(log, "gpt-4.1-mini") == live_rows
    monkeypatch.setenv("PRICES", "gpt-4.1-mini=0.4/1.6/5")
    line = cost_table(log).loc[("fine-tuning", "gpt-4.1-mini")]
    tokens = 3 * len(chats.read_bytes()) // 4
    assert (line["prompt tokens"], line["tokens"], line["$"]) == (
        tokens,
        "reported",
        pytest.approx(5 * tokens / 1e6, abs=1e-4),
    )
    with pytest.raises(
        FileNotFoundError, match="no fine-tuned model of 'gpt-4.1-mini' was recorded"
    ):
        hosted_students("gpt-4.1-mini", chats, CallLog(tmp_path / "other" / "calls.jsonl"))


def test_a_job_is_waited_for_again_after_an_interruption(chats, monkeypatch, path):

    def interrupted(seconds):
        raise KeyboardInterrupt

    with Server(job=("queued", "running", "succeeded")) as server:
        model = f"gpt-4.1-mini@{server.url}"
        with monkeypatch.context() as patch:
            patch.setattr(models.time, "sleep", interrupted)
            with pytest.raises(KeyboardInterrupt):
                hosted_students(model, chats, CallLog(path))
        assert "hosted" in hosted_students(model, chats, CallLog(path)) and len(server.jobs) == 1


def test_a_job_that_could_not_be_started_is_started_by_the_next_run(chats, path):
    with Server(gate=gate_of_creation(lambda before: answer(503, "Sorry"))) as server:
        model = f"gpt-4.1-mini@{server.url}"
        with pytest.raises(RunStopped, match="Run again to go on"):
            hosted_students(model, chats, CallLog(path))
        server.gate = None
        assert "hosted" in hosted_students(model, chats, CallLog(path)) and len(server.jobs) == 1


def test_a_service_that_is_gone_while_we_wait_is_looked_for_again(chats, path, capsys):
    with Server(
        gate=lambda method, path, before: (
            answer(503, "Sorry") if "ftjob" in path and before < 8 else None
        )
    ) as server:
        assert "hosted" in students(server, chats, path)
    assert "not seen (InternalServerError" in capsys.readouterr().out


def test_a_job_of_another_account_is_named_with_its_note(chats, path):
    with Server() as server:
        hosted_students(f"gpt-4.1-mini@{server.url}", chats, CallLog(path))
        note = path.with_name("finetuning_job.json")
        note.write_text(
            json.dumps({**json.loads(note.read_text(encoding="utf-8")), "fine_tuned_model": None}),
            encoding="utf-8",
        )
        server.jobs.clear()
        with pytest.raises(
            RunStopped,
            match="ftjob-1 is not known to this account.*"
            "Delete .*finetuning_job.json to start a new one",
        ):
            hosted_students(f"gpt-4.1-mini@{server.url}", chats, CallLog(path))


def test_a_refused_job_is_not_in_the_bill(chats, path, monkeypatch):
    monkeypatch.setenv("PRICES", "gpt-4.1-mini=0.4/1.6/5")
    log = CallLog(path)
    with Server(
        gate=lambda method, path, before: (
            answer(403, "Not for you") if (method, path) == CREATED else None
        )
    ) as server:
        with pytest.raises(RunStopped, match="Not for you"):
            hosted_students(f"gpt-4.1-mini@{server.url}", chats, log)
    assert Budget.of(log).spent() == Budget.of(CallLog(log.path)).spent() == 0


def test_every_job_is_in_the_bill_and_a_failed_one_is_not(chats, path, monkeypatch):
    monkeypatch.setenv("PRICES", "gpt-4.1-mini=0.4/1.6/5")
    paid = 0
    with Server() as server:
        for i, last in enumerate(("succeeded", "failed", "succeeded")):
            server.job = ("running", last)
            chats.write_text(
                chats.read_text(encoding="utf-8").replace(f"Row {i}.", f"Row number {i}."),
                encoding="utf-8",
            )
            log = CallLog(path)
            if last == "failed":
                with pytest.raises(RunStopped):
                    hosted_students(f"gpt-4.1-mini@{server.url}", chats, log)
            else:
                hosted_students(f"gpt-4.1-mini@{server.url}", chats, log)
                paid += 3 * len(chats.read_bytes()) // 4
            assert (
                Budget.of(log).spent()
                == pytest.approx(5 * paid / 1e6)
                == Budget.of(CallLog(path)).spent()
            )
        assert {
            job["method"]["supervised"]["hyperparameters"]["n_epochs"]
            for job in server.jobs.values()
        } == {3}


def test_another_file_is_another_job_and_a_failed_one_is_not_waited_for_again(chats, path):
    with Server(job=("running", "failed")) as server:
        model = f"gpt-4.1-mini@{server.url}"
        with pytest.raises(RunStopped):
            hosted_students(model, chats, CallLog(path))
        server.job = ("running", "succeeded")
        for jobs in (2, 2):
            hosted_students(model, chats, CallLog(path))
            assert len(server.jobs) == jobs
        chats.write_text(
            chats.read_text(encoding="utf-8").replace("Row 1.", "Row one."), encoding="utf-8"
        )
        assert "ftjob-3" in hosted_students(model, chats, CallLog(path))["hosted"].model_name
        hosted_students(f"gpt-4.1@{server.url}", chats, CallLog(path))
        assert len(server.jobs) == 4


def test_a_job_needs_room_in_the_budget(chats, tmp_path, monkeypatch):
    log = CallLog(tmp_path / "calls.jsonl")
    monkeypatch.setenv("BUDGET_DOLLARS", "0.001")
    with Server() as server:
        model = f"gpt-4.1-mini@{server.url}"
        with pytest.raises(RunStopped, match="price of training 'gpt-4.1-mini' is not known"):
            hosted_students(model, chats, log)
        monkeypatch.setenv("PRICES", "gpt-4.1-mini=0.4/1.6/5")
        with pytest.raises(
            RunStopped, match=r"the budget of \$0.001 does not allow the fine-tuning job"
        ):
            hosted_students(model, chats, log)
        assert not server.requests
        monkeypatch.setenv("BUDGET_DOLLARS", "1")
        hosted_students(model, chats, log)
        assert Budget.of(log).spent() == pytest.approx(5 * (3 * len(chats.read_bytes()) // 4) / 1e6)
