"""What calls cost: prices, the budget that a run keeps to, and the table after it."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, proxy

import pandas as pd
from llama_index.core.utils import get_tokenizer  # cl100k_base, which comes with LlamaIndex

from ..log import BATCH, STAGE, CallLog, prompt_text
from ..rows import write_text
from ..settings import RunStopped, cap, models_of, name_of, setting

MAX_TOKENS = 1024  # of a reply
THINKING_TOKENS = 4096  # more, for a model that reasons before it replies
# OpenAI's models that reason: the o-series, and GPT-5 and later except those named chat.
REASONING = re.compile(r"(?:[\w-]+/)?(?:ft:)?(?:o\d|gpt-(?:[5-9]|[12]\d)(?!\d))(?!.*-chat)")
# An entry of PRICES: a model, and two or three figures.
PRICE = re.compile(r"(\S.*?)\s*=\s*(\d*\.?\d+(?:\s*/\s*\d*\.?\d+){1,2})")
# Dollars per million tokens of training, which genai-prices does not have. From oreateai.com
# (gpt-4.1, undated) and tokenmix.ai (gpt-4o-mini, April 2026), read in November 2026. See
# developers.openai.com/api/docs/pricing before you pay; PRICES adds to these.
TRAINING_PRICES = {"gpt-4.1": 25.00, "gpt-4o-mini": 3.00}
EPOCHS = 3  # of a fine-tuning job that names no other number
# The stand-ins' calls get these models' prices, so a replay shows what a live run would cost.
PRICED_AS = {
    "stand-in-teacher": "gpt-4.1",
    "stand-in-question-writer": "gpt-4.1-mini",
    "stand-in-answerer": "gpt-4.1-nano",
}
JOB = "finetuning_job.json"  # beside the log: the newest job, and those before it
FAILED_CALLS = "failed_calls.json"  # beside the log: {model: [calls, prompt tokens, reply tokens]}
BATCH_PRICE = 0.5  # the share that a call in OpenAI's Batch API costs
# The longest prompt of the notebooks: three texts of MAX_TOKENS, or two chunks, and instructions.
PROMPT_TOKENS = 4096
MOST_TOKENS = 10**9  # of a call; what is reported beyond it is not believed
MARGIN = 1.25  # another tokenizer may count this much more than ours

_budgets: WeakKeyDictionary = WeakKeyDictionary()


def reasons(model: str) -> bool:
    """Whether a model is one of OpenAI's that reason before they reply."""
    return bool(REASONING.match(name_of(model)))


def reply_cap(model: str) -> int:
    """The most tokens that a model may spend on a reply."""
    return MAX_TOKENS + (THINKING_TOKENS if reasons(model) else 0)


def price_of(model: str) -> tuple[float, ...]:
    """Dollars per million tokens of prompt, of reply and of training; NaN where not known.

    PRICES comes before genai-prices (an offline list) and TRAINING_PRICES. A model on this machine
    costs nothing.
    """
    if model.startswith("local:"):
        return 0.0, 0.0, 0.0
    given = _of_family(_given(setting("PRICES")), model, ())
    training = given[2:] or [_of_family(TRAINING_PRICES, model, math.nan)]
    return *(given[:2] or _listed(name_of(model))), *training


def _of_family(table: dict, model: str, default: Any) -> Any:
    """A model's entry. A dated id has that of its family, a fine-tuned one that of "ft:<base>"."""
    name = name_of(model)
    base = re.sub(r"^(ft:[^:]+):.*", r"\1", name)
    family = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", base)
    return next((table[one] for one in (name, base, family) if one in table), default)


@lru_cache(maxsize=1)
def _given(text: str) -> dict[str, list[float]]:
    """{model: its prices} from PRICES: of prompt, of reply and perhaps of training."""
    given = {}
    for part in filter(None, map(str.strip, text.split(","))):
        if not (found := PRICE.fullmatch(part)):
            raise ValueError(
                f'PRICES: {part!r}: expected "model=0.15/0.60" or "model=0.15/0.60/3.00", dollars '
                "per million tokens of prompt, reply and training"
            )
        given[found[1]] = [float(figure) for figure in found[2].split("/")]
    return given


@lru_cache
def _listed(name: str) -> tuple[float, float]:
    from genai_prices import Usage, calc_price  # half a second, only where prices are asked for

    usage = Usage(input_tokens=1000, output_tokens=1000)
    try:
        price = calc_price(usage, model_ref=name, provider_id="openai")
    except LookupError:
        return math.nan, math.nan
    return float(price.input_price) * 1000, float(price.output_price) * 1000


def dollars_of(model: str, prompt: int = 0, reply: int = 0, trained: int = 0) -> float:
    """Dollars of so many tokens of a model; NaN where the price is not known."""
    counts = zip(price_of(model), (prompt, reply, trained))
    return sum(price * tokens for price, tokens in counts if tokens) / 1e6


