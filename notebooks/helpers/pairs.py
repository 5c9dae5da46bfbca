"""The local student for pairs: which of two answers is better, the same whichever comes first."""

import re
from dataclasses import dataclass
from typing import Callable

import numpy as np

from .student import FOLDS, WORD, LocalJudge, Saved, _names, _numbers, _share, _softmax, check_settings, embed, fit_head, overlap, words

Pair = tuple[str, str, str, str]  # question, source, first answer, second answer

VERDICTS = "ABC"
STRENGTHS = (0.03, 0.1, 0.3)
HEDGE = re.compile(r"\b(?:unknown|unclear|cannot|sorry|no information|(?:not|n't) (?:mention|provide|specif|clear|stated)\w*)\b", re.I)
PROMPT = re.compile(r"\[User Question\]\n(.*?)\n\n\[The Start of Reference\]\n(.*?)\n\[The End of Reference\]\n\n"
                    r"\[The Start of Assistant A’s Answer\]\n(.*?)\n\[The End of Assistant A’s Answer\]\n\n"
                    r"\[The Start of Assistant B’s Answer\]\n(.*)\n\[The End of Assistant B’s Answer\]\s*\Z", re.S)


def read_pair_prompt(messages: list[dict]) -> Pair:
    """(question, source, answer A, answer B) from the messages of a PairwiseComparisonEvaluator prompt.

    Raises:
        ValueError: the prompt does not have the evaluator's sections.
    """
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    if not (match := PROMPT.search(text)):
        raise ValueError("a local pairwise judge reads PairwiseComparisonEvaluator's prompt, with question, reference and two "
                         f"answers; this one begins {text[:80]!r}")
    return match.groups()


def answer_features(question: str, source: str, answer: str) -> list[float]:
    """What can be counted in one answer: its length, first; what of it the source bears out; how it ends and hedges."""
    asked, known, given = words(question), words(source), words(answer)
    said, names, numbers = given - asked, _names(answer) - asked, _numbers(answer) - _numbers(question)
    length = len(WORD.findall(answer))
    return [np.log1p(length), float(length <= 5), _share(asked, given),
            _share(said, known), np.log1p(len(said & known)), np.log1p(len(said - known)),
            np.log1p(len(names & known)), np.log1p(len(names - known)),
            np.log1p(len(numbers & _numbers(source))), np.log1p(len(numbers - _numbers(source))),
            float(answer.rstrip()[-1:] not in tuple('.!?"”')), float(len(HEDGE.findall(answer)))]


def featurize_pairs(pairs: list[Pair], kinds: str) -> tuple[np.ndarray, np.ndarray]:
    """(differences, likenesses) of pairs, (pairs, d) and (pairs, 3).

    Swapping the answers turns the sign of the differences, to the bit, and leaves the likenesses: words in common, cosine, and
    how unequal the lengths are. `kinds` of differences: "length"; "content" adds the counts; "similarity" adds to these the
    encoder's cosines of answer and source, answer and question.
    """
    question, source, first, second = (embed([pair[i] for pair in pairs]) for i in range(4))
    sides = []
    for i, vectors in ((2, first), (3, second)):
        counted = np.array([answer_features(pair[0], pair[1], pair[i]) for pair in pairs])
        cosines = np.stack([(vectors * source).sum(1), (vectors * question).sum(1)], axis=1)
        sides.append({"length": counted[:, :1], "content": counted, "similarity": np.hstack([counted, cosines])}[kinds])
    difference = sides[0] - sides[1]
    likeness = np.stack([[overlap(pair[2], pair[3]) for pair in pairs], (first * second).sum(1), np.abs(difference[:, 0])], axis=1)
    return difference, likeness


def _basis(differences: int, likenesses: int) -> np.ndarray:
    """Ties the head's weights so that a difference speaks for A as much as against B, and a likeness for a tie only."""
    rows = np.arange((differences + likenesses + 1) * 3).reshape(-1, 3)
    basis = np.zeros((rows.size, len(rows)))
    for i in range(len(rows)):
        if i < differences:
            basis[rows[i, 0], i], basis[rows[i, 1], i] = 1, -1
        else:
            basis[rows[i, 2], i] = 1
    return basis


