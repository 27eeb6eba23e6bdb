"""What an error says is fit for a terminal, whoever chose the names in it."""

import io

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from bimask.errors import BimaskError, SettingError, printable
from bimask.files.bounded import read_yaml
from bimask.files.drawn import save_figure
from bimask.progress import Console, ToldProgress
from bimask.victims import load_suite


@pytest.mark.parametrize("odd", ["\x1b]0;mine\x07", "\r", "\x9b31m", "\ud800", "\u202e", "\x7f", "\0"])
def test_no_control_reaches_a_terminal(odd):
    said = str(BimaskError(f"first {odd}", "second"))
    assert said.split("\n")[1] == "second"
    assert odd not in said
    said.encode()


def test_a_name_of_a_file_is_harmless(tmp_path):
    path = tmp_path / "a\x1b]0;mine\x07.yaml"
    with pytest.raises(SettingError) as caught:
        load_suite(path)
    assert "\x1b" not in str(caught.value)
    path.write_text('victims: [{"\\e]0;x": 1}]')
    assert "\x1b" in next(iter(read_yaml(path)["victims"][0]))
    with pytest.raises(SettingError) as caught:
        load_suite(path)
    assert "\x1b" not in str(caught.value)


def test_text_is_one_line_and_as_long_as_told():
    assert printable("a\nb\tc") == "a?b?c"
    assert printable("x" * 100, 10) == "xxxxxxx..."
    assert printable("héllo 日本") == "héllo 日本"
    assert len(str(BimaskError("x" * 10**7))) <= 20_000


@pytest.mark.parametrize("odd", ["$\\\\frac{$", "$x_$", "a\ud800b", "x" * 10**6, "\x1b[1m"])
def test_a_chart_is_drawn_whatever_its_words_are(tmp_path, odd):
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(odd)
    axes.set_ylabel(odd)
    figure.suptitle(odd)
    axes.plot([0, 1], label=odd)
    axes.legend()
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_terminal_is_steered_by_nobody():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    table = Table("name")
    table.add_row("a\x1b]0;mine\x07b\ud800")
    console.print(table)
    console.print(":skull: [bold]c\x1b[2Jd[/]\ne", soft_wrap=True)
    console.tell("f\ng [red]h[/]", mark="[i]note\n", style="bold")
    said = out.getvalue()
    assert "\x1b]0" not in said
    assert "\x1b[2J" not in said
    assert "\x1b[1m" in said  # its own style
    assert said.endswith(":skull: [bold]c?[2Jd[/]?e\n\x1b[1m[i]note?\x1b[0m: f?g [red]h[/]\n")
    said.encode()


def test_a_name_makes_no_line_of_its_own(tmp_path):
    """A line that looks like another message cannot be made by whoever names a file."""
    with pytest.raises(SettingError) as caught:
        load_suite(tmp_path / "a\nerror: all is well.yaml")
    assert "\n" not in str(caught.value)
    assert str(SettingError("one\ntwo", "three")).split("\n") == ["one?two", "three"]


def test_a_bar_is_one_line_without_markup():
    out = io.StringIO()
    with ToldProgress(Console(file=out, force_terminal=True, width=400)) as bars:
        bars.add_task("[link=file:///x]a\nb\x1b]0;c[/link]" + "x" * 10_000, total=2)
    assert "[link=file:///x]a?b?]0;c[/link]xxx" in out.getvalue()
    assert "x" * 300 not in out.getvalue()


def test_an_error_has_its_lines_on_a_terminal():
    out = io.StringIO()
    Console(file=out).tell_error(SettingError("[b]one\n", "two"))
    assert out.getvalue() == "error: [b]one?\ntwo\n"
