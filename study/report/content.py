"""What the page says, as plain data, from the records of a study alone: no model, no Ray, no MLflow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import TypeAdapter

from bimask.defences.settings import DefenceConfig
from study.analysis.blind import PROMISE
from study.analysis.importance import importances
from study.analysis.pareto import ParetoFront
from study.spec.config import PAPER, StudyError
from study.spec.config import settings_of as settings_class
from study.spec.directions import DIRECTIONS, OBJECTIVES, Direction
from study.spec.objectives import SCORES, Aggregate, known_scores
from study.spec.space import Parameter
from study.store import records
from study.store.files import read_lines

COMPLETE = "COMPLETE"
LOST = {"PRUNED": "stopped early", "FAILED": "failed"}
RISK = "risk"  # of what a purified model says without the attack: `bimask.inspection.risk`


def read(folder: Path) -> dict[str, Any]:
    """`study` (its YAML), `trials` (records in order), `summary` (empty where a study was cut off).

    Raises:
        StudyError: no study there, or files that cannot be read.
    """
    if not (folder / records.TRIALS).is_file() or not (folder / records.STUDY).is_file():
        raise StudyError(
            f"There is no study in {folder}: it needs {records.STUDY} and {records.TRIALS}; give the "
            "name of a study that was launched, and its --outputs."
        )
    summary = folder / records.SUMMARY
    try:
        return {
            "study": yaml.safe_load((folder / records.STUDY).read_text()),
            "trials": sorted(read_lines(folder / records.TRIALS), key=lambda t: int(t["number"])),
            "summary": json.loads(summary.read_text()) if summary.is_file() else {},
        }
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise StudyError(f"The study in {folder} cannot be read: {error}.") from error


def page_content(study: dict[str, Any], trials: list[dict[str, Any]], summary: dict[str, Any]) -> Any:
    """Everything on the page but the close-ups of single trials."""
    complete = [trial for trial in trials if trial["status"] == COMPLETE]
    objectives: dict[str, Direction] = {n: DIRECTIONS[n] for n in study.get("objectives", OBJECTIVES)}
    if summary:
        front = [point["number"] for point in summary["front"]]
    else:
        front = [complete[i]["number"] for i in ParetoFront.of(complete, objectives).indices]
    chosen = (summary.get("chosen") or {}).get("number")
    space = TypeAdapter(dict[str, Parameter]).validate_python(study["space"])
    searched = [trial for trial in complete if trial["preset"] != PAPER]
    left = "attack_success" if study.get("suspect") is None else RISK
    shown: dict[str, Direction] = {name: DIRECTIONS[name] for name in ("clean_accuracy", left)}
    return {
        "name": study["name"],
        "headline": headline(summary, Counter(trial["status"] for trial in trials)),
        "victims": _victims(summary, complete),
        "parameters": [{"name": name, **parameter.model_dump()} for name, parameter in space.items()],
        "objectives": objectives,
        "left": left,
        "scores": list(SCORES) if left in SCORES else list(shown),
        "trials": [_trial(trial) for trial in trials],
        "front": front,
        "chosen": chosen,
        "paper": next((t["number"] for t in trials if t["preset"] == PAPER), None),
        "before": _before(summary, "val"),
        "bound": summary.get("min_clean_accuracy"),
        "hypervolume": summary.get("hypervolume"),
        "importance": importances(space, searched, shown),
        "blind": blind_choice(complete, summary),
        "suite": summary.get("suite"),
        "leave_one_out": summary.get("leave_one_out"),
        "tested": _tested(summary),
        "cost": _cost(trials, summary),
        "provenance": _provenance(study, trials),
    }


def headline(summary: Mapping[str, Any], count: Mapping[str, int]) -> dict[str, Any]:
    """The finding in one sentence, the sentence after it, and the numbers behind both (on test).

    Args:
        count: status -> trials that ended so.
    """
    ended = _ended(count, " and ".join(summary.get("victims", {})))
    if not summary:
        return {"title": "This study has not ended", "text": f"So far: {ended}."}
    if not summary["chosen"]:
        if not summary["n_complete"]:
            return {"title": "No trial was completed", "text": f"{ended}."}
        return {
            "title": f"No trial keeps {_percent(summary['min_clean_accuracy'])} clean accuracy",
            "text": f"Nothing is chosen. {ended}. More trials or a wider space may find one; so "
            "may a larger `max_accuracy_drop`.",
        }
    before, chosen = _before(summary, "test") or {}, summary["chosen"]
    after = chosen["test"]
    if "attack_success" not in after:
        return _of_suspect(chosen, before, ended)
    paper = summary.get("paper_defaults")
    who = "The paper's defaults" if paper and paper["number"] == chosen["number"] else None
    text = f"Measured on the test images, once, after the choice. {ended}."
    if paper and who is None:
        left = _percent(paper["test"]["attack_success"])
        text += f" The paper's defaults leave attack success at {left}."
    text += _unseen(summary)
    return {
        "title": _finding(who or f"Trial {chosen['number']}", before, after, plural=who is not None),
        "text": text,
        "before": before,
        "after": after,
    }


def _of_suspect(chosen: Mapping[str, Any], before: Mapping[str, float], ended: str) -> dict[str, Any]:
    """The same of a model whose trigger nobody knows, with what that can and cannot promise."""
    left = f"leaves {_percent(chosen[RISK])} of the short cuts found in the suspect"
    price = _price(before, chosen["test"], in_vain=chosen[RISK] >= 1)
    return {
        "title": f"Trial {chosen['number']} {left} {price}",
        "text": "Short cuts were sought with clean pictures alone, and the risk is of val; the "
        f"accuracy was measured on other pictures, once, after the choice. {ended}. {PROMISE}",
        "before": before,
        "after": chosen["test"] | {RISK: chosen["risk"]},
    }


def _unseen(summary: Mapping[str, Any]) -> str:
    """What the choice is worth on held-out victims, where the study has confirmed it there."""
    confirmed = ((summary.get("suite") or {}).get("chosen") or {}).get("roles", {})
    found = confirmed.get("held_out", {}).get("attack_success")
    if found is None:
        return ""
    spread = f"{_percent(found['mean'])} ± {100 * found['std']:.1f}"
    return f" On held-out victims it leaves attack success at {spread} ({found['n']} runs)."


def _ended(count: Mapping[str, int], victims: str) -> str:
    """How many trials there were, on what, and how those without a result ended."""
    lost = "".join(f", {count[status]} {words}" for status, words in LOST.items() if count.get(status))
    trials = sum(count.values())
    return f"{trials} trial{'' if trials == 1 else 's'}{victims and f' on {victims}'}{lost}"


def _finding(who: str, before: Mapping[str, float], after: Mapping[str, float], *, plural: bool) -> str:
    """What a configuration did, in the words of someone who tells it."""
    s = "" if plural else "s"
    was, now = before["attack_success"], after["attack_success"]
    in_vain = _percent(now) == _percent(was) or now > was
    if in_vain:
        did = f"leave{s} attack success at {_percent(now)}"
    else:
        did = f"bring{s} attack success from {_percent(was)} to {_percent(now)}"
    return f"{who} {did} {_price(before, after, in_vain=in_vain, s=s)}"


def _price(
    before: Mapping[str, float], after: Mapping[str, float], *, in_vain: bool, s: str = "s"
) -> str:
    """What it cost in accuracy; `s` ends the verbs."""
    lost = before["clean_accuracy"] - after["clean_accuracy"]
    points = f"{abs(100 * lost):.1f}"
    unit = "point" if points == "1.0" else "points"
    if points == "0.0":
        return "at no cost in accuracy"
    if lost < 0:
        return f"and gain{s} {points} {unit} of accuracy"
    return f"{f'and lose{s}' if in_vain else 'for'} {points} {unit} of accuracy"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"


def _before(summary: Mapping[str, Any], split: str) -> dict[str, float] | None:
    """The victims' own scores, summed up as the study does."""
    scores = [victim[split] for victim in summary.get("victims", {}).values() if split in victim]
    if not scores:
        return None
    rule = Aggregate.model_validate(summary.get("aggregate", {}))
    return {name: rule(name, [s[name] for s in scores]) for name in known_scores(scores[0])}


