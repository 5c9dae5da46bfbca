"""Judge: rows -> judgements. Scores against a reference, pairs in both orders, single grading."""

import copy
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.evaluation import (
    BaseEvaluator,
    CorrectnessEvaluator,
    EvaluationResult,
    PairwiseComparisonEvaluator,
)
from llama_index.core.llms import LLM

from .log import FINISH, NotAnswered, run_stage
from .replies import cut_off, read_score, read_score_tokens, read_verdict
from .settings import CallFailed

# The score of a verdict: 1 the answer shown first, 0 the one shown second.
SCORES = {"A": 1.0, "B": 0.0, "C": 0.5}
ACCEPTABLE = 0.8  # a score above it is
FORMAT = {
    1: "as a number from 0.0 (no marks) to 1.0 (full marks) with one decimal",
    100: "as a whole number from 0 (no marks) to 100 (full marks)",
}
# The local student finds the texts by these headings; CorrectnessEvaluator has all but the second.
SECTIONS = (
    "## User Query\n{query}\n\n## Context\n{context}\n\n## Generated Answer\n{generated_answer}\n"
)


def resolve_orders(original: str, flipped: str) -> tuple[float, str]:
    """(score, source) of a pair's two verdicts, each "A", "B" or "C", as LlamaIndex resolves them.

    The source is the order whose verdict counts, "original" or "flipped", or "neither" where the
    two contradict. As in LlamaIndex and the published files, a score from the flipped order is left
    as that order gave it: 1.0 there means the *second* answer. `pair_scores` turns it right.
    """
    votes_first = SCORES[original] + 1 - SCORES[flipped]
    if votes_first == 1:
        return 0.5, "original" if original == "C" else "neither"
    winner = votes_first > 1
    if SCORES[original] == float(winner):
        return SCORES[original], "original"
    return SCORES[flipped], "flipped"


async def judge_rows(
    rows: list[dict], evaluator: BaseEvaluator, *, name: str, concurrency: int | None = None
) -> list[dict]:
    """Judge every row, and return the rows in the same order with one more evaluation each.

    An evaluation is {"llm": name, "score", "text"}; `text` is the judge's whole reply. Single
    grading adds "acceptable". A pairwise evaluation has "verdicts", those of the original and of
    the flipped order, and "source" (see `resolve_orders`): both orders are always asked, and if
    either cannot be read, the pair is invalid. An invalid evaluation has the score None and the
    reason under "invalid": the reply cannot be read or was cut off, or the call failed. An older
    evaluation of the same name is replaced. The rows that were passed in do not change.

    Args:
        rows: correctness rows (`question`, `reference`, `response_data.text`), pairwise rows
            (`question`, two `answers` with a `text` each, `source`) or single-grading rows
            (`question`, `response_data` of `text` and `context`).
        evaluator: a CorrectnessEvaluator (read on the scale of 1 to 5, whatever its template
            says), a PairwiseComparisonEvaluator or a SingleGradingEvaluator. LlamaIndex's own
            parsers are not used: the first's raises on a bare "4.5" and lets 7.5 pass, the
            second's reads "[[B]] because not [[A]]" as A.
        name: of the judge.
        concurrency: how many rows at a time; by default CONCURRENCY.

    Raises:
        TypeError: an evaluator of another kind.
        ValueError: a row lacks a field; the message names row and field.
    """
    kinds: dict[type, Callable[[Any, dict], Coroutine[Any, Any, dict]]] = {
        CorrectnessEvaluator: _judge_correctness,
        PairwiseComparisonEvaluator: _judge_pair,
        SingleGradingEvaluator: _judge_graded,
    }
    kind = next((kind for kind in kinds if isinstance(evaluator, kind)), None)
    if kind is None:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"judge_rows knows {known}, not {type(evaluator).__name__}")
    for number, row in enumerate(rows):
        _check(row, number, kind)
    evaluator, judge = copy.copy(evaluator), kinds[kind]
    jobs = [judge(evaluator, row) for row in rows]
    judged = []
    for row, new in zip(rows, await run_stage(f"judge: {name}", jobs, concurrency)):
        others = [old for old in row.get("evaluations", []) if old["llm"] != name]
        judged.append({**row, "evaluations": [*others, {"llm": name, **new}]})
    return judged


async def _judge_correctness(evaluator: CorrectnessEvaluator, row: dict) -> dict:
    evaluator.parser_function = lambda reply: (read_score(reply)[0], reply)
    try:
        result = await evaluator.aevaluate(
            query=row["question"], response=row["response_data"]["text"], reference=row["reference"]
        )
    except CallFailed as error:
        return {"score": None, "text": None, "invalid": f"the call failed: {error}"}
    text = result.feedback or ""
    score, reason = read_score(text)
    if cut := cut_off(FINISH.get()):
        score, reason = None, cut
    return {"score": score, "text": text, **({"invalid": reason} if reason else {})}


