"""The pages of the benchmarks are what the program makes of the records."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.pages import choosing, driver
from benchmarks.records import HERE, RESULTS

ROOT = Path(__file__).parents[1]
BY_HAND = {"README", "gpu"}


@pytest.mark.parametrize("name", sorted(report.PAGES))
def test_a_page_is_what_the_program_writes(name):
    assert (HERE / f"{name}.md").read_text() == report.PAGES[name](), "python -m benchmarks.report"


def test_the_readmes_table_is_what_the_program_writes():
    readme = report.README.read_text()
    assert report.with_table(readme) == readme, "python -m benchmarks.report"
    assert "the chosen configuration, 5 new runs" in readme


def test_the_program_writes_to_its_own_checkout():
    assert HERE == ROOT / "benchmarks"


def test_no_other_page_has_tables_of_numbers():
    assert {path.stem for path in HERE.glob("*.md")} == BY_HAND | set(report.PAGES)
    assert len((HERE / "README.md").read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", sorted(report.PAGES))
def test_a_table_is_followed_by_its_conclusion(name):
    blocks = report.PAGES[name]().strip().split("\n\n")
    tables = [at for at, block in enumerate(blocks) if block.startswith("|")]
    assert tables
    for at in tables:
        defining = blocks[at].startswith(("| case | ASR at most", "| row | method | why"))
        assert defining or re.match(r"[^|#]+\.$", blocks[at + 1], re.S), blocks[at][:80]


def test_every_record_is_on_a_page():
    read = {
        "audit",
        "blind",
        "choosing",
        "comparison",
        "conditional",
        "kills",
        "samplers",
        "scale",
        "serving",
        "shipped",
        "training",
        "tune",
        "victims",
        "zoo",
    }
    assert {path.name for path in RESULTS.iterdir() if path.is_dir()} == read


def test_a_page_without_records_says_so(tmp_path, monkeypatch):
    from benchmarks.pages import (
        audit,
        blind,
        choosing,
        comparison,
        conditional,
        kills,
        samplers,
        serving,
        shipped,
        training,
        victims,
        zoo,
    )

    modules = (audit, blind, choosing, comparison, conditional, driver, kills, samplers)
    for module in (*modules, serving, shipped, training, victims, zoo):
        monkeypatch.setattr(module, "KEPT", tmp_path / "nothing")
        page = getattr(module, module.__name__.rpartition(".")[2])
        assert "Nothing was measured yet." in page()


def test_a_run_that_is_too_short_for_a_suggestion_at_trial_100_is_on_the_page(tmp_path, monkeypatch):
    runs = json.loads(driver.KEPT.read_text())
    short = runs[0] | {"trials": 40, "complete": 40, "suggestion_cpu": {}}
    kept = tmp_path / "runs.json"
    kept.write_text(json.dumps([*runs, short]))
    monkeypatch.setattr(driver, "KEPT", kept)
    assert "40 of 40" in driver.driver()


def test_a_study_over_all_defences_is_held_against_the_best_of_one(tmp_path, monkeypatch):
    def choice(success):
        return {"defence": "fst", "clean_accuracy_test": 0.9, "attack_success_test": success}

    def one(volume, blind=0.1):
        more = {"oracle": choice(0.1), "blind": choice(blind), "spearman": 0.5, "complete": 20}
        return {"hypervolume": volume, **more}

    runs = {
        **{f"60/badnets/{seed}/all": one(0.3 + seed / 100, blind=0.1 + seed / 10) for seed in range(3)},
        **{f"60/badnets/{seed}/ims": one(0.31) for seed in range(3)},
        **{f"60/badnets/{seed}/fst": one(0.325 if seed else 0.0) for seed in range(3)},
        "60/wanet/0/all": one(0.2),  # one of a single defence has not been run yet
    }
    about = {"device": "CPU", "threads": 1, "torch": "2.8", "date": "2026-01-01"}
    kept = tmp_path / "digits.json"
    kept.write_text(json.dumps({"runs": runs, "about": about}))
    monkeypatch.setattr(choosing, "KEPT", kept)
    text = " ".join(choosing.choosing().split())
    # medians: 0.310 over all, 0.325 of the best alone
    assert "| badnets | 3 | 0.310 | 0.310 | 0.325 | fst | -0.015 | 20 |" in text
    assert "on 0 of 1 victims" in text
    assert "In 1 of 3 studies" in text  # the others are 0.1 and 0.2 above
    assert "wanet" not in text
