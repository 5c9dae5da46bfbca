"""Single grading: the generators, scores from 0 to 1, samples, log-probabilities, the metrics."""

import asyncio
import json
import math
import shutil

import numpy as np
import pytest
from fake import FakeLive, answered
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LogProb
from llama_index.core.evaluation import CorrectnessEvaluator

from helpers import (
    CallLog,
    ExtractiveAnswerer,
    LocalFinetuneEngine,
    SingleGradingEvaluator,
    Student,
    compare_designs,
    compare_graders,
    correctness_report,
    embeddings,
    fill,
    finetuning_events,
    generate,
    grading_report,
    items_of,
    judge_rows,
    live,
    load_rows,
    metrics,
    plot_probabilities,
    pool_samples,
    probabilities_of,
    readable_events,
    save_events,
    save_rows,
    score_distribution,
    scores_of,
    untrained_judges,
)
from helpers import student as student_module
from helpers.grade_metrics import GRADES
from helpers.judge import lower_median
from helpers.live import budget
from helpers.log import Collected, make_row
from helpers.rows import DATA, DamagedFile
from helpers.student import LocalJudge, read_prompt

BUNDLED = DATA / "single_grading"
CONTEXT = (
    "The bridge opened in 1937. Joseph Strauss was its engineer. It is painted orange. "
    "Fog is common there."
)


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    """The properties are not about the intervals."""
    metrics.RESAMPLES = 50
    yield
    metrics.RESAMPLES = 1000


@pytest.fixture
def grading_rows():
    """Twelve single-grading rows: four questions, three answers each."""
    return [
        {
            "question": f"Question {i // 3}?",
            "document": f"document {i // 6}",
            "response_data": {"model": f"m{i % 3}", "text": f"Answer {i}.", "context": CONTEXT},
        }
        for i in range(12)
    ]


class Graded(FakeLive):
    """Replies with the score that a rule gives to (question, context, answer)."""

    def __init__(self, rule, **settings):
        super().__init__(**settings)
        self.__dict__["rule"] = rule

    def chat(self, messages, **kwargs):
        response = super().chat(messages)
        response.message.content = str(
            self.__dict__["rule"](*read_prompt([{"role": "user", "content": messages[-1].content}]))
        )
        return response


def judged(rows, llm, name="t", **settings):
    return asyncio.run(
        judge_rows(rows, SingleGradingEvaluator(llm, "Be fair.", **settings), name=name)
    )


def tokens(*places):
    return [
        [LogProb(token=token, logprob=math.log(p)) for token, p in place.items()]
        for place in places
    ]


# Judging


def test_rows_are_graded_on_the_context_and_anything_unreadable_is_invalid(grading_rows):
    replies = {0: "0.9\nGood.", 1: "85 %", 2: "No.", 3: "1.5"}
    rows = judged(
        grading_rows,
        Graded(
            lambda q, context, a: replies.get(int(a[7:-1]), "0.3") if context == CONTEXT else "0"
        ),
    )
    first, second, third, fourth, fifth = (row["evaluations"][0] for row in rows[:5])
    assert first == {"llm": "t", "score": 0.9, "acceptable": True, "text": "0.9\nGood."}
    assert second["score"] == pytest.approx(0.85) and fifth["acceptable"] is False
    assert (third["score"], third["invalid"], fourth["invalid"]) == (
        None,
        "no score in the reply",
        "score 1.5 is outside 0 to 1",
    )
    assert third["acceptable"] is None


def test_exactly_the_threshold_is_not_acceptable(grading_rows):
    for reply, scale in (("0.8", 1), ("80", 100), ("80 %", 1), ("0.80", 1)):
        [row] = judged(grading_rows[:1], Graded(lambda *item, said=reply: said), scale=scale)
        assert (
            row["evaluations"][0]["acceptable"] is False and row["evaluations"][0]["score"] == 0.8
        )
    [row] = judged(grading_rows[:1], Graded(lambda *item: "81"), scale=100)
    assert row["evaluations"][0]["acceptable"] is True