async def _judge_graded(evaluator: "SingleGradingEvaluator", row: dict) -> dict:
    answer = row["response_data"]
    try:
        return await evaluator.grade(row["question"], answer["context"], answer["text"])
    except CallFailed as error:
        invalid = f"the call failed: {error}"
        return {"score": None, "acceptable": None, "text": None, "invalid": invalid}


async def _judge_pair(evaluator: PairwiseComparisonEvaluator, row: dict) -> dict:
    # One order at a time: so each order's verdict is kept, and the second is always asked.
    evaluator._enforce_consensus = False
    # The evaluator returns the reply as its feedback. It is read here.
    evaluator._parser_function = lambda reply: (None, 0.5, "")
    first, second = (answer["text"] for answer in row["answers"])
    orders = {"original": (first, second), "flipped": (second, first)}
    replies: list[str | None] = []
    verdicts: list[str | None] = []
    reasons, waiting = [], None
    for order, (one, other) in orders.items():
        reply, verdict, reason = None, None, None
        try:
            result = await evaluator.aevaluate(
                query=row["question"], response=one, second_response=other, reference=row["source"]
            )
            reply = result.feedback or ""
            verdict, reason = read_verdict(reply)
            if cut := cut_off(FINISH.get()):
                verdict, reason = None, cut
        except CallFailed as error:
            reason = f"the call failed: {error}"
        except NotAnswered as error:  # collected; the other order's request goes out with it
            waiting = error
        replies.append(reply)
        verdicts.append(verdict)
        reasons += [f"{order}: {reason}"] if reason else []
    if waiting:
        raise waiting
    original, flipped = verdicts
    if original is None or flipped is None:
        invalid = {"score": None, "text": replies[0], "source": None, "verdicts": verdicts}
        return {**invalid, "invalid": "; ".join(reasons)}
    score, source = resolve_orders(original, flipped)
    text = replies[source == "flipped"]
    return {"score": score, "text": text, "source": source, "verdicts": verdicts}


# The texts that a row must have; the starred ones may be empty.
TEXTS: dict[type, tuple[str, ...]] = {
    CorrectnessEvaluator: ("question", "reference", "response_data.text*"),
    PairwiseComparisonEvaluator: ("question", "source*", "answers.0.text*", "answers.1.text*"),
}


def _check(row: dict, number: int, kind: type) -> None:
    """Raise ValueError where a row lacks a text that its judge needs."""
    answers = row.get("answers")
    if kind is PairwiseComparisonEvaluator and not (
        isinstance(answers, list) and len(answers) == 2
    ):
        found = len(answers) if isinstance(answers, list) else repr(answers)
        raise ValueError(f"row {number}: answers must be two, found {found}")
    graded = ("question", "response_data.context", "response_data.text*")
    for field in TEXTS.get(kind, graded):
        value: Any = row
        for name in field.rstrip("*").split("."):
            if isinstance(value, list):
                value = value[int(name)]
            else:
                value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, str) or not (value.strip() or field.endswith("*")):
            shown = field.rstrip("*").replace(".0", "[0]").replace(".1", "[1]")
            raise ValueError(f"row {number}: {shown} must be a text, found {value!r}")


