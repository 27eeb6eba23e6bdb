"""Files of weights as they come: any suffix, any wrapping, any prefix; none runs anything."""

import argparse
import contextlib
import json
import pickle
import random
import struct
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bimask.errors import VictimError
from bimask.files import plain_pickles
from bimask.files.plain_pickles import load_plain
from bimask.files.safe import form_of
from bimask.files.stand_ins import StoredArray
from bimask.nets.weights import (
    StateDict,
    input_channels_of,
    last_layers_of,
    load_weights,
    read_weights,
    state_dicts,
)


class Mine(nn.Module):
    """A pickle of it is code."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, classes)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


class Settings:
    def __init__(self):
        self.lr = 0.1


def fresh(seed=0, **settings):
    torch.manual_seed(seed)
    return Mine(**settings)


def state_of(seed=0, **settings):
    return fresh(seed, **settings).state_dict()


def same(net, state):
    return all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def plain_pickle(content, path, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def before_zip(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "zip": torch.save,
    "before zip": before_zip,
    "pickle": plain_pickle,
    "safetensors": lambda state, path: save_file(
        {name: value.contiguous() for name, value in state.items()}, path
    ),
}


def optimiser_of(net):
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    adam = torch.optim.Adam(net.parameters())
    adam.step()
    return adam.state_dict()


def lightning(state):
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{k}": v for k, v in state.items()} | {"criterion.weight": torch.ones(4)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": [optimiser_of(fresh(1))],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace(data=Path("/data"), bits=[1, 2])},
    }


def tape(state):
    """As a hand-written loop saves it."""
    return {
        "epoch": 9,
        "arch": "mine",
        "net": {f"module.{name}": value for name, value in state.items()},
        "optimizer": optimiser_of(fresh(1)),
        "best": np.float64(0.93),
        "args": argparse.Namespace(seed=1),
        "rng": (np.random.RandomState(0).get_state(), random.Random(0).getstate()),
        "milestones": Counter({30: 1}),
    }


WRAPPINGS = {
    "bare": dict,
    "ordered": lambda state: state,
    "list": lambda state: [state, {"epoch": 1}],
    "deep": lambda state: {"checkpoint": {"epoch": 1, "inner": {"weights": state}}},
    "lightning": lightning,
    "tape": tape,
    "averaged": lambda state: {
        "n_averaged": torch.tensor(5),
        **{f"module.{name}": value for name, value in state.items()},
    },
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": v for name, v in state.items()}},
    "compiled in parallel": lambda state: {f"module._orig_mod.{n}": v for n, v in state.items()},
    "compiled within": lambda state: {
        n.replace("conv.", "conv._orig_mod."): v for n, v in state.items()
    },
    "under its normalisation": lambda state: {
        "state_dict": {f"net.network.{name}": value for name, value in state.items()}
        | {"mean": torch.zeros(3), "std": torch.ones(3)}
    },
    "old": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
    "only a prefix of its own": lambda state: {f"anything.at.all.{n}": v for n, v in state.items()},
    "beside losses": lambda state: {"losses": {"train": torch.rand(9999)}, "params": state},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt"])
@pytest.mark.parametrize("writer", ["zip", "before zip", "pickle"])
def test_a_state_dict_is_found_in_any_wrapping(tmp_path, wrapping, suffix, writer):
    state, path = state_of(), tmp_path / f"file{suffix}"
    WRITERS[writer](WRAPPINGS[wrapping](state), path)
    net = fresh(1)
    load_weights(net, path)
    if wrapping == "old":
        state = state | {"norm.num_batches_tracked": torch.tensor(0)}
    assert same(net, state)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "name", ["w.safetensors", "w.pt", "w.pth.tar", "w.ckpt", "w.pkl", "w.bin", "w"]
)
def test_the_name_of_a_file_counts_nothing(tmp_path, writer, name):
    state = state_of()
    WRITERS[writer](state, tmp_path / name)
    assert form_of(tmp_path / name) == writer
    read = read_weights(tmp_path / name)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("names", [1, 2, 3, 4, 5, 6, 7, 30])
def test_a_header_of_any_length_is_safetensors(tmp_path, names):
    """The first eight bytes are a length, which may begin as a pickle does: 0x0280 is 640."""
    for length in range(640 - 80, 640 + 800, 8):
        header = {f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(names)}
        text = json.dumps(header).encode()
        if len(text) > length:
            continue
        (tmp_path / "w").write_bytes(struct.pack("<Q", length) + text.ljust(length))
        assert form_of(tmp_path / "w") == "safetensors"
        assert len(read_weights(tmp_path / "w")) == names


PREFIXES = st.lists(
    st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "network.", "backbone."]), max_size=4
)
KEYS = st.lists(
    st.sampled_from(["net", "model", "state_dict", "model_state", "weights", "ema", "classifier", "x"]),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(prefixes=PREFIXES, keys=KEYS, beside=st.booleans())
def test_any_prefixes_under_any_keys_come_off(tmp_path_factory, prefixes, keys, beside):
    state, path = state_of(), tmp_path_factory.getbasetemp() / "any"
    content = {"".join(prefixes) + name: value for name, value in state.items()}
    for key in keys:
        content = {key: content} | ({"epoch": 1, "optimizer": {"param_groups": []}} if beside else {})
    torch.save(content, path)
    net = fresh(1)
    load_weights(net, path)
    assert same(net, state)


def test_a_net_whose_own_names_look_like_wrappers_is_let_be(tmp_path):
    net, other = (
        nn.Sequential(OrderedDict(module=fresh(seed), model=nn.Conv2d(1, 1, 1))) for seed in (0, 1)
    )
    torch.save(nn.DataParallel(net).state_dict(), tmp_path / "w")
    assert load_weights(other, tmp_path / "w") == ""
    assert same(other, net.state_dict())


# --- which of several ---


def test_the_plain_name_is_taken_and_said(tmp_path):
    theirs, average = state_of(), state_of(2)
    torch.save({"ema": average, "model": theirs}, tmp_path / "w")
    net = fresh(1)
    said = load_weights(net, tmp_path / "w")
    assert same(net, theirs)
    assert "under `model`" in said
    assert "under `ema` fit as well and are not used" in said
    torch.save({"model": average, "ema": average}, tmp_path / "w")
    assert load_weights(net, tmp_path / "w") == ""  # the same: no question


def test_an_average_alone_is_taken_and_said(tmp_path):
    torch.save({"ema": state_of(2)}, tmp_path / "w")
    net = fresh(1)
    assert "are those under `ema`." in load_weights(net, tmp_path / "w")
    assert same(net, state_of(2))


def test_what_is_not_used_is_said(tmp_path):
    state = {f"model.{name}": value for name, value in state_of().items()}
    torch.save({"state_dict": state | {"mean": torch.zeros(3)}}, tmp_path / "w")
    assert "1 tensors beside them are not used ('mean')" in load_weights(fresh(1), tmp_path / "w")


@pytest.mark.parametrize(
    "content",
    [
        {"teacher": state_of(), "student": state_of(2)},
        {"model": state_of(), "net": state_of(2)},
        {
            f"{part}.{name}": v
            for part, seed in (("a", 0), ("b", 2))
            for name, v in state_of(seed).items()
        },
    ],
)
def test_two_that_fit_and_differ_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w")
    with pytest.raises(
        VictimError, match="hold 2 state dicts that fit the net and differ .*save the one"
    ):
        load_weights(fresh(1), tmp_path / "w")


def test_the_net_decides_before_size_does(tmp_path):
    torch.save({"teacher": {"w": torch.zeros(10**5)}, "model": state_of()}, tmp_path / "w")
    net = fresh(1)
    load_weights(net, tmp_path / "w")
    assert same(net, state_of())
    assert read_weights(tmp_path / "w").keys() == {"w"}


def test_an_optimisers_state_is_never_taken(tmp_path):
    net = fresh()
    torch.save({"optimizer": optimiser_of(net), "model": net.state_dict()}, tmp_path / "w")
    assert [one.keys for one in state_dicts(tmp_path / "w")] == [("model",)]
    torch.save({"optimizer": optimiser_of(net)}, tmp_path / "w")
    with pytest.raises(VictimError, match="must hold a state dict"):
        read_weights(tmp_path / "w")


def test_moments_under_the_nets_names_are_no_plain_place(tmp_path):
    torch.save({"exp_avg": state_of(3), "exp_avg_sq": state_of(4), "net": state_of()}, tmp_path / "w")
    net = fresh(1)
    load_weights(net, tmp_path / "w")
    assert same(net, state_of())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {n: v for n, v in s.items() if n != "head.bias"}, r"Missing.*head\.bias"),
        (lambda s: {f"model.{n}": v for n, v in s.items() if n != "head.bias"}, r"Missing.*head\.bias"),
        (lambda s: s | {"more.weight": torch.ones(1)}, r"Unexpected.*more\.weight"),
        (lambda s: s | {"head.bias": torch.ones(5)}, r"size mismatch for head\.bias"),
        (lambda s: {"x": torch.ones(1)}, "share no name with it, theirs are such as 'x', the net's"),
    ],
)
@pytest.mark.parametrize("key", [None, "model"])
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, words, key):
    state = change(dict(state_of()))
    torch.save({key: state} if key else state, tmp_path / "w")
    with pytest.raises(VictimError, match=f"do not fit the net.*{words}") as caught:
        load_weights(fresh(1), tmp_path / "w")
    assert "\n" not in str(caught.value)


# --- what is code ---


def program(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        torch.jit.save(torch.jit.trace(fresh().eval(), torch.rand(1, 3, 8, 8)), path)


def exported(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(fresh().eval(), (torch.rand(1, 3, 8, 8),)), f"{path}.pt2")
    Path(f"{path}.pt2").rename(path)


def arrays(path):
    np.savez(path, **{name: value.numpy() for name, value in state_of().items()})
    Path(f"{path}.npz").rename(path)


CODE = {
    "module": lambda path: torch.save(fresh(), path),
    "module before zip": lambda path: before_zip(fresh(), path),
    "module in a pickle": lambda path: plain_pickle(fresh(), path),
    "module under a key": lambda path: torch.save({"epoch": 3, "my net": fresh()}, path),
    "module under a key before zip": lambda path: before_zip({"my net": fresh(), "epoch": 3}, path),
    "module under a key in a pickle": lambda path: plain_pickle({"epoch": 3, "my net": fresh()}, path),
    "settings": lambda path: torch.save({"config": Settings(), "state_dict": state_of()}, path),
    "settings before zip": lambda path: before_zip({"config": Settings(), "net": state_of()}, path),
    "settings in a pickle": lambda path: plain_pickle({"c": Settings(), "model": state_of()}, path),
    "TorchScript": program,
    "torch.export": exported,
    "numpy": arrays,
}


@pytest.mark.parametrize("kind", CODE)
def test_code_is_refused_with_a_line_that_works(tmp_path, kind):
    """The line in the message is run, as its reader would where the classes are at hand."""
    path = tmp_path / "file.pth"
    CODE[kind](path)
    with pytest.raises(VictimError, match="is refused.*nothing was run") as caught:
        load_weights(fresh(1), path)
    said = str(caught.value)
    assert "\n" not in said
    assert ("whole pickled module" in said) == ("module" in kind)
    line = said.split("`")[1]
    assert line.endswith(", 'file-weights.pt')")
    line = line.replace("'file-weights.pt'", repr(str(tmp_path / "new")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        exec(line, {"torch": torch, "pickle": pickle, "numpy": np})
    net = fresh(1)
    load_weights(net, tmp_path / "new")
    assert same(net, state_of())


class Calls:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("write", [torch.save, before_zip, plain_pickle])
@pytest.mark.parametrize("call", [(open, "RUN", "w"), (eval, "1"), (subprocess.call, "x"), (sys.exit,)])
def test_what_does_harm_is_never_advised_to_be_opened(tmp_path, monkeypatch, write, call):
    monkeypatch.chdir(tmp_path)
    write({"model": state_of(), "x": Calls(*call)}, tmp_path / "w")
    with pytest.raises(VictimError, match="asks for .* do not open it with other programs") as caught:
        read_weights(tmp_path / "w")
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "RUN").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x1f\x8b\x08\0", "gzip; unpack"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar archive; unpack"),
        (b"{}", "no whole file of torch.save"),
        (struct.pack("<Q", 50) + b"{", "cannot be read as plain tensors"),
        (b"\x80\x04\x95", "no whole pickle of tensors"),
        (b"\x80\x04.", "no whole pickle of tensors"),
        (b"\x80\x02]q\0h\0a.", "hold list"),
    ],
)
def test_other_files_get_one_sentence(tmp_path, data, words):
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(VictimError, match=words) as caught:
        read_weights(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_containers_in_circles_are_gone_through_once(tmp_path):
    around = {"model": state_of()}
    around["self"] = around
    around["more"] = [around, {"again": around["model"]}]
    plain_pickle(around, tmp_path / "w")
    assert [one.keys for one in state_dicts(tmp_path / "w")] == [("model",)]


# --- plain pickles ---


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_of_tensors_and_arrays_is_read(protocol):
    tensors = {
        "float": torch.randn(2, 3),
        "half": torch.ones(2).half(),
        "bfloat": torch.ones(2).bfloat16(),
        "turned": torch.randn(4, 5).t(),
        "part": torch.arange(10)[3:7],
        "one": torch.tensor(3),
        "none": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    beside = {"a": 1, "b": [1.5, None, True, "x", b"yy", (1, 2, 3, 4)], "array": np.eye(3, dtype="f4")}
    read = load_plain(pickle.dumps(tensors | beside, protocol=protocol))
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value.detach())
    assert read["b"] == beside["b"]
    assert isinstance(read["array"], StoredArray)
    assert np.array_equal(read["array"].value, beside["array"])


def test_arrays_under_names_are_weights(tmp_path):
    state = state_of()
    plain_pickle({"model": {name: value.numpy() for name, value in state.items()}}, tmp_path / "w.pkl")
    net = fresh(1)
    load_weights(net, tmp_path / "w.pkl")
    assert same(net, state)


def tensor_with(**changes):
    """The pickle of a tensor whose parts are others."""
    parts = {"offset": 0, "size": (2, 3), "stride": (3, 1)} | changes
    storage = torch.arange(6.0)._typed_storage()
    arguments = (storage, parts["offset"], parts["size"], parts["stride"], False, OrderedDict())
    return pickle.dumps({"x": Calls(torch._utils._rebuild_tensor_v2, *arguments)})


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (2**40, 3)},
        {"offset": 5},
        {"offset": -1},
        {"stride": (-1, 1)},
        {"size": "ab"},
        {"stride": (2**62, 2**62)},
        {"size": (3,)},
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, changes):
    (tmp_path / "w").write_bytes(tensor_with())
    assert read_weights(tmp_path / "w")["x"].shape == (2, 3)
    (tmp_path / "w").write_bytes(tensor_with(**changes))
    with pytest.raises(VictimError):
        read_weights(tmp_path / "w")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93}b.",  # sets state on a class
        b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93)R.",  # calls what is only held
        b"\x80\x04}((((tttt1K\x01s.",  # a key that is a nest of tuples
        b"\x80\x02}" + b"(i__main__\nCalls\n.",
        b"\x80\x02U\x01xQ.",  # a persistent id
        b"\x80\x02\x82\x01.",  # a name of copyreg
        b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",  # a byte array of a petabyte
    ],
)
def test_operations_that_tensors_do_not_need_are_refused(tmp_path, data):
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(VictimError) as caught:
        read_weights(tmp_path / "w")
    assert "\n" not in str(caught.value)


def test_operations_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_pickles, "MAX_OPERATIONS", 1000)
    (tmp_path / "w").write_bytes(b"\x80\x02]" + b"}0" * 600 + b".")
    with pytest.raises(VictimError, match="has more than 1000 operations"):
        read_weights(tmp_path / "w")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_byte_that_is_another_is_read_or_refused(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "flipped"
    data = bytearray(pickle.dumps({"model": {"a": torch.ones(2), "b": np.ones(2)}, "epoch": 3}))
    data[2 + place % (len(data) - 2)] = value
    path.write_bytes(data)
    with warnings.catch_warnings(), contextlib.suppress(VictimError):
        warnings.simplefilter("error")
        read_weights(path)


# --- what shapes say before there is a net ---


def shapes(**sizes):
    tensors = {name.replace("_", "."): torch.zeros(size) for name, size in sizes.items()}
    return StateDict((), tensors)


@pytest.mark.parametrize(
    ("state", "rows"),
    [
        (shapes(conv_weight=(8, 3, 3, 3), head_weight=(10, 8)), {10}),
        (shapes(fc1_weight=(120, 400), fc2_weight=(84, 120), fc3_weight=(7, 84)), {7}),
        (shapes(a_weight=(4096, 512), b_weight=(4096, 4096), c_weight=(43, 4096)), {43}),
        (shapes(se1_weight=(4, 16), se2_weight=(16, 4), head_weight=(9, 16)), {9}),
        (shapes(head_weight=(5, 5)), {5}),
        (shapes(conv_weight=(8, 3, 3, 3)), set()),
        (shapes(fc_weight=(10, 50), where_weight=(6, 32)), {10, 6}),
    ],
)
def test_the_last_layer_is_known_by_shapes(state, rows):
    assert set(last_layers_of(state).values()) == rows
    if len(rows) > 1:  # and no order says which
        assert last_layers_of(StateDict((), state.tensors, ordered=False)) == {}


@pytest.mark.parametrize(
    ("name", "classes"), [("resnet18", 7), ("vgg11", 9), ("mobilenet_v3_small", 5), ("vit_b_32", 6)]
)
def test_the_last_layer_and_channels_of_published_nets_are_known(tmp_path, name, classes):
    from torchvision.models import get_model

    with torch.device("meta"):
        state = get_model(name, num_classes=classes).state_dict()
    found = StateDict((), state)
    assert set(last_layers_of(found).values()) == {classes} or name == "vit_b_32"
    assert classes in last_layers_of(found).values()
    assert input_channels_of(found)[1] == 3


@pytest.mark.parametrize(
    ("state", "channels"),
    [
        (shapes(a_weight=(8, 3, 3, 3), b_weight=(8, 1, 3, 3)), 3),
        (shapes(a_weight=(8, 1, 3, 3), b_weight=(8, 8, 3, 3)), 1),
        (shapes(a_weight=(3, 1, 3, 3), b_weight=(8, 3, 1, 1)), 3),
        (shapes(a_weight=(8, 4, 3, 3)), None),
        (shapes(a_weight=(8, 768)), None),
    ],
)
def test_the_first_convolutions_channels_are_known_by_shapes(state, channels):
    found = input_channels_of(state)
    assert (found and found[1]) == channels
