"""What a report says, from the records of a study; what it looks like is in test_page.py."""

import base64
import json
import math
import re
import shutil
from collections import Counter

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file

from bimask import PurifyConfig, load_victim
from bimask.interop import save_imported
from bimask.interop.backdoorbench_writer import clean_positions
from bimask.masking.masks import MaskSet
from bimask.victims.imported import assemble
from study.analysis.importance import MIN_TRIALS, importances
from study.report import REPORT, write_report
from study.report.__main__ import main as report_page
from study.report.closeup import layers
from study.report.content import blind_choice, headline, page_content, read
from study.report.pictures import _groups, draw_front
from study.spec.config import StudyError
from study.spec.space import Parameter
from study.store import records


def data_of(path):
    """The data that a page holds."""
    text = path.read_text()
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


@pytest.fixture(scope="module")
def page(large_study):
    return write_report(large_study, large_study.parent / "victims")


# --- the headline ---


def scores(accuracy, success, recovery=0.5):
    return {"clean_accuracy": accuracy, "attack_success": success, "recovery": recovery}


def told(before, after, *, chosen=7, paper=None, statuses=("COMPLETE",) * 8):
    summary = {
        "aggregate": {},
        "victims": {"digits-badnets": {"test": before}},
        "n_complete": statuses.count("COMPLETE"),
        "min_clean_accuracy": 0.97,
        "chosen": after and {"number": chosen, "test": after},
        "paper_defaults": paper and {"number": 0, "test": paper},
    }
    found = headline(summary, Counter(statuses))
    return found["title"].replace("\u00a0", " "), found["text"].replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("before", "after", "title"),
    [
        (
            (0.993, 0.975),
            (0.975, 0.0099),
            "brings attack success from 97.5 % to 1.0 % for 1.8 points of",
        ),
        ((0.99, 0.9), (0.98, 0.1), "brings attack success from 90.0 % to 10.0 % for 1.0 point of"),
        (
            (0.99, 0.9),
            (0.99, 0.1),
            "brings attack success from 90.0 % to 10.0 % at no cost in accuracy",
        ),
        ((0.98, 0.9), (0.99, 0.1), "to 10.0 % and gains 1.0 point of accuracy"),
        ((0.99, 0.9), (0.98, 0.9), "leaves attack success at 90.0 % and loses 1.0 point of accuracy"),
        ((0.99, 0.9), (0.99, 0.95), "leaves attack success at 95.0 % at no cost in accuracy"),
    ],
)
def test_the_headline_says_what_was_gained_and_what_it_cost(before, after, title):
    got, _ = told(scores(*before), scores(*after))
    assert got.startswith("Trial 7 ")
    assert title in got


def test_the_headline_speaks_of_the_papers_defaults_where_they_are_chosen():
    title, text = told(scores(0.99, 0.9), scores(0.98, 0.1), chosen=0, paper=scores(0.98, 0.1))
    assert title.startswith("The paper's defaults bring attack success from 90.0 %")
    assert "leave attack success" not in text


def test_the_text_counts_trials_and_compares_with_the_paper():
    statuses = ("COMPLETE",) * 9 + ("FAILED",) * 2 + ("PRUNED",)
    _, text = told(scores(0.99, 0.9), scores(0.98, 0.1), paper=scores(0.98, 0.7), statuses=statuses)
    assert "12 trials on digits-badnets, 1 stopped early, 2 failed." in text
    assert "The paper's defaults leave attack success at 70.0 %." in text


def test_the_blind_choice_is_shown_where_there_is_evidence_and_ranks_are_spearmans(large_study):
    trials = [trial for trial in read(large_study).trials if trial["status"] == "COMPLETE"]

    def with_risk(rank):
        for trial in trials:
            for scores in trial["scores"].values():
                scores["risk"] = rank(trial["attack_success"])
        return blind_choice(
            trials, {"chosen": None, "selection": {"blind": {"number": 3}, "oracle": None}}
        )

    assert blind_choice(trials, None) is None
    agreeing, opposite = with_risk(lambda success: success**3), with_risk(lambda success: 1 - success)
    assert agreeing["spearman"] == pytest.approx(1)
    assert opposite["spearman"] == pytest.approx(-1)
    assert agreeing["chosen"] == 3
    assert agreeing["risk"][trials[0]["number"]] == pytest.approx(trials[0]["attack_success"] ** 3)


