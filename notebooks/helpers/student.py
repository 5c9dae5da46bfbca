"""The local student: counts, a frozen encoder's cosines, and a softmax head over the verdicts."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    LogProb,
    MessageRole,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback

from .embeddings import embed

Item = tuple[str, ...]  # question, evidence (reference answer or context), answer to judge

SECTIONS = re.compile(
    r"## User Query\n(.*?)\n\n## (?:Reference Answer|Context)\n(.*?)\n\n"
    r"## Generated Answer\n(.*?)\n?\Z",
    re.S,
)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
STOPWORDS = frozenset(
    "a an and are as at be been but by did do does for from had has have he her him his how i in "
    "into is it its no not of on or our she so than that the their them then there these they this "
    "to was we were what when where which while who whom whose why will with would you your".split()
)
FOLDS = 5


def read_sections(messages: list[dict], sections: re.Pattern, name: str) -> Item:
    """The texts of an evaluator's sections, from the messages of its prompt.

    Args:
        messages: of the prompt.
        sections: a pattern with a group a text.
        name: what the prompt should be, for the error.

    Raises:
        ValueError: the prompt does not have the sections.
    """
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    if not (match := sections.search(text)):
        raise ValueError(f"{name}; this one begins {text[:80]!r}")
    return match.groups()


def read_prompt(messages: list[dict]) -> Item:
    """(question, evidence, answer) from CorrectnessEvaluator's or SingleGradingEvaluator's prompt.

    Raises:
        ValueError: the prompt does not have the evaluators' three sections.
    """
    expected = (
        "a local judge reads CorrectnessEvaluator's prompt, with the sections User Query, "
        "Reference Answer (or Context) and Generated Answer"
    )
    return read_sections(messages, SECTIONS, expected)


def items_of(rows: list[dict]) -> list[Item]:
    """The items of correctness rows or, where rows have no reference, of single-grading rows."""
    answers = [row["response_data"] for row in rows]
    evidence = [row.get("reference", answer.get("context")) for row, answer in zip(rows, answers)]
    return [
        (row["question"], known, answer["text"])
        for row, known, answer in zip(rows, evidence, answers)
    ]


def words(text: str) -> set[str]:
    """The distinct content words of a text, in lower case."""
    return set(WORD.findall(text.lower())) - STOPWORDS


def names(text: str) -> set[str]:
    """The distinct capitalised words of a text, in lower case."""
    return {word.lower() for word in WORD.findall(text) if word[0].isupper()} - STOPWORDS


def numbers(text: str) -> set[str]:
    """The distinct numbers of a text; a comma in a number is left out."""
    return set(re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")))


def share(part: set, whole: set) -> float:
    """How much of a part is in the whole, 0 to 1; 1 of an empty part."""
    return len(part & whole) / len(part) if part else 1.0


def overlap(reference: str, answer: str) -> float:
    """F1 of the content words of two texts, 0 to 1."""
    wanted, given = words(reference), words(answer)
    return 2 * len(wanted & given) / (len(wanted) + len(given)) if wanted or given else 1.0


@lru_cache(maxsize=100_000)  # cross-validation asks for the same items over and over
def lexical_features(item: Item) -> tuple[float, ...]:
    """What can be counted: how much of the reference the answer holds, and how much besides."""
    question, reference, answer = item
    features: list[float] = []
    for kind in (words, names, numbers):
        # What the question itself says proves nothing, so it is left out of both sides.
        key, said = kind(reference) - kind(question), kind(answer) - kind(question)
        features += [share(key, said), share(said, key)]
        features += [np.log1p(len(key - said)), np.log1p(len(said - key))]
    wanted, given = (np.log1p(len(WORD.findall(text))) for text in (reference, answer))
    return (*features, overlap(reference, answer), given, given - wanted)


def featurize(items: list[Item], kinds: str) -> np.ndarray:
    """Features of items, shape (items, features).

    Args:
        items: question, evidence and answer, a row each.
        kinds: "lexical", or "similarity", which adds the encoder's cosines of reference and answer,
            question and answer, question and reference.
    """
    counted = np.array([lexical_features(item) for item in items])
    if kinds == "lexical":
        return counted
    question, reference, answer = (embed([item[i] for item in items]) for i in range(3))
    pairs = (reference, answer), (question, answer), (question, reference)
    return np.column_stack([counted, *((one * other).sum(1) for one, other in pairs)])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    return log_softmax(logits, axis=1)


def distillation_loss(
    weights: np.ndarray,
    x: np.ndarray,
    hard: np.ndarray,
    soft: np.ndarray,
    alpha: float = 1.0,
    temperature: float = 1.0,
    strength: float = 0.0,
) -> tuple[float, np.ndarray]:
    """Loss alpha * CE(hard label) + (1 - alpha) * T^2 * KL(teacher || student), and gradient.

    Args:
        weights: flat, of a (features + 1, verdicts) matrix; its last row is the bias.
        x: features, (rows, features).
        hard: the teacher's verdicts, one-hot, (rows, verdicts).
        soft: the teacher's distributions, (rows, verdicts), each row summing to 1.
        alpha: share of the hard labels; 1 is plain cross-entropy.
        temperature: T; both distributions are softened by it in the second term.
        strength: of the L2 penalty, strength / 2 * sum of squares, without the bias.

    Returns:
        (loss, gradient), in nats a row; the gradient has the shape of `weights`.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"
    (arXiv:1503.02531).
    """
    w = weights.reshape(x.shape[1] + 1, hard.shape[1])
    logits = x @ w[:-1] + w[-1]
    loss, error = strength / 2 * (w[:-1] ** 2).sum(), np.zeros_like(hard)
    if alpha > 0:
        log_student = _log_softmax(logits)
        loss -= alpha * (hard * log_student).sum() / len(x)
        error = alpha * (np.exp(log_student) - hard)
    if alpha < 1:
        log_student = _log_softmax(logits / temperature)
        teacher = soft ** (1 / temperature)
        teacher = teacher / teacher.sum(axis=1, keepdims=True)
        log_teacher = np.log(np.maximum(teacher, np.finfo(float).tiny))
        divergence = (teacher * (log_teacher - log_student)).sum() / len(x)
        loss += (1 - alpha) * temperature**2 * divergence
        error = error + (1 - alpha) * temperature * (np.exp(log_student) - teacher)
    error = error / len(x)
    gradient = np.concatenate([x.T @ error + strength * w[:-1], error.sum(axis=0, keepdims=True)])
    return loss, gradient.ravel()


def folds(items: list[Item]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, held out) masks of each fold of cross-validation; the draw is seeded.

    Items with the same question on the same evidence, their first two parts, stay together: no
    held-out item shares its question with a training item.

    Raises:
        ValueError: there are fewer questions than folds.
    """
    questions = list(dict.fromkeys(item[:2] for item in items))
    if len(questions) < FOLDS:
        raise ValueError(
            f"{len(questions)} different questions (or references, contexts, sources) are too few "
            f"to learn from: at least {FOLDS}"
        )
    drawn = np.random.default_rng(0).permutation(len(questions)) % FOLDS
    fold_of = dict(zip(questions, drawn))
    fold = np.array([fold_of[item[:2]] for item in items])
    return [(fold != k, fold == k) for k in range(FOLDS)]


