"""The local student for pairs: which of two answers is better, the same whichever comes first."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import numpy as np

from .student import WORD, LocalJudge, Student, _names, _numbers, _share, embed, overlap, words

Pair = tuple[str, str, str, str]  # question, source, first answer, second answer

VERDICTS = "ABC"
LIKENESSES = 3  # the last features of a pair: those that swapping the answers leaves as they are
HEDGE = re.compile(
    r"\b(?:unknown|unclear|cannot|sorry|no information|(?:not|n't) (?:mention|provide|specif|clear|stated)\w*)\b",
    re.I,
)
PROMPT = re.compile(
    r"\[User Question\]\n(.*?)\n\n\[The Start of Reference\]\n(.*?)\n\[The End of Reference\]\n\n"
    r"\[The Start of Assistant A’s Answer\]\n(.*?)\n\[The End of Assistant A’s Answer\]\n\n"
    r"\[The Start of Assistant B’s Answer\]\n(.*)\n\[The End of Assistant B’s Answer\]\s*\Z",
    re.S,
)


def read_pair_prompt(messages: list[dict]) -> Pair:
    """(question, source, answer A, answer B) from the messages of a PairwiseComparisonEvaluator prompt.

    Raises:
        ValueError: the prompt does not have the evaluator's sections.
    """
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    if not (match := PROMPT.search(text)):
        raise ValueError(
            "a local pairwise judge reads PairwiseComparisonEvaluator's prompt, with question, reference and two "
            f"answers; this one begins {text[:80]!r}"
        )
    return match.groups()


@lru_cache(maxsize=100_000)
def answer_features(question: str, source: str, answer: str) -> list[float]:
    """What can be counted in one answer: its length, first; what of it the source bears out; how it ends and hedges."""
    asked, known, given = words(question), words(source), words(answer)
    said, names, numbers = (
        given - asked,
        _names(answer) - asked,
        _numbers(answer) - _numbers(question),
    )
    length = len(WORD.findall(answer))
    return [
        np.log1p(length),
        float(length <= 5),
        _share(asked, given),
        _share(said, known),
        np.log1p(len(said & known)),
        np.log1p(len(said - known)),
        np.log1p(len(names & known)),
        np.log1p(len(names - known)),
        np.log1p(len(numbers & _numbers(source))),
        np.log1p(len(numbers - _numbers(source))),
        float(answer.rstrip()[-1:] not in tuple('.!?"”')),
        float(len(HEDGE.findall(answer))),
    ]


def featurize_pairs(pairs: list[Pair], kinds: str) -> np.ndarray:
    """Features of pairs, (pairs, d + 3): d differences, then the likenesses.

    Swapping the answers turns the sign of the differences, to the bit, and leaves the likenesses: words in common, cosine, and
    how unequal the lengths are. `kinds` of differences: "length"; "content" adds the counts; "similarity" adds to these the
    encoder's cosines of answer and source, answer and question.
    """
    question, source, first, second = (embed([pair[i] for pair in pairs]) for i in range(4))
    sides = []
    for i, vectors in ((2, first), (3, second)):
        counted = np.array([answer_features(pair[0], pair[1], pair[i]) for pair in pairs])
        cosines = np.stack([(vectors * source).sum(1), (vectors * question).sum(1)], axis=1)
        sides.append(
            {
                "length": counted[:, :1],
                "content": counted,
                "similarity": np.hstack([counted, cosines]),
            }[kinds]
        )
    difference = sides[0] - sides[1]
    likeness = np.stack(
        [
            [overlap(pair[2], pair[3]) for pair in pairs],
            (first * second).sum(1),
            np.abs(difference[:, 0]),
        ],
        axis=1,
    )
    return np.hstack([difference, likeness])


@dataclass
class PairStudent(Student):
    """A trained pairwise judge, antisymmetric by construction: swap the answers, and P(A) and P(B) swap, to the bit.

    `fit` takes pairs, verdicts "A", "B" or "C" and, if any, distributions over these letters.
    """

    KINDS = ("length", "content", "similarity")
    STRENGTHS = (0.03, 0.1, 0.3)

    @staticmethod
    def featurize(pairs: list[Pair], kinds: str) -> np.ndarray:
        return featurize_pairs(pairs, kinds)

    @staticmethod
    def _labels(verdicts: list, soft: list[dict]) -> np.ndarray:
        return np.array(list(VERDICTS))

    @staticmethod
    def _standard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differences are not centred: theirs is 0, the middle between A and B."""
        mean, scale = x.mean(axis=0), x.std(axis=0)
        mean[:-LIKENESSES], scale[:-LIKENESSES] = 0, np.sqrt((x[:, :-LIKENESSES] ** 2).mean(axis=0))
        return mean, scale

    @staticmethod
    def _basis(features: int) -> np.ndarray:
        """Ties the head's weights so that a difference speaks for A as much as against B, and a likeness for a tie only."""
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

    def verdicts(self, pairs: list[Pair]) -> list[str]:
        """The likeliest of "A", "B" and "C" for each pair."""
        # Between equal P(A) and P(B) no order may decide: that is a tie.
        return [
            "C" if max(a, b) <= c or a == b else "A" if a > b else "B"
            for a, b, c in self.probabilities(pairs)
        ]

    def llm(self, name: str = "local-pair-student") -> "PairJudge":
        """The student as a LlamaIndex LLM, for `PairwiseComparisonEvaluator(llm=...)`."""

        def judge(pair: Pair) -> tuple[str, str]:
            a, b, tie = self.probabilities([pair])[0]
            return (
                self.verdicts([pair])[0],
                f"Assistant A is the better one with {a:.0%}, Assistant B with {b:.0%}, neither with {tie:.0%}.",
            )

        return PairJudge(judge, model_name=name)


class PairJudge(LocalJudge):
    """A function of (question, source, answer A, answer B) that returns (verdict, reason), behind the face of an LLM."""

    def _reply(self, messages: list[dict]) -> tuple[str, dict]:
        verdict, reason = self._judge(read_pair_prompt(messages))
        return f"{reason}\n\nFinal Verdict: [[{verdict}]]", {}


def _more(first: float, second: float) -> str:
    return "A" if first > second else "B" if second > first else "C"


def untrained_pair_judges() -> dict[str, PairJudge]:
    """The pairwise judges that learn nothing.

    - `base`: the untrained encoder: the answer whose embedding is nearer the source's.
    - `longer`: the answer with more words; `shorter`: with fewer; `overlap`: with more words in common with the source (F1). Equal is
      a tie.
    - `first`: always the one shown first.
    """
    rules: dict[str, Callable[[Pair], str]] = {
        "base": lambda pair: _more(
            *(float(np.dot(*embed([pair[1], answer]))) for answer in pair[2:])
        ),
        "longer": lambda pair: _more(*(len(answer.split()) for answer in pair[2:])),
        "shorter": lambda pair: _more(*(-len(answer.split()) for answer in pair[2:])),
        "overlap": lambda pair: _more(*(overlap(pair[1], answer) for answer in pair[2:])),
        "first": lambda pair: "A",
    }
    return {
        name: PairJudge(lambda pair, rule=rule: (rule(pair), f"By rule: {name}."), model_name=name)
        for name, rule in rules.items()
    }