def test_rubric_and_format_stand_in_the_prompt_and_braces_are_no_placeholders():
    first, second = SingleGradingEvaluator(FakeLive(), "Mind {query} and {{it}}.").messages(
        "Q {context}", "C", "A"
    )
    assert first.content.startswith(
        "Mind {query} and {{it}}.\n\nWrite the score alone on the first line, as a number from 0.0"
    )
    assert (
        second.content == "## User Query\nQ {context}\n\n## Context\nC\n\n## Generated Answer\nA\n"
    )
    assert (
        "whole number from 0 (no marks) to 100"
        in SingleGradingEvaluator(FakeLive(), "x", scale=100).messages("Q", "C", "A")[0].content
    )
    with pytest.raises(ValueError, match="scale=5: expected 1 or 100"):
        SingleGradingEvaluator(FakeLive(), "x", scale=5)


def test_it_is_an_evaluator_of_llama_index(grading_rows):
    evaluator = SingleGradingEvaluator(Graded(lambda *item: "0.9\nGood."), "Be fair.")
    result = evaluator.evaluate(query="Q?", response="A.", contexts=["One.", "Two."])
    assert (result.score, result.passing, result.feedback, result.invalid_result) == (
        0.9,
        True,
        "0.9\nGood.",
        False,
    )
    result = SingleGradingEvaluator(Graded(lambda *item: "?"), "x").evaluate(
        query="Q?", response="A.", contexts=["C"]
    )
    assert (result.score, result.passing, result.invalid_reason) == (
        None,
        None,
        "no score in the reply",
    )
    with pytest.raises(ValueError, match="must be given"):
        evaluator.evaluate(query="Q?", response="A.")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"question": None}, "question must be a text"),
        ({"question": " "}, "question must be a text, found ' '"),
        ({"response_data": {"text": "A"}}, "response_data.context must be a text, found None"),
        ({"response_data": {"text": "A", "context": ""}}, "response_data.context"),
        ({"response_data": "A"}, "response_data.context"),
        (
            {"response_data": {"text": 42, "context": "C"}},
            "response_data.text must be a text, found 42",
        ),
    ],
)
def test_a_bad_row_is_named_before_anything_is_asked(grading_rows, change, said):
    llm = Graded(lambda *item: "0.5")
    grading_rows[7] = {**grading_rows[7], **change}
    with pytest.raises(ValueError, match=f"row 7: {said}"):
        judged(grading_rows, llm)
    assert llm.count == 0


def test_a_failed_call_is_an_invalid_row(tmp_path, grading_rows):
    llm = CallLog(tmp_path / "c.jsonl", "record").llm(
        "m", Graded(lambda *item: "0.5", broken="Answer 4.")
    )
    rows = judged(grading_rows, llm)
    assert rows[4]["evaluations"][0]["invalid"].startswith("the call failed: ConnectionError")
    assert [row["evaluations"][0]["score"] for row in rows].count(0.5) == 11


# Samples


def sampled(row, *scores):
    return {
        **row,
        "evaluations": [
            {
                "llm": f"s{k}",
                "score": score,
                "text": f"said {score}",
                **({"invalid": "no score"} if score is None else {}),
            }
            for k, score in enumerate(scores)
        ],
    }


def test_samples_are_pooled_over_the_valid_ones(grading_rows):
    [row] = pool_samples(
        [sampled(grading_rows[0], 1.0, 0.4, 0.9)], ["s0", "s1", "s2"], name="teacher"
    )
    assert row["evaluations"] == [
        {
            "llm": "teacher",
            "score": 0.9,
            "acceptable": True,
            "text": "said 0.9",
            "samples": [1.0, 0.4, 0.9],
        }
    ]
    [row] = pool_samples(
        [sampled(grading_rows[0], 0.8, 0.8, 0.9)], ["s0", "s1", "s2"], name="teacher"
    )
    assert row["evaluations"][0]["acceptable"] is False
    [row] = pool_samples(
        [sampled(grading_rows[0], None, 0.9, 0.7)], ["s0", "s1", "s2"], name="teacher"
    )
    [evaluation] = row["evaluations"]
    assert (
        evaluation["score"] == 0.7
        and evaluation["samples"] == [None, 0.9, 0.7]
        and not evaluation["acceptable"]
    )
    assert (
        score_distribution(evaluation) == {0.7: 0.5, 0.9: 0.5}
        and probabilities_of([row], "teacher")[0] == 0.5
    )


