"""What a study found, in a sentence or two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from typing_extensions import NotRequired, TypedDict

from bimask.metrics import Split
from bimask.tasks import CLASSIFICATION, Task
from study.analysis.blind import PROMISE
from study.spec.defences import KEY
from study.spec.objectives import Aggregate, known_scores, number
from study.spec.space import Scalar
from study.store.schema import Measured, StudySummary, TrialStatus

LOST: dict[TrialStatus, str] = {"PRUNED": "stopped early", "FAILED": "failed"}
RISK: Final = "risk"  # of what a purified model says without the attack, as `Task.probe` asks it


class Headline(TypedDict):
    """The finding in one sentence, the sentence after it, and the numbers behind both (on test)."""

    title: str
    text: str
    before: NotRequired[Mapping[str, float]]
    after: NotRequired[Mapping[str, float]]


def headline(
    summary: StudySummary | None, count: Mapping[TrialStatus, int], task: Task = CLASSIFICATION
) -> Headline:
    """What a study found.

    Args:
        count: status -> trials that ended so.
    """
    ended = _ended(count, " and ".join(summary["victims"] if summary else ()))
    if not summary:
        return {"title": "This study has not ended", "text": f"So far: {ended}."}
    if not (chosen := summary["chosen"]):
        if not summary["n_complete"]:
            return {"title": "No trial was completed", "text": f"{ended}."}
        return {
            "title": f"No trial keeps {_percent(summary['min_clean_accuracy'])} "
            f"{task.metrics[task.quality].name}",
            "text": f"Nothing is chosen. {ended}. More trials or a wider space may find one; so "
            "may a larger `max_accuracy_drop`.",
        }
    was = scores_before(summary, "test") or {}
    after = chosen["test"]
    if "attack_success" not in after:
        return _of_suspect(chosen, was, ended, task)
    paper, name = summary["paper_defaults"], _defence_of(chosen)
    of = "" if name is None else f" of {name}"
    who = f"The paper's defaults{of}" if paper and paper["number"] == chosen["number"] else None
    text = f"Measured on the test images, once, after the choice. {ended}."
    if paper and who is None:
        left = _percent(paper["test"]["attack_success"])
        text += f" The paper's defaults{of} leave attack success at {left}."
    text += _unseen(summary)
    return {
        "title": _finding(task, who or _named(chosen), was, after, plural=who is not None),
        "text": text,
        "before": was,
        "after": after,
    }


def _named(chosen: Measured) -> str:
    """The chosen trial, with its defence where the study had several."""
    name = _defence_of(chosen)
    return f"Trial {chosen['number']}" + ("" if name is None else f" ({name})")


def _defence_of(chosen: Measured) -> Scalar:
    """The chosen trial's defence where the study had several."""
    return chosen.get("parameters", {}).get(KEY)


def _of_suspect(chosen: Measured, before: Mapping[str, float], ended: str, task: Task) -> Headline:
    """The same of a model whose trigger nobody knows, with what that can and cannot promise."""
    risk = number(chosen, RISK)
    left = f"leaves {_percent(risk)} of the short cuts found in the suspect"
    price = _price(task, before, chosen["test"], in_vain=risk >= 1)
    return {
        "title": f"{_named(chosen)} {left} {price}",
        "text": "Short cuts were sought with clean pictures alone, and the risk is of val; the "
        f"accuracy was measured on other pictures, once, after the choice. {ended}. {PROMISE}",
        "before": before,
        "after": chosen["test"] | {RISK: risk},
    }


def _unseen(summary: StudySummary) -> str:
    """What the choice is worth on held-out victims, where the study has confirmed it there."""
    confirmed = (summary.get("suite") or {}).get("chosen")
    role = confirmed and confirmed["roles"].get("held_out")
    if not role or (found := role.get("attack_success")) is None:
        return ""
    spread = f"{_percent(found['mean'])} ± {100 * found['std']:.1f}"
    return f" On held-out victims it leaves attack success at {spread} ({found['n']} runs)."


def _ended(count: Mapping[TrialStatus, int], victims: str) -> str:
    """How many trials there were, on what, and how those without a result ended."""
    lost = "".join(f", {count[status]} {words}" for status, words in LOST.items() if count.get(status))
    trials = sum(count.values())
    return f"{trials} trial{'' if trials == 1 else 's'}{victims and f' on {victims}'}{lost}"


def _finding(
    task: Task, who: str, before: Mapping[str, float], after: Mapping[str, float], *, plural: bool
) -> str:
    """What a configuration did, in the words of someone who tells it."""
    s = "" if plural else "s"
    was, now = before["attack_success"], after["attack_success"]
    in_vain = _percent(now) == _percent(was) or now > was
    if in_vain:
        did = f"leave{s} attack success at {_percent(now)}"
    else:
        did = f"bring{s} attack success from {_percent(was)} to {_percent(now)}"
    return f"{who} {did} {_price(task, before, after, in_vain=in_vain, s=s)}"


def _price(
    task: Task,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    in_vain: bool,
    s: str = "s",
) -> str:
    """What it cost in clean quality; `s` ends the verbs."""
    lost = before[task.quality] - after[task.quality]
    points = f"{abs(100 * lost):.1f}"
    unit = "point" if points == "1.0" else "points"
    if points == "0.0":
        return f"at no cost in {task.price}"
    if lost < 0:
        return f"and gain{s} {points} {unit} of {task.price}"
    return f"{f'and lose{s}' if in_vain else 'for'} {points} {unit} of {task.price}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"


def scores_before(summary: StudySummary | None, split: Split) -> dict[str, float] | None:
    """The victims' own scores, summed up as the study does."""
    if summary is None or not summary["victims"]:
        return None
    scores = [victim[split] for victim in summary["victims"].values()]
    rule = Aggregate.model_validate(summary["aggregate"])
    return {name: rule(name, [number(s, name) for s in scores]) for name in known_scores(scores[0])}
