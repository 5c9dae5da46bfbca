"""Fine-tune: judgements -> chats to learn from -> engines that learn."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.llms import LLM
from llama_index.core.utils import get_tokenizer

from .judge import lower_median
from .log import ROW
from .pairs import PROMPT, PairStudent, read_pair_prompt
from .replies import cut_off, read_score, read_verdict, without_thought
from .rows import DamagedFile, load_rows, write_text
from .settings import LOCAL
from .student import Student, check_settings, read_prompt

ROLES = ["system", "user", "assistant"]
MIN_EXAMPLES = 10  # OpenAI refuses smaller files
SPECIAL = re.compile(r"<\|\w+\|>")  # a model's own token, such as <|endoftext|>


class _Recorder(BaseEventHandler):
    chats: dict  # row and the messages' identities -> the messages, which keeps them alive

    @classmethod
    def class_name(cls) -> str:
        return "finetuning_recorder"

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            # OpenAIFineTuningHandler, if it is in use too, puts the reply into the caller's list.
            reply, raw = event.response.message, event.response.raw
            asked = [message for message in event.messages if message is not reply]
            if cut_off(raw.get("finish_reason") if isinstance(raw, dict) else None):
                return
            # An LLM around another reports the same messages twice: that is one chat.
            self.chats[ROW.get(), *map(id, asked)] = [*asked, reply]


@contextmanager
def finetuning_events() -> Iterator[list[dict]]:
    """Collect the LLM chats that finish in a `with` block, as fine-tuning events.

    An event is {"messages": system, user and assistant, "row": the number of its row}. The events
    are in the order of the rows, and within a row in the order of the questions, however the calls
    overlap. A failed call leaves no event, nor does a reply that was cut off, and a model's thought
    is left out. LlamaIndex's own OpenAIFineTuningHandler keeps the order
    of starting, breaks on a failed call, and, once it is set globally, collects the students' calls
    too.
    """
    events: list[dict] = []
    handlers, recorder = get_dispatcher().event_handlers, _Recorder(chats={})
    handlers.append(recorder)
    try:
        yield events
    finally:
        # By identity: equal recorders, as of nested blocks, are not the same.
        handlers[:] = [handler for handler in handlers if handler is not recorder]
        for (row, *_), chat in sorted(recorder.chats.items(), key=lambda item: item[0][0]):
            messages = [{"role": one.role.value, "content": one.content} for one in chat]
            messages[-1]["content"] = without_thought(messages[-1]["content"] or "")
            events.append({"messages": messages, "row": row})


def readable_events(events: list[dict], low: float = 1, high: float = 5) -> list[dict]:
    """The chats whose reply holds a score from `low` to `high`: from others nothing is learnt."""
    replies = [event["messages"][-1]["content"] for event in events]
    scores = [read_score(reply, low, high)[0] for reply in replies]
    return [event for event, score in zip(events, scores) if score is not None]


def save_events(path: str | Path, events: list[dict]) -> None:
    """Write chats as an OpenAI fine-tuning file, line for line as OpenAIFineTuningHandler does."""
    write_text(path, "\n".join(json.dumps({"messages": event["messages"]}) for event in events))


def check_events(path: str | Path, least: int = MIN_EXAMPLES) -> list[dict]:
    """Read a fine-tuning file and check it. Returns the chats to learn from.

    Args:
        path: the file; each line has a system, a user and an assistant message, all with text.
            A chat whose assistant message has the weight 0 is not learnt from.
        least: how many chats to learn from it must have.

    Raises:
        DamagedFile: says which line is wrong, and what was expected.
    """
    events = load_rows(path)
    for number, event in enumerate(events, 1):
        where = f"{path}, line {number}"
        messages: Any = event.get("messages")
        listed = isinstance(messages, list) and all(isinstance(one, dict) for one in messages)
        roles = [message.get("role") for message in messages] if listed else messages
        if roles != ROLES:
            expected = f"expected messages of the roles {', '.join(ROLES)}; found {roles}"
            raise DamagedFile(f"{where}: {expected}")
        for message in messages:
            if wrong := _wrong_with(message):
                raise DamagedFile(f"{where}: the {message['role']} message {wrong}")
    learnt = [event for event in events if event["messages"][-1].get("weight", 1)]
    if len(learnt) < least:
        left_out = f" ({len(events) - len(learnt)} more have the weight 0)" * (learnt != events)
        raise DamagedFile(f"{path}: {len(learnt)} examples{left_out}, expected at least {least}")
    return learnt


def _wrong_with(message: dict) -> str:
    """Why a message of a fine-tuning file cannot be learnt from, or ""."""
    content, weight = message.get("content"), message.get("weight", 1)
    if message.get("tool_calls") or message.get("function_call"):
        return "calls a tool, but a judge is to answer in text"
    if not isinstance(content, str) or not content.strip():
        return "is empty"
    if token := SPECIAL.search(content):
        return f"holds {token[0]}, a special token that OpenAI refuses: write it in another way"
    if isinstance(weight, bool) or weight not in (0, 1):
        return f"has the weight {weight!r}, expected 0 or 1"
    return ""


def resolve_pairwise_events(
    events: list[dict], rows: list[dict], both_orders: bool = False
) -> list[dict]:
    """From the chats of both orders, those to learn from: per row the order that decided it.

    Rows without a verdict (the orders contradict, or one is invalid) give none. An event finds its
    row and order by its prompt, never by counting, so retries, failures and concurrency shift
    nothing.

    Args:
        events: chats with PairwiseComparisonEvaluator's prompt, in any number and order.
        rows: pairwise rows. Their first evaluation is the teacher's.
        both_orders: keep the other order's chat too, where the row has a verdict (swap
            augmentation).

    Returns:
        The chats, in the order of the rows.

    Raises:
        ValueError: an event belongs to no row, or a row lacks the chat that decided it.

    Source: the original pairwise notebook, which pairs events by even and odd numbers.
    """
    places: dict[tuple, list] = {}
    for number, row in enumerate(rows):
        first, second = (answer["text"] for answer in row["answers"])
        for order, answers in (("original", (first, second)), ("flipped", (second, first))):
            shown = row["question"], row["source"], *answers
            places.setdefault(shown, []).append((number, order))
    chats = {}
    for number, event in enumerate(events):
        waiting = places.get(read_pair_prompt(event["messages"]))
        if not waiting:
            raise ValueError(
                f"event {number} belongs to none of the rows (or a row's chat is there more than "
                "twice)"
            )
        chats[waiting.pop(0)] = event
    resolved = []
    for number, row in enumerate(rows):
        source = row["evaluations"][0]["source"]
        if source not in ("original", "flipped"):
            continue
        if (number, source) not in chats:
            raise ValueError(
                f"row {number} was decided by its {source} order, but the events hold no such chat"
            )
        other = "flipped" if source == "original" else "original"
        orders = [source, other] if both_orders else [source]
        resolved += [chats[number, order] for order in orders if (number, order) in chats]
    return resolved


def count_tokens(events: list[dict]) -> list[int]:
    """Training tokens of each chat, counted as OpenAI's fine-tuning guide does.

    Three a message, three for the reply, and the texts in cl100k_base, which comes with LlamaIndex.
    Other encodings of OpenAI differ by a few per cent.
    """
    tokenize = get_tokenizer()
    return [
        3
        + sum(3 + len(tokenize(m["role"])) + len(tokenize(m["content"])) for m in event["messages"])
        for event in events
    ]


@dataclass
class LocalJob:
    """What `get_current_job` returns: the fields of OpenAI's FineTuningJob that a local run has."""

    status: str
    model: str
    training_file: str
    trained_examples: int
    features: str
    verdicts: list