def check_settings(alpha: float, temperature: float) -> None:
    """Raise ValueError where the loss is not defined."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: expected 0 to 1, the share of the hard labels")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected above 0")


def fit_head(
    x: np.ndarray,
    hard: np.ndarray,
    soft: np.ndarray,
    basis: np.ndarray | None = None,
    **settings: float,
) -> np.ndarray:
    """The weights, (features + 1, verdicts), that minimise `distillation_loss`.

    By L-BFGS from zero, on one BLAS thread.

    Args:
        x: features, (rows, features).
        hard: one-hot verdicts, (rows, verdicts).
        soft: distributions, (rows, verdicts).
        basis: (weights, parameters); ties weights together: the weights are basis @ parameters.
        settings: `alpha`, `temperature` and `strength` of the loss.
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    shape = x.shape[1] + 1, hard.shape[1]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        if basis is None:
            return distillation_loss(parameters, x, hard, soft, **settings)
        value, gradient = distillation_loss(basis @ parameters, x, hard, soft, **settings)
        return value, basis.T @ gradient

    start = np.zeros(np.prod(shape) if basis is None else basis.shape[1])
    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7}
    # The matrices are tiny. More BLAS threads wait for one another, at ten times the CPU time.
    with threadpool_limits(1, user_api="blas"):
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return (found if basis is None else basis @ found).reshape(shape)


