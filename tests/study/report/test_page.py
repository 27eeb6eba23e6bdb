"""The page in a real Chromium: it draws, links, obeys keys and fingers, and asks for nothing elsewhere.

The browser is the machine's own (`apt-get install chromium`), driven by Playwright.
"""

import base64
import json
import shutil

import pytest

from study.report import write_report

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def report(large_study):
    return write_report(large_study, large_study.parent / "victims")


@pytest.fixture
def opened(browser, request):
    """path -> the page, from disk; at the end there was no error and no request to anywhere."""
    complaints, contexts = [], []

    def open_page(path, viewport=DESK, scheme="light"):
        context = browser.new_context(
            viewport=viewport, color_scheme=scheme, has_touch=viewport is PHONE, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda sent: complaints.append(sent.url) if elsewhere(sent.url) else None)
        page.goto(path.as_uri())
        return page

    def elsewhere(url):
        return not url.startswith(("file:", "data:"))

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def data_in(page):
    return json.loads(page.locator("#data").text_content())


def complete(data):
    return [trial for trial in data["trials"] if trial["status"] == "COMPLETE"]


def centre_of(page, selector):
    """The middle of an element in the window, which is scrolled to it."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def faded(page, kind):
    """How many points or lines stand back."""
    return page.locator(f"{kind}.out").count()


def test_it_opens_from_disk_with_the_finding_first(opened, report):
    page = opened(report)
    data = data_in(page)
    assert page.locator("h1").inner_text() == data["headline"]["title"]
    assert page.title() == f"large: {data['headline']['title']}"
    assert page.locator(".point").count() == len(complete(data)) == 170
    assert page.locator(".trial-line").count() == 169, "trial 0 is not of the space"
    assert page.locator(".point.front").count() == len(set(data["front"]) - {data["paper"]})
    assert page.locator("#failures tbody tr").count() == 30
    assert page.locator("#failures summary").inner_text() == "20 stopped early, 10 failed"
    for section in page.locator("section").all():
        assert section.locator("svg, table, dl, .bars, .tile").count(), section.get_attribute("id")


def test_words_from_the_records_stay_words(opened, report):
    page = opened(report)
    assert "</script>" in page.locator("#failures tbody").text_content()
    assert "taken" not in page.title()
    assert page.locator("#failures b").count() == 0


def test_hovering_a_point_tells_its_trial_and_lifts_its_line(opened, report):
    page = opened(report)
    chosen = data_in(page)["chosen"]
    assert page.locator("#tip").is_hidden()
    page.mouse.move(*centre_of(page, f".point[data-number='{chosen}'] .mark"))
    assert f"Trial {chosen}, chosen" in page.locator("#tip").inner_text()
    assert page.locator(".trial-line.hover").count() == 1
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()
    assert page.locator(".trial-line.hover").count() == 0


def test_a_rectangle_on_the_front_keeps_the_same_trials_everywhere(opened, report):
    page = opened(report)
    page.locator("#parallel summary").click()
    page.locator("#front .hit").scroll_into_view_if_needed()
    box = page.locator("#front .hit").bounding_box()
    left, top = box["x"] + 1, box["y"] + 1
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move(left + 0.5 * box["width"], top + 0.9 * box["height"], steps=4)
    assert page.locator("#front .brush").is_visible()
    page.mouse.up()
    kept = page.locator("#parallel tbody tr").count()
    assert 0 < kept < 170
    assert faded(page, ".point") == 170 - kept
    # the paper's defaults are no line
    paper_is_kept = page.locator(".point.paper:not(.out)").count()
    assert faded(page, ".trial-line") == 169 - (kept - paper_is_kept)
    assert f"{kept} of 170 trials" in page.locator("#front .grow").inner_text()
    for row in page.locator("#parallel tbody tr").all()[:5]:
        assert float(row.locator("td").nth(1).inner_text()) <= 55
    page.locator("#front button", has_text="Keep all").click()
    assert faded(page, ".point") == faded(page, ".trial-line") == 0


def test_a_range_dragged_on_an_axis_thins_out_the_front(opened, report):
    page = opened(report)
    hit = page.locator("#parallel .hit").first  # the axis of attack success
    assert "attack success" in page.locator("#parallel .handle").first.get_attribute("aria-label")
    hit.scroll_into_view_if_needed()
    box = hit.bounding_box()
    x = box["x"] + box["width"] / 2
    page.mouse.move(x, box["y"] + 0.985 * box["height"])
    page.mouse.down()
    page.mouse.move(x, box["y"] + 0.75 * box["height"], steps=4)
    page.mouse.up()
    values = [trial["attack_success"] for trial in complete(data_in(page))]
    low, high = min(values), max(values)
    expected = sum(value <= low + 0.25 * (high - low) for value in values)
    assert 170 - faded(page, ".point") == pytest.approx(expected, abs=2)
    page.mouse.click(x, box["y"] + 0.1 * box["height"])
    assert faded(page, ".point") == 0


def test_everything_can_be_done_with_keys(opened, report):
    page = opened(report)
    handle = page.locator("#parallel .handle[aria-label='inner_steps, lowest kept']")
    handle.focus()
    for _ in range(2):
        page.keyboard.press("PageUp")
        page.keyboard.press("PageUp")
    data = data_in(page)
    steps = [trial["parameters"].get("inner_steps") for trial in complete(data)]
    assert faded(page, ".point") == sum(value in (1, 2, None) for value in steps)
    assert float(handle.get_attribute("aria-valuenow")) == pytest.approx(0.8)
    page.keyboard.press("Escape")
    assert faded(page, ".point") == 0

    page.locator(".point[tabindex='0']").focus()
    assert page.locator("#tip").is_visible()
    first = page.evaluate("document.activeElement.dataset.number")
    page.keyboard.press("ArrowRight")
    number = page.evaluate("document.activeElement.dataset.number")
    assert number != first
    page.keyboard.press("Enter")
    shown = page.locator("#close-up [data-slot='close-up']").inner_text()
    assert shown.startswith(f"Trial {number}")
    assert page.locator("#front a[href='#close-up']").count() == 1


def test_every_trial_of_the_front_can_be_looked_at_under_every_victim(opened, report):
    page = opened(report)
    trials = page.locator("#pick-trial option").evaluate_all("all => all.map((one) => one.value)")
    data = data_in(page)
    assert {int(number) for number in trials} >= set(data["front"]) | {data["chosen"]}
    for number in trials:
        page.select_option("#pick-trial", number)
        for victim in ("digits-badnets", "digits-blended"):
            page.select_option("#pick-victim", victim)
            section = page.locator("#close-up")
            detail = data["close_ups"]["trials"][number]["victims"][victim]
            assert section.locator("canvas").count() == len(detail["layers"])
            assert section.locator(".pixels").count() == (0 if "answers" not in detail else 24) + (
                "common" in detail.get("answers", {}).get("synthesised", {})
            )


def test_masks_are_painted_as_they_are(opened, report):
    page = opened(report)
    data = data_in(page)
    first = data["close_ups"]["trials"][str(data["chosen"])]["victims"]["digits-badnets"]["layers"][0]
    painted = page.evaluate(
        """() => { const canvas = document.querySelector("#close-up canvas");
        const row = canvas.getContext("2d").getImageData(0, 0, canvas.width, 1).data;
        return [canvas.width, [...row.slice(0, 3)], [...row.slice(-4, -1)]]; }"""
    )
    factors = base64.b64decode(first["factor"])
    assert painted[0] == len(factors)
    accent, light = (0, 0x72, 0xB2), (0xEC, 0xEC, 0xE7)
    for pixel, factor in zip(painted[1:], (factors[0], factors[-1]), strict=True):
        for got, dark, bright in zip(pixel, accent, light, strict=True):
            assert got == pytest.approx(dark + (bright - dark) * factor / 255, abs=1)


def test_the_choice_is_shown_on_victims_that_no_trial_saw(opened, report):
    page = opened(report)
    drawn = page.locator("#unseen .chart")
    for text in ("tuned on", "held out", "clean controls", "digits-sig", "digits-clean"):
        assert text in drawn.text_content()
    page.locator("#unseen summary").click()
    rows = page.locator("#unseen details tbody tr").all_inner_texts()
    # four victims and three roles, under two configurations
    assert len(rows) == 14
    found = data_in(page)["suite"]["chosen"]["victims"]["digits-sig"]["attack_success"]
    (row,) = (row for row in rows if row.startswith("digits-sig\tchosen"))
    assert f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}" in row


def test_the_blind_choice_stands_beside_the_oracles(opened, large_study, tmp_path):
    folder = tmp_path / "blind"
    shutil.copytree(large_study, folder, ignore=shutil.ignore_patterns("trials"))
    rows = [json.loads(row) for row in (folder / "trials.jsonl").read_text().splitlines()]
    for row in rows:
        for scores in row.get("scores", {}).values():
            scores["risk"] = 0.5 * row["attack_success"]
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((folder / "summary.json").read_text())
    summary["selection"]["blind"] = summary["chosen"] | {"number": 0}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = opened(write_report(folder, tmp_path / "nowhere"))
    assert "is 1.00." in page.locator("#blind p").inner_text()
    assert page.locator("#blind .chart .mark.triangle").count() == 1
    assert page.locator("#blind tbody tr").count() == 2


def test_the_heat_map_has_a_cell_a_victim_and_trial_least_attack_success_first(opened, report):
    page = opened(report)
    columns = page.locator("#heat g[data-number]")
    numbers = [int(n) for n in columns.evaluate_all("all => all.map((g) => g.dataset.number)")]
    trials = {trial["number"]: trial for trial in complete(data_in(page))}
    successes = [trials[number]["attack_success"] for number in numbers]
    assert len(numbers) == 170
    assert successes == sorted(successes)
    assert page.locator("#heat g[data-number] rect").count() == 2 * 170
    style = page.locator("#heat g[data-number] rect").first.get_attribute("style")
    worst = trials[numbers[0]]["scores"]["digits-badnets"]["attack_success"]
    assert f"var(--warm) {100 * worst:.0f}%" in style
    page.mouse.move(
        *centre_of(page, f"#heat g[data-number='{numbers[5]}'] rect:first-of-type >> nth=0")
    )
    assert f"Trial {numbers[5]}" in page.locator("#tip").inner_text()
    page.locator("#heat button", has_text="clean accuracy").click()
    assert page.locator("#heat button[aria-pressed='true']").inner_text() == "clean accuracy"
    assert page.locator("#heat g[data-number] rect").first.get_attribute("style") != style


def test_the_close_up_shows_the_corner_alone(opened, report):
    page = opened(report)
    page.locator("#front button", has_text="Close-up").click()
    shown = page.locator(".point")
    numbers = {int(n) for n in shown.evaluate_all("all => all.map((g) => g.dataset.number)")}
    data = data_in(page)
    corner = {
        t["number"]
        for t in complete(data)
        if t["number"] in data["front"] and t["attack_success"] <= 0.25
    }
    assert corner <= numbers
    assert len(numbers) < 170
    page.locator("#front button", has_text="Everything").click()
    assert shown.count() == 170


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll_and_the_chart_lies_down(opened, report, scheme):
    page = opened(report, PHONE, scheme)
    page.locator("#parallel summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    axis = page.locator("#parallel .axis").first.bounding_box()
    assert axis["width"] > 250
    small = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((node) => node.childElementCount === 0
        && node.textContent.trim() && parseFloat(getComputedStyle(node).fontSize) < 12).length"""
    )
    assert small == 0