def test_a_sample_at_the_threshold_does_not_accept(grading_rows):
    rows = pool_samples(
        [sampled(grading_rows[0], 0.8, 0.9, 0.9)], ["s0", "s1", "s2"], name="teacher"
    )
    assert probabilities_of(rows, "teacher")[0] == pytest.approx(2 / 3)


def test_a_row_without_a_valid_sample_is_invalid_and_counted(grading_rows):
    rows = pool_samples(
        [sampled(grading_rows[0], None, None), sampled(grading_rows[1], 0.9, 0.9)],
        ["s0", "s1"],
        name="teacher",
    )
    assert (
        rows[0]["evaluations"][0]["invalid"] == "no valid sample: no score"
        and score_distribution(rows[0]["evaluations"][0]) == {}
    )
    rows = [
        {**row, "evaluations": row["evaluations"] + [{"llm": "s", "score": 0.9, "text": "x"}]}
        for row in rows
    ]
    assert grading_report(rows, "s", ["teacher"]).loc["teacher", ["n", "coverage"]].tolist() == [
        1,
        0.5,
    ]
    assert grading_report(rows, "teacher", ["s"]).loc["s", ["n", "coverage"]].tolist() == [1, 1]
    with pytest.raises(KeyError, match="row 0 has no judgement by 's2'"):
        pool_samples([sampled(grading_rows[0], 0.9, 0.9)], ["s0", "s1", "s2"], name="teacher")


def test_the_lower_median_is_one_of_the_scores_and_strict_on_a_tie():
    assert (
        lower_median({0.1: 1 / 3, 0.9: 2 / 3}) == 0.9 and lower_median({0.7: 0.5, 0.9: 0.5}) == 0.7
    )
    assert (
        lower_median(dict.fromkeys((0.2, 0.5, 1.0), 1 / 3)) == 0.5
        and lower_median({0.4: 1.0}) == 0.4
    )
    with pytest.raises(ValueError, match="no median"):
        lower_median({})


# Log-probabilities, from the model to the rows


class WithLogprobs(FakeLive):
    def chat(self, messages, **kwargs):
        super().chat(messages)
        alternatives = tokens(
            {"90": 0.5, "60": 0.4, "x": 0.1}, {"\n": 1.0}, {"Because": 1.0}, {" so": 1.0}
        )
        return ChatResponse(
            message=ChatMessage(role="assistant", content="90\nBecause so"), logprobs=alternatives
        )


def test_log_probabilities_are_logged_replayed_and_become_the_distribution(tmp_path, grading_rows):
    path = tmp_path / "calls.jsonl"
    params = {"logprobs": True, "top_logprobs": 20}
    recorded = judged(
        grading_rows,
        CallLog(path, "record").llm("m", WithLogprobs(), params=params),
        scale=100,
        logprobs=True,
    )
    replayed = judged(
        grading_rows, CallLog(path, "replay").llm("m", params=params), scale=100, logprobs=True
    )
    assert replayed == recorded
    evaluation = replayed[0]["evaluations"][0]
    assert evaluation["distribution"] == [[0.6, pytest.approx(4 / 9)], [0.9, pytest.approx(5 / 9)]]
    assert evaluation["score"] == 0.9 and probabilities_of(replayed, "t")[0] == pytest.approx(5 / 9)
    assert len(load_rows(path)[0]["logprobs"]) == 2, "only the first line's are kept"


def test_a_teacher_without_log_probabilities_is_invalid_not_certain(grading_rows):
    [row] = judged(grading_rows[:1], Graded(lambda *item: "90\nGood."), scale=100, logprobs=True)
    assert (
        row["evaluations"][0]["score"] is None
        and row["evaluations"][0]["invalid"] == "no log-probabilities of a score"
    )


