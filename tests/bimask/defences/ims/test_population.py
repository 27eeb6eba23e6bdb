import itertools
import math
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bimask.defences.ims import population
from bimask.defences.ims.config import ENGINE, PurifyConfig
from bimask.defences.ims.member import Member
from bimask.defences.ims.population import PopulationPurifier
from bimask.errors import NonFiniteError, SettingError
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking import batched_forward as blocks
from bimask.masking import frozen
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet

SHORT = {
    "initialise_rounds": 2,
    "minimise_rounds": 3,
    "select_rounds": 2,
    "inner_steps": 2,
    "step_size": None,
    "budget": 0.2,
    "patience": None,
}
NO_ROUNDS = {"initialise_rounds": 0, "minimise_rounds": 0, "select_rounds": 0}
# Members that differ in all that members may differ in.
MIX = [
    {},
    {"inner_steps": 4, "budget": 0.05, "sharpness": 5, "weight_decay": 0.2, "mask_lr": 0.1},
    {"inner_steps": 3, "warm_start": 0.5, "initial_selection": 0.8, "initial_mask": 0.7},
    {"initialise_rounds": 0, "select_rounds": 4, "mask_lr_schedule": "cosine", "keep": "best"},
    {"minimise_rounds": 0, "warm_start": 1, "step_size": 0.01, "selection_weight": 1},
    {"inverse_weight": 0, "learn_selection": False, "initial_selection": 0},
    {"batch_size": 15, "warm_start": 0.5, "keep": "best", "mask_lr": 0.3},
    {"batch_size": 15, "warm_start": 1, "inner_steps": 3, "inner_weight_decay": 0.5},
    {"batch_size": 20, "early_batch_size": 10, "inner_steps": 5, "inner_steps_at_start": 1},
    {"inner_optimizer": "sign", "norm": "l2", "budget": 1.0, "inner_steps": 3},
    {"inner_optimizer": "sign", "inner_momentum": 0.9, "clip_images": True, "loss_form": "log"},
    {"inner_optimizer": "sign", "reuse_last_pass": True, "inner_steps": 3, "batch_size": 20},
    {"norm": "l2", "reuse_last_pass": True, "step_size": 0.02, "clip_images": True},
    {"patience": 0, "minimise_rounds": 9, "threshold": 0.5},
    {"mask_estimator": "straight_through", "initial_selection": 0.8, "initial_mask": 0.6},
    {"shift": 1, "flip": True, "batch_size": 20, "warm_start": 0.5},
    {"universal": 0.5, "warm_start": 0.5, "clip_images": True, "budget": 0.8},
    {"universal": 1, "batch_size": 15, "warm_start": 1, "inner_optimizer": "sign", "inner_steps": 3},
    {"universal": 0.3, "inner_steps": 3, "inner_weight_decay": 0.5, "clean_weight": 3},
    {"universal": 0.5, "universal_budget": 0.05, "budget": 0.4, "inner_optimizer": "sign"},
    {"class_triggers": 0.4, "batch_size": 20, "warm_start": 0.5},
    {"class_triggers": 0.5, "reuse_last_pass": True, "inner_optimizer": "sign", "shift": 1},
    {"keep": "average", "select_rounds": 5, "clean_weight": 0.5, "mask_lr": 0.1},
    NO_ROUNDS,
]
ENGINES = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16", "images_per_pass": "device"},
    "contiguous": {"memory_format": "contiguous", "fold_batch_norm": False, "images_per_pass": 50},
}


POOLS = {}


@pytest.fixture(autouse=True)
def _searched_once(monkeypatch):
    """The same model and images give the same triggers: one search is enough for all tests."""
    search = TriggerPool.search

    def known(model, images):
        key = tuple(value.numpy().tobytes() for value in (images, *model.state_dict().values()))
        if key not in POOLS:
            POOLS[key] = search(model, images)
        return POOLS[key]

    monkeypatch.setattr(TriggerPool, "search", known)


def short(**changes):
    return PurifyConfig(**(SHORT | changes))


def generators(configs):
    return [torch.Generator().manual_seed(number) for number in range(len(configs))]


def together(model, images, configs, on_round=None):
    """All in one population; what each round told of each member comes along."""
    told = [[] for _ in configs]

    def heard(member, log, masks):
        told[member].append((log, masks.mask.tolist(), masks.selection.tolist()))
        return on_round is not None and on_round(member, log)

    purifier = PopulationPurifier(
        model, images, configs, generators=generators(configs), on_round=heard
    )
    return purifier.run(), told


