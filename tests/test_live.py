"""The series live, end to end, against the loopback server; and what is left when a run is interrupted."""

import collections
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from jupyter_client.manager import start_new_kernel
from server import Server, answer

from helpers import CallLog, cost_table, load_rows
from helpers.rows import DATA

KEYS = {
    "OPENAI_API_KEY": "sk-proj-Qw7xVerySecret0001",
    "HF_TOKEN": "hf_QwVerySecret0002",
    "ENDPOINT_API_KEY": "an-endpoint-key-0003",
}
NOTEBOOKS = {
    "01_correctness": "correctness",
    "02_pairwise": "pairwise",
    "03_shared_helpers": "single_grading",
}
ROWS = {
    "correctness": (174, 61),
    "pairwise": (159, 69),
    "single_grading": (270, 81),
}  # all and tested


def environment(url, folder, **more):
    roles = {
        "TEACHER_MODEL": "gpt-4.1",
        "WRITER_MODEL": "llama3.1:8b",
        "ANSWERER_MODEL": "gpt-4.1-nano",
        "STUDENT_MODEL": "gpt-4.1-mini",
    }
    return {
        **os.environ,
        **KEYS,
        **{role: f"{model}@{url}" for role, model in roles.items()},
        "PYTHONPATH": str(ROOT / "notebooks"),
        "SNAPSHOT": str(folder),
        "POLL_SECONDS": "0.2",
        "JUDGE_MODE": "record",
        **more,
    }


