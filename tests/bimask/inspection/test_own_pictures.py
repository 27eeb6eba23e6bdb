"""Pictures and folders of the user's own, as they come: modes, sizes, strays; none white in silence."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from bimask import PurifyConfig, load_data
from bimask.__main__ import app
from bimask.cleaned.folder import load_cleaned
from bimask.cli.suspects import shown_warnings
from bimask.data.pictures import DataWarning, picture_size, read_picture
from bimask.errors import DataError, SettingError, VictimError
from bimask.inspection.suspect import load_suspect, read_clean
from bimask.inspection.words import size

FACTORY = """
from torch import nn

seen = []


def make(num_classes, in_channels=3, image_size=None):
    seen.append(image_size)
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes),
    )

"""


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def net(classes, channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)),
    )


def write(folder, classes, *, each=2, size=(8, 8), suffix="png"):
    """Class folders of noise; `size` is (height, width)."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for row in range(each):
            pixels = noise(*size, 3, seed=100 * label + row)
            Image.fromarray(pixels).save(folder / name / f"{row}.{suffix}")


@pytest.fixture
def home(tmp_path):
    (tmp_path / "own.py").write_text(FACTORY)
    torch.save({"model": net(4).state_dict()}, tmp_path / "w.pth.tar")
    write(tmp_path / "clean", "abcd")
    return tmp_path


def suspect(home, *, factory="make", weights="w.pth.tar", **options):
    return load_suspect(home / weights, f"{home / 'own.py'}:{factory}", home / "clean", **options)


# --- one picture ---


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 65535), st.sampled_from(["png", "tif", "pgm"])
)
def test_16_bits_are_scaled_by_their_whole_range(tmp_path_factory, height, width, value, suffix):
    path = tmp_path_factory.getbasetemp() / f"deep.{suffix}"
    pixels = np.full((height, width), value, dtype=np.uint16)
    pixels[0, 0] = 65535
    Image.fromarray(pixels).save(path)
    read = read_picture(path, 3)
    assert read.shape == (3, height, width)
    assert read[:, 0, 0].tolist() == [255] * 3
    if height * width > 1:
        assert read[0, -1, -1].item() == round(value / 257)
    assert torch.equal(read[:1], read_picture(path, 1))