def alone(model, images, configs, number, on_round=None):
    """One of them in a population of its own, with the generator it has among the others."""
    told = []

    def heard(_member, log, masks):
        told.append((log, masks.mask.tolist(), masks.selection.tolist()))
        return on_round is not None and on_round(number, log)

    purifier = PopulationPurifier(
        model,
        images,
        [configs[number]],
        generators=[generators(configs)[number]],
        on_round=heard,
    )
    return purifier.run()[0], told


def bits_of(result):
    return result.rounds, {name: value.tolist() for name, value in result.masks.tensors().items()}


def same_as_alone(model, images, configs, numbers=None, on_round=None):
    results, told = together(model, images, configs, on_round)
    for number in range(len(configs)) if numbers is None else numbers:
        result, told_alone = alone(model, images, configs, number, on_round)
        assert bits_of(results[number]) == bits_of(result), configs[number]
        assert told[number] == told_alone
    return results


# --- a member ends with the bits of a run alone ---


@pytest.mark.parametrize("engine", ENGINES)
def test_members_of_all_kinds_end_with_the_bits_of_a_run_alone(tiny_net, pictures, engine):
    configs = [short(**ENGINES[engine] | changes) for changes in MIX]
    results = same_as_alone(tiny_net, pictures, configs)
    lengths = [len(result.rounds) for result in results]
    assert lengths[:2] == [7, 7]
    assert lengths[-1] == 0
    assert 3 <= lengths[-3] < 13
    assert len({str(bits_of(result)) for result in results}) == len(MIX)


ONLY = {
    "sharpness": 3,
    "mask_estimator": "straight_through",
    "initial_mask": 0.6,
    "initial_selection": 0.5,
    "mask_lr": 0.2,
    "mask_lr_schedule": "cosine",
    "weight_decay": 0.5,
    "selection_weight": 1,
    "patience": 0,
    "keep": "best",
    "batch_size": 20,
    "early_batch_size": 20,
    "loss_form": "log",
    "inner_steps": 4,
    "inner_steps_at_start": 1,
    "step_size": 0.15,
    "budget": 0.05,
    "norm": "l2",
    "inner_optimizer": "adamw",
    "inner_momentum": 0.9,
    "clip_images": True,
    "warm_start": 0.5,
    "reuse_last_pass": True,
    "shift": 2,
    "flip": True,
}


@pytest.mark.parametrize("name", ONLY)
def test_members_that_differ_in_one_setting_end_with_the_bits_of_runs_alone(tiny_net, pictures, name):
    usual = {"inner_optimizer": "sign", "initial_selection": 0.8, "images_per_pass": "device"}
    usual |= {"initialise_rounds": 1, "minimise_rounds": 3, "threshold": 0.5}
    configs = [short(**usual), short(**usual | {name: ONLY[name]})]
    results = same_as_alone(tiny_net, pictures, configs)
    if name != "keep":
        assert bits_of(results[0]) != bits_of(results[1])


def test_small_passes_change_nothing_of_that(tiny_net, pictures):
    same_as_alone(tiny_net, pictures, [short(images_per_pass=5, **changes) for changes in MIX[1:9:3]])


@pytest.mark.parametrize("shape", [(5, 7, 9), (3, 24, 8), (1, 17, 11)], ids=str)
def test_odd_shapes_change_nothing_of_that(shape):
    channels, n, size = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(channels, 5, 3, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 7, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(7, 3),
        ).eval()
        images = torch.rand(n, channels, size, size)
    changes = ({}, {"mask_lr": 0.1}, {"inner_optimizer": "sign"}, {"inner_steps": 3})
    same_as_alone(net, images, [short(images_per_pass="device", **each) for each in changes])


kinds = st.fixed_dictionaries(
    {
        "initialise_rounds": st.integers(0, 2),
        "minimise_rounds": st.integers(0, 2),
        "select_rounds": st.integers(0, 2),
        "inner_steps": st.integers(1, 3),
        "inner_steps_at_start": st.sampled_from([None, 1, 2]),
        "step_size": st.sampled_from([None, 0.25]),
        "patience": st.sampled_from([None, 0, 1]),
        "warm_start": st.sampled_from([0, 0.5, 1]),
        "batch_size": st.sampled_from([256, 16, 7]),
        "early_batch_size": st.sampled_from([None, 12]),
        "loss_form": st.sampled_from(["paper", "log"]),
        "mask_estimator": st.sampled_from(["soft", "straight_through"]),
        "norm": st.sampled_from(["linf", "l2"]),
        "inner_optimizer": st.sampled_from(["adamw", "sign"]),
        "inner_momentum": st.sampled_from([0, 0.9]),
        "clip_images": st.booleans(),
        "reuse_last_pass": st.booleans(),
        "keep": st.sampled_from(["last", "best", "average"]),
        "universal": st.sampled_from([0.0, 0.5, 1.0]),
        "universal_budget": st.sampled_from([None, 0.05]),
        "clean_weight": st.sampled_from([0.5, 1.0, 3.0]),
        "mask_lr_schedule": st.sampled_from(["constant", "cosine"]),
    }
)


