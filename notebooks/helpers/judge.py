"""Judge: rows -> judgements. Scores against a reference, pairs in both orders, single grading."""

import copy
import re
from collections.abc import Callable
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.evaluation import (
    BaseEvaluator,
    CorrectnessEvaluator,
    EvaluationResult,
    PairwiseComparisonEvaluator,
)
from llama_index.core.llms import LLM

from .log import FINISH, STAGE, Collected, run_stage, showing
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
    two contradict. As in LlamaIndex, a score from the flipped order is left as that order gave it:
    1.0 there means the *second* answer. `pair_scores` turns it right.
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
    """Return the rows in the same order, each with one more evaluation.

    An evaluation is {"llm": name, "score", "text"}; `text` is the judge's whole reply. Single
    grading adds "acceptable". Pairs add "verdicts", those of the original and of the flipped order,
    and "source" (see `resolve_orders`): both orders are always asked, and if either cannot be read,
    the pair is invalid. An invalid evaluation has the score None and the reason under "invalid":
    the reply cannot be read or was cut off, or the call failed. An older evaluation of the same
    name is replaced.

    Args:
        rows: correctness rows (`question`, `reference`, `response_data.text`), pairwise rows
            (`question`, two `answers` with a `text` each, `source`) or single-grading rows
            (`question`, `response_data` of `text` and `context`).
        evaluator: a CorrectnessEvaluator (read on the scale of 1 to 5, whatever its template
            says), a PairwiseComparisonEvaluator or a SingleGradingEvaluator. `replies` reads the
            replies: LlamaIndex's parsers misread some.
        name: of the judge.
        concurrency: how many rows at a time; by default CONCURRENCY.

    Raises:
        TypeError: an evaluator of another kind.
        ValueError: a row lacks a field; the message names row and field.
    """
    kind = next((kind for kind in KINDS if isinstance(evaluator, kind)), None)
    if kind is None:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"judge_rows knows {known}, not {type(evaluator).__name__}")
    (judge, fields), evaluator = KINDS[kind], copy.copy(evaluator)  # its parser is changed
    texts = [_texts(row, number, fields.split()) for number, row in enumerate(rows)]
    jobs = [judge(evaluator, *shown) for shown in texts]
    judged = []
    for row, new in zip(rows, await run_stage(f"judge: {name}", jobs, concurrency)):
        others = [old for old in row.get("evaluations", []) if old["llm"] != name]
        judged.append({**row, "evaluations": [*others, {"llm": name, **new}]})
    return judged


def _texts(row: dict, number: int, fields: list[str]) -> list[str]:
    """The texts of a row that its judge needs; ValueError if one is missing."""
    answers = row.get("answers")
    if "source*" in fields and not (isinstance(answers, list) and len(answers) == 2):
        found = len(answers) if isinstance(answers, list) else repr(answers)
        raise ValueError(f"row {number}: answers must be two, found {found}")
    texts = []
    for field in fields:
        value: Any = row
        for name in re.findall(r"\w+", field):
            try:
                value = value[int(name) if name.isdigit() else name]
            except (LookupError, TypeError):
                value = None
        if not isinstance(value, str) or not (value.strip() or field.endswith("*")):
            raise ValueError(f"row {number}: {field.strip('*')} must be a text, found {value!r}")
        texts.append(value)
    return texts


def _failed(error: CallFailed) -> str:
    """Count a failed call on the progress bar. Returns the reason why its row is invalid."""
    if stage := STAGE.get():
        stage.failed += 1
    return f"the call failed: {error}"


async def _ask(evaluator: BaseEvaluator, read: Callable, **shown: str) -> tuple:
    """(the reply or None, what `read` reads in it or None, the reason if there is nothing)."""
    try:
        with showing(*shown.values()):
            reply = (await evaluator.aevaluate(**shown)).feedback or ""
    except CallFailed as error:
        return None, None, _failed(error)
    if cut := cut_off(FINISH.get()):
        return reply, None, cut
    return reply, *read(reply)


async def _score(
    evaluator: CorrectnessEvaluator, question: str, reference: str, answer: str
) -> dict:
    evaluator.parser_function = lambda reply: (None, reply)
    shown = {"query": question, "reference": reference, "response": answer}  # as in SECTIONS
    text, score, reason = await _ask(evaluator, read_score, **shown)
    return {"score": score, "text": text, **({"invalid": reason} if reason else {})}


async def _compare(
    evaluator: PairwiseComparisonEvaluator, question: str, source: str, first: str, second: str
) -> dict:
    # One order at a time: so each order's verdict is kept, and the second is always asked.
    evaluator._enforce_consensus = False
    evaluator._parser_function = lambda reply: (None, 0.5, "")  # the feedback is the reply
    shown, asked, waiting = {"query": question, "reference": source}, [], None
    for one, other in ((first, second), (second, first)):
        both = {"response": one, "second_response": other}
        try:
            asked.append(await _ask(evaluator, read_verdict, **shown, **both))
        except Collected as error:  # the other order's request goes out with it
            waiting = error
    if waiting:
        raise waiting
    replies, verdicts, reasons = map(list, zip(*asked))
    if any(reasons):
        said = [f"{order}: {why}" for order, why in zip(("original", "flipped"), reasons) if why]
        invalid = {"score": None, "text": replies[0], "source": None, "verdicts": verdicts}
        return {**invalid, "winner": None, "invalid": "; ".join(said)}
    score, decided = resolve_orders(*verdicts)
    # The score is of the order that decided; `winner` is the number of the answer in the row.
    winner = {(1.0, "original"): 0, (0.0, "original"): 1, (1.0, "flipped"): 1, (0.0, "flipped"): 0}
    text = replies[decided == "flipped"]
    judged = {"score": score, "text": text, "source": decided, "verdicts": verdicts}
    return {**judged, "winner": winner.get((score, decided))}