def test_16_bits_are_never_white_in_silence_in_any_reader(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name in "ab":
        (tmp_path / "sets" / name).mkdir(parents=True)
        for row in range(5):
            Image.fromarray(deep).save(tmp_path / "sets" / name / f"{row}.png")
    expected = torch.from_numpy(deep / 257).round().byte()
    assert torch.equal(load_data(f"imagefolder:{tmp_path / 'sets'}").train.images[0, 1], expected)
    with pytest.warns(DataWarning, match="the same"):
        assert torch.equal(read_clean(tmp_path / "sets")[0].images[0, 1], expected)


def test_floats_in_the_unit_range_are_scaled_and_others_refused(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert torch.equal(
        read_picture(tmp_path / "a.tif", 1)[0], torch.from_numpy(values * 255).round().byte()
    )
    for odd in (values * 255, values - 0.1, values + np.nan):
        Image.fromarray(odd).save(tmp_path / "b.tif")
        with pytest.raises(DataError, match=r"b\.tif has values of .* must have floats in \[0, 1\]"):
            read_picture(tmp_path / "b.tif", 3)


def test_whole_numbers_of_no_known_range_are_refused(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 9999).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="32 bits, 0 to 629937, and nothing says which is white"):
        read_picture(tmp_path / "a.tiff", 3)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png")),
        *(("CMYK", "jpg"), ("CMYK", "tif"), ("L", "pgm"), ("RGB", "webp"), ("YCbCr", "jpg")),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_usual_modes_become_colours(tmp_path, mode, suffix, channels):
    red = Image.new("RGB", (32, 16), (250, 10, 10))
    red.paste((10, 10, 250), (0, 0, 16, 16))
    red.convert(mode).save(tmp_path / f"a.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_picture(tmp_path / f"a.{suffix}", channels).int()
    assert read.shape == (channels, 16, 32)
    target = "RGB" if channels == 3 else "L"
    expected = np.array(red.convert(mode).convert(target)).reshape(16, 32, channels)
    far = (read - torch.from_numpy(expected).permute(2, 0, 1)).abs()[:, :, [4, -4]]  # from the edge
    assert far.max() <= 8


def test_transparency_and_orientation_count_nothing(tmp_path):
    pixels = noise(6, 8, 4)
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(
        read_picture(tmp_path / "a.png", 3).permute(1, 2, 0), torch.from_numpy(pixels[..., :3])
    )
    palette = Image.fromarray(pixels[..., :3]).quantize(16)
    palette.save(tmp_path / "b.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_picture(tmp_path / "b.png", 3)
    assert torch.equal(read.permute(1, 2, 0), torch.from_numpy(np.array(palette.convert("RGB"))))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(tmp_path / "c.jpg", exif=turned)
    assert read_picture(tmp_path / "c.jpg", 3).shape == (3, 6, 8)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_several_frames_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(noise(8, 8, 3, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(
        DataError, match=r"has several frames or pages, but must have one; save the one you mean"
    ):
        read_picture(tmp_path / f"a.{suffix}", 3)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["png", "jpg", "bmp", "webp", "tif", "ppm"]),
    st.integers(0, 10**4),
    st.integers(0, 255),
)
def test_a_broken_picture_is_read_or_refused_in_one_sentence(tmp_path_factory, suffix, place, value):
    path = tmp_path_factory.getbasetemp() / f"broken.{suffix}"
    Image.fromarray(noise(8, 8, 3)).save(path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data[: len(data) - place % 7])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's of odd tags
        try:
            read = read_picture(path, 3, 8)
        except DataError as error:
            said = str(error)
        else:
            said = ""
            assert read.shape == (3, 8, 8)
    assert "\n" not in said
    assert not said or str(path) in said


def test_a_size_is_height_by_width(tmp_path):
    Image.fromarray(noise(30, 20, 3)).save(tmp_path / "a.png")
    assert picture_size(tmp_path / "a.png") == (30, 20)
    assert read_picture(tmp_path / "a.png", 3, (15, 12)).shape == (3, 15, 12)
    assert read_picture(tmp_path / "a.png", 1, 9).shape == (1, 9, 9)
    (tmp_path / "b.png").write_bytes(b"")
    for read in (picture_size, lambda path: read_picture(path, 3)):
        with pytest.raises(DataError, match=r"Cannot read the picture .*b\.png"):
            read(tmp_path / "b.png")


# --- folders ---


def test_a_folder_of_tiffs_is_read(tmp_path):
    write(tmp_path / "clean", "ab", suffix="TIFF")
    clean, names = read_clean(tmp_path / "clean")
    assert names == ("a", "b")
    assert clean.labels.tolist() == [0, 0, 1, 1]


def test_an_empty_class_folder_does_not_shift_the_labels(tmp_path):
    write(tmp_path, "abd")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.gif").write_bytes(b"x")
    with pytest.raises(DataError, match=r"folders without a picture \('c'\) beside 3 class folders"):
        read_clean(tmp_path)
    (tmp_path / "c" / "1.gif").unlink()
    (tmp_path / "c").rename(tmp_path / ".c")  # hidden: no class
    assert read_clean(tmp_path)[1] == tuple("abd")


def test_strays_and_hidden_folders_are_named(tmp_path):
    write(tmp_path, ["a", "b", ".thumbnails"])
    Image.fromarray(noise(5, 5)).save(tmp_path / "cover.png")
    Image.fromarray(noise(5, 5)).save(tmp_path / "x.png")
    (tmp_path / "a" / "._0.png").write_bytes(b"AppleDouble")
    with pytest.warns(DataWarning) as caught:
        clean, names = read_clean(tmp_path)
    assert names == ("a", "b")
    assert len(clean.images) == 4
    said = [str(one.message) for one in caught]
    assert any("1 hidden folders with pictures, such as '.thumbnails'" in one for one in said)
    assert any("2 pictures beside its class folders, such as 'cover.png'" in one for one in said)
    assert {one.filename for one in caught} == {__file__}


def test_pictures_in_no_folders_may_stand_beside_empty_ones(tmp_path):
    write(tmp_path, ["a"])
    (tmp_path / "flat" / "output").mkdir(parents=True)
    for path in (tmp_path / "a").iterdir():
        path.rename(tmp_path / "flat" / path.name)
    clean, names = read_clean(tmp_path / "flat")
    assert names is None
    assert clean.labels is None
    assert len(clean.images) == 2


def test_monotony_is_warned_of(tmp_path):
    write(tmp_path / "one", "abc", each=3)
    for value, path in enumerate((tmp_path / "one" / "b").iterdir()):
        Image.new("RGB", (8, 8), (value, 0, 9)).save(path)
    with pytest.warns(DataWarning, match=r"1 class folders of .*\('b'\) have one colour each"):
        read_clean(tmp_path / "one")
    write(tmp_path / "two", "ab", each=2)
    (tmp_path / "two" / "a" / "1.png").write_bytes((tmp_path / "two" / "a" / "0.png").read_bytes())
    with pytest.warns(DataWarning, match=r"1 class folders of .*\('a'\) are the same"):
        read_clean(tmp_path / "two")
    write(tmp_path / "three", "ab", each=1)
    (tmp_path / "three" / "b" / "0.png").write_bytes((tmp_path / "three" / "a" / "0.png").read_bytes())
    with pytest.warns(DataWarning, match="All 2 pictures in .* are the same"):
        read_clean(tmp_path / "three")
    with pytest.warns(DataWarning, match=r"All pictures in \S*/one/b have one colour each"):
        read_clean(tmp_path / "one" / "b")
    write(tmp_path / "fine", "ab", each=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_clean(tmp_path / "fine")


def test_the_command_shows_warnings_of_pictures_and_leaves_others(capsys):
    def both():
        with shown_warnings():
            warnings.warn("pictures [bold]such", DataWarning, stacklevel=1)
            warnings.warn("other", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="other") as caught:
        both()
    assert [str(one.message) for one in caught] == ["other"]
    assert capsys.readouterr().out == "warning: pictures [bold]such\n"


# --- classes and channels, as the weights have them ---


@pytest.mark.parametrize("names", ["abc", "abcde"])
def test_class_folders_are_counted_before_the_net_is_built(home, names):
    write(home / "other", names)
    (home / "clean").rename(home / "old")
    (home / "other").rename(home / "clean")
    (home / "own.py").write_text("def make(num_classes):\n    raise RuntimeError('built')\n")
    with pytest.raises(
        DataError, match=r"end in 4 classes \('8\.weight'\), but .*--classes 4"
    ) as caught:
        suspect(home)
    assert f"has {len(names)} class folders ('a', 'b', 'c'" in str(caught.value)
    (home / "own.py").write_text(FACTORY)
    read = suspect(home, classes=4)
    assert read.clean.labels is None
    assert len(read.classes) == 4
    with pytest.raises(VictimError, match="do not fit.*size mismatch"):
        suspect(home, classes=5)


def test_pictures_in_no_folders_ask_for_classes_and_say_what_the_weights_look_like(home):
    flat = home / "clean" / "a"
    with pytest.raises(SettingError, match=r"give --classes \(the weights look like 4\)"):
        load_suspect(home / "w.pth.tar", f"{home / 'own.py'}:make", flat)


def test_grey_weights_get_grey_pictures_and_it_is_told(home):
    save_file(net(4, channels=1).state_dict(), home / "grey")
    read = suspect(home, weights="grey")
    assert read.clean.images.shape == (8, 1, 8, 8)
    assert read.notes == (
        f"Pictures are read as grey ones, since the first convolution in {home / 'grey'}, '0.weight', "
        "takes 1 channel.",
    )
    assert suspect(home, weights="grey", channels=1).notes == ()
    with pytest.raises(SettingError, match="shall have 3 channels.*takes 1; give --channels 1"):
        suspect(home, weights="grey", channels=3)
    with pytest.raises(SettingError, match="shall have 1 channels.*takes 3; give --channels 3"):
        suspect(home, channels=1)
    assert suspect(home).notes == ()


def test_which_weights_were_taken_is_among_the_notes(home):
    torch.save({"model": net(4).state_dict(), "ema": net(4).double().state_dict()}, home / "same")
    assert suspect(home, weights="same").notes == ()
    other = {name: value + 1 for name, value in net(4).state_dict().items()}
    torch.save({"model": net(4).state_dict(), "ema": other}, home / "two")
    (note,) = suspect(home, weights="two").notes
    assert "under `model`; those under `ema` fit as well" in note


# --- images that are no squares ---


@pytest.mark.parametrize(
    ("size", "asked", "shape", "factory_gets"),
    [
        ((12, 20), None, (12, 20), (12, 20)),
        ((8, 8), None, (8, 8), 8),
        ((12, 20), 16, (16, 16), 16),
        ((12, 20), (6, 10), (6, 10), (6, 10)),
        ((12, 20), (6, 6), (6, 6), 6),
    ],
)
def test_a_factory_gets_one_side_of_a_square_and_both_of_others(home, size, asked, shape, factory_gets):
    write(home / "oblong", "abcd", size=size)
    (home / "clean").rename(home / "old")
    (home / "oblong").rename(home / "clean")
    (home / "sized.py").write_text(
        FACTORY + f"\n\ndef make(num_classes, image_size, old=make):\n"
        f"    assert image_size == {factory_gets!r}, image_size\n    return old(num_classes)\n"
    )
    (home / "own.py").write_text((home / "sized.py").read_text())
    assert suspect(home, image_size=asked).clean.images.shape[2:] == shape


def test_several_sizes_are_refused(home):
    Image.fromarray(noise(12, 9, 3)).save(home / "clean" / "a" / "odd.png")
    with pytest.raises(DataError, match="have 2 sizes, such as 8x8 and 9x12; give an image size"):
        suspect(home)
    assert suspect(home, image_size=(9, 7)).clean.images.shape[2:] == (9, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("32", 32), ("48x32", (48, 32)), (" 7x7 ", (7, 7)), ("1024x1", (1024, 1))],
)
def test_sizes_as_they_are_typed(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "32x", "x32", "32x0", "-3", "1025", "3x4x5", "a", "1e2", "٣٢", "9" * 99]
)
def test_sizes_that_are_none(text):
    with pytest.raises(SettingError, match="--image-size must be pixels, such as 32, or 48x32"):
        size(text)


def purify(home, *words):
    settings = PurifyConfig.profile("fast", initialise_rounds=1, minimise_rounds=1, select_rounds=1)
    import yaml

    (home / "best.yaml").write_text(yaml.safe_dump({"purify": settings.model_dump(), "seed": 0}))
    options = {
        "--model": home / "w.pth.tar",
        "--net": f"{home / 'own.py'}:make",
        "--clean": home / "clean",
    }
    options |= {"--config": home / "best.yaml", "--out": home / "cleaned"}
    flat = [str(part) for pair in options.items() for part in pair]
    return CliRunner().invoke(app, ["purify", *flat, *map(str, words)])


@pytest.mark.parametrize("size", [(12, 20), (20, 12)])
def test_oblong_pictures_go_through_to_the_cleaned_model_and_its_export(home, size):
    write(home / "oblong", "abcd", size=size)
    done = purify(home, "--clean", home / "oblong")
    assert done.exit_code == 0, done.output
    read = load_cleaned(home / "cleaned", own_code=True)
    assert read.shape == (3, *size)
    assert read.model(torch.rand(2, *read.shape)).shape == (2, 4)
    words = ["export", home / "cleaned", home / "m.pt2", "--images", home / "oblong", "--trust-code"]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output


def test_a_size_on_the_command_line_may_be_oblong(home):
    done = purify(home, "--image-size", "6x10")
    assert done.exit_code == 0, done.output
    assert load_cleaned(home / "cleaned", own_code=True).shape == (3, 6, 10)


def test_the_command_tells_what_was_decided(home):
    torch.save({"ema": net(4, channels=1).state_dict()}, home / "w.pth.tar")
    Image.fromarray(noise(5, 5)).save(home / "clean" / "cover.png")
    done = purify(home)
    assert done.exit_code == 0, done.output
    assert "warning: " in done.output
    assert "such as 'cover.png'" in done.output
    assert "note: Pictures are read as grey ones" in done.output
    assert "are those under `ema`." in done.output


@pytest.mark.parametrize(("word", "says"), [("2", "--channels must be 3, or 1"), ("1", "takes 3")])
def test_wrong_channels_on_the_command_line_write_nothing(home, word, says):
    done = purify(home, "--channels", word)
    assert isinstance(done.exception, SettingError)
    assert says in str(done.exception)
    assert not (home / "cleaned").exists()


def test_an_oblong_model_is_audited(home):
    write(home / "oblong", "abcd", size=(12, 20), each=3)
    model = net(4).eval()
    with torch.no_grad():  # so that it answers with several classes
        answers = model(read_clean(home / "oblong")[0].floats())
        model[-1].bias -= answers.mean(0)
    torch.save(model.state_dict(), home / "w.pth.tar")
    words = ["audit", "--model", home / "w.pth.tar", "--net", f"{home / 'own.py'}:make", "--no-masks"]
    words += ["--clean", home / "oblong", "--out", home / "report"]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output


def test_nets_of_our_own_take_oblong_images_but_for_transformers(home):
    from bimask.nets import build_net

    shape = {"in_channels": 3, "num_classes": 4, "image_size": (24, 40)}
    shape |= {"mean": [0.0] * 3, "std": [1.0] * 3, "width": 4}
    for name in ("small_resnet", "mobilenet_v3_large", "vgg19_bn"):
        assert build_net(name, **shape).eval()(torch.rand(2, 3, 24, 40)).shape == (2, 4)
    with pytest.raises(SettingError, match="vit_tiny takes square images alone, got 24x40"):
        build_net("vit_tiny", **shape | {"width": 12})