def test_any_mix_of_members_ends_with_the_bits_of_runs_alone(tiny_net, pictures):
    @settings(max_examples=8)
    @given(
        mix=st.lists(kinds, min_size=2, max_size=4),
        passes=st.sampled_from(["batch", "device", 48]),
        precision=st.sampled_from(["float32", "bfloat16"]),
    )
    def check(mix, passes, precision):
        engine = {"images_per_pass": passes, "precision": precision}
        same_as_alone(tiny_net, pictures, [short(**kind | engine) for kind in mix])

    check()


@pytest.mark.parametrize(
    ("sizes", "per_pass"),
    [((1, 1, 1), "device"), ((3, 3, 3), "device"), ((16, 16), 5), ((23, 24), "batch")],
    ids=["batches of 1", "batches of 3", "a pass of 1 is left", "clean logits of 1 are left"],
)
def test_few_images_change_nothing_of_that(tiny_net, pictures, sizes, per_pass):
    configs = [short(batch_size=size, images_per_pass=per_pass) for size in sizes]
    same_as_alone(tiny_net, pictures, configs)


# --- members that end early, and how ---


def test_one_that_is_stopped_leaves_the_others_alone(tiny_net, pictures):
    def stop(member, log):
        return member == 1 and log.step == 3

    configs = [short(), short(mask_lr=0.1), short(inner_steps=3), short(warm_start=1)]
    results = same_as_alone(tiny_net, pictures, configs, on_round=stop)
    assert [len(result.rounds) for result in results] == [7, 4, 7, 7]
    stopped = results[1]
    _, told = together(tiny_net, pictures, configs[:2], stop)
    assert told[1][-1][1] == stopped.masks.mask.tolist()


def test_one_that_reaches_its_plateau_leaves_the_others_alone(tiny_net, pictures):
    configs = [
        short(minimise_rounds=8),
        short(minimise_rounds=8, patience=1, threshold=0.1),
        short(minimise_rounds=8, inner_steps=3),
    ]
    results = same_as_alone(tiny_net, pictures, configs)
    assert [len(result.rounds) for result in results] == [12, 2 + 3 + 2, 12]


def test_one_that_becomes_infinite_leaves_the_others_alone(tiny_net, pictures):
    far = {"inner_optimizer": "sign", "step_size": 1e38, "budget": 2e38}
    near = {"inner_optimizer": "sign"}
    configs = [short(**near), short(**far), short(**near, mask_lr=0.1), short(**near, inner_steps=3)]
    for per_pass in ("batch", "device"):
        engine = {"images_per_pass": per_pass}
        mix = [config.model_copy(update=engine) for config in configs]
        results = same_as_alone(tiny_net, pictures, mix, numbers=(0, 2, 3))
        assert isinstance(results[1], NonFiniteError)
        assert "stage 'minimise', round 0" in str(results[1])
        assert [len(results[number].rounds) for number in (0, 2, 3)] == [7, 7, 7]
        assert all(math.isfinite(log.loss) for number in (0, 2, 3) for log in results[number].rounds)


def test_a_victim_that_is_broken_ends_all(tiny_net, pictures):
    tiny_net[-1].bias.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        together(tiny_net, pictures, [short(), short(initialise_rounds=0)])