def majority(distribution: dict[str, float]) -> str:
    """The likeliest verdict; if several are equally likely, a tie."""
    most = max(distribution.values())
    likeliest = [verdict for verdict, p in distribution.items() if p == most]
    return likeliest[0] if len(likeliest) == 1 else "C"


class LocalFinetuneEngine:
    """Trains the local student on a fine-tuning file, with the methods of OpenAIFinetuneEngine.

    Args:
        base_model: "minilm", the one encoder there is.
        data_path: the JSONL that would be uploaded to OpenAI. Where a prompt is in it more than
            once, as it is if the teacher was sampled several times, the replies are the teacher's
            distribution; the hard label is their lower median or, for pairs, their `majority`.
        alpha: the hard labels' share of the loss (see `distillation_loss`).
        temperature: of the loss.
        scale: the ends of the teacher's scale, where it gave scores.

    Raises:
        ValueError: another base model, or alpha or temperature out of range.
    """

    def __init__(
        self,
        base_model: str = "minilm",
        data_path: str | Path = "",
        alpha: float = 1.0,
        temperature: float = 1.0,
        scale: tuple[float, float] = (1, 5),
    ) -> None:
        if base_model != LOCAL:
            raise ValueError(f"base_model={base_model!r}: the local engine has {LOCAL!r} only")
        check_settings(alpha, temperature)
        self.data_path, self.scale = data_path, scale
        self.alpha, self.temperature = alpha, temperature
        self.student: Student | None = None
        self._job: LocalJob | None = None

    def finetune(self) -> None:
        """Check the file and train on it. Its first prompt tells whether it holds pairs or scores.

        Raises:
            DamagedFile: the file is not what it must be, or a reply cannot be read.
        """
        events = check_events(self.data_path)
        pairs = bool(PROMPT.search(events[0]["messages"][1]["content"]))
        read_input = read_pair_prompt if pairs else read_prompt
        samples: dict = {}  # what the teacher said to each prompt
        for number, event in enumerate(events, 1):
            where, reply = f"{self.data_path}, line {number}", event["messages"][-1]["content"]
            label, reason = read_verdict(reply) if pairs else read_score(reply, *self.scale)
            if label is None:
                raise DamagedFile(f"{where}: cannot learn from the reply: {reason}")
            try:
                samples.setdefault(read_input(event["messages"]), []).append(label)
            except ValueError as error:
                raise DamagedFile(f"{where}: {error}") from error
        soft = [
            {label: said.count(label) / len(said) for label in said} for said in samples.values()
        ]
        hard = list(map(majority if pairs else lower_median, soft))
        student = (PairStudent if pairs else Student).fit(
            list(samples), hard, soft, self.alpha, self.temperature
        )
        self.student, name = student, Path(self.data_path).name
        self._job = LocalJob(
            "succeeded", LOCAL, name, len(events), student.kinds, student.labels.tolist()
        )

    def get_current_job(self) -> LocalJob:
        """The finished job.

        Raises:
            ValueError: there is none yet.
        """
        if self._job is None:
            raise ValueError("call finetune() first")
        return self._job

    def get_finetuned_model(self) -> LLM:
        """The trained student, as an LLM that judges.

        Raises:
            ValueError: there is none yet.
        """
        self.get_current_job()
        assert self.student is not None
        return self.student.llm()
