"""Judge: rows -> judgements."""

import copy

from llama_index.core.evaluation import (
    BaseEvaluator,
    CorrectnessEvaluator,
    EvaluationResult,
    PairwiseComparisonEvaluator,
)

from .calls import FINISH, NotAnswered, run_stage
from .grading import SingleGradingEvaluator
from .models import CallFailed
from .replies import cut_off, read_score, read_verdict

# What the verdicts in the original and the flipped order come to: the score (1 the first answer, 0 the second) as the call of
# that order gave it, and the order that decides. In the flipped order "A" is the second answer.
SCORES = {"A": 1.0, "B": 0.0, "C": 0.5}


def resolve_orders(original: str, flipped: str) -> tuple[float, str]:
    """(score, source) of a pair's two verdicts, each "A", "B" or "C", as LlamaIndex resolves them.

    The source is "original" or "flipped" for the order whose verdict stands, or "neither" where they contradict. As in
    LlamaIndex and the published files, a score from the flipped order is left as that order gave it: 1.0 there means the
    *second* answer. `pair_scores` turns it right.
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
    """Judge every row, and return the rows with one more evaluation each, in the same order.

    An evaluation is {"llm": name, "score", "text"}, and for single grading "acceptable"; `text` is the judge's whole reply. A
    reply that cannot be read or was cut off, or a live call that failed, has the score None and the reason under "invalid". A
    pairwise evaluation has two keys more: "source" and "verdicts", those of the original and of the flipped order (see
    `resolve_orders`); both orders are always asked, and if either cannot be read the pair is invalid. An evaluation that already
    bears the name is replaced. The rows passed in are left as they are.

    Args:
        rows: correctness rows (`question`, `reference`, `response_data.text`), pairwise rows (`question`, two `answers` with a
            `text` each, `source`) or single-grading rows (`question`, `response_data` of `text` and `context`).
        evaluator: a CorrectnessEvaluator (read on the scale of 1 to 5, whatever its template says), a PairwiseComparisonEvaluator
            or a SingleGradingEvaluator. LlamaIndex's own parsers
            are not used: the first's raises on a bare "4.5" and lets 7.5 pass, the second's reads "[[B]] because not [[A]]" as A.
        name: of the judge.
        concurrency: how many rows may be under way at once; by default CONCURRENCY, 16.

    Raises:
        TypeError: an evaluator of another kind.
        ValueError: a row lacks a field; the message says which row and field.
    """
    kinds = {
        CorrectnessEvaluator: (_check_correctness, _judge_correctness),
        PairwiseComparisonEvaluator: (_check_pair, _judge_pair),
        SingleGradingEvaluator: (_check_graded, _judge_graded),
    }
    check, judge = next(
        (kinds[kind] for kind in kinds if isinstance(evaluator, kind)), (None, None)
    )
    if judge is None:
        raise TypeError(
            f"judge_rows knows {', '.join(kind.__name__ for kind in kinds)}, not {type(evaluator).__name__}"
        )
    for number, row in enumerate(rows):
        check(row, number)
    evaluator = copy.copy(evaluator)
    evaluations = await run_stage(
        f"judge: {name}", [judge(evaluator, row, name) for row in rows], concurrency
    )
    return [
        {
            **row,
            "evaluations": [old for old in row.get("evaluations", []) if old["llm"] != name]
            + [new],
        }
        for row, new in zip(rows, evaluations)
    ]


async def _judge_correctness(evaluator: CorrectnessEvaluator, row: dict, name: str) -> dict:
    evaluator.parser_function = lambda reply: (read_score(reply)[0], reply)
    try:
        result: EvaluationResult = await evaluator.aevaluate(
            query=row["question"], response=row["response_data"]["text"], reference=row["reference"]
        )
    except CallFailed as error:
        return {"llm": name, "score": None, "text": None, "invalid": f"the call failed: {error}"}
    score, reason = (
        (None, reason) if (reason := cut_off(FINISH.get())) else read_score(result.feedback)
    )
    return {
        "llm": name,
        "score": score,
        "text": result.feedback,
        **({"invalid": reason} if reason else {}),
    }


async def _judge_graded(evaluator: SingleGradingEvaluator, row: dict, name: str) -> dict:
    try:
        return {
            "llm": name,
            **await evaluator.grade(
                row["question"], row["response_data"]["context"], row["response_data"]["text"]
            ),
        }
    except CallFailed as error:
        return {
            "llm": name,
            "score": None,
            "acceptable": None,
            "text": None,
            "invalid": f"the call failed: {error}",
        }


async def _judge_pair(evaluator: PairwiseComparisonEvaluator, row: dict, name: str) -> dict:
    evaluator._enforce_consensus = (
        False  # an order at a time: so each order's verdict is kept, and the second is always asked
    )
    evaluator._parser_function = lambda reply: (
        None,
        0.5,
        "",
    )  # the reply comes back as it is, to be read here
    first, second = (answer["text"] for answer in row["answers"])
    replies, reasons, waiting = [], [], None
    for order, (one, other) in (("original", (first, second)), ("flipped", (second, first))):
        try:
            result = await evaluator.aevaluate(
                query=row["question"], response=one, second_response=other, reference=row["source"]
            )
            replies.append(result.feedback)
            reasons.append(cut_off(FINISH.get()) or read_verdict(result.feedback)[1])
        except CallFailed as error:
            replies.append(None)
            reasons.append(f"the call failed: {error}")
        except NotAnswered as error:  # collected; the other order's request goes out with it
            waiting = error
    if waiting:
        raise waiting
    verdicts = [
        None if reason else read_verdict(reply)[0] for reply, reason in zip(replies, reasons)
    ]
    if None in verdicts:
        invalid = "; ".join(
            f"{order}: {reason}"
            for order, reason in zip(("original", "flipped"), reasons)
            if reason
        )
        return {
            "llm": name,
            "score": None,
            "text": replies[0],
            "source": None,
            "verdicts": verdicts,
            "invalid": invalid,
        }
    score, source = resolve_orders(*verdicts)
    return {
        "llm": name,
        "score": score,
        "text": replies[source == "flipped"],
        "source": source,
        "verdicts": verdicts,
    }


def _check_correctness(row: dict, number: int) -> None:
    answer = row.get("response_data")
    _check_texts(
        number,
        {"question": row.get("question"), "reference": row.get("reference")},
        {"response_data.text": answer.get("text") if isinstance(answer, dict) else None},
    )


def _check_graded(row: dict, number: int) -> None:
    answer = row.get("response_data") if isinstance(row.get("response_data"), dict) else {}
    _check_texts(
        number,
        {"question": row.get("question"), "response_data.context": answer.get("context")},
        {"response_data.text": answer.get("text")},
    )


def _check_pair(row: dict, number: int) -> None:
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) != 2:
        found = len(answers) if isinstance(answers, list) else repr(answers)
        raise ValueError(f"row {number}: answers must be two, found {found}")
    texts = {
        f"answers[{i}].text": answer.get("text") if isinstance(answer, dict) else None
        for i, answer in enumerate(answers)
    }
    _check_texts(number, {"question": row.get("question")}, {"source": row.get("source"), **texts})


def _check_texts(number: int, filled: dict, may_be_empty: dict) -> None:
    for field, value in {**filled, **may_be_empty}.items():
        if not isinstance(value, str) or field in filled and not value.strip():
            raise ValueError(f"row {number}: {field} must be a text, found {value!r}")
