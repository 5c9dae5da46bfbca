"""Notebooks recorded live, end to end, against the loopback server."""

import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import zlib

import pytest
from conftest import ROOT
from server import Server, answer, reply_to

from helpers import CallLog, cost_table, load_rows
from helpers.live.models import request_settings
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
ROLES = {
    "TEACHER_MODEL": "gpt-4.1",
    "WRITER_MODEL": "llama3.1:8b",
    "ANSWERER_MODEL": "gpt-4.1-nano",
    "SMALL_MODEL": "smollm2:135m",
}
TEACHER = "stand-in-teacher"
# The bundled names of these models. The student and its base answer as the teacher did.
BUNDLED = dict(zip(ROLES.values(), (TEACHER, "stand-in-question-writer", "stand-in-answerer")))
BUNDLED[ROLES["SMALL_MODEL"]] = "SmolLM2-135M-Instruct"


def environment(url, folder, **more):
    roles = {**ROLES, "STUDENT_MODEL": "gpt-4.1-mini"}
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


def request(model, messages, settings):
    return json.dumps([model, messages, settings["temperature"], settings["max_tokens"]])


def recorded_replies(part):
    """{request: the bundled replies to it, by sample}: a live run repeats the bundled one."""
    replies = collections.defaultdict(list)
    rows = CallLog(DATA / part / "calls.jsonl", "replay").rows()
    for row in sorted(rows, key=lambda row: row["sample"]):
        model, messages = row["model"], row["messages"]
        sent = request(model, messages, request_settings(model, row["params"]))
        reply = {"content": row["response"], "finish_reason": row["finish_reason"]}
        replies[sent].append(reply)
    return replies


SCRIPT = "<script>alert(/evil-17/)</script>"
IMAGE = "<img/src=x/onerror=alert(18)>"  # a model's name may hold this


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_no_script_of_a_reply_is_in_a_page(notebook, tmp_path):
    """Every reply holds one, and so does all that is made of replies; and so do models' names."""

    def reply(body, before):
        messages = body["messages"]
        text = reply_to(messages, before)  # two samples differ
        if "generate only questions" in messages[-1]["content"]:  # a "?" ends a question
            return {"content": text.replace("What", f"What {SCRIPT}")}
        return {"content": text + SCRIPT}

    with Server(fault=reply) as server:
        roles = {role: f"{role.split('_')[0].lower()}{IMAGE}@{server.url}" for role in ROLES}
        env = environment(server.url, tmp_path, STUDENT_MODEL="minilm", **roles)
        command = [sys.executable, "-m", "helpers", "run", notebook]
        run = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr[-3000:]
    page = (tmp_path / f"{notebook}.html").read_text(encoding="utf-8")
    assert "alert(/evil-17/)" in page and "onerror=alert(18)" in page, "they are shown as text"
    assert SCRIPT not in page and IMAGE not in page


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
        model = BUNDLED.get(body["model"], TEACHER)
        known = replies[sent := request(model, body["messages"], body)]
        answered[body["model"], sent] += 1
        if not known:
            return answer(400, "not a request of the bundled run")
        return known[min(answered[body["model"], sent], len(known)) - 1]

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
    tested = len(load_rows(DATA / part / "test_qa.jsonl"))
    judged = tested * (4 if part == "pairwise" else 2)  # by the hosted student and its base
    assert len(log) == len(bundled) + judged
    for name in ("train_qa", "test_qa_complete"):
        rows = (load_rows(where / part / f"{name}.jsonl") for where in (folder, DATA))
        for mine, theirs in zip(*rows, strict=True):
            ours = [one for one in mine.pop("evaluations") if not one["llm"].startswith("hosted")]
            for one, other in zip(ours, theirs.pop("evaluations"), strict=True):
                assert one == other or one["llm"] in COMPUTED and alike(one, other)
            assert mine == theirs
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
    answered = table.drop(index="(no reply, at most)", level="stage")
    assert set(answered["tokens"][:-1]) == {"reported"}
    assert ("fine-tuning", "gpt-4.1-mini") in table.index