def _victims(summary: dict[str, Any], complete: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each victim with its own scores; of a study that was cut off only the names."""
    known: dict[str, Any] = summary.get("victims") or (complete[0]["scores"] if complete else {})
    return [
        {
            "name": name,
            "before": {split: known[name][split] for split in ("val", "test")} if summary else None,
        }
        for name in known
    ]


def _trial(trial: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a trial; of the paper's defaults no parameters, they are not searched."""
    short = {key: trial[key] for key in ("number", "status", "preset")}
    if trial["status"] == COMPLETE:
        short |= {
            name: trial[name] for name in (*SCORES, RISK, "pruned_share", "spread") if name in trial
        }
        short["scores"] = {victim: known_scores(scores) for victim, scores in trial["scores"].items()}
        short |= {"rounds": trial["rounds"], "passes": trial["passes"]}
    else:
        short["reason"] = trial["reason"]
    short["seconds"] = trial.get("seconds")
    short["parameters"] = {} if trial["preset"] == PAPER else trial["parameters"]
    return short


def settings_of(study: Mapping[str, Any], trial: Mapping[str, Any]) -> DefenceConfig:
    """All settings of the defence in a trial."""
    fixed = {} if trial["preset"] == PAPER else study["fixed"]
    return settings_class(study).model_validate({**fixed, **trial["parameters"]})


def _tested(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table on test: the victims as they were, the paper's defaults, the chosen trial."""
    victims = summary.get("victims", {})
    if not victims or not summary.get("chosen"):
        return []
    rows = [{"who": "before", "victims": {name: v["test"] for name, v in victims.items()}}]
    for key, who in (("paper_defaults", "paper's defaults"), ("chosen", "chosen")):
        if trial := summary.get(key):
            rows.append({"who": who, "number": trial["number"], "victims": trial["victims"]})
    return rows


def blind_choice(
    complete: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What was known of each trial without the attack, beside what is true; None where nothing was.

    `risk` by trial, mean over the victims; the rank correlation of both; the trial chosen blindly.
    """
    evidence = {
        trial["number"]: [scores.get(RISK) for scores in trial["scores"].values()] for trial in complete
    }
    known = all("attack_success" in trial for trial in complete)
    if not complete or not known or any(None in values for values in evidence.values()):
        return None
    risk = pd.Series({number: sum(values) / len(values) for number, values in evidence.items()})
    true = pd.Series({trial["number"]: trial["attack_success"] for trial in complete})
    selection = summary.get("selection") or {}
    correlation = risk.rank().corr(true.rank())  # Spearman's, ties at their mean rank
    return {
        "risk": risk.to_dict(),
        "spearman": float(correlation),
        "chosen": (selection.get("blind") or summary.get("blind") or {}).get("number"),
        "oracle": (selection.get("oracle") or summary.get("chosen") or {}).get("number"),
    }


def _cost(trials: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    passes = [t["passes"] for t in trials if t["status"] == COMPLETE]
    return {
        "seconds": summary.get("seconds"),
        "forward": sum(p["forward"] for p in passes),
        "backward": sum(p["backward"] for p in passes),
        "devices": sorted({t["device"] for t in trials if t.get("device")}),
    }


def _provenance(study: dict[str, Any], trials: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name -> value, as the records have it; versions that differ between trials are all shown."""
    found: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        seen = found.setdefault(name, [])
        if str(value) not in seen:
            seen.append(str(value))

    for key in ("seed", "sampler", "selection", "clean_images_per_class"):
        if key in study:
            add(key.replace("_", " "), study[key])
    for trial in trials:
        origin = trial["provenance"]
        add("commit", origin["commit"])
        add("study digest", origin["study"])
        for name, digest in origin["victims"].items():
            add(f"victim {name}", digest)
        for package, number in origin["versions"].items():
            add(package, number)
    return [(name, ", ".join(values)) for name, values in found.items()]
