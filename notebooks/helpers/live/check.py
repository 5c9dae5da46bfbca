"""Before the first call: which models answer, and what a run can cost at most."""

import json
import math

import pandas as pd

from .. import settings
from ..log import CallLog
from ..rows import write_text
from ..settings import LOCAL, ROLES, CallFailed, RunStopped, cap, id_of, name_of, redact
from .budget import EPOCHS, PRICED_AS, PROMPT_TOKENS, dollars_of, no_price, reply_cap
from .models import ask_and_block, client_of, weights_of

LISTS_NONE = (400, 404, 405, 501)  # what an endpoint that lists no models answers
COUNTS = ["calls at most", "tokens at most"]
COLUMNS = ["role", "model", *COUNTS, "priced as", "$ at most", "endpoint"]


def check_run(
    log: CallLog, models: dict[str, str], calls: dict[str, int], examples: int = 0
) -> pd.DataFrame:
    """Say which models a run asks, and what that can cost at most.

    The models' ids are noted in `models.json` beside the log, for the replay.

    Args:
        log: the run's log.
        models: by role, as `models_of` gives them.
        calls: by role, the most calls that the run makes of it.
        examples: how many chats a hosted student would be fine-tuned on.

    Returns:
        A row a role: model; calls at most, those in the log included; tokens at most
        (PROMPT_TOKENS a prompt, `reply_cap` a reply; a training example is both, EPOCHS times); the
        model whose price was taken; dollars at most, NaN where no price is known; and whether its
        endpoint answered.

    Raises:
        RunStopped: a key is missing, a model cannot be reached, the budget has no price to go by,
            or the log holds other models' answers. It says for each role how to mend it.
    """
    recording, reached, lines = log.mode == "record", {}, []
    wrong = _other_models(log, models)
    for role, most in calls.items():
        if (model := models[role]) == LOCAL:
            continue
        if recording and model not in reached:
            reached[model] = unreachable(model)
        if why := reached.get(model):
            wrong.append(f"{ROLES[role]} ({role}): {why}")
        # Half of the student's calls go to the fine-tuned model, whose price is higher.
        priced = f"ft:{name_of(model)}" if role == "student" else PRICED_AS.get(model, model)
        reply = reply_cap(priced)
        tokens = PROMPT_TOKENS + reply
        dollars = most * dollars_of(priced, PROMPT_TOKENS, reply)
        parts = [(role, priced, most, most * tokens, dollars)]
        if role == "student" and examples:
            trained = EPOCHS * examples * tokens
            training = dollars_of(model, trained=trained)
            parts.append(("student, fine-tuning", model, 1, trained, training))
        for name, priced, *counts, dollars in parts:
            if recording and cap("BUDGET_DOLLARS") and math.isnan(dollars):
                wrong.append(f"{ROLES[role]} ({name}): {no_price(priced, name != role)}")
            endpoint = "answers" if model in reached else "not asked"
            lines.append((name, name_of(model), *counts, name_of(priced), dollars, endpoint))
    if wrong:
        raise RunStopped("\n  ".join(["this run cannot start:", *dict.fromkeys(wrong)]))
    if log.mode != "replay" and not any(
        one.startswith(settings.STAND_IN) for one in models.values()
    ):
        ids = {role: id_of(model) for role, model in models.items()}
        write_text(log.path.with_name("models.json"), json.dumps(ids, indent=1) + "\n")
    table = pd.DataFrame(lines, columns=COLUMNS).set_index("role")
    sums = table[[*COUNTS, "$ at most"]].sum(skipna=False)
    if recording and (terminal := settings.terminal()):
        n, tokens, dollars = sums
        price = "an unknown price" if math.isnan(dollars) else f"{dollars:.2f} dollars"
        print(f"at most {n:,.0f} calls, {tokens:,.0f} tokens and {price}", file=terminal)
    table.loc["in all"] = {"model": "", "priced as": "", "endpoint": "", **sums}
    return table.astype(dict.fromkeys(COUNTS, int)).round({"$ at most": 2})


def _other_models(log: CallLog, models: dict[str, str]) -> list[str]:
    """What is wrong if the log holds, or waits for, other answers than this run would ask for."""
    noted = settings.noted_models(log.path.parent) if len(log) and log.mode != "replay" else {}
    wrong = [
        f"{ROLES[role]} ({role}): {log.path.parent} was recorded with {noted[role]!r}, and this "
        f"run names {id_of(model)!r}. Name another folder (SNAPSHOT), or delete its models.json "
        "to go on with the new model"
        for role, model in models.items()
        if role != "student" and noted.get(role, id_of(model)) != id_of(model)
    ]
    batches = log.path.with_name("batches.json")
    if log.mode == "record" and batches.exists() and json.loads(batches.read_text("utf-8")):
        wrong.append(
            f"{batches}: batches are under way, which ask the same calls; `make batch` waits for "
            "them (or delete this file, and pay for their calls again)"
        )
    return wrong


def unreachable(model: str) -> str:
    """Why a model cannot be asked; "" if it can. Asking for the model's name costs nothing.

    An endpoint that does not list its models passes.
    """
    try:
        if model.startswith("local:"):
            weights_of(name_of(model))
            return ""
        with client_of(model) as client:
            try:
                ask_and_block(client.models.retrieve, name_of(model))
                return ""
            except (RunStopped, CallFailed) as error:
                if error.status not in LISTS_NONE:
                    raise
            known = [one.id for one in ask_and_block(client.models.list).data]
    except (RunStopped, CallFailed) as error:
        return "" if error.status in LISTS_NONE else str(error)
    if not known or name_of(model) in known:
        return ""
    return f"{redact(str(client.base_url))} does not have it, but {', '.join(known[:8])}"