def priced_as(log: CallLog) -> dict[str, str]:
    """{logged name: the model whose price it has} where they differ.

    They do for stand-ins, and for local models: the log leaves out the "local:", by which they cost
    nothing.
    """
    played = models_of(log.path.parent).values()
    return PRICED_AS | {name_of(one): one for one in played if one.startswith("local:")}


def no_price(model: str, training: bool = False) -> str:
    """What to set where BUDGET_DOLLARS has no price to go by."""
    what, form = ("training ", "0.15/0.60/3.00") if training else ("", "0.15/0.60")
    name = name_of(model)
    return (
        f"BUDGET_DOLLARS is set, and the price of {what}{name!r} is not known: give it in PRICES, "
        f'as "{name}={form}" (dollars per million tokens of prompt, reply and training; 0 if free)'
    )


def _is_count(said: Any) -> bool:
    """Whether a provider's number of tokens can be one. What is odd is counted here instead."""
    return type(said) is int and 0 <= said <= MOST_TOKENS


def tokens_of(row: dict) -> tuple[int, int, bool]:
    """(prompt tokens, reply tokens, whether the provider reported them, or they were counted)."""
    usage = row["usage"] if isinstance(row["usage"], dict) else {}
    prompt: Any = usage.get("prompt_tokens")
    reply: Any = usage.get("completion_tokens", 0)
    if _is_count(prompt) and _is_count(reply):
        return prompt, reply, True
    embedded = any(message["role"] == "input" for message in row["messages"])
    return prompt_tokens(row), 0 if embedded else len(get_tokenizer()(row["response"])), False


def prompt_tokens(call: dict) -> int:
    """The tokens of a call's messages: exact for OpenAI's models up to GPT-4, else a few % off."""
    return len(get_tokenizer()(prompt_text(call))) + 4 * len(call["messages"])


def _cost(priced: dict[str, str], row: dict) -> tuple[int, int, bool, str, float]:
    """What `tokens_of` says, the model whose price is taken, and dollars; NaN without a price."""
    model, (prompt, reply, reported) = priced.get(row["model"], row["model"]), tokens_of(row)
    share = BATCH_PRICE if (row["usage"] or {}).get(BATCH) else 1.0
    return prompt, reply, reported, model, share * dollars_of(model, prompt, reply)


def noted_jobs(log: CallLog) -> list[dict]:
    """The fine-tuning jobs of a snapshot, the newest first."""
    path = log.path.with_name(JOB)
    job = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return [job, *job.pop("earlier")] if job else []