def recorded_replies():
    """{prompt: the bundled replies to it, by sample}: so that a live run can be compared with the bundled one."""
    replies = collections.defaultdict(list)
    for part in NOTEBOOKS.values():
        for row in CallLog(DATA / part / "calls.jsonl", "replay").rows():
            replies[json.dumps(row["messages"])].append(row["response"])
    return replies


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """All three notebooks recorded with a hosted student, through faults: (server, folder, what the command said)."""
    folder, replies, refused = tmp_path_factory.mktemp("live"), recorded_replies(), []

    def fault(body, before):
        # Now and then a refusal that quotes the key, each once: the call is asked again.
        content = json.dumps(body["messages"])
        if content not in refused and hash(content) % 17 == 0:
            refused.append(content)
            return answer(
                429,
                f"Rate limit reached for {KEYS['OPENAI_API_KEY']} and {KEYS['ENDPOINT_API_KEY']}",
            )
        answered[body["model"], content] += 1
        known = replies[content]
        return (
            {"content": known[min(answered[body["model"], content], len(known)) - 1]}
            if known
            else answer(400, "not a prompt of the bundled run")
        )

    answered = collections.Counter()
    with Server(fault=fault) as server:
        run = subprocess.run(
            [sys.executable, "-m", "helpers", "run"],
            env=environment(server.url, folder),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        server.refused = len(refused)
        yield server, folder, run.stdout + run.stderr


COMPUTED = (
    "fine_tuned",
    "base",
    "overlap",
    "longer",
    "shorter",
    "constant",
    "first",
)  # judges on this machine
FIGURE = re.compile(r"\d+(?:\.(\d+))?(?:e-\d+)?")


def alike(ours, theirs):
    """Whether two evaluations by a computed judge are equal up to what differs between processors.

    Its probabilities differ by some 3e-6, and so, seldom, the last digit of a rounded figure.
    """
    texts = [json.dumps(evaluation) for evaluation in (ours, theirs)]
    figures = zip(*(FIGURE.finditer(text) for text in texts), strict=True)
    return FIGURE.sub("#", texts[0]) == FIGURE.sub("#", texts[1]) and all(
        abs(float(one[0]) - float(other[0])) <= max(1e-4, 1.01 * 10.0 ** -len(other[1] or ""))
        for one, other in figures
    )


def test_the_series_is_recorded_end_to_end(series):
    server, folder, said = series
    assert server.refused > 50 and len(server.bodies) - server.refused == sum(
        len(CallLog(folder / part / "calls.jsonl", "replay")) for part in ROWS
    ), "a call was paid twice"
    for part, (_, tested) in ROWS.items():
        theirs, ours = (CallLog(where / part / "calls.jsonl", "replay") for where in (DATA, folder))
        judged = tested * (4 if part == "pairwise" else 2)  # by the hosted student and its base
        assert len(ours) == len(theirs) + judged
        for name in ("train_qa", "test_qa_complete"):
            rows = (
                load_rows(folder / part / f"{name}.jsonl"),
                load_rows(DATA / part / f"{name}.jsonl"),
            )
            for mine, bundled in zip(*rows, strict=True):
                ours = [
                    one for one in mine.pop("evaluations") if not one["llm"].startswith("hosted")
                ]
                for one, other in zip(ours, bundled.pop("evaluations"), strict=True):
                    assert one == other or one["llm"] in COMPUTED and alike(one, other)
                assert (
                    json.loads(json.dumps(mine).replace("gpt-4.1-nano", "stand-in-answerer"))
                    == bundled
                )
        [job] = [
            job
            for job in server.jobs.values()
            if len(server.files[job["training_file"]].splitlines())
            == len(load_rows(folder / part / FILES[part]))
        ]
        assert (
            json.loads((folder / part / "finetuning_job.json").read_text())["status"] == "succeeded"
        )
        hosted = [
            one
            for row in load_rows(folder / part / "test_qa_complete.jsonl")
            for one in row["evaluations"]
            if one["llm"] == "hosted"
        ]
        assert len(hosted) == tested and all("invalid" not in one for one in hosted)
        assert {
            json.loads((folder / part / "models.json").read_text())[role]
            for role in ("teacher", "student")
        } == {"gpt-4.1", "gpt-4.1-mini"}
    for part in (
        "fine-tuning job ftjob-1: running",
        "fine-tuning job ftjob-3: succeeded",
        "judge: hosted_base: 100%",
        "0 failed, $",
    ):
        assert part in said
    assert (folder / "01_correctness.ipynb").exists() and not (DATA / "recorded").exists()


FILES = {
    "correctness": "correction_finetuning_events.jsonl",
    "pairwise": "resolved_pairwise_finetuning_events.jsonl",
    "single_grading": "single_grading_finetuning_events.jsonl",
}


def test_no_key_is_left_behind(series):
    _, folder, said = series
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30 and {".ipynb", ".html", ".jsonl", ".json", ".npz"} <= {
        path.suffix for path in files
    }
    for key in KEYS.values():
        assert key not in said
        for path in files:
            assert key.encode() not in path.read_bytes(), path
    assert "Bearer" not in said and not any(b"Bearer" in path.read_bytes() for path in files)


def test_it_is_replayed_from_its_folder_alone_and_recording_again_asks_nothing(series):
    server, folder, _ = series
    before = len(server.requests)
    bare = {
        name: value
        for name, value in environment(server.url, folder).items()
        if not name.endswith(("_MODEL", "_KEY", "_TOKEN"))
    }
    replay = subprocess.run(
        [sys.executable, "-m", "helpers", "run", "02_pairwise"],
        env=bare | {"JUDGE_MODE": "replay"},
        capture_output=True,
        text=True,
    )
    assert replay.returncode == 0 and "hosted_base" in replay.stdout, replay.stderr[-2000:]
    assert len(server.requests) == before
    again = subprocess.run(
        [sys.executable, "-m", "helpers", "run", "02_pairwise"],
        env=environment(server.url, folder),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert {path.split("/")[2] for _, path in server.requests[before:]} == {"models"}, (
        "only the check before the first call"
    )
    table = cost_table(CallLog(folder / "pairwise" / "calls.jsonl", "replay"))
    assert (
        set(table["tokens"][:-1]) == {"reported"} and ("fine-tuning", "gpt-4.1-mini") in table.index
    )


# Interrupted runs

PROGRAM = """
import asyncio, sys
from helpers import CallLog, judge_rows, live
from llama_index.core.evaluation import CorrectnessEvaluator

path, url = {path!r}, {url!r}
rows = [{{"question": f"Question {{i}}?", "reference": "It is so.", "response_data": {{"text": f"Answer {{i}}."}}}} for i in range(200)]
judge = CorrectnessEvaluator(llm=CallLog(path, "record").llm("gpt-4.1", live(f"gpt-4.1@{{url}}"), params={{"temperature": 0}}))
"""
IN_A_SCRIPT = (
    PROGRAM
    + 'rows = asyncio.run(judge_rows(rows, judge, name="t", concurrency=8))\nprint(sum(row["evaluations"][0]["score"] is not None for row in rows))'
)
IN_A_CELL = (
    PROGRAM
    + 'rows = await judge_rows(rows, judge, name="t", concurrency=8)\nprint(sum(row["evaluations"][0]["score"] is not None for row in rows))'
)


def logged(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(path, rows):
    end = time.monotonic() + 60
    while logged(path) < rows:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.01)


def check_asked(server, path, answered):
    """All rows are there; what was answered was asked once, and what was under way at most twice."""
    assert len(CallLog(path, "replay")) == 200
    times = [server.asked[key] for key in server.asked]
    assert len(times) == 200 and max(times) <= 2 and sum(times) <= 200 + 8, (sum(times), max(times))
    first = [json.dumps(row["messages"]) for row in load_rows(path)[:answered]]
    asked = collections.Counter(json.dumps(body["messages"]) for body in server.bodies)
    assert answered >= 40 and all(asked[prompt] == 1 for prompt in first), (
        "an answered call was asked again"
    )


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_at_any_moment_goes_on_where_it_was(name, tmp_path, monkeypatch):
    path = tmp_path / "calls.jsonl"
    env = {**os.environ, **KEYS, "PYTHONPATH": str(ROOT / "notebooks")}
    with Server(delay=0.02) as server:
        command = [sys.executable, "-c", IN_A_SCRIPT.format(path=str(path), url=server.url)]
        first = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wait_for(path, 60)
        first.send_signal(getattr(signal, name))
        _, said = first.communicate(timeout=60)
        assert first.returncode != 0 and (name != "SIGINT" or "KeyboardInterrupt" in said)
        with pytest.warns(UserWarning, match="torn last line") if torn(path) else no_warning():
            answered = len(CallLog(path, "replay"))
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.stdout.strip() == "200", run.stderr[-2000:]
        check_asked(server, path, answered)


def torn(path):
    return not path.read_bytes().endswith(b"\n")


def no_warning():
    import contextlib

    return contextlib.nullcontext()


def execute(client, code, wait=True):
    """Run code in a kernel: (the name of the error, what it printed)."""
    id = client.execute(code)
    if not wait:
        return id
    return outcome(client, id)


def outcome(client, id):
    error, said, end = None, "", time.monotonic() + 120
    while time.monotonic() < end:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        if message["parent_header"].get("msg_id") != id:
            continue
        if message["msg_type"] == "error":
            error = message["content"]["ename"]
        elif message["msg_type"] == "stream":
            said += message["content"]["text"]
        elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return error, said
    raise TimeoutError


@pytest.mark.parametrize("how", ["interrupt", "restart"])
def test_a_kernel_that_is_interrupted_or_restarted_goes_on_where_it_was(how, tmp_path):
    path = tmp_path / "calls.jsonl"
    with Server(delay=0.02) as server:
        manager, client = start_new_kernel(
            kernel_name="python3", env={**os.environ, **KEYS, "PYTHONPATH": str(ROOT / "notebooks")}
        )
        try:
            cell = IN_A_CELL.format(path=str(path), url=server.url)
            id = execute(client, cell, wait=False)
            wait_for(path, 60)
            if how == "interrupt":
                manager.interrupt_kernel()
                assert outcome(client, id)[0] in ("KeyboardInterrupt", "CancelledError")
            else:
                manager.restart_kernel(now=True)
                client.wait_for_ready(timeout=60)
            time.sleep(0.2)
            answered = logged(path)
            error, said = execute(client, cell)
            assert error is None and re.search(r"^200$", said, re.M), (error, said)
            check_asked(server, path, answered)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
