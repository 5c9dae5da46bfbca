"""What is left of a live run when it is interrupted, and that the next run goes on from there."""

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

import pytest
from conftest import ROOT
from jupyter_client.manager import start_new_kernel
from server import Server

from helpers import CallLog, load_rows

pytestmark = pytest.mark.slow

PROGRAM = """
import asyncio, sys
from helpers import CallLog, judge_rows, live
from llama_index.core.evaluation import CorrectnessEvaluator

path, url = {path!r}, {url!r}
answers = [{{"text": f"Answer {{i}}."}} for i in range(200)]
rows = [
    {{"question": f"Question {{i}}?", "reference": "It is so.", "response_data": answer}}
    for i, answer in enumerate(answers)
]
log = CallLog(path, "record")
llm = log.llm("gpt-4.1", live(f"gpt-4.1@{{url}}"), params={{"temperature": 0}})
judging = judge_rows(rows, CorrectnessEvaluator(llm=llm), name="t", concurrency=8)
rows = {run}
log.close()
print(sum(row["evaluations"][0]["score"] is not None for row in rows))
"""


def program(run, path, server):
    """The code of a run; `run` is how it waits for `judging`."""
    return PROGRAM.format(path=str(path), url=server.url, run=run)


def logged(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(path, rows):
    end = time.monotonic() + 60
    while logged(path) < rows:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.01)


def check_asked(server, path, answered):
    """All rows are there. An answered call was asked once, one under way at most twice."""
    assert len(CallLog(path, "replay")) == 200
    times = [server.asked[key] for key in server.asked]
    assert len(times) == 200 and max(times) <= 2 and sum(times) <= 200 + 8, (sum(times), max(times))
    first = [json.dumps(row["messages"]) for row in load_rows(path)[:answered]]
    asked = collections.Counter(json.dumps(body["messages"]) for body in server.bodies)
    assert answered >= 40 and all(asked[prompt] == 1 for prompt in first), (
        "an answered call was asked again"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals between processes")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_at_any_moment_goes_on_where_it_was(
    name, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "notebooks"))
    with Server(delay=0.02) as server:
        code = program("asyncio.run(judging)", path, server)
        first = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        wait_for(path, 60)
        first.send_signal(getattr(signal, name))
        _, said = first.communicate(timeout=60)
        assert first.returncode != 0 and (name != "SIGINT" or "KeyboardInterrupt" in said)
        with pytest.warns(UserWarning, match="torn last line") if torn(path) else no_warning():
            answered = len(CallLog(path, "replay"))
        exec(code, {})  # in this process, which has imported all that it needs
        assert capsys.readouterr().out.strip() == "200"
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
            kernel_name="python3", env={**os.environ, "PYTHONPATH": str(ROOT / "notebooks")}
        )
        try:
            cell = program("await judging", path, server)
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