def failed_calls(log: CallLog) -> dict[str, list[int]]:
    """Calls that were sent and brought no reply: {model: [calls, prompt tokens, reply tokens]}."""
    path = log.path.with_name(FAILED_CALLS)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Budget:
    """What the rows of a log have cost, and what its calls under way may cost.

    A call reserves the most that it can cost before it is sent, so calls under way cannot pass the
    cap together. Each attempt counts, also one that failed. BUDGET_CALLS and BUDGET_DOLLARS are
    read at each call.
    """

    def __init__(self, log: CallLog) -> None:
        self.log = proxy(log)  # the log may go when its notebook lets it go
        self._rows, self._counted = 0.0, 0  # dollars of the rows so far, and where these end
        self._unpriced = False
        self._asked, self._reserved = 0, 0.0  # calls under way, and the dollars for them
        self._failed = failed_calls(log)
        self._priced = priced_as(log)

    @classmethod
    def of(cls, log: CallLog) -> "Budget":
        """The budget of a log."""
        if log not in _budgets:
            _budgets[log] = cls(log)
        return _budgets[log]

    def spent(self) -> float:
        """Dollars of the log's rows and fine-tuning jobs. With a cap, all prices must be known."""
        costs = (_cost(self._priced, row)[-2:] for row in self.log.rows(self._counted))
        self._rows += sum(self._known(*cost) for cost in costs)
        self._counted, dollars = self.log.end, self._rows
        for job in noted_jobs(self.log):
            model = job["base_model"]
            dollars += self._known(model, dollars_of(model, trained=job["tokens"]), training=True)
        for model, (_, *tokens) in self._failed.items():
            dollars += self._known(model, dollars_of(model, *tokens))
        return dollars

    def note_failed(self, calls: tuple[dict, ...], refused: bool) -> None:
        """Count calls that were sent and brought no reply.

        If they were not refused, the provider may have answered: the whole reply is in the bill.
        """
        for call in calls:
            model = self._priced.get(call["model"], call["model"])
            embedded = call["messages"][0]["role"] == "input"
            tokens = prompt_tokens(call), 0 if embedded else reply_cap(model)
            cost = (0, 0) if refused else tokens
            before = self._failed.get(model, [0, 0, 0])
            self._failed[model] = [old + new for old, new in zip(before, (1, *cost))]
        path = self.log.path.with_name(FAILED_CALLS)
        write_text(path, json.dumps(self._failed, indent=1) + "\n")

    def __str__(self) -> str:
        return f", ${self.spent():.4f}{' and what has no price' * self._unpriced} so far"

    def _known(self, model: str, dollars: float, training: bool = False) -> float:
        """The dollars; 0 where they are not known and there is no cap."""
        if math.isnan(dollars) and cap("BUDGET_DOLLARS"):
            raise RunStopped(no_price(model, training))
        self._unpriced |= math.isnan(dollars)
        return 0.0 if math.isnan(dollars) else dollars

    def _most(self, call: dict) -> float:
        """Dollars that a call can cost at most; 0 where there is no cap."""
        if not cap("BUDGET_DOLLARS"):
            return 0.0
        model = self._priced.get(call["model"], call["model"])
        prompt = int(MARGIN * prompt_tokens(call))
        return self._known(model, dollars_of(model, prompt, reply_cap(model)))

    def _refusal(self, calls: int, dollars: float, what: str) -> str:
        """Why the budget does not allow so many more calls and dollars now; "" if it does."""
        most_calls, most = cap("BUDGET_CALLS"), cap("BUDGET_DOLLARS")
        go_on = "What was answered is kept; raise the cap and run again to go on."
        asked_so_far = len(self.log) + self._asked + sum(one for one, *_ in self._failed.values())
        if calls and most_calls and asked_so_far + calls > most_calls:
            asked = f", and {calls} more are asked for" if calls > 1 else ""
            return f"the budget of {most_calls:g} calls is used up{asked} (BUDGET_CALLS). {go_on}"
        if most is None or (so_far := self.spent() + self._reserved) + dollars <= most:
            return ""
        return (
            f"the budget of ${most:g} does not allow {what}: ${so_far:.4f} is spent, and {what} "
            f"may cost ${dollars:.4f} (BUDGET_DOLLARS). {go_on}"
        )

    @contextmanager
    def reserved(self, *calls: dict) -> Iterator[None]:
        """Reserve the most that calls can cost, until they are answered; RunStopped if too much."""
        if stage := STAGE.get():
            stage.spent = self
        n, most = len(calls), sum(map(self._most, calls))
        if why := self._refusal(n, most, "another call" if n == 1 else f"{n} more calls"):
            raise RunStopped(why)
        self._asked, self._reserved = self._asked + n, self._reserved + most
        try:
            yield
        finally:
            self._asked, self._reserved = self._asked - n, self._reserved - most

    @asynccontextmanager
    async def room_for(self, *calls: dict) -> AsyncIterator[None]:
        """As `reserved`, but wait first while calls under way leave no room for these."""
        most = sum(map(self._most, calls))
        while self._asked and self._refusal(len(calls), most, ""):
            await asyncio.sleep(0.02)
        with self.reserved(*calls):
            yield

    def allow_training(self, model: str, tokens: int) -> None:
        """RunStopped if the budget does not allow a fine-tuning job, or its price is not known."""
        dollars = self._known(model, dollars_of(model, trained=tokens), training=True)
        if why := self._refusal(0, dollars, "the fine-tuning job"):
            raise RunStopped(why)


def cost_table(log: CallLog) -> pd.DataFrame:
    """What the calls of this run cost when they were recorded; the last line is their sum.

    Returns:
        A row a stage and model. Columns: calls; prompt and reply tokens, and whether the provider
        reported or the project counted them; the model whose price was taken; and dollars, NaN
        where no price is known. A row of the log belongs to the first stage that used it; rows
        that this run did not use have a line of their own.
    """
    stage_of = {key: stage for (stage, _), keys in log.used.items() for key in keys}
    lines, priced = [], priced_as(log)
    for row in log.rows():
        stage = stage_of.get(row["key"], "(not used by this run)")
        lines.append((stage, row["model"], 1, *_cost(priced, row)))
    rank = {place: number for number, place in enumerate(log.used)}
    lines.sort(key=lambda line: rank.get(line[:2], len(rank)))
    for job in noted_jobs(log):
        model, tokens, reported = job["base_model"], job["tokens"], bool(job["trained_tokens"])
        dollars = dollars_of(model, trained=tokens)
        lines.append(("fine-tuning", model, 1, tokens, 0, reported, model, dollars))
    for model, (calls, prompt, reply) in failed_calls(log).items():
        dollars = dollars_of(model, prompt, reply)
        lines.append(("(no reply, at most)", model, calls, prompt, reply, False, model, dollars))
    names = ["stage", "model", "calls", "prompt tokens", "reply tokens", "tokens", "priced as", "$"]
    table = pd.DataFrame(lines, columns=names)
    if table.empty:
        return table
    sums = dict.fromkeys(names[2:5], "sum")
    table = table.groupby(["stage", "model"], sort=False).agg(
        {**sums, "tokens": "mean", "priced as": "first", "$": lambda part: part.sum(skipna=False)}
    )
    table["tokens"] = table["tokens"].map({0.0: "counted", 1.0: "reported"}).fillna("some counted")
    total = table[[*sums, "$"]].sum(skipna=False)
    table.loc[("in all", ""), :] = {**total, "tokens": "", "priced as": ""}
    return table.astype(dict.fromkeys(sums, int)).round({"$": 4})
