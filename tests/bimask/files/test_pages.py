"""Pages: words of strangers are shown as they are, what this program made stays whole."""

import json

from markupsafe import Markup

from bimask.files.pages import MOST_WORDS, plain

ODD = "a\x1b[2J\u202eb\u00a0c\u3000d<b>\ud800"


def test_strings_are_harmless_and_bounded_whatever_is_around_them():
    made = Markup("data:image/png;base64," + "A" * 10_000)
    found = plain({ODD: [ODD, (ODD * 1000,), made, float("nan"), {7: None}], "n": 1.5})
    shown = "a?[2J?b\u00a0c\u3000d<b>?"
    assert list(found) == [shown, "n"]
    first, (long,), picture, nothing, inner = found[shown]
    assert first == shown
    assert len(long) == MOST_WORDS
    assert json.loads(json.dumps(picture)) == str(made)
    assert (nothing, inner) == (None, {7: None})
    json.dumps(found).encode()
