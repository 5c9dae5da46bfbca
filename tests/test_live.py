"""The series live, end to end, against the loopback server; and what is left when a run is interrupted."""

import collections
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
import zlib

import pytest
from conftest import ROOT
from jupyter_client.manager import start_new_kernel
from server import Server, answer

from helpers import CallLog, cost_table, load_rows
from helpers.rows import DATA

pytestmark = pytest.mark.slow

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


def recorded_replies(part):
    """{prompt: the bundled replies to it, by sample}, so that a live run repeats the bundled one."""
    replies = collections.defaultdict(list)
    for row in CallLog(DATA / part / "calls.jsonl", "replay").rows():
        replies[json.dumps(row["messages"])].append(row["response"])
    return replies


@contextlib.contextmanager
def recorded(notebook, folder):
    """A notebook recorded with a hosted student, through faults: (server, what was said)."""
    replies, refused, answered = recorded_replies(NOTEBOOKS[notebook]), [], collections.Counter()

    def fault(body, before):
        # Now and then a refusal that quotes the key, each once: the call is asked again.
        content = json.dumps(body["messages"])
        if content not in refused and zlib.crc32(content.encode()) % 17 == 0:
            refused.append(content)
            keys = f"{KEYS['OPENAI_API_KEY']} and {KEYS['ENDPOINT_API_KEY']}"
            return answer(429, f"Rate limit reached for {keys}")
        answered[body["model"], content] += 1
        known = replies[content]
        if not known:
            return answer(400, "not a prompt of the bundled run")
        return {"content": known[min(answered[body["model"], content], len(known)) - 1]}

    with Server(fault=fault) as server:
        command = [sys.executable, "-m", "helpers", "run", notebook]
        env = environment(server.url, folder)
        run = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
        assert run.returncode == 0, run.stderr[-3000:]
        server.refused = len(refused)
        yield server, run.stdout + run.stderr


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


# The third has no way of its own into a live run, and takes as long as both.
@pytest.mark.parametrize("notebook", ["01_correctness", "02_pairwise"])
def test_a_notebook_is_recorded_end_to_end(notebook, tmp_path):
    with recorded(notebook, tmp_path) as (server, said):
        check_the_rows(server, tmp_path, NOTEBOOKS[notebook], said)
        check_that_no_key_is_left(tmp_path, said)
        if notebook == "02_pairwise":
            check_that_nothing_is_asked_again(server, tmp_path)


def check_the_rows(server, folder, part, said):
    bundled, log = (CallLog(where / part / "calls.jsonl", "replay") for where in (DATA, folder))
    answered = len(server.bodies) - server.refused
    assert server.refused > 20 and answered == len(log), "a call was paid twice"
    tested = ROWS[part][1]
    judged = tested * (4 if part == "pairwise" else 2)  # by the hosted student and its base
    assert len(log) == len(bundled) + judged
    for name in ("train_qa", "test_qa_complete"):
        rows = (load_rows(where / part / f"{name}.jsonl") for where in (folder, DATA))
        for mine, theirs in zip(*rows, strict=True):
            ours = [one for one in mine.pop("evaluations") if not one["llm"].startswith("hosted")]
            for one, other in zip(ours, theirs.pop("evaluations"), strict=True):
                assert one == other or one["llm"] in COMPUTED and alike(one, other)
            assert (
                json.loads(json.dumps(mine).replace("gpt-4.1-nano", "stand-in-answerer")) == theirs
            )
    [job] = server.jobs.values()
    chats = load_rows(folder / part / FILES[part])
    assert len(server.files[job["training_file"]].splitlines()) == len(chats)
    note = json.loads((folder / part / "finetuning_job.json").read_text(encoding="utf-8"))
    assert note["status"] == "succeeded"
    complete = load_rows(folder / part / "test_qa_complete.jsonl")
    hosted = [one for row in complete for one in row["evaluations"] if one["llm"] == "hosted"]
    assert len(hosted) == tested and all("invalid" not in one for one in hosted)
    models = json.loads((folder / part / "models.json").read_text(encoding="utf-8"))
    assert (models["teacher"], models["student"]) == ("gpt-4.1", "gpt-4.1-mini")
    for words in (
        "fine-tuning job ftjob-1: running",
        "fine-tuning job ftjob-1: succeeded",
        "judge: hosted_base: 100%",
        "0 failed, $",
    ):
        assert words in said
    assert list(folder.glob("0*.ipynb")) and not (DATA / "recorded").exists()


FILES = {
    "correctness": "correction_finetuning_events.jsonl",
    "pairwise": "resolved_pairwise_finetuning_events.jsonl",
    "single_grading": "single_grading_finetuning_events.jsonl",
}


def check_that_no_key_is_left(folder, said):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {".ipynb", ".html", ".jsonl", ".json"} <= {path.suffix for path in files}
    for key in KEYS.values():
        assert key not in said
        for path in files:
            assert key.encode() not in path.read_bytes(), path
    assert "Bearer" not in said and not any(b"Bearer" in path.read_bytes() for path in files)


def check_that_nothing_is_asked_again(server, folder):
    """It is replayed from its folder alone, and recorded again without a call."""
    before, env = len(server.requests), environment(server.url, folder)
    roles_and_keys = ("_MODEL", "_KEY", "_TOKEN")
    bare = {name: value for name, value in env.items() if not name.endswith(roles_and_keys)}
    command = [sys.executable, "-m", "helpers", "run", "02_pairwise"]
    settings = {**bare, "JUDGE_MODE": "replay"}
    replay = subprocess.run(command, env=settings, capture_output=True, encoding="utf-8")
    assert replay.returncode == 0 and "hosted_base" in replay.stdout, replay.stderr[-2000:]
    assert len(server.requests) == before
    again = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert again.returncode == 0, again.stderr[-2000:]
    asked = {path.split("/")[2] for _, path in server.requests[before:]}
    assert asked == {"models"}, "only the check before the first call"
    table = cost_table(CallLog(folder / "pairwise" / "calls.jsonl", "replay"))
    assert set(table["tokens"][:-1]) == {"reported"}
    assert ("fine-tuning", "gpt-4.1-mini") in table.index


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
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
        )
        wait_for(path, 60)
        first.send_signal(getattr(signal, name))
        _, said = first.communicate(timeout=60)
        assert first.returncode != 0 and (name != "SIGINT" or "KeyboardInterrupt" in said)
        with pytest.warns(UserWarning, match="torn last line") if torn(path) else no_warning():
            answered = len(CallLog(path, "replay"))
        run = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
        assert run.stdout.strip() == "200", run.stderr[-2000:]
        check_asked(server, path, answered)


def torn(path):
    return not path.read_bytes().endswith(b"\n")


def no_warning():
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
