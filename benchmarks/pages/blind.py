"""How far the choice without the attack agrees with the truth."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, between, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "blind" / "trials.json"
# records of these commits are of the search of triggers that was there before the commit 2fa4791
BEFORE_THE_SEARCH = ("502170dd5bd8-dirty",)
ABOUT = """Random settings of the digits study, one victim an attack (seed 1), one seed a setting;
the defence's images are of `train`, the probe's of `val`, and the truth is of `test`. Among the
trials that lose at most 2 points on `val`, the blind choice has the least risk and the oracle's
choice the least ASR on `val`; regret is the difference of their ASR."""


def blind() -> str:
    """The page: a row a victim."""
    kept: dict[str, Any] | None = read(KEPT)
    if kept is None:
        return page("Choosing without the attack", NOTHING)
    columns = ["victim", "n", "Spearman risk", "same answer", "carried over", "agreement, clean"]
    columns += ["target's weight", "ASR val, blind / oracle", "ASR test, blind / oracle", "regret val"]
    columns += ["regret test", "probe, s", "a trial, s"]
    rows = []
    for attack, found in kept["victims"].items():
        rho = found["spearman"]
        rows.append(
            [
                f"{attack}, target {found['target']}",
                str(found["n"]),
                *(f"{rho[name]:.2f}" for name in ("risk", "same_answer", "carried_over", "agreement")),
                f"{found['weight_of_target']:.2f}",
                *(
                    f"{found[split]['blind']:.3f} / {found[split]['oracle']:.3f}"
                    for split in ("val", "test")
                ),
                *(f"{found[split]['regret']:.3f}" for split in ("val", "test")),
                f"{found['seconds']['probe']:.0f}",
                f"{found['seconds']['a trial']:.2f}",
            ]
        )
    old = (
        " They are of the search of triggers before the commit 2fa4791."
        if kept["commit"] in BEFORE_THE_SEARCH
        else ""
    )
    risks = [found["spearman"]["risk"] for found in kept["victims"].values()]
    regrets = [found["test"]["regret"] for found in kept["victims"].values()]
    return page(
        "Choosing without the attack",
        ABOUT,
        f"The records were measured at the commit {kept['commit']}.{old}",
        table(columns, rows),
        f"The order by risk agrees with the order by ASR at a Spearman of {between(risks)}, and the "
        f"blind choice has {between(regrets, 3)} more ASR on `test` than the oracle's; "
        "[a decision](../docs/decisions/0014-risk.md) says where risk fails.",
    )
