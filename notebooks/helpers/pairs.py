"""The local student for pairs: which of two answers is better, the same whichever comes first."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from .embeddings import embed
from .student import (
    WORD,
    Item,
    LocalJudge,
    Student,
    names,
    numbers,
    overlap,
    read_sections,
    share,
    words,
)

VERDICTS = "ABC"
LIKENESSES = 3  # the last features of a pair; they do not change when the answers are swapped
HEDGE = re.compile(
    r"\b(?:unknown|unclear|cannot|sorry|no information|"
    r"(?:not|n't) (?:mention|provide|specif|clear|stated)\w*)\b",
    re.I,
)
PROMPT = re.compile(
    r"\[User Question\]\n(.*?)\n\n\[The Start of Reference\]\n(.*?)\n\[The End of Reference\]\n\n"
    r"\[The Start of Assistant A’s Answer\]\n(.*?)\n\[The End of Assistant A’s Answer\]\n\n"
    r"\[The Start of Assistant B’s Answer\]\n(.*)\n\[The End of Assistant B’s Answer\]\s*\Z",
    re.S,
)


def read_pair_prompt(messages: list[dict]) -> Item:
    """(question, source, answer A, answer B) from PairwiseComparisonEvaluator's prompt.

    Raises:
        ValueError: the prompt does not have the evaluator's sections.
    """
    expected = (
        "a local pairwise judge reads PairwiseComparisonEvaluator's prompt, with question, "
        "reference and two answers"
    )
    return read_sections(messages, PROMPT, expected)


@lru_cache(maxsize=100_000)  # cross-validation asks for the same answers over and over
def answer_features(question: str, source: str, answer: str) -> tuple[float, ...]:
    """What can be counted in one answer: its length first, what the source supports, hedges."""
    asked, known = words(question), words(source)
    said, named = words(answer) - asked, names(answer) - asked
    numbered, length = numbers(answer) - numbers(question), len(WORD.findall(answer))
    return (
        np.log1p(length),
        float(length <= 5),
        share(asked, words(answer)),
        share(said, known),
        np.log1p(len(said & known)),
        np.log1p(len(said - known)),
        np.log1p(len(named & known)),
        np.log1p(len(named - known)),
        np.log1p(len(numbered & numbers(source))),
        np.log1p(len(numbered - numbers(source))),
        float(answer.rstrip()[-1:] not in tuple('.!?"”')),
        float(len(HEDGE.findall(answer))),
    )


def featurize_pairs(pairs: list[Item], kinds: str) -> np.ndarray:
    """Features of pairs, (pairs, d + 3): d differences, then the likenesses.

    Swapping the answers turns the sign of the differences, to the bit, and leaves the likenesses:
    words in common, cosine, and how unequal the lengths are.

    Args:
        pairs: question, source and two answers, a row each.
        kinds: of differences: "length"; "content", which adds the counts; "similarity", which adds
            to these the encoder's cosines of answer and source, answer and question.
    """
    question, source, first, second = (embed([pair[i] for pair in pairs]) for i in range(4))
    sides = []
    for i, vectors in ((2, first), (3, second)):
        counted = np.array([answer_features(pair[0], pair[1], pair[i]) for pair in pairs])
        cosines = np.stack([(vectors * source).sum(1), (vectors * question).sum(1)], axis=1)
        every = {
            "length": counted[:, :1],
            "content": counted,
            "similarity": np.hstack([counted, cosines]),
        }
        sides.append(every[kinds])
    difference = sides[0] - sides[1]
    in_common = [overlap(pair[2], pair[3]) for pair in pairs]
    likeness = [in_common, (first * second).sum(1), np.abs(difference[:, 0])]
    return np.hstack([difference, np.stack(likeness, axis=1)])


@dataclass
class PairStudent(Student):
    """A trained pairwise judge. Swap the answers, and P(A) and P(B) swap, to the bit.

    `fit` takes pairs, verdicts "A", "B" or "C" and, if any, distributions over these letters.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("length", "content", "similarity")
    STRENGTHS: ClassVar[tuple[float, ...]] = (0.03, 0.1, 0.3)

    @staticmethod
    def featurize(items: list[Item], kinds: str) -> np.ndarray:
        """The features of pairs, (pairs, features)."""
        return featurize_pairs(items, kinds)

    @staticmethod
    def _labels(verdicts: Any, soft: list[dict]) -> np.ndarray:
        return np.array(list(VERDICTS))

    @staticmethod
    def _standard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differences are not centred: 0 is the middle between A and B."""
        mean, scale = x.mean(axis=0), x.std(axis=0)
        mean[:-LIKENESSES] = 0
        scale[:-LIKENESSES] = np.sqrt((x[:, :-LIKENESSES] ** 2).mean(axis=0))
        return mean, scale

    @staticmethod
    def _basis(features: int) -> np.ndarray:
        """Ties weights: a difference counts for A as much as against B, a likeness for a tie."""
        rows = np.arange((features + 1) * 3).reshape(-1, 3)
        basis = np.zeros((rows.size, len(rows)))
        for i in range(len(rows)):
            if i < features - LIKENESSES:
                basis[rows[i, 0], i], basis[rows[i, 1], i] = 1, -1
            else:
                basis[rows[i, 2], i] = 1
        return basis

    @staticmethod
    def _error(probabilities: np.ndarray, hard: np.ndarray, labels: np.ndarray) -> float:
        """What cross-validation makes small: the negative log-likelihood."""
        return float(-(hard * np.log(probabilities)).sum())

    def _logits(self, z: np.ndarray) -> np.ndarray:
        lean = z[:, :-LIKENESSES] @ self.weights[: -LIKENESSES - 1, 0]
        tie = z[:, -LIKENESSES:] @ self.weights[-LIKENESSES - 1 : -1, 2] + self.weights[-1, 2]
        return np.stack([lean, -lean, tie], axis=1)

    def verdicts(self, pairs: list[Item]) -> list[str]:
        """The likeliest of "A", "B" and "C" for each pair."""
        # Between equal P(A) and P(B) no order may decide: that is a tie.
        return [
            "C" if max(a, b) <= c or a == b else "A" if a > b else "B"
            for a, b, c in self.probabilities(pairs)
        ]

    def llm(self, name: str = "local-pair-student") -> "PairJudge":
        """The student as a LlamaIndex LLM, for `PairwiseComparisonEvaluator(llm=...)`."""

        def judge(pair: Item) -> tuple[str, str]:
            a, b, tie = self.probabilities([pair])[0]
            reason = (
                f"Assistant A is the better one with {a:.0%}, Assistant B with {b:.0%}, neither "
                f"with {tie:.0%}."
            )
            return self.verdicts([pair])[0], reason

        return PairJudge(judge, model_name=name)  # type: ignore[call-arg,arg-type]


class PairJudge(LocalJudge):
    """A function of (question, source, answer A, answer B) to (verdict, reason), as an LLM."""

    def _reply(self, messages: list[dict]) -> tuple[str, dict]:
        verdict, reason = self._judge(read_pair_prompt(messages))
        return f"{reason}\n\nFinal Verdict: [[{verdict}]]", {}


def untrained_pair_judges() -> dict[str, PairJudge]:
    """The pairwise judges that learn nothing. Where their rule finds both equal, it is a tie.

    - `base`: the answer whose embedding is nearer the source's, by the untrained encoder.
    - `longer`: the answer with more words.
    - `shorter`: the answer with fewer.
    - `overlap`: the answer with more words in common with the source (F1).
    - `first`: always the one shown first.
    """
    rules: dict[str, Callable[[Item, str], float]] = {
        "base": lambda pair, answer: float(np.dot(*embed([pair[1], answer]))),
        "longer": lambda pair, answer: len(answer.split()),
        "shorter": lambda pair, answer: -len(answer.split()),
        "overlap": lambda pair, answer: overlap(pair[1], answer),
    }

    def judge_by(name: str) -> Callable[[Item], tuple[str, str]]:
        def judge(pair: Item) -> tuple[str, str]:
            if name == "first":
                return "A", "By rule: first."
            first, second = (rules[name](pair, answer) for answer in pair[2:])
            verdict = "A" if first > second else "B" if second > first else "C"
            return verdict, f"By rule: {name}."

        return judge

    return {
        name: PairJudge(judge_by(name), model_name=name)  # type: ignore[call-arg,arg-type]
        for name in (*rules, "first")
    }