@dataclass
class PairStudent(Saved):
    """A trained pairwise judge, antisymmetric by construction: swap the answers, and P(A) and P(B) swap, to the bit.

    `kinds` of features; `scale` of the differences; `mean` and `spread` of the likenesses; `weights` of the head.
    """

    kinds: str
    scale: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, pairs: list[Pair], verdicts: list[str], soft: np.ndarray | None = None, alpha: float = 1.0,
            temperature: float = 1.0) -> "PairStudent":
        """Train on the teacher's verdicts ("A", "B" or "C"). Feature kinds and strength are chosen by cross-validation on
        these pairs alone, by likelihood.

        Args:
            soft: the teacher's distribution over A, B, C, (pairs, 3); by default all on its verdict.

        Raises:
            ValueError: alpha or temperature out of range, or too little to learn from.
        """
        check_settings(alpha, temperature)
        if len(set(verdicts)) < 2:
            raise ValueError(f"all {len(verdicts)} rows have the verdict {verdicts[0]}: there is nothing to tell apart")
        hard = np.array([[verdict == letter for letter in VERDICTS] for verdict in verdicts], dtype=float)
        soft = hard if soft is None else np.asarray(soft, dtype=float)
        settings = {"alpha": alpha, "temperature": temperature}
        fold = np.random.default_rng(0).permutation(len(pairs)) % FOLDS
        best = (np.inf, None, None)
        for kinds in ("length", "content", "similarity"):
            x = featurize_pairs(pairs, kinds)
            for strength in STRENGTHS:
                loss = 0.0
                for k in range(FOLDS):
                    train, held = fold != k, fold == k
                    model = cls._fit(kinds, [part[train] for part in x], hard[train], soft[train], strength, settings)
                    loss -= (hard[held] * np.log(model._predict(*[part[held] for part in x]))).sum()
                best = min(best, (loss, kinds, strength), key=lambda choice: choice[0])
        _, kinds, strength = best
        return cls._fit(kinds, featurize_pairs(pairs, kinds), hard, soft, strength, settings)

    @classmethod
    def _fit(cls, kinds, x, hard, soft, strength, settings) -> "PairStudent":
        difference, likeness = x
        scale, spread = np.sqrt((difference**2).mean(axis=0)), likeness.std(axis=0)
        scale, spread, mean = np.where(scale > 1e-9, scale, 1.0), np.where(spread > 1e-9, spread, 1.0), likeness.mean(axis=0)
        both = np.hstack([difference / scale, (likeness - mean) / spread])
        basis = _basis(difference.shape[1], likeness.shape[1])
        return cls(kinds, scale, mean, spread, fit_head(both, hard, soft, basis, strength=strength, **settings))

    def _predict(self, difference: np.ndarray, likeness: np.ndarray) -> np.ndarray:
        d = difference.shape[1]
        lean = difference / self.scale @ self.weights[:d, 0]
        tie = (likeness - self.mean) / self.spread @ self.weights[d:-1, 2] + self.weights[-1, 2]
        return _softmax(np.stack([lean, -lean, tie], axis=1))

    def probabilities(self, pairs: list[Pair]) -> np.ndarray:
        """P(A), P(B) and P(tie) of each pair, (pairs, 3)."""
        return self._predict(*featurize_pairs(pairs, self.kinds))

    def verdicts(self, pairs: list[Pair]) -> list[str]:
        """The likeliest of "A", "B" and "C" for each pair."""
        # Between equal P(A) and P(B) no order may decide: that is a tie.
        return ["C" if max(a, b) <= c or a == b else "A" if a > b else "B" for a, b, c in self.probabilities(pairs)]

    def llm(self, name: str = "local-pair-student") -> "PairJudge":
        """The student as a LlamaIndex LLM, for `PairwiseComparisonEvaluator(llm=...)`."""

        def judge(pair: Pair) -> tuple[str, str]:
            a, b, tie = self.probabilities([pair])[0]
            return self.verdicts([pair])[0], f"Assistant A is the better one with {a:.0%}, Assistant B with {b:.0%}, neither with {tie:.0%}."

        return PairJudge(judge, model_name=name)


class PairJudge(LocalJudge):
    """A function of (question, source, answer A, answer B) that returns (verdict, reason), behind the face of an LLM."""

    def _reply(self, messages: list[dict]) -> str:
        verdict, reason = self._judge(read_pair_prompt(messages))
        return f"{reason}\n\nFinal Verdict: [[{verdict}]]"


def _more(first: float, second: float) -> str:
    return "A" if first > second else "B" if second > first else "C"


def untrained_pair_judges() -> dict[str, PairJudge]:
    """The pairwise judges that learn nothing.

    - `base`: the untrained encoder: the answer whose embedding is nearer the source's.
    - `longer`: the answer with more words; `overlap`: with more words in common with the source (F1). Equal is a tie.
    - `first`: always the one shown first.
    """
    rules: dict[str, Callable[[Pair], str]] = {
        "base": lambda pair: _more(*(float(np.dot(*embed([pair[1], answer]))) for answer in pair[2:])),
        "longer": lambda pair: _more(*(len(answer.split()) for answer in pair[2:])),
        "overlap": lambda pair: _more(*(overlap(pair[1], answer) for answer in pair[2:])),
        "first": lambda pair: "A",
    }
    return {name: PairJudge(lambda pair, rule=rule: (rule(pair), f"By rule: {name}."), model_name=name) for name, rule in rules.items()}