def luminance(colour):
    def linear(value):
        value /= 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_the_schemes_own_and_can_be_read(opened, report, scheme):
    page = opened(report, scheme=scheme)
    names = ("bg", "surface", "ink", "muted", "accent", "warm")
    read = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    colour = {name: page.evaluate(read, name) for name in names}
    light = {name: luminance(value) for name, value in colour.items()}
    assert (light["bg"] > 0.8) if scheme == "light" else (light["bg"] < 0.02)
    for name, least in (("ink", 12), ("muted", 4.5), ("accent", 4.5), ("warm", 3)):
        pair = sorted((light[name], light["bg"]))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, name
    okabe_ito = {"light": ("#0072b2", "#d55e00"), "dark": ("#56b4e9", "#e69f00")}
    assert (colour["accent"], colour["warm"]) == okabe_ito[scheme]


def test_roles_are_told_by_shape_too(opened, report):
    page = opened(report)
    outlines = page.locator("#front .legend .mark").evaluate_all(
        "all => all.map((m) => m.getAttribute('d'))"
    )
    rings = page.locator("#front .legend .ring").count()
    assert rings == 1, "the chosen one has a ring"
    # on the front, dominated, chosen (as its role, ringed), the paper's defaults, the victim
    assert len(outlines) == 5
    assert len({outlines[0], outlines[1], outlines[3], outlines[4]}) == 4


