"""The local student: a judge that anyone can train. Frozen encoder, lexical features, a softmax head over the verdicts."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata, MessageRole
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback

from .datasets import local_embedding

Item = tuple[str, str, str]  # question, reference answer, answer to judge

SECTIONS = re.compile(r"## User Query\n(.*?)\n\n## Reference Answer\n(.*?)\n\n## Generated Answer\n(.*?)\n?\Z", re.S)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
STOPWORDS = frozenset("a an and are as at be been but by did do does for from had has have he her him his how i in into is it "
                      "its no not of on or our she so than that the their them then there these they this to was we were what "
                      "when where which while who whom whose why will with would you your".split())
STRENGTHS = (0.01, 0.03, 0.1)
FOLDS = 5


def read_prompt(messages: list[dict]) -> Item:
    """(question, reference, answer) from the messages of a CorrectnessEvaluator prompt.

    Raises:
        ValueError: the prompt does not have the evaluator's three sections.
    """
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    if not (match := SECTIONS.search(text)):
        raise ValueError("a local judge reads CorrectnessEvaluator's prompt, with the sections User Query, Reference Answer and "
                         f"Generated Answer; this one begins {text[:80]!r}")
    return match.groups()


def items_of(rows: list[dict]) -> list[Item]:
    """The items of correctness rows."""
    return [(row["question"], row["reference"], row["response_data"]["text"]) for row in rows]


def words(text: str) -> set[str]:
    """The distinct content words of a text, in lower case."""
    return set(WORD.findall(text.lower())) - STOPWORDS


def overlap(reference: str, answer: str) -> float:
    """F1 of the content words of two texts, 0 to 1."""
    wanted, given = words(reference), words(answer)
    return 2 * len(wanted & given) / (len(wanted) + len(given)) if wanted or given else 1.0


def embed(texts: list[str]) -> np.ndarray:
    """Unit vectors of the local encoder, shape (texts, 384). Each text is encoded once a process."""
    # By length, since a batch takes as long as its longest text makes it.
    new = sorted(set(texts), key=lambda text: (len(text), text))
    vectors = dict(zip(new, local_embedding().get_text_embedding_batch(new)))
    return np.array([vectors[text] for text in texts])


def _share(part: set, whole: set) -> float:
    return len(part & whole) / len(part) if part else 1.0


def _names(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text) if word[0].isupper()} - STOPWORDS


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")))


def lexical_features(item: Item) -> list[float]:
    """What can be counted: how much of the reference the answer holds, and how much it holds besides."""
    question, reference, answer = item
    asked, wanted, given = words(question), words(reference), words(answer)
    features = []
    for wanted_kind, given_kind, known in [(wanted, given, asked),
                                           (_names(reference), _names(answer), _names(question)),
                                           (_numbers(reference), _numbers(answer), _numbers(question))]:
        # What the question itself says proves nothing, so it is taken out of both sides.
        key, said = wanted_kind - known, given_kind - known
        features += [_share(key, said), _share(said, key), np.log1p(len(key - said)), np.log1p(len(said - key))]
    lengths = [len(WORD.findall(text)) for text in (reference, answer)]
    return features + [overlap(reference, answer), np.log1p(lengths[1]), np.log1p(lengths[1]) - np.log1p(lengths[0])]


def featurize(items: list[Item], kinds: str) -> np.ndarray:
    """Features of items, shape (items, features).

    `kinds`: "lexical", or "similarity", which adds the encoder's cosines of reference and answer, question and answer,
    question and reference.
    """
    columns = [np.array([lexical_features(item) for item in items])]
    if kinds != "lexical":
        question, reference, answer = (embed([item[i] for item in items]) for i in range(3))
        columns.append(np.stack([(reference * answer).sum(1), (question * answer).sum(1), (question * reference).sum(1)], axis=1))
    return np.concatenate(columns, axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def distillation_loss(weights: np.ndarray, x: np.ndarray, hard: np.ndarray, soft: np.ndarray, alpha: float = 1.0,
                      temperature: float = 1.0, strength: float = 0.0) -> tuple[float, np.ndarray]:
    """alpha * CE(hard label) + (1 - alpha) * T^2 * KL(teacher || student), and its gradient.

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

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).
    """
    w = weights.reshape(x.shape[1] + 1, hard.shape[1])
    logits = x @ w[:-1] + w[-1]
    student, cooled = _softmax(logits), _softmax(logits / temperature)
    teacher = soft ** (1 / temperature)
    teacher = teacher / teacher.sum(axis=1, keepdims=True)
    tiny = np.finfo(float).tiny
    cross_entropy = -(hard * np.log(np.maximum(student, tiny))).sum() / len(x)
    divergence = (teacher * (np.log(np.maximum(teacher, tiny)) - np.log(np.maximum(cooled, tiny)))).sum() / len(x)
    loss = alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence + strength / 2 * (w[:-1] ** 2).sum()
    error = (alpha * (student - hard) + (1 - alpha) * temperature * (cooled - teacher)) / len(x)
    gradient = np.concatenate([x.T @ error + strength * w[:-1], error.sum(axis=0, keepdims=True)])
    return loss, gradient.ravel()


def check_settings(alpha: float, temperature: float) -> None:
    """Raise ValueError where the loss is not defined."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: expected 0 to 1, the share of the hard labels")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected above 0")