class SingleGradingEvaluator(BaseEvaluator):
    """Grades one answer from 0 to 1 by a rubric, with the context as the evidence.

    Args:
        llm: the judge.
        rubric: what to grade by; the system message. The format of the reply is added to it.
        scale: 1 asks for a number up to 1.0, 100 for a whole number up to 100, which is then
            divided by 100.
        logprobs: take the judge's distribution from the token log-probabilities of one call. A
            hosted model needs scale=100 for that, so that a score is one token, and
            params={"logprobs": True, "top_logprobs": 20}.
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
        return [ChatMessage(role="system", content=self.rubric), ChatMessage(content=shown)]

    # A rubric may hold braces that are no placeholders, so it is no template of LlamaIndex's.
    def _get_prompts(self) -> dict:
        return {}

    def _update_prompts(self, prompts: dict) -> None:
        raise NotImplementedError("give the rubric to the constructor")

    async def grade(self, question: str, context: str, answer: str) -> dict:
        """One judgement: `score`, `acceptable` and `text`, the reply.

        With `logprobs` also `distribution`, [[score, probability], ...]: the score is its lower
        median. If there is no score, `invalid` says why.
        """
        try:
            with showing(question, context, answer):
                response = await self.llm.achat(self.messages(question, context, answer))
        except CallFailed as error:
            return {"score": None, "acceptable": None, "text": None, "invalid": _failed(error)}
        text, raw = response.message.content or "", response.raw
        score, reason = read_score(text, 0, self.scale)
        reason = cut_off(raw.get("finish_reason") if isinstance(raw, dict) else None) or reason
        shares: dict[float, float] = {}
        if self.logprobs and not reason:
            shares, reason = read_score_tokens(response.logprobs or [], self.scale, reply=text)
            score = lower_median(shares) if shares else None
        if score is None or reason:
            return {"score": None, "acceptable": None, "text": text, "invalid": reason}
        score /= self.scale
        graded = {"score": score, "acceptable": score > ACCEPTABLE, "text": text}
        if shares:
            graded["distribution"] = [[one / self.scale, p] for one, p in shares.items()]
        return graded

    async def aevaluate(
        self, query: Any = None, response: Any = None, contexts: Any = None, **kwargs: Any
    ) -> EvaluationResult:
        """As LlamaIndex's evaluators do it. `passing` means that the score is above ACCEPTABLE."""
        if query is None or response is None or not contexts:
            raise ValueError("query, response and contexts must be given")
        graded = await self.grade(query, "\n\n".join(contexts), response)
        result = EvaluationResult(query=query, response=response, contexts=contexts)
        result.score, result.feedback = graded["score"], graded["text"]
        result.passing, result.invalid_reason = graded["acceptable"], graded.get("invalid")
        result.invalid_result = "invalid" in graded
        return result


# {evaluator: (what judges, the texts that it is shown)}; a starred text may be empty.
KINDS: dict[type, tuple[Callable, str]] = {
    CorrectnessEvaluator: (_score, "question reference response_data.text*"),
    PairwiseComparisonEvaluator: (_compare, "question source* answers[0].text* answers[1].text*"),
    SingleGradingEvaluator: (
        SingleGradingEvaluator.grade,
        "question response_data.context response_data.text*",
    ),
}


def lower_median(distribution: dict[float, float]) -> float:
    """The lowest score that holds half of the probability; ValueError if there is no score."""
    half, below = sum(distribution.values()) / 2 - 1e-12, 0.0
    for score in sorted(distribution):
        below += distribution[score]
        if below >= half:
            return score
    raise ValueError("a distribution over no scores has no median")


def pool_samples(rows: list[dict], judges: list[str], *, name: str) -> list[dict]:
    """Replace the evaluations by `judges`, samples of one judge's verdict, with one by `name`.

    It comes first, with the `samples` (None where a sample is invalid), their lower median as
    `score`, `acceptable`, and the `text` of the first sample with that score. It is invalid only if
    all samples are.

    Raises:
        KeyError: a row lacks one of the samples.
    """
    pooled = []
    for number, row in enumerate(rows):
        others = {said["llm"]: said for said in row.get("evaluations", [])}
        try:
            drawn = [others.pop(judge) for judge in judges]
        except KeyError as missing:
            raise KeyError(f"row {number} has no judgement by {missing}") from None
        others.pop(name, None)
        samples = [said["score"] for said in drawn]
        one = {"llm": name, "score": None, "acceptable": None, "text": drawn[0]["text"]}
        one["samples"] = samples
        if distribution := score_distribution(one):
            score = lower_median(distribution)
            text = drawn[samples.index(score)]["text"]
            one |= {"score": score, "acceptable": score > ACCEPTABLE, "text": text}
        else:
            reasons = dict.fromkeys(said["invalid"] for said in drawn)
            one["invalid"] = "no valid sample: " + "; ".join(reasons)
        pooled.append({**row, "evaluations": [one, *others.values()]})
    return pooled


def score_distribution(evaluation: dict) -> dict[float, float]:
    """{score: probability} of one evaluation; {} if it is invalid.

    From its token log-probabilities, else its valid samples, else its score.
    """
    if "distribution" in evaluation:
        return dict(evaluation["distribution"])
    samples = evaluation.get("samples", [evaluation["score"]])
    valid = [score for score in samples if score is not None]
    return {score: valid.count(score) / len(valid) for score in sorted(set(valid))}