def test_a_victim_that_breaks_on_a_later_image_ends_all(tiny_net, pictures):
    class NoAnswerToBlack(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return torch.where(images.amax((1, 2, 3))[:, None] < 0.1, math.nan, self.net(images))

    pictures = torch.cat([pictures] * 3)[:12].clone()
    pictures[11] = 0  # not among those that are asked before the first round
    net = NoAnswerToBlack(tiny_net)
    results, told = together(net, pictures, [short(), short(initialise_rounds=0)])
    assert ["'initialise'" in str(results[0]), "'minimise'" in str(results[1])] == [True, True]
    assert told == [[], []]


def test_results_come_in_the_order_of_the_configurations(tiny_net, pictures):
    configs = [short(minimise_rounds=rounds) for rounds in (5, 0, 3, 1)]
    configs.insert(1, short(**NO_ROUNDS))
    results, _ = together(tiny_net, pictures, configs)
    assert [result.config for result in results] == configs
    assert [len(result.rounds) for result in results] == [9, 0, 4, 7, 5]


def test_members_are_told_of_by_number_with_their_masks_as_they_are_then(tiny_net, pictures):
    configs = [short(), short(mask_lr=0.3), short(sharpness=3, initialise_rounds=0)]
    seen = []

    def on_round(member, log, masks):
        seen.append((member, log.stage, log.round, log.step, masks.sharpness))
        last[member] = masks.tensors()

    last = {}
    results = PopulationPurifier(tiny_net, pictures, configs, on_round=on_round).run()
    for member, result in enumerate(results):
        mine = [(m, *rest) for m, *rest in seen if m == member]
        k = configs[member].sharpness
        assert mine == [(member, log.stage, log.round, log.step, k) for log in result.rounds]
        tensors = result.masks.tensors()
        assert all(torch.equal(tensors[name], last[member][name]) for name in tensors)
        assert result.masks.sharpness == k
        assert not any(value.requires_grad for value in result.masks.parameters())


# --- what is refused ---


def test_no_configuration_is_refused(tiny_net, pictures):
    with pytest.raises(SettingError, match="at least one"):
        PopulationPurifier(tiny_net, pictures, [])


OTHERS = {
    "sites": "all",
    "precision": "bfloat16",
    "memory_format": "contiguous",
    "fold_batch_norm": False,
    "compile": True,
    "images_per_pass": 7,
}


@pytest.mark.parametrize("name", ENGINE)
def test_members_that_need_another_net_are_refused_by_name(tiny_net, pictures, name):
    configs = [short(), short(), short(**{name: OTHERS[name]})]
    with pytest.raises(SettingError, match=f"`{name}`.*member 0 .*member 2 {OTHERS[name]!r}"):
        PopulationPurifier(tiny_net, pictures, configs)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_generators_is_refused(tiny_net, pictures, count):
    with pytest.raises(SettingError, match=f"2 members .*got {count}"):
        PopulationPurifier(tiny_net, pictures, [short(), short()], generators=[None] * count)


# --- passes: how many, how large ---


class TrialObserver:
    """The prepared net's passes while it is open: images and blocks of each, forward and backward."""

    def __enter__(self):
        self.forward, self.backward, self.batches = [], [], []
        self.patch = pytest.MonkeyPatch()
        original = FrozenNet.forward

        def watching(net, images, factors=None):
            self.forward.append(len(images))
            self.batches.append(images.detach().clone())
            logits = original(net, images, factors)
            if logits.requires_grad:
                logits.register_hook(lambda gradient: self.backward.append(len(gradient)))
            return logits

        self.patch.setattr(FrozenNet, "forward", watching)
        return self

    def __exit__(self, *_):
        self.patch.undo()


def watched(model, images, configs):
    with TrialObserver() as watch:
        results, _ = together(model, images, configs)
    return results, watch


@pytest.mark.parametrize("per_pass", ["device", 2, 5, 23, 49])
def test_the_size_of_passes_changes_results_by_rounding_only(tiny_net, pictures, per_pass):
    model, images = tiny_net.double(), pictures.double()
    changes = ({}, {"inner_steps": 3, "warm_start": 0.5}, {"loss_form": "log", "batch_size": 13})
    usual, _ = together(model, images, [short(**each) for each in changes])
    other, _ = together(model, images, [short(**each, images_per_pass=per_pass) for each in changes])
    for one, two in zip(usual, other, strict=True):
        for kind in ("mask", "selection"):
            values = (getattr(one.masks, kind), getattr(two.masks, kind))
            torch.testing.assert_close(*values, rtol=0, atol=1e-9)
        for log, again in zip(one.rounds, two.rounds, strict=True):
            assert log.losses == pytest.approx(again.losses, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("per_pass", ["batch", "device", 100, 24])
def test_passes_are_those_that_are_reported(tiny_net, pictures, per_pass):
    changes = ({}, {"inner_steps": 5}, {"inner_steps_at_start": 1}, {"reuse_last_pass": True})
    configs = [short(**each, images_per_pass=per_pass) for each in changes]
    results, watch = watched(tiny_net, pictures, configs)
    clean = 1  # of all together
    forward = sum(result.passes.forward - clean for result in results) + clean
    assert forward * len(pictures) == sum(watch.forward)
    assert sum(result.passes.backward for result in results) * len(pictures) == sum(watch.backward)
    # 2 rounds of 2 and 2, 5 rounds of 2 k + 5 and 2 k + 4; the grown k are 1, 1, 2, 2, 2
    wanted = [(50, 44), (80, 74), (46, 40), (45, 44)]
    assert [(r.passes.forward, r.passes.backward) for r in results] == wanted


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_members_shared_out_to_threads_end_with_the_same_bits(tiny_net, pictures, two_threads, engine):
    configs = [short(**each, **ENGINES[engine]) for each in MIX]
    threads = threading.active_count()
    results, told = together(tiny_net, pictures, configs)
    assert threading.active_count() == threads
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert [heard for heard in told] == together(tiny_net, pictures, configs)[1]
    assert all(
        result.rounds for result, config in zip(results, MIX, strict=True) if config != NO_ROUNDS
    )


def test_the_work_goes_to_as_many_threads_as_there_are(tiny_net, pictures, two_threads, monkeypatch):
    at_work = set()
    forward = FrozenNet.forward

    def noting(net, images, factors=None):
        at_work.add((threading.get_ident(), id(net), torch.get_num_threads()))
        return forward(net, images, factors)

    monkeypatch.setattr(FrozenNet, "forward", noting)
    together(tiny_net, pictures, [short()] * 4)
    mine = threading.get_ident()
    workers = {entry for entry in at_work if entry[0] != mine}
    assert len(workers) == len({net for _, net, _ in workers}) == 2  # a net each
    assert {threads for _, _, threads in workers} == {1}


def test_an_error_in_a_thread_ends_the_run_and_the_threads(tiny_net, pictures, two_threads):
    def failing(_net, _inputs, out):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("in a worker")
        return out

    tiny_net[0].register_forward_hook(failing)
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="in a worker"):
        together(tiny_net, pictures, [short(fold_batch_norm=False)] * 2)
    assert threading.active_count() == threads
    assert torch.get_num_threads() == 2


def test_passes_of_a_member_are_those_of_a_run_alone(tiny_net, pictures):
    configs = [short(batch_size=12, **each) for each in ({}, {"inner_steps": 4}, {"patience": 0})]
    results, _ = together(tiny_net, pictures, configs)
    for number, result in enumerate(results):
        assert result.passes == alone(tiny_net, pictures, configs, number)[0].passes
        assert result.seconds > 0


def test_passes_of_a_member_do_not_depend_on_the_batches_of_others(tiny_net, pictures):
    configs = [short(batch_size=12), short()]
    results, _ = together(tiny_net, pictures, configs)
    assert results[0].passes == alone(tiny_net, pictures, configs, 0)[0].passes


@pytest.mark.parametrize("per_pass", [24, 50, 100])
def test_a_pass_holds_no_more_images_than_it_may(tiny_net, pictures, per_pass):
    configs = [short(inner_steps=steps, images_per_pass=per_pass) for steps in (1, 2, 3)]
    _, watch = watched(tiny_net, pictures, configs)
    assert per_pass - len(pictures) < max(watch.forward) <= per_pass


def test_a_batch_in_a_pass_is_the_bound_of_a_run_alone(tiny_net, pictures):
    for count in (1, 3):
        _, watch = watched(tiny_net, pictures, [short(images_per_pass="batch")] * count)
        assert max(watch.forward) == count * len(pictures)


def test_a_device_takes_what_fits_into_its_pass(tiny_net, pictures, monkeypatch):
    block = 24 * 6 * 8 * 8 * 4  # bytes of the largest masked activation
    monkeypatch.setitem(blocks.PASS_BYTES, "cpu", 5 * block + 1)
    _, watch = watched(tiny_net, pictures, [short(images_per_pass="device")] * 3)
    assert max(watch.forward) == 5 * 24
    _, watch = watched(tiny_net, pictures, [short(images_per_pass="batch")] * 8)
    assert max(watch.forward) == 5 * 24
    monkeypatch.setattr(population, "fast_bfloat16", lambda _device: True)
    narrow = short(images_per_pass="device", precision="bfloat16")
    _, watch = watched(tiny_net, pictures, [narrow] * 3)
    assert max(watch.forward) == 10 * 24
    monkeypatch.setitem(blocks.PASS_BYTES, "cpu", 1)
    _, watch = watched(tiny_net, pictures, [short(images_per_pass="device")] * 3)
    assert max(watch.forward) == 24


def test_a_device_without_bfloat16_gives_the_bits_of_float32(tiny_net, pictures, monkeypatch):
    wide, narrow = short(), short(precision="bfloat16")
    (wanted,) = PopulationPurifier(tiny_net, pictures, [wide], generators=generators([wide])).run()
    masks = {}
    for known in (False, True):
        monkeypatch.setattr(population, "fast_bfloat16", lambda _device, known=known: known)
        (ended,) = PopulationPurifier(
            tiny_net, pictures, [narrow], generators=generators([narrow])
        ).run()
        masks[known] = ended.masks.mask
    assert torch.equal(masks[False], wanted.masks.mask)
    assert not torch.equal(masks[True], wanted.masks.mask)


def launches(model, images, configs):
    """How many kernels the rounds of a population ask for."""
    purifier = PopulationPurifier(model, images, configs, generators=generators(configs))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        purifier.run()
    return sum(event.name.startswith("aten::") for event in profile.events())


@pytest.mark.parametrize(("count", "fewer"), [(8, 6), (32, 20)])
def test_members_in_one_pass_need_far_fewer_kernels_each(tiny_net, pictures, monkeypatch, count, fewer):
    monkeypatch.setitem(blocks.PASS_BYTES, "cpu", blocks.PASS_BYTES_ELSEWHERE)
    one = short(minimise_rounds=2, select_rounds=1, images_per_pass="device")
    many = [one.model_copy(update={"mask_lr": 0.01 * number}) for number in range(1, count + 1)]
    assert launches(tiny_net, pictures, many) * fewer <= count * launches(tiny_net, pictures, [one])


# --- settings whose effect can be said in a sentence ---


def test_the_cosine_is_that_of_torch():
    config = short(mask_lr=0.3, mask_lr_schedule="cosine", select_rounds=17)
    member, weights = Member(0, config, None), [torch.zeros(1, requires_grad=True)]
    for stage, rounds in (("initialise", 2), ("minimise", 3)):
        assert member.stage == stage
        for member.round in range(rounds):
            assert member.lr == 0.3
        member.stages.pop(0)
    optimizer = torch.optim.SGD(weights, lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17)
    for member.round in range(17):
        assert member.lr == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


def triggered_of(model, images, **changes):
    """The triggered images of every round of one member, from the passes of the outer losses."""
    config = short(initialise_rounds=0, **changes)
    (result,), watch = watched(model, images, [config])
    batches, found = iter(watch.batches[1:]), []  # the first pass is of the clean logits
    for round_ in range(len(result.rounds)):
        steps = config.inner_steps_at(round_ / max(1, len(result.rounds) - 1))
        extra = 0 if config.reuse_last_pass else 1
        passes = list(itertools.islice(batches, 2 * steps + extra + 4))
        assert torch.equal(passes[-1], passes[-4])  # clean images, masked and inverse-masked
        assert torch.equal(passes[-2], passes[-3])  # triggered images, in the same way
        found.append(passes[-2])
    assert next(batches, None) is None
    return found


UNREACHED = pytest.mark.filterwarnings("ignore::bimask.defences.ims.config.BudgetWarning")


@UNREACHED
@pytest.mark.parametrize("optimizer", ["adamw", "sign"])
def test_the_last_pass_that_is_used_again_is_one_step_behind(tiny_net, pictures, optimizer):
    settings = {"step_size": 0.02, "inner_optimizer": optimizer}
    behind = triggered_of(tiny_net, pictures, inner_steps=3, reuse_last_pass=True, **settings)
    shorter = triggered_of(tiny_net, pictures, inner_steps=2, **settings)
    whole = triggered_of(tiny_net, pictures, inner_steps=3, **settings)
    assert torch.equal(behind[0], shorter[0])
    assert not torch.equal(behind[0], whole[0])
    at_first = triggered_of(tiny_net, pictures, inner_steps=1, reuse_last_pass=True, **settings)
    assert torch.equal(at_first[0], pictures)


@UNREACHED
def test_the_victims_answer_to_the_last_pass_is_used_again(tiny_net, pictures):
    """The losses are those of a run whose victim answers the same images anew."""
    model, images = tiny_net.double(), pictures.double()
    settings = {"step_size": 0.02, "initialise_rounds": 0}
    behind = short(inner_steps=3, reuse_last_pass=True, **settings)
    shorter = short(inner_steps=2, **settings)
    ((one,), _), ((two,), _) = (together(model, images, [config]) for config in (behind, shorter))
    assert one.rounds[0].losses == pytest.approx(two.rounds[0].losses, rel=1e-12)
    assert (one.passes.forward, two.passes.forward) == (1 + 5 * 10, 1 + 5 * 9)


def test_a_reused_last_pass_goes_on_from_the_last_step(tiny_net, pictures):
    """Warm starts take the end of the steps, not what the masks learned on."""
    settings = {"step_size": 0.02, "inner_optimizer": "sign", "warm_start": 1, "inner_steps": 2}
    frozen_masks = {"mask_lr": 1e-30, "weight_decay": 0}
    behind = triggered_of(tiny_net, pictures, reuse_last_pass=True, **settings, **frozen_masks)
    usual = triggered_of(tiny_net, pictures, **settings | {"inner_steps": 3}, **frozen_masks)
    assert torch.equal(behind[1], usual[0])  # 2 steps and 1


@pytest.mark.parametrize(("start", "end"), [(1, 6), (2, 3), (4, 4), (1, 20)])
def test_inner_steps_grow_from_their_start_to_their_end(tiny_net, pictures, start, end):
    config = short(
        initialise_rounds=1,
        minimise_rounds=4,
        select_rounds=5,
        inner_steps=end,
        inner_steps_at_start=start,
    )
    counts = [0]
    with TrialObserver() as watch:
        purifier = PopulationPurifier(
            tiny_net, pictures, [config], on_round=lambda *_: counts.append(len(watch.forward))
        )
        (result,) = purifier.run()
    of_rounds = [after - before for before, after in itertools.pairwise(counts)]
    steps = [(passes - 5) / 2 for passes in of_rounds[1:]]
    assert (steps[0], steps[-1]) == (start, end)
    assert steps == sorted(steps)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= math.ceil((end - start) / 8)
    assert result.passes.forward == counts[-1]


def test_early_stages_have_batches_of_their_own(tiny_net, pictures):
    config = short(batch_size=20, early_batch_size=10)
    (result,), watch = watched(tiny_net, pictures, [config])
    assert watch.forward[:2] == [20, 4]  # clean logits
    of_early = 2 * 2 + 3 * 9
    assert watch.forward[2:] == [10] * of_early + [20] * 2 * 9
    assert len(result.rounds) == 2 + 3 + 2


# --- devices ---


def here(name):
    return {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }[name]


DEVICES = [
    pytest.param(name, marks=pytest.mark.skipif(not here(name), reason=f"no {name} here"))
    for name in ("cpu", "cuda", "mps")
]
EVERYTHING = {
    "warm_start": 0.5,
    "batch_size": 16,
    "keep": "best",
    "clip_images": True,
    "inner_steps_at_start": 1,
}
KINDS = [
    {},
    EVERYTHING,
    EVERYTHING | {"norm": "l2", "loss_form": "log"},
    EVERYTHING | {"inner_optimizer": "sign", "inner_momentum": 0.5, "reuse_last_pass": True},
    EVERYTHING | {"shift": 1, "flip": True, "mask_estimator": "straight_through"},
    EVERYTHING | {"universal": 0.5, "inner_optimizer": "sign"},
    EVERYTHING | {"class_triggers": 0.5, "keep": "average"},
]


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_gives_the_same_but_for_rounding(tiny_net, pictures, device):
    configs = [short(**kind) for kind in KINDS]
    usual, _ = together(tiny_net, pictures, configs)
    there, _ = together(tiny_net.to(device), pictures.to(device), configs)
    for one, two in zip(usual, there, strict=True):
        assert two.masks.mask.device.type == device
        assert one.rounds[0].loss == pytest.approx(two.rounds[0].loss, rel=1e-4)
        assert len(one.rounds) == len(two.rounds)


READ_BACKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class Counted(TorchDispatchMode):
    """Operations by name, while it is open, on what comes of some tensors: an accelerator would hold
    that, and not what the host draws."""

    def __init__(self, *sources):
        super().__init__()
        self.names, self.there = Counter(), WeakIdKeyDictionary()
        self.there.update(dict.fromkeys(sources, True))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            name = "masked_select"  # under another name
        there = any(
            isinstance(t, torch.Tensor) and t in self.there for t in tree_leaves((args, kwargs))
        )
        found = func(*args, **kwargs or {})
        if there:
            self.names[name] += 1
            of_it = (t for t in tree_leaves(found) if isinstance(t, torch.Tensor))
            self.there.update(dict.fromkeys(of_it, True))
        return found


def test_read_backs_would_be_counted():
    source, drawn = torch.ones(3, requires_grad=True), torch.rand(3)
    with Counted(source) as seen:
        (slope,) = torch.autograd.grad((source * 2).sum(), source)
        drawn.sum().item()
        assert not [name for name in READ_BACKS if seen.names[name]]
        slope.sum().item()
        bool(source[0] > 0)
        torch.arange(3)[source > 0]
    assert {name for name in READ_BACKS if seen.names[name]} == {"_local_scalar_dense", "masked_select"}


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_round_reads_back_once(tiny_net, pictures, monkeypatch, kind):
    lists = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t.shape) or original(t))
    configs = [short(**KINDS[kind]), short(**KINDS[kind], mask_lr=0.1)]
    purifier = PopulationPurifier(tiny_net, pictures, configs, generators=generators(configs))
    pool = purifier.objective.pool
    _ = pool and pool.chances  # read once, with the pool
    with Counted(purifier.images, *purifier.blocks.net.parameters()) as seen:
        purifier.run()
    assert sum(seen.names.values()) > 1000
    assert not [name for name in READ_BACKS if seen.names[name]]
    tables = [shape for shape in lists if len(shape) == 2]  # what the host draws of a pool is a row
    assert tables == [(2, 3)] * 2 + [(2, 6)] * 5  # losses of all members, once a round