def fit_head(x: np.ndarray, hard: np.ndarray, soft: np.ndarray, basis: np.ndarray | None = None, **settings: float) -> np.ndarray:
    """The weights, (features + 1, verdicts), that minimise `distillation_loss`; found by L-BFGS from zero.

    `basis`, (weights, parameters), ties weights together: the weights searched are basis @ parameters.
    """
    from scipy.optimize import minimize

    shape = x.shape[1] + 1, hard.shape[1]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        if basis is None:
            return distillation_loss(parameters, x, hard, soft, **settings)
        value, gradient = distillation_loss(basis @ parameters, x, hard, soft, **settings)
        return value, basis.T @ gradient

    start = np.zeros(np.prod(shape) if basis is None else basis.shape[1])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7}).x
    return (found if basis is None else basis @ found).reshape(shape)


class Saved:
    """A student that can be written to a file: `kinds` of features, and arrays."""

    def save(self, path: str | Path) -> None:
        """Write the student to an `.npz` file."""
        np.savez(path, **{**vars(self), "kinds": np.array(self.kinds)})

    @classmethod
    def load(cls, path: str | Path):
        """Read what `save` wrote; nothing in the file is executed."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{**{name: file[name] for name in file.files}, "kinds": str(file["kinds"])})


@dataclass
class Student(Saved):
    """A trained judge: `kinds` of features, their `mean` and `scale`, head `weights`, the verdicts' `labels`."""

    kinds: str
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    labels: np.ndarray

    @classmethod
    def fit(cls, items: list[Item], scores: list[float], soft: np.ndarray | None = None, alpha: float = 1.0,
            temperature: float = 1.0) -> "Student":
        """Train on the teacher's scores. Feature kinds and strength are chosen by cross-validation on these items alone.

        Args:
            items: question, reference and answer, a row each.
            scores: the teacher's score of each row.
            soft: the teacher's distribution over the sorted distinct scores, (rows, verdicts); by default all on its score.

        Raises:
            ValueError: alpha or temperature out of range, or too little to learn from.
        """
        check_settings(alpha, temperature)
        labels = np.unique(scores)
        if len(labels) < 2:
            raise ValueError(f"all {len(items)} rows have the score {labels[0]:g}: there is nothing to tell apart")
        hard = (np.asarray(scores)[:, None] == labels).astype(float)
        soft = hard if soft is None else np.asarray(soft, dtype=float)
        settings = {"alpha": alpha, "temperature": temperature}
        fold = np.random.default_rng(0).permutation(len(items)) % FOLDS
        best = (np.inf, None, None)
        for kinds in ("lexical", "similarity"):
            x = featurize(items, kinds)
            for strength in STRENGTHS:
                error = 0.0
                for k in range(FOLDS):
                    train, held = fold != k, fold == k
                    model = cls._fit(kinds, x[train], hard[train], soft[train], labels, strength, settings)
                    error += ((model._predict(x[held]) @ labels - (hard @ labels)[held]) ** 2).sum()
                best = min(best, (error, kinds, strength), key=lambda choice: choice[0])
        _, kinds, strength = best
        return cls._fit(kinds, featurize(items, kinds), hard, soft, labels, strength, settings)

    @classmethod
    def _fit(cls, kinds, x, hard, soft, labels, strength, settings) -> "Student":
        mean, scale = x.mean(axis=0), x.std(axis=0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        return cls(kinds, mean, scale, fit_head((x - mean) / scale, hard, soft, strength=strength, **settings), labels)

    def _predict(self, x: np.ndarray) -> np.ndarray:
        return _softmax((x - self.mean) / self.scale @ self.weights[:-1] + self.weights[-1])

    def probabilities(self, items: list[Item]) -> np.ndarray:
        """The student's distribution over `labels`, (items, verdicts)."""
        return self._predict(featurize(items, self.kinds))

    def scores(self, items: list[Item]) -> np.ndarray:
        """The expected score of each item under the student's distribution, shape (items,).

        To one decimal: finer ones would differ between machines, by float noise alone.
        """
        return np.round(self.probabilities(items) @ self.labels, 1)

    def llm(self, name: str = "local-student") -> "LocalJudge":
        """The student as a LlamaIndex LLM, for `CorrectnessEvaluator(llm=...)`."""

        def judge(item: Item) -> tuple[float, str]:
            probabilities = self.probabilities([item])[0]
            likely = sorted(zip(-probabilities, self.labels))[:2]
            verdicts = " or ".join(f"{label:.1f} ({-p:.0%})" for p, label in likely)
            found = _share(words(item[1]) - words(item[0]), words(item[2]))
            return float(self.scores([item])[0]), (f"Most like answers that the teacher gave {verdicts}. Of what the reference "
                                                   f"adds to the question, the answer has {found:.0%}, word for word.")

        return LocalJudge(judge, model_name=name)


class LocalJudge(CustomLLM):
    """A function of (question, reference, answer) behind the face of an LLM: it reads the judge's prompt, and answers in form.

    Args:
        judge: returns (score, reason).
        model_name: its name.
    """

    model_name: str
    _judge: Callable = PrivateAttr()

    def __init__(self, judge: Callable[[Item], tuple[float, str]], **settings: Any) -> None:
        super().__init__(**settings)
        self._judge = judge

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name=self.model_name, is_chat_model=True)

    @llm_chat_callback()
    def chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        reply = self._reply([{"role": m.role.value, "content": m.content} for m in messages])
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=reply))

    def _reply(self, messages: list[dict]) -> str:
        score, reason = self._judge(read_prompt(messages))
        return f"{score:.1f}\n{reason}"

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self.chat([ChatMessage(role=MessageRole.USER, content=prompt)]).message.content)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any):
        yield self.complete(prompt)


def _from_share(share: float) -> float:
    """A share, 0 to 1, on the scale from 1 to 5."""
    return 1 + 4 * min(1.0, max(0.0, share))


def untrained_judges(constant: float) -> dict[str, LocalJudge]:
    """The judges that learn nothing: the base student, and the trivial ones that any judge must beat.

    - `base`: the encoder's cosine of reference and answer, untrained.
    - `overlap`: F1 of the words of reference and answer.
    - `longer`: the longer the better, full marks from 60 words on.
    - `constant`: always the same score (give it the training rows' median).
    """
    rules = {
        "base": lambda item: (_from_share(float(np.dot(*embed([item[1], item[2]])))), "Cosine of the embeddings."),
        "overlap": lambda item: (_from_share(overlap(item[1], item[2])), "Words in common."),
        "longer": lambda item: (_from_share(len(WORD.findall(item[2])) / 60), "Length."),
        "constant": lambda item: (constant, "Always this."),
    }
    return {name: LocalJudge(rule, model_name=name) for name, rule in rules.items()}
