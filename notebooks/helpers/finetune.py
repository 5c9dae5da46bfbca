"""Fine-tune: judgements -> chats to learn from -> engines that learn."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.llms import LLM
from llama_index.core.utils import get_tokenizer

from .judge import lower_median
from .log import ROW
from .pairs import PAIR_PROMPT, PAIR_SECTIONS, PairStudent
from .replies import cut_off, read_score, read_verdict, without_thought
from .rows import DamagedFile, load_rows, write_text
from .settings import LOCAL
from .student import SECTIONS, Student, check_settings, read_prompt

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
    are in the order of the rows, and within a row in the order of the questions. A failed call
    leaves no event, and a cut-off reply leaves none. A model's thought is left out. LlamaIndex's
    OpenAIFineTuningHandler breaks on a failed call, and keeps another order.
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
    """The chats whose reply holds a score from `low` to `high`."""
    scores = [read_score(event["messages"][-1]["content"], low, high)[0] for event in events]
    return [event for event, score in zip(events, scores) if score is not None]


def save_events(path: str | Path, events: list[dict]) -> None:
    """Write chats as an OpenAI fine-tuning file, line for line as OpenAIFineTuningHandler does."""
    write_text(path, "\n".join(json.dumps({"messages": event["messages"]}) for event in events))


def check_events(path: str | Path) -> list[dict]:
    """Read a fine-tuning file and check it. Returns the chats to learn from.

    Each line has a system, a user and an assistant message, all with text. A chat whose reply has
    the weight 0 is not learnt from. MIN_EXAMPLES others are needed.

    Raises:
        DamagedFile: The message says which line is wrong, and what was expected.
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
    if len(learnt) < MIN_EXAMPLES:
        more = f" ({len(events) - len(learnt)} more have the weight 0)" * (learnt != events)
        said = f"{len(learnt)} examples{more}, expected at least {MIN_EXAMPLES}"
        raise DamagedFile(f"{path}: {said}")
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
    """Keep the chats to learn from: for each row, the chat of the order that decided it.

    A row without a verdict gives no chat. An event finds its row and order by its prompt, so
    retries, failures and concurrency shift nothing. The first evaluation of a row is the teacher's.
    `both_orders` keeps the other order's chat too, after the first.

    Raises:
        ValueError: An event belongs to no row, or a row lacks the chat that decided it.

    Source: the original pairwise notebook, which pairs events by even and odd numbers.
    """
    waiting: dict[str, list[int]] = {}  # the numbers of the events with these sections
    for number, event in enumerate(events):
        read_prompt(event["messages"], PAIR_SECTIONS)  # a ValueError if there are none
        asked = next(one["content"] for one in event["messages"] if one["role"] == "user")
        sections = asked[asked.index(PAIR_PROMPT[:15]) :].strip()
        waiting.setdefault(sections, []).append(number)
    resolved = []
    for number, row in enumerate(rows):
        texts = [answer["text"] for answer in row["answers"]]
        orders = {"original": texts, "flipped": texts[::-1]}
        chats = {}
        for order, shown in orders.items():
            # By the whole prompt: a text that holds section marks cannot be told from it.
            prompt = PAIR_PROMPT.format(row["question"], row["source"], *shown)
            if numbers := waiting.get(prompt.strip()):
                chats[order] = events[numbers.pop(0)]
        source = row["evaluations"][0]["source"]
        if source in chats:
            resolved += [chats.pop(source), *(chats.values() if both_orders else ())]
        elif source in orders:
            raise ValueError(f"row {number} was decided by its {source} order, but lacks this chat")
    if left := sorted(number for numbers in waiting.values() for number in numbers):
        raise ValueError(f"event {left[0]} belongs to none of the rows, or repeats a row's chat")
    return resolved


def count_tokens(events: list[dict]) -> list[int]:
    """Training tokens of each chat, counted as OpenAI's fine-tuning guide does.

    Three a message, three for the reply, and the texts in cl100k_base, which comes with LlamaIndex.
    """
    tokenize = get_tokenizer()

    def tokens(message: dict) -> int:
        return 3 + len(tokenize(message["role"])) + len(tokenize(message["content"]))

    return [3 + sum(map(tokens, event["messages"])) for event in events]


def majority(distribution: dict[str, float]) -> str:
    """The likeliest verdict; if several are equally likely, a tie."""
    most = max(distribution.values())
    likeliest = [verdict for verdict, p in distribution.items() if p == most]
    return likeliest[0] if len(likeliest) == 1 else "C"


@dataclass
class LocalFinetuneEngine:
    """Trains the local student on a fine-tuning file, with the methods of OpenAIFinetuneEngine.

    Where a prompt is in the file more than once, the replies are the teacher's distribution. The
    hard label is their lower median or, for pairs, their `majority`. It is a ValueError if the
    model is another one, or if alpha or temperature is out of range.
    """

    base_model: str = LOCAL  # the one encoder there is
    data_path: str | Path = ""  # the JSONL that would be uploaded to OpenAI
    alpha: float = 1.0  # see `distillation_loss`
    temperature: float = 1.0
    scale: tuple[float, float] = (1, 5)  # the ends of the teacher's scale, where it gave scores
    kinds: str | None = None  # of features; by default, cross-validation chooses them
    student: Student = field(init=False, repr=False)  # there after `finetune`
    _job: SimpleNamespace | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.base_model != LOCAL:
            raise ValueError(f"base_model={self.base_model!r}: the local engine has {LOCAL!r} only")
        check_settings(self.alpha, self.temperature)

    def finetune(self) -> None:
        """Check the file and train on it. Its first prompt tells whether it holds pairs or scores.

        Raises:
            DamagedFile: The file is not what it must be, or a reply cannot be read.
        """
        events = check_events(self.data_path)
        pairs = bool(PAIR_SECTIONS.search(events[0]["messages"][1]["content"]))
        sections = PAIR_SECTIONS if pairs else SECTIONS
        samples: dict = {}  # what the teacher said to each prompt
        for number, event in enumerate(events, 1):
            where, reply = f"{self.data_path}, line {number}", event["messages"][-1]["content"]
            label, reason = read_verdict(reply) if pairs else read_score(reply, *self.scale)
            if label is None:
                raise DamagedFile(f"{where}: cannot learn from the reply: {reason}")
            try:
                samples.setdefault(read_prompt(event["messages"], sections), []).append(label)
            except ValueError as error:
                raise DamagedFile(f"{where}: {error}") from error
        soft = [{one: said.count(one) / len(said) for one in said} for said in samples.values()]
        hard = list(map(majority if pairs else lower_median, soft))
        kind = PairStudent if pairs else Student
        settings = self.alpha, self.temperature, self.kinds
        student = kind.fit(list(samples), hard, soft, *settings)
        self.student = student
        self._job = SimpleNamespace(
            status="succeeded",
            model=LOCAL,
            training_file=Path(self.data_path).name,
            trained_examples=len(events),
            features=student.kinds,
            verdicts=student.labels.tolist(),
        )

    def get_current_job(self) -> SimpleNamespace:
        """The finished job, with fields as of OpenAI's; a ValueError if there is none yet."""
        if self._job is None:
            raise ValueError("call finetune() first")
        return self._job

    def get_finetuned_model(self) -> LLM:
        """The trained student, as an LLM that judges; a ValueError if there is none yet."""
        self.get_current_job()
        return self.student.llm()