def test_what_a_study_has_not_is_not_there(opened, large_study, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(large_study, folder, ignore=shutil.ignore_patterns("summary.json", "trials"))
    rows = (folder / "trials.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, rows[:6]) if row["status"] == "COMPLETE"]
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = opened(write_report(folder, tmp_path / "nowhere"))
    ids = [section.get_attribute("id") for section in page.locator("section").all()]
    assert "front" in ids
    assert not {"importance", "failures", "blind"} & set(ids)
    assert page.locator("nav a").count() == len(ids) - 1
    (folder / "trials.jsonl").write_text("")
    page = opened(write_report(folder, tmp_path / "nowhere"))
    assert page.locator("h1").inner_text() == "This study has not ended"


def test_of_several_defences_each_point_has_the_colour_and_the_name_of_its_own(
    opened, two_defences, tmp_path
):
    page = opened(write_report(two_defences, tmp_path / "nowhere", tmp_path / "page.html"))
    data = data_in(page)
    assert data["defences"] == ["ims", "clp"]
    legend = page.locator("#front .legend li").all_inner_texts()
    assert legend[:2] == ["ims", "clp"]
    colours = {"ims": set(), "clp": set()}
    named = {trial["number"]: trial["defence"] for trial in data["trials"]}
    for point in page.locator("#front .point").all():
        name = named[int(point.get_attribute("data-number"))]
        assert name in point.get_attribute("aria-label")
        style = point.locator(".mark").first.get_attribute("style")
        colours[name].add(style.partition(":")[2])
    assert [len(found) for found in colours.values()] == [1, 1]
    assert colours["ims"] != colours["clp"]


def test_of_several_defences_the_axes_are_those_of_the_one_that_is_picked(
    opened, two_defences, tmp_path
):
    page = opened(write_report(two_defences, tmp_path / "nowhere", tmp_path / "page.html"))
    select = page.locator("#pick-defence")
    select.select_option("clp")
    labels = page.locator("#parallel .handle").evaluate_all(
        "all => all.map((one) => one.getAttribute('aria-label'))"
    )
    assert any(label.startswith("u,") for label in labels)
    assert any(label.startswith("defence,") for label in labels)
    assert not any("mask_lr" in label for label in labels)
    select.select_option("ims")
    page.locator("#parallel .handle[aria-label^='mask_lr']").first.wait_for(state="attached")
    page.locator("#parallel summary").click()
    page.locator("[data-slot='trials'] thead th").first.wait_for()
    heads = page.locator("[data-slot='trials'] thead th").all_inner_texts()
    assert "defence" in heads
    assert "its settings" in heads