@dataclass
class Student:
    """A trained judge.

    Args:
        kinds: the kinds of features that it uses.
        mean: of each feature on the training rows.
        scale: of each feature.
        weights: of the head, (features + 1, verdicts).
        labels: the verdicts.
        held_out: the distribution of each training item when it was held out, (items, verdicts).
    """

    kinds: str
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray | None = None

    KINDS: ClassVar[tuple[str, ...]] = ("lexical", "similarity")
    STRENGTHS: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1)

    @classmethod
    def fit(
        cls,
        items: list[Item],
        verdicts: list | np.ndarray,
        soft: list[dict] | None = None,
        alpha: float = 1.0,
        temperature: float = 1.0,
    ) -> "Student":
        """Train on the teacher's verdicts.

        Cross-validation on these items alone chooses the kinds of features and the strength of the
        penalty. Items with the same question stay together in it.

        Args:
            items: question, evidence and answer, a row each.
            verdicts: the teacher's score of each row, on any scale: the hard labels.
            soft: the teacher's distribution of each row, {score: probability}; by default all on
                its verdict.
            alpha: see `distillation_loss`.
            temperature: see `distillation_loss`.

        Raises:
            ValueError: alpha or temperature out of range, or too little to learn from.
        """
        check_settings(alpha, temperature)
        _check_verdicts(items, list(verdicts))
        soft = soft or [{verdict: 1.0} for verdict in verdicts]
        labels = cls._labels(verdicts, soft)
        hard = (np.asarray(verdicts)[:, None] == labels).astype(float)
        shares = np.array([[row.get(label, 0.0) for label in labels.tolist()] for row in soft])
        best: Any = (np.inf,)
        settings = {"alpha": alpha, "temperature": temperature}
        for kinds in cls.KINDS:
            x = cls.featurize(items, kinds)
            if len(items) < x.shape[1]:
                raise ValueError(
                    f"{len(items)} rows are too few to learn from: the student has {x.shape[1]} "
                    "features"
                )
            for strength in cls.STRENGTHS:
                settings["strength"] = strength
                unseen = np.empty(hard.shape)
                for train, held in folds(items):
                    taught = cls._fit(kinds, x[train], hard[train], shares[train], labels, settings)
                    unseen[held] = taught._predict(x[held])
                error = cls._error(unseen, hard, labels)
                if error < best[0]:
                    best = error, kinds, dict(settings), x, unseen
        _, kinds, settings, x, unseen = best
        student = cls._fit(kinds, x, hard, shares, labels, settings)
        student.held_out = unseen
        return student

    # What a kind of judge has of its own:

    @staticmethod
    def featurize(items: list[Item], kinds: str) -> np.ndarray:
        """The features of items, (items, features)."""
        return featurize(items, kinds)

    @staticmethod
    def _labels(verdicts: Any, soft: list[dict]) -> np.ndarray:
        return np.unique([*verdicts, *(score for row in soft for score in row)])

    @staticmethod
    def _standard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, scale) of the features."""
        return x.mean(axis=0), x.std(axis=0)

    @staticmethod
    def _basis(features: int) -> np.ndarray | None:
        return None

    @staticmethod
    def _error(probabilities: np.ndarray, hard: np.ndarray, labels: np.ndarray) -> float:
        """What cross-validation makes small: the squared error of the expected score."""
        return float(((probabilities @ labels - hard @ labels) ** 2).sum())

    def _logits(self, z: np.ndarray) -> np.ndarray:
        return z @ self.weights[:-1] + self.weights[-1]

    # What all kinds share:

    @classmethod
    def _fit(
        cls,
        kinds: str,
        x: np.ndarray,
        hard: np.ndarray,
        soft: np.ndarray,
        labels: np.ndarray,
        settings: dict,
    ) -> "Student":
        mean, scale = cls._standard(x)
        scale = np.where(scale > 1e-9, scale, 1.0)
        weights = fit_head((x - mean) / scale, hard, soft, cls._basis(x.shape[1]), **settings)
        return cls(kinds, mean, scale, weights, labels)

    def _predict(self, x: np.ndarray) -> np.ndarray:
        return np.exp(_log_softmax(self._logits((x - self.mean) / self.scale)))

    def probabilities(self, items: list[Item]) -> np.ndarray:
        """The student's distribution over `labels`, (items, verdicts)."""
        return self._predict(self.featurize(items, self.kinds))

    def scores(self, items: list[Item]) -> np.ndarray:
        """The expected score of each item under the student's distribution, (items,).

        Rounded to one decimal, or two where the labels lie within 1: further digits would differ
        between machines.
        """
        return np.round(self.probabilities(items) @ self.labels, self._decimals())

    def _decimals(self) -> int:
        return 1 if np.ptp(self.labels) > 1 else 2

    def llm(self, name: str = "local-student") -> "LocalJudge":
        """The student as a LlamaIndex LLM, for CorrectnessEvaluator and SingleGradingEvaluator.

        It answers on the scale of the scores that it learnt.
        """

        def judge(item: Item) -> tuple[float, str, dict]:
            probabilities = self.probabilities([item])[0]
            likely = sorted(zip(-probabilities, self.labels))[:2]
            verdicts = " or ".join(f"{label:.1f} ({-p:.0%})" for p, label in likely)
            found = share(words(item[1]) - words(item[0]), words(item[2]))
            reason = (
                f"Most like answers that the teacher gave {verdicts}. Of what the reference adds "
                f"to the question, the answer has {found:.0%}, word for word."
            )
            distribution = dict(zip(self.labels.tolist(), probabilities.tolist()))
            return float(self.scores([item])[0]), reason, distribution

        return LocalJudge(judge, model_name=name, decimals=self._decimals())

    def save(self, path: str | Path) -> None:
        """Write the student to an `.npz` file (the ending is added where it is missing)."""
        parts = {name: value for name, value in vars(self).items() if name != "held_out"}
        np.savez(path, **parts)

    @classmethod
    def load(cls, path: str | Path) -> "Student":
        """Read what `save` wrote. Nothing in the file is executed."""
        with np.load(str(path).removesuffix(".npz") + ".npz", allow_pickle=False) as file:
            parts = {name: file[name] for name in file.files}
        return cls(**{**parts, "kinds": str(parts["kinds"])})