def test_held_out_victims_are_told_of_in_the_text(large_study):
    content = page_content(read(large_study))
    found = content["suite"]["chosen"]["roles"]["held_out"]["attack_success"]
    said = f"On held-out victims it leaves attack success at {100 * found['mean']:.1f}"
    assert said in content["headline"]["text"]
    assert "(3 runs)" in content["headline"]["text"]


def test_nothing_chosen_is_said_first():
    title, text = told(scores(0.99, 0.9), None)
    assert title == "No trial keeps 97.0 % clean accuracy"
    assert "Nothing is chosen" in text
    title, _ = told(scores(0.99, 0.9), None, statuses=("FAILED",) * 3)
    assert title == "No trial was completed"


# --- importance ---

SPACE = {
    "mask_lr": {"kind": "float", "low": 0.01, "high": 1.0, "log": True},
    "inner_steps": {"kind": "int", "low": 1, "high": 9},
    "norm": {"kind": "categorical", "choices": ["linf", "l2"]},
    "step_size": {"kind": "float", "low": 0.1, "high": 0.2, "when": {"norm": "l2"}},
}


def points(count, value):
    """Trials spread over the space whose attack success is `value` of their parameters."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        a, b, c = torch.rand(3, generator=generator).tolist()
        parameters = {
            "mask_lr": 0.01 * 100**a,
            "inner_steps": 1 + int(9 * b),
            "norm": "l2" if c > 0.5 else "linf",
        }
        if c > 0.5:
            parameters["step_size"] = 0.15
        yield {"number": number, "parameters": parameters, "attack_success": value(parameters)}


def shares(trials):
    space = TypeAdapter(dict[str, Parameter]).validate_python(SPACE)
    return importances(space, list(trials), {"attack_success": "minimize"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask_lr", lambda p: math.log(p["mask_lr"])),
        ("inner_steps", lambda p: p["inner_steps"]),
        ("norm", lambda p: float(p["norm"] == "l2")),
    ],
)
def test_the_setting_that_decides_is_the_important_one(name, value):
    found = shares(points(60, value))["attack_success"]
    assert found[name] > 0.9
    assert next(iter(found)) == name
    assert sum(found.values()) == pytest.approx(1)
    assert "step_size" not in found, "a conditional setting has no share of the whole"


def test_no_importance_where_nothing_varies_or_few_trials_are():
    assert shares(points(MIN_TRIALS, lambda p: 0.5)) == {}
    assert shares(points(MIN_TRIALS - 1, lambda p: p["inner_steps"])) == {}
    assert shares(points(MIN_TRIALS, lambda p: p["inner_steps"]))


def test_trials_outside_the_space_do_not_count():
    inside = list(points(40, lambda p: p["inner_steps"]))
    outside = {"parameters": {**inside[0]["parameters"], "mask_lr": 5.0}, "attack_success": 99.0}
    assert shares([*inside, outside]) == shares(inside)


# --- masks ---


def test_layers_are_the_masks_in_255ths_sorted_by_factor_in_the_models_order(tiny_net):
    masks = MaskSet.for_model(tiny_net, sharpness=5)
    with torch.no_grad():
        masks.mask.copy_(torch.linspace(0, 1, len(masks.mask)))
        masks.selection.copy_(torch.linspace(1, 0.25, len(masks.selection)))
    saved = MaskSet.from_tensors(dict(sorted(masks.tensors().items(), reverse=True)), sharpness=5)
    rows = layers(saved, tiny_net)
    assert [row["name"] for row in rows] == list(masks.sites)
    keeps, selections = masks.keeps(), masks.by_site(masks.selection)
    for row in rows:
        keep = keeps[row["name"]].detach()
        order = keep.argsort(descending=True)
        assert decoded(row["factor"]) == (255 * keep[order]).round().int().tolist()
        selection = selections[row["name"]].detach()[order]
        assert decoded(row["selection"]) == (255 * selection).round().int().tolist()
        assert row["kept"] == sum(value >= 0.5 for value in keep.tolist())


def decoded(text):
    return list(base64.b64decode(text))


# --- the whole ---


def test_a_page_is_one_file_of_modest_size_that_names_no_other(page):
    text = page.read_text()
    assert page.stat().st_size < 10e6
    assert "default-src 'none'" in text
    # namespaces are names, not addresses
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not addresses
    assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=|@import|<link[^>]*href=(?!\"data:)", text)


def test_its_data_are_the_records(page, large_study):
    data = data_of(page)
    rows = [json.loads(line) for line in (large_study / "trials.jsonl").read_text().splitlines()]
    summary = json.loads((large_study / "summary.json").read_text())
    assert len(data["trials"]) == 200
    assert [t["status"] for t in data["trials"]] == [row["status"] for row in rows]
    for trial, row in zip(data["trials"], rows, strict=True):
        assert trial["number"] == row["number"]
        assert trial.get("attack_success") == row.get("attack_success")
        assert trial["parameters"] == ({} if row["preset"] else row["parameters"])
    assert data["front"] == [point["number"] for point in summary["front"]]
    assert data["chosen"] == summary["chosen"]["number"]
    assert data["headline"]["after"] == summary["chosen"]["test"]
    assert dict(data["provenance"])["commit"] == "0123456789ab"


def test_close_ups_are_there_for_the_front_and_their_answers_for_the_chosen(page, large_study):
    data = data_of(page)
    close_ups = data["close_ups"]["trials"]
    assert {str(number) for number in (*data["front"], data["chosen"], data["paper"])} <= set(close_ups)
    mine = close_ups[str(data["chosen"])]["victims"]["digits-badnets"]
    assert [name for name, _ in mine["curves"]["stages"]] == ["initialise", "minimise", "select"]
    assert len(mine["curves"]["loss"]) == 8
    assert [step for step, _ in mine["curves"]["scores"]["attack_success"]] == [1, 3, 5, 7, 8]
    path = large_study / "trials" / f"{data['chosen']:03d}" / "digits-badnets.masks.safetensors"
    assert {layer["name"] + ".mask" for layer in mine["layers"]} < set(load_file(path))
    asked = mine["answers"]["asked"]
    assert set(asked) == {"purified", "inverse"}
    assert {"each"} <= set(mine["answers"]["synthesised"]) <= {"each", "common"}
    victim = data["close_ups"]["victims"]["digits-badnets"]
    summary = json.loads((large_study / "summary.json").read_text())["victims"]["digits-badnets"]["val"]
    assert victim["asked"]["clean_right"] == pytest.approx(summary["clean_accuracy"])
    assert victim["asked"]["triggered_wanted"] == pytest.approx(summary["attack_success"])


def test_a_study_without_its_victims_has_no_answers(large_study, tmp_path):
    data = data_of(write_report(large_study, tmp_path / "nowhere", tmp_path / "new" / "page.html"))
    assert data["close_ups"]["victims"] == {}
    mine = data["close_ups"]["trials"][str(data["chosen"])]["victims"]["digits-badnets"]
    assert set(mine) == {"curves", "layers"}


def test_an_imported_victim_answers_from_where_it_was_imported_to(large_study, study_of, tmp_path):
    victims = large_study.parent / "victims"
    ours = load_victim(next(path for path in victims.iterdir() if _is_badnets(path)))
    sets = ours.eval_sets(ours.spec.load_data(), "test")
    wanted = ours.attack.attack_labels(sets.clean.labels, sets.clean.num_classes)
    imported = assemble(
        source="backdoorbench",
        net=ours.spec.net,
        weights=(ours.model, ours.spec.width),
        dataset="digits",
        clean=sets.clean,
        triggered=sets.triggered,
        clean_index=clean_positions(sets, wanted),
    )
    folder = tmp_path / "somebodys"
    save_imported(imported, folder, source=victims.parent / "large" / "study.yaml")
    study = study_of({"imported": str(folder)})
    data = data_of(write_report(study, tmp_path / "victims"))
    before = json.loads((study / "summary.json").read_text())["victims"]["somebodys"]["val"]
    asked = data["close_ups"]["victims"]["somebodys"]["asked"]
    assert asked["triggered_wanted"] == pytest.approx(before["attack_success"])
    assert asked["clean_right"] == pytest.approx(before["clean_accuracy"])
    mine = data["close_ups"]["trials"][str(data["chosen"])]["victims"]["somebodys"]
    assert set(mine["answers"]["asked"]) == {"purified", "inverse"}

    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # imported anew: another victim by now
    assert data_of(write_report(study, tmp_path / "victims"))["close_ups"]["victims"] == {}


def _is_badnets(folder):
    spec = json.loads((folder / "manifest.json").read_text())["spec"]
    return spec["attack"]["name"] == "badnets" and spec["poisoning_rate"] > 0


def test_a_study_that_was_cut_off_has_a_page(large_study, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(large_study, folder, ignore=shutil.ignore_patterns("summary.json", REPORT))
    rows = (folder / "trials.jsonl").read_text().splitlines()
    (folder / "trials.jsonl").write_text("\n".join(rows[:9]) + "\n")
    data = data_of(write_report(folder, large_study.parent / "victims"))
    assert data["headline"]["title"] == "This study has not ended"
    assert data["chosen"] is None
    assert data["front"]
    (folder / "trials.jsonl").write_text("")
    assert page_content(read(folder))["trials"] == []


def test_nothing_in_the_data_ends_the_script_they_are_in(page):
    reasons = {trial["reason"] for trial in data_of(page)["trials"] if trial["status"] == "FAILED"}
    (reason,) = reasons
    assert "</script>" in reason
    assert reason not in page.read_text()


def test_bad_names_and_files_get_a_sentence_and_exit_code_2(large_study, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        report_page("nothing", outputs=tmp_path)
    assert caught.value.code == 2
    assert "There is no study in" in capsys.readouterr().err
    with pytest.raises(StudyError, match="Cannot write the report"):
        write_report(large_study, tmp_path, large_study / "study.yaml" / "page.html")
    folder = tmp_path / "broken"
    shutil.copytree(large_study, folder)
    (folder / "trials.jsonl").write_text('{"number": 0,\n')
    with pytest.raises(StudyError, match="cannot be read"):
        write_report(folder, tmp_path)


def test_the_settings_of_a_close_up_are_the_trials(page, large_study):
    data = data_of(page)
    study = yaml.safe_load((large_study / "study.yaml").read_text())
    for number, detail in data["close_ups"]["trials"].items():
        settings = PurifyConfig.model_validate(detail["settings"])
        trial = data["trials"][int(number)]
        if trial["preset"] is None:
            expected = {**study["fixed"], **trial["parameters"]}
            assert {name: getattr(settings, name) for name in expected} == expected


def test_of_several_defences_the_headline_names_that_of_the_choice(two_defences):
    content = page_content(read(two_defences))
    chosen = next(one for one in content["trials"] if one["number"] == content["chosen"])
    assert f"({chosen['defence']})" in content["headline"]["title"]
    assert content["importance"] == {}, "`defence` alone is in all trials"
    assert {one["defence"] for one in content["trials"]} == {"ims", "clp"}


def test_of_several_defences_the_picture_of_the_front_has_a_colour_each(two_defences):
    trials = records.read_trials(two_defences)
    complete = [trial for trial in trials if trial["status"] == "COMPLETE"]
    front = [point["number"] for point in records.read_summary(two_defences)["front"]]
    found = _groups(complete, front)
    assert {one.label for one in found if one.label} == {"ims", "clp"}
    assert sorted(n for one in found for n in one.numbers) == [t["number"] for t in complete]
    for one in found:
        assert len({trials[number]["parameters"]["defence"] for number in one.numbers}) == 1
    draw_front(two_defences / "front.png", trials, records.read_summary(two_defences))