class OneDevice(TorchDispatchMode):
    """An error where an operation on an accelerator takes a tensor of the host along."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        assert len({t.device.type for t in tensors}) <= 1, func
        return func(*args, **kwargs or {})


def placed_anew(module, fn, recurse=True):
    """`nn.Module._apply` without the swaps in place that fake tensors do not bear."""
    for child in module.children():
        child._apply(fn)
    for name, value in module._parameters.items():
        module._parameters[name] = nn.Parameter(fn(value.detach()), value.requires_grad)
    for name, value in module._buffers.items():
        module._buffers[name] = value if value is None else fn(value)
    return module


@pytest.mark.parametrize("kind", [2, 3, 4])
def test_nothing_stays_on_the_host_where_there_is_an_accelerator(monkeypatch, kind):
    """Tensors without numbers that say they are on a GPU: mixing them with the host's, or reading
    them, is an error."""
    read = []

    def ones(tensor):
        read.append(tuple(tensor.shape))
        return [[1.0] * tensor.shape[1]] * tensor.shape[0]

    def nothing(_outputs, inputs, _gradients=None):
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        return tuple(torch.empty_like(value) for value in inputs)

    # what is asked before the first round reads numbers, and may
    monkeypatch.setattr(population, "check_images", lambda _images: None)
    monkeypatch.setattr(blocks, "memory_of", lambda _device: None)
    monkeypatch.setattr(
        population,
        "admit",
        lambda model, _images: SimpleNamespace(plain=model, model=model, findings=()),
    )
    monkeypatch.setattr(population, "masks_for", lambda model, *_: MaskSet.for_model(model))
    monkeypatch.setattr(frozen, "bears_channels_last", lambda *_: True)
    monkeypatch.setattr(FrozenNet, "_answers", staticmethod(lambda *_: True))
    monkeypatch.setattr(frozen, "copied", lambda model: model)
    monkeypatch.setattr(nn.Module, "_apply", placed_anew)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.autograd, "grad", nothing)
    monkeypatch.setattr(FakeTensor, "tolist", ones)
    mode, devices = FakeTensorMode(), set()
    with mode, torch.device("cuda"):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )
        images = torch.rand(20, 1, 8, 8)
    with mode, OneDevice():
        configs = [short(**KINDS[kind]), short(**KINDS[kind], mask_lr=0.1)]
        purifier = PopulationPurifier(
            net, images, configs, on_round=lambda _m, _l, masks: devices.add(masks.mask.device.type)
        )
        results = purifier.run()
    assert devices == {"cuda"}
    assert [len(result.rounds) for result in results] == [7, 7]
    assert read == [(2, 3)] * 2 + [(2, 6)] * 5


class Sided(nn.Module):
    """Answers 0 where the left half is the brighter one, or whatever a flip leaves."""

    def __init__(self, symmetric):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.symmetric = symmetric
        with torch.no_grad():
            self.conv.weight.fill_(1.0)

    def forward(self, x):
        x = self.conv(x)
        left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
        other = (left + right) / 2 if self.symmetric else right
        return torch.stack([left + right if self.symmetric else left, 2 * other + 0.1], 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_flips_are_natural_where_the_suspect_answers_them_alike(symmetric):
    images = torch.zeros(10, 1, 8, 8)
    images[::2, ..., :4] = 1.0  # bright on the left, or on the right
    images[1::2, ..., 4:] = 1.0
    config = PurifyConfig(flip="auto", inner_steps=1, step_size=None, budget=0.1)
    assert PopulationPurifier(Sided(symmetric).eval(), images, [config]).natural == symmetric
    plain = config.model_copy(update={"flip": False})
    assert not PopulationPurifier(Sided(symmetric).eval(), images, [plain]).natural, "nobody asks"
