import math

import pytest

from study.analysis.comparison import compare, table
from study.report.comparison import render, verdict
from study.spec.comparison import ComparisonConfig

CONFIG = ComparisonConfig.model_validate(
    {
        "name": "hand",
        "defences": ["clp", "ft_sam", "ims"],
        "search_seconds": 1,
        "budgets": [10],
        "tuning": [{"attack": {"name": "badnets"}}],
    }
)


def searched(trials=3, **more):
    found = {"study": "s", "trials": trials, "complete": trials, "seconds": 1.0, "chosen": {}}
    return found | {"hypervolume": 0.5, "front": [(0.1, 0.9)]} | more


def record(entry, victim, part="held_out", *, acc=0.9, asr=0.1, ra=0.8, der=0.9):
    return {
        "schema": 2,
        "entry": entry,
        "budget": 10,
        "part": part,
        "victim": victim,
        "attack": "clean" if part == "control" else "badnets",
        "victim_seed": 2,
        "seed": 3,
        "before": {"clean_accuracy": 0.95, "attack_success": 1.0, "recovery": 0.0},
        "test": {"clean_accuracy": acc, "attack_success": asr, "recovery": ra},
        "arr": 1 - acc / 0.95,
        "rdr": 1 - ra / 0.95,
        "der": der,
        "seconds": 2.0,
        "forward": 10,
        "backward": 5,
        "own": {},
    }


def failed(entry, victim):
    kept = record(entry, victim)
    return {k: v for k, v in kept.items() if k not in ("test", "arr", "rdr", "der")} | {"reason": "x"}


@pytest.fixture
def found():
    records = [
        *[record("clp", v, der=0.9, acc=0.94) for v in "abcd"],
        *[record("ft_sam", v, der=0.8) for v in "abc"],
        failed("ft_sam", "d"),
        record("clp", "e", "control", acc=0.93),
        record("ft_sam", "e", "control", acc=0.95),
    ]
    tried = {"clp": searched(), "ft_sam": searched(), "ims": searched(chosen=None, reason="none")}
    return compare(CONFIG, tried, records)


def cell_of(found, entry, part):
    (cell,) = [c for c in found["cells"] if (c["entry"], c["part"]) == (entry, part)]
    return cell


def test_failures_are_counted_and_no_number_stands_for_them(found):
    cell = cell_of(found, "ft_sam", "held_out")
    assert (cell["n"], cell["n_failed"]) == (3, 1)
    assert cell["scores"]["attack_success"]["n"] == 3
    assert cell_of(found, "ims", "held_out")["scores"] == {}


def test_the_tare_is_what_a_clean_twin_loses(found):
    assert found["tare"]["clp"]["10"]["mean"] == pytest.approx(0.02)
    assert found["tare"]["ft_sam"]["10"]["mean"] == pytest.approx(0.0)
    assert found["tare"]["ims"]["10"] is None


def test_a_clean_twin_has_no_attack_measures(found):
    assert "der" not in cell_of(found, "clp", "control")["scores"]
    assert "rdr" not in cell_of(found, "clp", "control")["scores"]


def test_what_failed_and_what_chose_nothing_ranks_last(found):
    der = next(r["ranks"] for r in found["rankings"] if r["measure"] == "der")
    assert list(der["mean_rank"]) == ["clp", "ft_sam", "ims"]
    assert der["blocks"] == 4
    assert der["mean_rank"]["ft_sam"] == (2 * 3 + 2.5) / 4  # of the two that lack victim d
    tare = next(r["ranks"] for r in found["rankings"] if r["measure"] == "tare")
    assert next(iter(tare["mean_rank"])) == "ft_sam"


def test_a_defence_that_was_refused_is_not_ranked():
    tried = {"clp": searched(), "ft_sam": searched(), "ims": searched(0, reason="no norms")}
    found = compare(CONFIG, tried, [record("clp", "a"), record("ft_sam", "a")])
    assert all("ims" not in r["ranks"]["mean_rank"] for r in found["rankings"])


def test_the_verdict_says_no_more_than_the_test(found):
    der = verdict(found)[0]
    assert "clp has the best mean rank" in der
    assert "not told apart" in der or "no defence is told apart" in der or "p =" in der


def test_the_page_stands_alone_and_escapes_names(found, tmp_path):
    found["searched"]["ims"]["reason"] = "<script>alert(1)</script>"
    text = render(found, {})
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "90.0 ± 0.0" in text


def test_the_table_has_a_row_a_defence_budget_and_part(found):
    rows = table(found)
    assert len(rows) == 9
    held = rows[(rows.entry == "clp") & (rows.part == "held_out")].iloc[0]
    assert held["attack_success.mean"] == pytest.approx(0.1)
    assert math.isnan(rows[rows.entry == "ims"].iloc[0].get("der.mean"))
