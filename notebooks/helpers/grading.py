"""Single grading: one answer, a score from 0 to 1, the context as the only evidence."""

from typing import Any, Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.evaluation import BaseEvaluator, EvaluationResult
from llama_index.core.llms import LLM

from .replies import cut_off, read_score, read_score_tokens

ACCEPTABLE = 0.8  # a score above it is
FORMAT = {
    1: "as a number from 0.0 (no marks) to 1.0 (full marks) with one decimal",
    100: "as a whole number from 0 (no marks) to 100 (full marks)",
}
# The local student finds the texts by these headings, which are CorrectnessEvaluator's, but for the second.
SECTIONS = (
    "## User Query\n{query}\n\n## Context\n{context}\n\n## Generated Answer\n{generated_answer}\n"
)


def lower_median(distribution: dict[float, float]) -> float:
    """The lowest score that holds half of the probability: of three samples the middle one, of two the stricter."""
    below = 0.0
    for score in sorted(distribution):
        below += distribution[score]
        if below >= sum(distribution.values()) / 2 - 1e-12:
            return score
    raise ValueError("a distribution over no scores has no median")


class SingleGradingEvaluator(BaseEvaluator):
    """Grades one answer from 0 to 1 by a rubric; the contexts are the evidence, and no reference answer is needed.

    Args:
        llm: the judge.
        rubric: what to grade by; the system message. The format of the reply is added to it.
        scale: 1 asks for a number up to 1.0, 100 for a whole number up to 100, which is then divided by 100.
        logprobs: take the judge's distribution from the token log-probabilities of one call. A hosted model needs scale=100 for
            that, so that a score is one token, and params={"logprobs": True, "top_logprobs": 20}. The local student gives its
            distribution on its own scale. `CallLog` keeps the log-probabilities of a reply's first line.

    Raises:
        ValueError: a scale of another kind.
    """

    def __init__(self, llm: LLM, rubric: str, scale: int = 1, logprobs: bool = False) -> None:
        if scale not in FORMAT:
            raise ValueError(f"scale={scale!r}: expected {' or '.join(map(str, FORMAT))}")
        self.llm, self.scale, self.logprobs = llm, scale, logprobs
        self.rubric = f"{rubric.strip()}\n\nWrite the score alone on the first line, {FORMAT[scale]}; then say in one or two sentences why."

    def messages(self, question: str, context: str, answer: str) -> list[ChatMessage]:
        """What the judge is sent."""
        shown = SECTIONS.format(query=question, context=context, generated_answer=answer)
        return [
            ChatMessage(role=MessageRole.SYSTEM, content=self.rubric),
            ChatMessage(role=MessageRole.USER, content=shown),
        ]

    # A rubric is anyone's text, with braces that are no placeholders, so it is no template of LlamaIndex's.
    def _get_prompts(self) -> dict:
        return {}

    def _update_prompts(self, prompts: dict) -> None:
        raise NotImplementedError("give the rubric to the constructor")

    async def grade(self, question: str, context: str, answer: str) -> dict:
        """One judgement: `score` and `acceptable` (None if invalid, with the reason under `invalid`), `text` (the reply), and with
        `logprobs` also `distribution`, [[score, probability], ...], whose lower median the score is."""
        response = await self.llm.achat(self.messages(question, context, answer))
        text = response.message.content or ""
        score, reason = read_score(text, 0, self.scale)
        reason = (
            cut_off(response.raw.get("finish_reason") if isinstance(response.raw, dict) else None)
            or reason
        )
        distribution = {}
        if reason is None and self.logprobs:
            distribution, reason = read_score_tokens(response.logprobs or [], self.scale)
            score = lower_median(distribution) if reason is None else None
        if reason:
            return {"score": None, "acceptable": None, "text": text, "invalid": reason}
        graded = {
            "score": score / self.scale,
            "acceptable": score / self.scale > ACCEPTABLE,
            "text": text,
        }
        return graded | (
            {"distribution": [[score / self.scale, p] for score, p in distribution.items()]}
            if distribution
            else {}
        )

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """The face of LlamaIndex's evaluators: `passing` is True where the score is above ACCEPTABLE."""
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


def pool_samples(rows: list[dict], judges: list[str], *, name: str) -> list[dict]:
    """Make several samples of a judge's verdict, each an evaluation under a name of its own, one evaluation.

    It stands first, and has the `samples` (None where a sample is invalid), their lower median as `score`, `acceptable`, and the `text` of the
    first sample that gave that score. It is invalid only if all samples are.

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
        one = {
            "llm": name,
            "score": None,
            "acceptable": None,
            "text": drawn[0]["text"],
            "samples": samples,
        }
        if distribution := score_distribution(one):
            score = lower_median(distribution)
            one |= {
                "score": score,
                "acceptable": score > ACCEPTABLE,
                "text": drawn[samples.index(score)]["text"],
            }
        else:
            one["invalid"] = "no valid sample: " + "; ".join(
                dict.fromkeys(evaluation["invalid"] for evaluation in drawn)
            )
        rest = [
            evaluation
            for evaluation in row["evaluations"]
            if evaluation["llm"] not in (*judges, name)
        ]
        pooled.append({**row, "evaluations": [one, *rest]})
    return pooled


def score_distribution(evaluation: dict) -> dict[float, float]:
    """{score: probability} of one evaluation: as its token log-probabilities gave it, else the shares of its valid samples, else
    all on its score; empty if it is invalid."""
    if "distribution" in evaluation:
        return {score: p for score, p in evaluation["distribution"]}
    valid = [
        score for score in evaluation.get("samples", [evaluation["score"]]) if score is not None
    ]
    return {score: valid.count(score) / len(valid) for score in sorted(set(valid))}