class SingleGradingEvaluator(BaseEvaluator):
    """Grades one answer from 0 to 1 by a rubric, with the context as the evidence.

    Args:
        llm: the judge.
        rubric: what to grade by; the system message. The format of the reply is added to it.
        scale: 1 asks for a number up to 1.0, 100 for a whole number up to 100, which is then
            divided by 100.
        logprobs: take the judge's distribution from the token log-probabilities of one call. A
            hosted model needs scale=100 for that, so that a score is one token, and
            params={"logprobs": True, "top_logprobs": 20}. The local student gives its distribution
            on its own scale. `CallLog` keeps the log-probabilities up to the line of the score.

    Raises:
        ValueError: another scale.
    """

    def __init__(self, llm: LLM, rubric: str, scale: int = 1, logprobs: bool = False) -> None:
        if scale not in FORMAT:
            raise ValueError(f"scale={scale!r}: expected {' or '.join(map(str, FORMAT))}")
        self.llm, self.scale, self.logprobs = llm, scale, logprobs
        self.rubric = (
            f"{rubric.strip()}\n\nWrite the score alone on the first line, {FORMAT[scale]}; then "
            "say in one or two sentences why."
        )

    def messages(self, question: str, context: str, answer: str) -> list[ChatMessage]:
        """What the judge is sent."""
        shown = SECTIONS.format(query=question, context=context, generated_answer=answer)
        return [
            ChatMessage(role=MessageRole.SYSTEM, content=self.rubric),
            ChatMessage(role=MessageRole.USER, content=shown),
        ]

    # A rubric may hold braces that are no placeholders, so it is no template of LlamaIndex's.
    def _get_prompts(self) -> dict:
        return {}

    def _update_prompts(self, prompts: dict) -> None:
        raise NotImplementedError("give the rubric to the constructor")

    async def grade(self, question: str, context: str, answer: str) -> dict:
        """One judgement.

        Returns:
            `score` and `acceptable` (None if invalid, with the reason under `invalid`), `text` (the
            reply), and with `logprobs` also `distribution`, [[score, probability], ...]. The score
            is then its lower median.
        """
        response = await self.llm.achat(self.messages(question, context, answer))
        text, raw = response.message.content or "", response.raw
        score, reason = read_score(text, 0, self.scale)
        reason = cut_off(raw.get("finish_reason") if isinstance(raw, dict) else None) or reason
        distribution: dict[float, float] = {}
        if reason is None and self.logprobs:
            distribution, reason = read_score_tokens(
                response.logprobs or [], self.scale, reply=text
            )
            score = lower_median(distribution) if reason is None else None
        if score is None or reason:
            return {"score": None, "acceptable": None, "text": text, "invalid": reason}
        score /= self.scale
        graded = {"score": score, "acceptable": score > ACCEPTABLE, "text": text}
        if distribution:
            graded["distribution"] = [[one / self.scale, p] for one, p in distribution.items()]
        return graded

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """As LlamaIndex's evaluators do it. `passing` means that the score is above ACCEPTABLE."""
        if query is None or response is None or not contexts:
            raise ValueError("query, response and contexts must be given")
        graded = await self.grade(query, "\n\n".join(contexts), response)
        return EvaluationResult(
            query=query,
            response=response,
            contexts=contexts,
            score=graded["score"],
            feedback=graded["text"],
            passing=graded.get("acceptable"),
            invalid_result="invalid" in graded,
            invalid_reason=graded.get("invalid"),
        )


def lower_median(distribution: dict[float, float]) -> float:
    """The lowest score that holds half of the probability: of three samples the middle one.

    Raises:
        ValueError: the distribution is empty.
    """
    half, below = sum(distribution.values()) / 2 - 1e-12, 0.0
    for score in sorted(distribution):
        below += distribution[score]
        if below >= half:
            return score
    raise ValueError("a distribution over no scores has no median")


def pool_samples(rows: list[dict], judges: list[str], *, name: str) -> list[dict]:
    """Make several samples of a judge's verdict one evaluation.

    It comes first, with the `samples` (None where a sample is invalid), their lower median as
    `score`, `acceptable`, and the `text` of the first sample with that score. It is invalid only if
    all samples are.

    Args:
        rows: judged rows.
        judges: the names of the samples' evaluations, which it replaces.
        name: of the new evaluation.

    Raises:
        KeyError: a row lacks one of the samples.
    """
    pooled = []
    for number, row in enumerate(rows):
        given = {evaluation["llm"]: evaluation for evaluation in row.get("evaluations", [])}
        if missing := [judge for judge in judges if judge not in given]:
            raise KeyError(f"row {number} has no judgement by {missing[0]!r}")
        drawn = [given[judge] for judge in judges]
        samples = [evaluation["score"] for evaluation in drawn]
        one = {"llm": name, "score": None, "acceptable": None, "text": drawn[0]["text"]}
        one["samples"] = samples
        if distribution := score_distribution(one):
            score = lower_median(distribution)
            text = drawn[samples.index(score)]["text"]
            one |= {"score": score, "acceptable": score > ACCEPTABLE, "text": text}
        else:
            reasons = dict.fromkeys(evaluation["invalid"] for evaluation in drawn)
            one["invalid"] = "no valid sample: " + "; ".join(reasons)
        replaced = (*judges, name)
        rest = [said for said in row["evaluations"] if said["llm"] not in replaced]
        pooled.append({**row, "evaluations": [one, *rest]})
    return pooled


def score_distribution(evaluation: dict) -> dict[float, float]:
    """{score: probability} of one evaluation; {} if it is invalid.

    As its token log-probabilities gave it, else the shares of its valid samples, else all on its
    score.
    """
    if "distribution" in evaluation:
        return dict(evaluation["distribution"])
    samples = evaluation.get("samples", [evaluation["score"]])
    valid = [score for score in samples if score is not None]
    return {score: valid.count(score) / len(valid) for score in sorted(set(valid))}
