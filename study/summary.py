"""What a study comes to: the front, the choice, and what the chosen trial scores on `test`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bimask.config import PurifyConfig
from bimask.metrics import Scores, evaluate
from bimask.victim import Victim
from study import records, search
from study.config import StudyConfig
from study.pareto import ParetoFront, choose
from study.plots import draw_front
from study.trial import SCORES, purified

FRONT_PICTURE = "front.png"


def summarise(
    config: StudyConfig, folder: Path, trials: list[dict[str, Any]], victims: dict[str, Victim]
) -> dict[str, Any]:
    """Front, hypervolume, chosen trial with its `test` scores; writes best.yaml and the picture."""
    complete = sorted((t for t in trials if t["status"] == "COMPLETE"), key=lambda t: int(t["number"]))
    front = ParetoFront.of(complete)
    before = {
        name: sum(getattr(victim.scores["val"], name) for victim in victims.values()) / len(victims)
        for name in SCORES
    }
    bound = before["clean_accuracy"] - config.choose.max_accuracy_drop
    position = choose(complete, min_clean_accuracy=bound)
    chosen = None if position is None else complete[position]
    paper = next((t for t in complete if t["preset"] == search.PAPER), None)
    on_front = [complete[i] for i in front.indices]
    draw_front(
        folder / FRONT_PICTURE,
        title=f"{config.name}: {len(complete)} trials on {', '.join(victims)}",
        trials=complete,
        front=[t["number"] for t in on_front],
        chosen=None if chosen is None else chosen["number"],
        victim=before,
        min_clean_accuracy=bound,
    )
    summary: dict[str, Any] = {
        "name": config.name,
        "n_trials": len(trials),
        "n_complete": len(complete),
        "n_failed": len(trials) - len(complete),
        "hypervolume": front.hypervolume(config.reference_point.model_dump()),
        "reference_point": config.reference_point.model_dump(),
        "front": [_point(t) for t in on_front],
        "chosen": chosen and _measured(config, folder, chosen, victims),
        "paper_defaults": paper and _measured(config, folder, paper, victims),
        "victims": {
            name: {"digest": victim.spec.digest}
            | {split: asdict(scores) for split, scores in victim.scores.items()}
            for name, victim in victims.items()
        },
        "min_clean_accuracy": bound,
    }
    if chosen is not None:
        settings = _settings(config, chosen)
        records.write_yaml(
            folder / records.BEST,
            {"purify": settings.model_dump(), "seed": config.seed}
            | {"study": config.name, "trial": chosen["number"]},
            f"trial {chosen['number']} of study {config.name}\n"
            "use: python -m bimask purify --victim VICTIM --config THIS_FILE --out CLEANED",
        )
    return summary


def _point(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial as it stands in the summary: number, parameters and scores on val."""
    return {
        "number": trial["number"],
        "parameters": trial["parameters"],
        "val": {name: trial[name] for name in SCORES},
    }


def _settings(config: StudyConfig, trial: dict[str, Any]) -> PurifyConfig:
    paper = trial["preset"] == search.PAPER
    return PurifyConfig() if paper else config.purify_config(trial["parameters"])


def _measured(
    config: StudyConfig, folder: Path, trial: dict[str, Any], victims: dict[str, Victim]
) -> dict[str, Any]:
    """A trial with its scores on `test`, measured from its saved masks, mean over the victims."""
    settings = _settings(config, trial)
    per_victim: dict[str, Scores] = {}
    for name, victim in victims.items():
        masks = load_file(folder / "trials" / f"{trial['number']:03d}" / f"{name}.masks.safetensors")
        sets = victim.eval_sets(victim.spec.load_data(), "test")
        per_victim[name] = evaluate(purified(victim.model, masks, settings), sets)
    mean = {
        name: sum(getattr(scores, name) for scores in per_victim.values()) / len(per_victim)
        for name in SCORES
    }
    return _point(trial) | {
        "test": mean,
        "victims": {
            name: asdict(scores)
            | {
                "arr": scores.arr(victims[name].scores["test"]),
                "rdr": scores.rdr(victims[name].scores["test"]),
                "der": scores.der(victims[name].scores["test"]),
                "rir": scores.rir(victims[name].scores["test"]),
            }
            for name, scores in per_victim.items()
        },
    }