def test_fill_takes_log_probabilities_from_a_batch(tmp_path, grading_rows):
    log = CallLog(tmp_path / "calls.jsonl", "collect")
    llm = log.llm("m", params={"logprobs": True, "top_logprobs": 2})
    with pytest.raises(Collected):
        judged(grading_rows[:1], llm, scale=100, logprobs=True)
    [request] = load_rows(log.requests_path)
    content = [
        {"token": token, "logprob": -0.1, "top_logprobs": [{"token": token, "logprob": -0.1}]}
        for token in ("70", "\n", "Yes")
    ]
    choice = {
        "message": {"content": "70\nYes"},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    save_rows(
        tmp_path / "results.jsonl",
        [
            {
                "custom_id": request["custom_id"],
                "response": {"status_code": 200, "body": {"choices": [choice]}},
            }
        ],
    )
    assert fill(log, tmp_path / "results.jsonl") == []
    [row] = judged(grading_rows[:1], llm, scale=100, logprobs=True)
    assert row["evaluations"][0]["distribution"] == [[0.7, 1.0]]


# Generators


@pytest.mark.slow
def test_the_extractive_answerer_quotes_the_nearest_sentences_in_their_order():
    pair = {
        "question": "Who was the engineer of the bridge, and when did it open?",
        "context": CONTEXT,
    }
    [row] = answered(ExtractiveAnswerer(sentences=2), pair)
    assert (
        row["response_data"]["text"]
        == "The bridge opened in 1937. Joseph Strauss was its engineer."
    )
    with pytest.raises(
        ValueError, match="reads LlamaIndex's question-answering prompt; this one begins 'Who"
    ):
        ExtractiveAnswerer().complete("Who was it?")


def test_the_extractive_answerer_quotes_no_title_and_cuts_no_abbreviation(monkeypatch):
    said = [
        "The city lies on the St. Lawrence River, below Mt. Royal.",
        "Dr. Chomedey founded it in 1642.",
        "Winters are long.",
    ]
    monkeypatch.setattr(generate, "embed", lambda texts: np.eye(len(texts)))
    context = f"title: History of Montreal\n\n{said[0]} {said[1]}\n\ntitle: Winter\n\n{said[2]}"
    for k in (1, 2, 3):
        [row] = answered(
            ExtractiveAnswerer(sentences=k), {"question": "Where?", "context": context}
        )
        assert row["response_data"]["text"] == " ".join(said[:k])


def test_float_noise_of_another_machine_chooses_the_same_sentences(monkeypatch):
    rows = load_rows(DATA / "correctness" / "test_qa.jsonl") + load_rows(BUNDLED / "test_qa.jsonl")
    extracted = [row for row in rows if row["response_data"]["model"] == "extractive"]
    assert extracted
    encoder, noise = embeddings.local_embedding(), np.random.default_rng(0)

    class Noisy:
        def get_text_embedding_batch(self, texts):
            return np.array(encoder.get_text_embedding_batch(texts)) + noise.normal(
                scale=1e-7, size=(len(texts), 384)
            )

    monkeypatch.setattr(embeddings, "local_embedding", Noisy)
    pairs = [
        {"question": row["question"], "context": row["response_data"]["context"]}
        for row in extracted
    ]
    again = answered(ExtractiveAnswerer(sentences=2), *pairs)
    assert [row["response_data"]["text"] for row in again] == [
        row["response_data"]["text"] for row in extracted
    ]


@pytest.mark.slow
def test_a_model_of_hugging_face_on_this_machine_is_a_generator(tmp_path, monkeypatch):
    """A real HuggingFaceLLM with a tiny random model: its nonsense is logged and replayed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {
        "<unk>": 0,
        **{
            word: i
            for i, word in enumerate("the bridge opened in and who was it answer query".split(), 1)
        },
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(vocabulary),
            n_positions=4096,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(budget, "MAX_TOKENS", 5)
    pair, path = {"question": "Who was it?", "context": CONTEXT}, tmp_path / "c.jsonl"
    log, tiny = CallLog(path, "record"), live(f"local:{tmp_path / 'tiny'}")
    generation = tiny()._model.generation_config
    for params, never, words, reason in (
        ({"temperature": 0.7}, [0], 5, "length"),
        ({"temperature": 0, "max_tokens": 3}, [0], 3, "length"),
        ({"temperature": 0}, list(range(1, len(vocabulary))), 0, "stop"),  # it can but end
    ):
        generation.suppress_tokens = never
        [row] = answered(log.llm("tiny", tiny, params=params), pair)
        assert len(row["response_data"]["text"].split()) == words
        assert [*log.rows()][-1]["finish_reason"] == reason
        replayed = answered(CallLog(path, "replay").llm("tiny", params=params), pair)
        assert [row] == replayed and len(log) == len(load_rows(path))


# Metrics


def scored(teacher, **judges):
    return [
        {
            "document": i // 4,
            "evaluations": [{"llm": "t", "score": t}]
            + [{"llm": name, "score": given[i]} for name, given in judges.items()],
        }
        for i, t in enumerate(teacher)
    ]


def test_the_figures_are_those_of_scikit_learn():
    from sklearn.metrics import (
        accuracy_score,
        brier_score_loss,
        cohen_kappa_score,
        precision_score,
        recall_score,
        roc_auc_score,
    )

    rng = np.random.default_rng(0)
    truth = rng.choice([0.2, 0.5, 0.8, 0.9, 1.0], size=60)
    given = np.round(np.clip(truth + rng.normal(scale=0.2, size=60), 0, 1), 1)
    report = grading_report(scored(truth.tolist(), s=given.tolist()), "t", ["s"]).loc["s"]
    y, guess = truth > 0.8, given > 0.8
    expected = {
        "correlation": np.corrcoef(truth, given)[0, 1],
        "mae": np.abs(truth - given).mean(),
        "accuracy": accuracy_score(y, guess),
        "precision": precision_score(y, guess),
        "recall": recall_score(y, guess),
        "kappa": cohen_kappa_score(y, guess),
        "auc": roc_auc_score(y, given),
        "brier": brier_score_loss(y, given),
        "coverage": 1.0,
    }
    assert list(expected) == list(GRADES)
    for name, value in expected.items():
        assert report[name] == pytest.approx(value), name
    assert (
        report["acceptable"] == y.sum()
        and report["accuracy_low"] < report["accuracy"] < report["accuracy_high"]
    )


def test_undefined_figures_are_nan(recwarn):
    report = grading_report(scored([0.5] * 8, s=[0.4] * 8), "t", ["s"]).loc["s"]
    assert np.isnan(
        report[["correlation", "precision", "recall", "kappa", "auc"]].astype(float)
    ).all()
    assert report["accuracy"] == 1 and report["mae"] == pytest.approx(0.1)
    # A connection of an earlier test may be collected, and complain, just now.
    assert not [warning for warning in recwarn.list if warning.category is not ResourceWarning]


def test_graders_are_compared_on_the_same_rows():
    rng = np.random.default_rng(1)
    truth = rng.choice([0.2, 0.5, 0.9, 1.0], size=48)
    good = np.clip(truth + rng.normal(scale=0.05, size=48), 0, 1).tolist()
    bad = rng.uniform(size=48).tolist()
    table = compare_graders(scored(truth.tolist(), good=good, bad=bad), "t", "good", "bad")
    assert list(table.index) == ["mae", "accuracy", "auc", "brier"] and (table["p"] < 0.05).all()
    assert table.loc["mae", "difference"] < 0 < table.loc["auc", "difference"]
    turned = compare_graders(scored(truth.tolist(), good=good, bad=bad), "t", "bad", "good")
    assert turned["difference"].tolist() == pytest.approx((-table["difference"]).tolist())
    with pytest.raises(ValueError, match="no row on which"):
        compare_graders(scored([0.5, 0.9], a=[None, 0.9], b=[0.5, None]), "t", "a", "b")


# The student


@pytest.fixture(scope="module")
def bundled():
    """(items, scores, distributions) of the bundled training rows, and the test rows."""
    train, test = load_rows(BUNDLED / "train_qa.jsonl"), load_rows(BUNDLED / "test_qa.jsonl")
    soft = [score_distribution(row["evaluations"][0]) for row in train]
    return (items_of(train), scores_of(train, "teacher").tolist(), soft), test


@pytest.fixture(scope="module")
def trained(bundled):
    return Student.fit(*bundled[0])


def test_the_student_beats_what_learns_nothing(bundled, trained):
    (_, scores, _), test = bundled
    rows = asyncio.run(
        judge_rows(test, SingleGradingEvaluator(trained.llm(), "x", logprobs=True), name="student")
    )
    for name, llm in untrained_judges(float(np.median(scores)), 0, 1).items():
        rows = asyncio.run(judge_rows(rows, SingleGradingEvaluator(llm, "x"), name=name))
        report = grading_report(rows, "teacher", ["student", name])
        for figure, sign in (("mae", -1), ("accuracy", 1), ("auc", 1), ("brier", -1)):
            assert sign * report.loc["student", figure] > sign * report.loc[name, figure], (
                name,
                figure,
            )


def test_cross_validation_keeps_a_question_together(bundled):
    items = bundled[0][0]
    held = np.zeros(len(items), dtype=int)
    for train, out in student_module.folds(items):
        assert not {items[i][0] for i in np.flatnonzero(train)} & {
            items[i][0] for i in np.flatnonzero(out)
        }
        held += out
    assert (held == 1).all()


@pytest.mark.slow
def test_the_engine_reads_several_replies_to_a_prompt_as_a_distribution(tmp_path, bundled):
    """The file's samples give the same student, to the bit, as the rows' distributions."""
    items, scores, soft = bundled[0]
    chats = load_rows(BUNDLED / "single_grading_finetuning_events.jsonl")
    assert len(chats) == 3 * len(items)
    save_events(
        tmp_path / "shuffled.jsonl",
        [chats[i] for i in np.random.default_rng(0).permutation(len(chats))],
    )
    engine = LocalFinetuneEngine(
        "minilm",
        BUNDLED / "single_grading_finetuning_events.jsonl",
        alpha=0.5,
        temperature=2.0,
        scale=(0, 1),
    )
    engine.finetune()
    direct = Student.fit(items, scores, soft, 0.5, 2.0)
    assert (
        engine.student.weights.tobytes() == direct.weights.tobytes()
        and engine.get_current_job().trained_examples == len(chats)
    )
    shuffled = LocalFinetuneEngine(
        "minilm", tmp_path / "shuffled.jsonl", alpha=0.5, temperature=2.0, scale=(0, 1)
    )
    shuffled.finetune()
    # Another order makes other folds, which may choose otherwise. The labels stay the same.
    assert shuffled.student.labels.tolist() == direct.labels.tolist()
    with pytest.raises(
        DamagedFile, match="line 1: cannot learn from the reply: score 0.* is outside 1 to 5"
    ):
        LocalFinetuneEngine("minilm", BUNDLED / "single_grading_finetuning_events.jsonl").finetune()
    with pytest.raises(ValueError, match="alpha=2"):
        LocalFinetuneEngine("minilm", "x", alpha=2)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"alpha": 1.5}, "alpha=1.5: expected 0 to 1"),
        ({"temperature": 0}, "temperature=0: expected above 0"),
        (
            {"verdicts": [0.9, 0.1, None, float("nan"), 0.5] * 6},
            "row 2 has no verdict of the teacher's \\(of 12 rows\\)",
        ),
        ({"verdicts": [0.9] * 30}, "all 30 rows have the verdict 0.9"),
        (
            {"items": [("q", "c", "a")] * 9, "verdicts": [0.1, 0.9, 0.5] * 3},
            "9 rows are too few to learn from: the student has 15 features",
        ),
    ],
)
def test_what_cannot_be_learnt_is_refused(change, said):
    settings = {
        "items": [(f"q{i}", "c", "a") for i in range(30)],
        "verdicts": [0.1, 0.9, 0.5] * 10,
        **change,
    }
    with pytest.raises(ValueError, match=said):
        Student.fit(**settings)


@pytest.mark.slow
def test_a_text_too_long_for_the_encoder_is_judged_and_said_once(recwarn):
    long = "The bridge opened in 1937 after four years of work. " * 60
    judge = untrained_judges(0.5, 0, 1)["base"]
    rows = [
        {"question": "When?", "response_data": {"text": text, "context": long}}
        for text in ("In 1937.", long, "In the fog.")
    ]
    rows = judged(rows, judge)
    assert all(0 <= row["evaluations"][0]["score"] <= 1 for row in rows)
    said = [
        str(warning.message) for warning in recwarn.list if "longer than" in str(warning.message)
    ]
    assert len(said) == 1 and "256 tokens" in said[0]
    assert np.allclose(
        student_module.embed([long]), student_module.embed([long + "More."]), atol=1e-3
    )


def test_saved_it_judges_the_same_in_a_correctness_evaluator(trained, tmp_path):
    trained.save(tmp_path / "student.npz")
    item = (
        "When did the bridge open, and who was its engineer?",
        CONTEXT,
        "It opened in 1937, under Joseph Strauss.",
    )
    query = dict(zip(("query", "reference", "response"), item))
    here, there = (
        CorrectnessEvaluator(llm=student.llm()).evaluate(**query).score
        for student in (trained, Student.load(tmp_path / "student.npz"))
    )
    assert here == there == trained.scores([item])[0] and 0 <= here <= 1


def test_a_judge_by_a_rule_gives_its_distribution_as_log_probabilities():
    judge = LocalJudge(
        lambda item: (0.7, "x", {0.4: 0.25, 0.9: 0.75, 1.0: 0.0}), model_name="j", decimals=2
    )
    [row] = judged(
        [{"question": "Q?", "response_data": {"text": "A", "context": "C"}}], judge, logprobs=True
    )
    evaluation = row["evaluations"][0]
    assert (
        evaluation["distribution"] == [[0.4, pytest.approx(0.25)], [0.9, pytest.approx(0.75)]]
        and evaluation["score"] == 0.9
    )
    assert evaluation["text"] == "0.70\nx"


def test_the_designs_are_told_from_the_files_that_are_there(tmp_path):
    whole = compare_designs(DATA)
    assert list(whole) == ["correctness", "pairwise", "single_grading"]
    test = load_rows(DATA / "correctness" / "test_qa_complete.jsonl")
    figure = correctness_report(test, "teacher", ["fine_tuned"]).loc["fine_tuned", "correlation"]
    assert whole.loc["student", "correctness"].startswith(f"{figure:.2f} [") and whole.loc[
        "rows to test on", "correctness"
    ] == str(len(test))
    chats = load_rows(DATA / "pairwise" / "pairwise_finetuning_events.jsonl")
    assert whole.loc["teacher's calls a row", "pairwise"] == "2" and len(chats) == 2 * int(
        whole.loc["rows to learn from", "pairwise"]
    )
    shutil.copytree(DATA / "pairwise", tmp_path / "pairwise")
    # A run that was stopped has written some of a design's files, not all.
    (tmp_path / "single_grading").mkdir()
    for file in ("test_qa_complete.jsonl", "single_grading_finetuning_events.jsonl"):
        shutil.copy(DATA / "single_grading" / file, tmp_path / "single_grading" / file)
    assert list(compare_designs(tmp_path)) == ["pairwise"]
    # Where every answer is the same, no simple rule has a correlation: a dash, and no error.
    (tmp_path / "correctness").mkdir()
    same = [
        {
            **row,
            "evaluations": [
                {**said, "score": 3.0} if said["llm"] != "teacher" else said
                for said in row["evaluations"]
            ],
        }
        for row in test
    ]
    save_rows(tmp_path / "correctness" / "test_qa_complete.jsonl", same)
    for file in ("train_qa.jsonl", "correction_finetuning_events.jsonl"):
        shutil.copy(DATA / "correctness" / file, tmp_path / "correctness")
    said = compare_designs(tmp_path).loc["best simple rule", "correctness"]
    assert said == "– (best_feature)"


def test_what_cannot_be_read_is_not_learnt_from(tmp_path, bundled):
    chats = load_rows(BUNDLED / "single_grading_finetuning_events.jsonl")
    bad = [
        {
            "messages": [
                *chat["messages"][:2],
                {"role": "assistant", "content": "I would rather not."},
            ]
        }
        for chat in chats[:4]
    ]
    save_events(tmp_path / "x.jsonl", bad + chats)
    with pytest.raises(DamagedFile, match="line 1: cannot learn from the reply: no score"):
        LocalFinetuneEngine("minilm", tmp_path / "x.jsonl", scale=(0, 1)).finetune()
    assert readable_events(bad + chats, 0, 1) == chats and readable_events(chats[:9]) == [
        chat for chat in chats[:9] if chat["messages"][2]["content"].startswith("1.0")
    ]


def test_events_of_three_samples_stay_with_their_rows(tmp_path, grading_rows):
    async def go():
        rows = grading_rows
        log = CallLog(tmp_path / "c.jsonl", "record")
        with finetuning_events() as events:
            for k in range(3):
                llm = log.llm(
                    "m", Graded(lambda q, c, a: f"0.{int(a[7:-1]) % 10}\n{a}", delay=0.02), sample=k
                )
                rows = await judge_rows(rows, SingleGradingEvaluator(llm, "x"), name=f"t{k}")
        return rows, events

    rows, events = asyncio.run(go())
    assert [event["row"] for event in events] == [i for i in range(12) for _ in range(3)]
    assert all(
        rows[event["row"]]["response_data"]["text"] in event["messages"][1]["content"]
        for event in events
    )
    assert json.loads(json.dumps(rows)) == rows


def test_a_grade_that_was_cut_off_is_invalid_for_whoever_asks(tmp_path):
    log = CallLog(tmp_path / "c.jsonl", "record")
    judge = SingleGradingEvaluator(log.llm("m"), "Be fair.")
    asked = [
        {"role": message.role.value, "content": message.content}
        for message in judge.messages("Why?", CONTEXT, "So.")
    ]
    log.append(
        make_row({"model": "m", "messages": asked, "params": {}, "sample": 0}, "0.", None, "length")
    )
    result = asyncio.run(judge.aevaluate(query="Why?", contexts=[CONTEXT], response="So."))
    assert (
        result.score is None
        and result.invalid_result
        and result.invalid_reason == "cut off (finish_reason length)"
    )


def test_more_judges_than_colours_are_refused(grading_rows):
    import matplotlib.pyplot as plt

    rows = judged(grading_rows, Graded(lambda *item: 0.5))
    with pytest.raises(ValueError, match="4 judges: expected 3 at most"):
        plot_probabilities(rows, "t", ["t"] * 4)
    assert not plt.get_fignums(), "a figure is left open"


def test_a_ranking_is_compared_whatever_the_scale():
    """A judge that says a tenth of what another says ranks the rows in the same way."""
    rng, rows = np.random.default_rng(0), []
    for i in range(64):
        truth = float(rng.random() < 0.5)
        a, b = (float(np.clip(truth / 2 + rng.random() * spread, 0, 1)) for spread in (0.6, 1.0))
        scores = {"t": truth, "a": a, "b": b, "tenth": b / 10}
        rows.append(
            {
                "document": f"d{i % 8}",
                "evaluations": [{"llm": name, "score": score} for name, score in scores.items()],
            }
        )
    plain, tenth = (compare_graders(rows, "t", "a", other).loc["auc"] for other in ("b", "tenth"))
    assert (
        plain[["difference", "p"]].tolist() == tenth[["difference", "p"]].tolist()
        and 0 < plain["difference"]
        and plain["p"] < 1
    )
