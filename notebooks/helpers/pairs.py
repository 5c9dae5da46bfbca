"""The local student for pairs: which of two answers is better, the same whichever comes first."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy import ndarray

from .embeddings import embed
from .student import WORD, Item, LocalJudge, Student, names, numbers, overlap, share, words

LIKENESSES = 3  # the last features of a pair; they do not change when the answers are swapped
HEDGE = re.compile(
    r"\b(?:unknown|unclear|cannot|sorry|no information|"
    r"(?:not|n't) (?:mention|provide|specif|clear|stated)\w*)\b",
    re.I,
)
# The sections of PairwiseComparisonEvaluator's prompt, with these texts in them.
PAIR_PROMPT = (
    "[User Question]\n{}\n\n[The Start of Reference]\n{}\n[The End of Reference]\n\n"
    "[The Start of Assistant A’s Answer]\n{}\n[The End of Assistant A’s Answer]\n\n"
    "[The Start of Assistant B’s Answer]\n{}\n[The End of Assistant B’s Answer]"
)
PAIR_SECTIONS = re.compile(re.escape(PAIR_PROMPT).replace(r"\{\}", "(.*?)") + r"\s*\Z", re.S)


# What `answer_features` counts, in its order.
ANSWER_COUNTS = (
    "length",
    "five words or fewer",
    "share of the question's words that it has",
    "share of its words that the source has",
    *(
        f"number of its {kind} that the source {has}"
        for kind in ("words", "names", "numbers")
        for has in ("has", "lacks")
    ),
    "no full stop at the end",
    "hedges",
)


@lru_cache(maxsize=100_000)  # cross-validation asks for the same answers over and over
def answer_features(question: str, source: str, answer: str) -> tuple[float, ...]:
    """What can be counted in one answer: its length first, what the source supports, hedges."""
    asked, known = words(question), words(source)
    said, named = words(answer) - asked, names(answer) - asked
    numbered, length = numbers(answer) - numbers(question), len(WORD.findall(answer))
    evidence = (said, known), (named, known), (numbered, numbers(source))
    counts = [len(part) for one, whole in evidence for part in (one & whole, one - whole)]
    return (
        np.log1p(length),
        float(length <= 5),
        share(asked, words(answer)),
        share(said, known),
        *np.log1p(counts),
        float(answer.rstrip()[-1:] not in tuple('.!?"”')),
        float(len(HEDGE.findall(answer))),
    )


@dataclass
class PairStudent(Student):
    """A trained pairwise judge. Swap the answers, and P(A) and P(B) swap, to the bit.

    `fit` takes pairs (question, source and two answers), verdicts "A", "B" or "C" and, if any,
    distributions over these letters.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("length", "content", "similarity")
    STRENGTHS: ClassVar[tuple[float, ...]] = (0.03, 0.1, 0.3)
    LABELS: ClassVar[tuple[str, ...]] = ("A", "B", "C")

    @staticmethod
    def featurize(items: list[Item], kinds: str) -> ndarray:
        """Features of pairs, (pairs, d + 3): d differences, then the likenesses.

        Swapping the answers turns the sign of the differences, to the bit. It leaves the
        likenesses: words in common, cosine, and how unequal the lengths are. The differences are of
        "length"; of "content", which adds the counts; or of "similarity", which adds to these the
        encoder's cosines of answer and source, and of answer and question.
        """
        question, source, first, second = (embed([pair[i] for pair in items]) for i in range(4))
        sides = []
        for i, vectors in ((2, first), (3, second)):
            counted = np.array([answer_features(pair[0], pair[1], pair[i]) for pair in items])
            cosines = [(vectors * source).sum(1), (vectors * question).sum(1)]
            sides.append(np.column_stack([counted, *cosines]))
        # How many of the columns each kind uses. The last two are cosines.
        used = {"length": 1, "content": -2, "similarity": None}[kinds]
        difference = (sides[0] - sides[1])[:, :used]
        in_common = [overlap(pair[2], pair[3]) for pair in items]
        likeness = [in_common, (first * second).sum(1), np.abs(difference[:, 0])]
        return np.column_stack([difference, *likeness])

    @staticmethod
    def _ties(features: int) -> ndarray:
        """A difference counts for A as much as against B; a likeness and the bias for a tie."""
        differences = features - LIKENESSES
        return np.array([[1, -1, 0]] * differences + [[0, 0, 1]] * (LIKENESSES + 1))

    @staticmethod
    def _error(probabilities: ndarray, hard: ndarray, labels: ndarray) -> float:
        """What cross-validation makes small: the negative log-likelihood."""
        return float(-(hard * np.log(probabilities)).sum())

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

    sections: ClassVar[re.Pattern] = PAIR_SECTIONS

    def _reply(self, item: Item) -> tuple[str, dict]:
        verdict, reason = self._judge(item)
        return f"{reason}\n\nFinal Verdict: [[{verdict}]]", {}