def _check_verdicts(items: list[Item], verdicts: list) -> None:
    """Raise ValueError where there is nothing to learn."""
    if not items:
        raise ValueError("no rows to learn from")
    missing = [n for n, verdict in enumerate(verdicts) if verdict is None or verdict != verdict]
    if missing:
        raise ValueError(
            f"row {missing[0]} has no verdict of the teacher's (of {len(missing)} rows): leave "
            "such rows out"
        )
    if len(set(verdicts)) < 2:
        raise ValueError(
            f"all {len(items)} rows have the verdict {verdicts[0]}: there is nothing to tell apart"
        )


class LocalJudge(CustomLLM):
    """A function of (question, reference, answer) as an LLM: it reads the judge's prompt.

    Args:
        judge: returns (score, reason), or (score, reason, {score: probability}). The last becomes
            the reply's log-probabilities.
        model_name: its name.
        decimals: of the score in the reply. Further digits would differ between machines.
    """

    model_name: str
    decimals: int = 1
    _judge: Callable = PrivateAttr()

    def __init__(self, judge: Callable[[Item], tuple], **settings: Any) -> None:
        super().__init__(**settings)
        self._judge = judge

    @property
    def metadata(self) -> LLMMetadata:
        """The name, and that this is a chat model."""
        return LLMMetadata(model_name=self.model_name, is_chat_model=True)

    @llm_chat_callback()
    def chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The judge's reply to an evaluator's prompt.

        Raises:
            ValueError: it is another prompt.
        """
        plain = [{"role": one.role.value, "content": one.content} for one in messages]
        reply, distribution = self._reply(plain)
        tokens = [
            LogProb(token=f"{score:g}", logprob=float(np.log(p)))
            for score, p in distribution.items()
            if p > 0
        ]
        message = ChatMessage(role=MessageRole.ASSISTANT, content=reply)
        return ChatResponse(message=message, logprobs=[tokens] if tokens else None)

    def _reply(self, messages: list[dict]) -> tuple[str, dict]:
        score, reason, *distribution = self._judge(read_prompt(messages))
        return f"{score:.{self.decimals}f}\n{reason}", distribution[0] if distribution else {}

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `chat`, for a prompt that is one text."""
        response = self.chat([ChatMessage(role=MessageRole.USER, content=prompt)])
        return CompletionResponse(text=response.message.content or "")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        """As `complete`, in one piece."""
        yield self.complete(prompt)


def untrained_judges(constant: float, low: float = 1, high: float = 5) -> dict[str, LocalJudge]:
    """The judges that learn nothing, on a scale from `low` to `high`.

    - `base`: the encoder's cosine of evidence (reference or context) and answer.
    - `overlap`: F1 of the words of evidence and answer.
    - `longer`: the longer the better, full marks from 60 words on.
    - `constant`: always the same score (give it the training rows' median).
    """

    def scaled(part: float) -> float:
        return low + (high - low) * min(1.0, max(0.0, part))

    def cosine(item: Item) -> float:
        return float(np.dot(*embed([item[1], item[2]])))

    rules: dict[str, Callable[[Item], tuple]] = {
        "base": lambda item: (scaled(cosine(item)), "Cosine of the embeddings."),
        "overlap": lambda item: (scaled(overlap(item[1], item[2])), "Words in common."),
        "longer": lambda item: (scaled(len(WORD.findall(item[2])) / 60), "Length."),
        "constant": lambda item: (constant, "Always this."),
    }
    decimals = 1 if high - low > 1 else 2
    return {
        name: LocalJudge(rule, model_name=name, decimals=decimals) for name, rule in rules.items()
    }
