"""Leave one attack out: what a choice loses on an attack that it never saw.

A trial's record keeps the numbers of every tuning victim, so the choice that would have been made
without one attack follows from the records of one study: the others' numbers, summed up by the
study's rule. That is exact where the attack had no part in which trials there are: with a sampler
that learns nothing from scores (random, QMC), and no early stopping. Elsewhere the trials were
proposed with the attack in view, and the exact way is a study of its own without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study.analysis.pareto import choose
from study.spec.config import StudyConfig, StudyError
from study.spec.directions import SCORES
from study.spec.objectives import known_scores, number, numbers_in, over_victims, total_violation
from study.store.schema import LeaveOneOut, StudySummary, TrialRecord, Unseen

BLIND_SAMPLERS = ("random", "qmc")
NUMBERS = (*SCORES, "pruned_share", "accuracy_drop")


def attacks_of(config: StudyConfig) -> dict[str, list[str]]:
    """Attack -> the tuning victims that it made."""
    found: dict[str, list[str]] = {}
    if config.suspect is not None:  # by whatever it may have been made
        return found
    for name, spec in zip(config.victim_names(), config.victims, strict=True):
        found.setdefault(spec.attack_name, []).append(name)
    return found


def is_exact(config: StudyConfig) -> bool:
    """Whether the study's own trials are those that a study without one of its attacks would have."""
    learns_nothing = config.sampler in BLIND_SAMPLERS and not config.warm_start_from
    return learns_nothing and config.early_stopping is None


def without(config: StudyConfig, attack: str) -> StudyConfig:
    """The study of the others: the attack's victims are held out."""
    seen = [spec for spec in config.victims if spec.attack_name != attack]
    unseen = [spec for spec in config.victims if spec.attack_name == attack]
    changes = {
        "name": f"{config.name}-without-{attack}",
        "victims": seen,
        "held_out": [*unseen, *config.held_out],
    }
    return config.model_copy(update=changes)


def select(config: StudyConfig, which: str) -> list[str]:
    """The attacks that `--leave-out` names: one, or all of them in turn.

    Raises:
        StudyError: it names none of the tuning victims', or there is no other.
    """
    attacks = list(attacks_of(config))
    if len(attacks) < 2:
        raise StudyError(
            "--leave-out needs tuning victims of two attacks or more, got "
            f"{', '.join(attacks) or 'none'}; list more of them under `victims`."
        )
    if which == "all":
        return attacks
    if which not in attacks:
        raise StudyError(
            f"--leave-out got {which!r}; the tuning victims' attacks are {', '.join(attacks)}, or say "
            "all."
        )
    return [which]


def table_of_studies(
    config: StudyConfig, full: StudySummary, others: Mapping[str, StudySummary]
) -> LeaveOneOut:
    """The same table from a study of all attacks and one without each, confirmed on `test`.

    Args:
        full: summary of the study that saw every attack.
        others: attack -> summary of the study without it.
    """
    rows = {}
    for attack, summary in others.items():
        digests = {spec.digest for spec in config.victims if spec.attack_name == attack}
        seen, unseen = _confirmed(config, full, digests), _confirmed(config, summary, digests)
        rows[attack] = compared(unseen, seen, quality=config.task.quality)
    return {"exact": True, "scored_on": "test, mean over the confirmation's seeds", "attacks": rows}


def _confirmed(
    config: StudyConfig, summary: StudySummary, digests: set[str]
) -> dict[str, float] | None:
    """A summary's choice on the victims of these digests."""
    found, chosen = (summary.get("suite") or {}).get("chosen"), summary["chosen"]
    if found is None or chosen is None:
        return None
    mine = [one for one in found["victims"].values() if one["digest"] in digests]
    if any("attack_success" not in one for one in mine):
        return None
    spreads: list[Mapping[str, Any]] = [*mine]
    return {"number": chosen["number"]} | {
        name: sum(one[name]["mean"] for one in spreads) / len(spreads) for name in config.task.metrics
    }


def table(
    config: StudyConfig, trials: Sequence[TrialRecord], before: Mapping[str, float]
) -> LeaveOneOut:
    """For every attack: the choice without it and the choice with it, both scored on it, on `val`.

    Args:
        trials: records; those that are COMPLETE count.
        before: victim -> its own clean quality on `val`.

    Returns:
        `exact`, `scored_on`, and `attacks`: attack -> {"without", "with", "loss"}; the first two are a
        trial's number and its mean numbers on the attack's victims, null where nothing can be chosen;
        `loss` is by how much the attack's success rises and accuracy falls for not having seen it.
    """
    complete = [trial for trial in trials if trial["status"] == "COMPLETE"]
    attacks = attacks_of(config)
    rows = {}
    for attack, unseen in attacks.items():
        seen = [name for name in config.victim_names() if name not in unseen]
        if seen:
            blind = _chosen(config, complete, seen, before)
            informed = _chosen(config, complete, config.victim_names(), before)
            rows[attack] = compared(
                _on(blind, unseen), _on(informed, unseen), quality=config.task.quality
            )
    return {"exact": is_exact(config), "scored_on": "val, the trials' own", "attacks": rows}


def compared(
    without: dict[str, float] | None,
    with_: dict[str, float] | None,
    *,
    quality: str = "clean_accuracy",
) -> Unseen:
    """A row of the table."""
    loss = None
    if without is not None and with_ is not None:
        loss = {
            "attack_success": without["attack_success"] - with_["attack_success"],
            quality: with_[quality] - without[quality],
        }
    return {"without": without, "with": with_, "loss": loss}


def _chosen(
    config: StudyConfig,
    trials: Sequence[TrialRecord],
    victims: Sequence[str],
    before: Mapping[str, float],
) -> TrialRecord | None:
    """The trial that the study's rule chooses by these victims alone."""
    points = [_values(config, trial, victims) for trial in trials]
    quality = config.task.quality
    accuracy = config.aggregate(quality, [before[name] for name in victims])
    position = choose(
        points,
        min_clean_accuracy=accuracy - config.choose.max_accuracy_drop,
        violations=[total_violation(config.constraints.violations(point)) for point in points],
        tolerance=config.choose.tolerance,
        quality=quality,
    )
    return None if position is None else trials[position]


def _values(config: StudyConfig, trial: TrialRecord, victims: Sequence[str]) -> dict[str, float]:
    runs = {name: [numbers_in(trial["scores"][name], NUMBERS)] for name in victims}
    return over_victims(config.aggregate, runs, seconds=trial["seconds"])


def _on(trial: TrialRecord | None, victims: Sequence[str]) -> dict[str, float] | None:
    if trial is None:
        return None
    scores = [trial["scores"][victim] for victim in victims]
    means = {
        name: sum(number(one, name) for one in scores) / len(scores) for name in known_scores(scores[0])
    }
    return {"number": trial["number"]} | means
