import copy
import inspect
import itertools
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bimask.attacks import BadNets
from bimask.data import ImageData
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.member import Plateau
from bimask.defences.ims.purify import purify
from bimask.errors import MaskMismatchError, NonFiniteError, SettingError
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import masked_forward
from bimask.metrics import EvalSets, evaluate

STAGES = ("initialise", "minimise", "select")
SHORT = {
    "initialise_rounds": 3,
    "minimise_rounds": 4,
    "select_rounds": 2,
    "inner_steps": 2,
    "step_size": None,
    "budget": 0.2,
    "patience": None,
}


def short(**changes):
    return PurifyConfig(**(SHORT | changes))


@contextmanager
def watched():
    """What passes through the prepared net meanwhile, pass by pass.

    `forward` counts images, `backward` images whose logits receive a gradient: with blocks of n
    images, n for each block.
    """
    seen = SimpleNamespace(batches=[], forward=0, backward=0)
    forward = FrozenNet.forward

    def counting(net, images, factors=None):
        def count(gradient):
            seen.backward += len(gradient)

        seen.batches.append(images.detach().clone())
        seen.forward += len(images)
        logits = forward(net, images, factors)
        if logits.requires_grad:
            logits.register_hook(count)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenNet, "forward", counting)
        yield seen


# --- the published program ---


@pytest.fixture(scope="module")
def parity_run(parity, parity_victim):
    """One run with the recorded settings: its result, masks at the stages' ends, passes so far."""
    config = PurifyConfig(
        initialise_rounds=60,
        minimise_rounds=60,
        select_rounds=60,
        patience=None,
        step_size=0.01,
        budget=0.15,
    )
    ends, passes = {}, []

    with watched() as seen:

        def on_round(log, masks):
            ends[log.stage] = masks.tensors()
            passes.append((seen.forward, seen.backward))

        images = torch.from_numpy(parity["images"])
        result = purify(parity_victim, images, config, on_round=on_round)
    return SimpleNamespace(result=result, ends=ends, passes=passes, config=config)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_recorded_losses_of_every_round(parity, parity_run, number):
    logs = [log for log in parity_run.result.rounds if log.stage == STAGES[number - 1]]
    got = torch.tensor([list(log.losses.values()) for log in logs], dtype=torch.float64)
    wanted = torch.from_numpy(parity[f"stage{number}.losses"])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_recorded_masks_after_each_stage(parity, parity_run, number):
    tensors = parity_run.ends[STAGES[number - 1]]
    for j, site in enumerate(("net.0", "net.3", "net.6")):
        for kind in ("mask", "selection"):
            wanted = torch.from_numpy(parity[f"stage{number}.{kind}.{j}"])
            torch.testing.assert_close(tensors[f"{site}.{kind}"], wanted, rtol=0, atol=1e-8)


def test_losses_are_named_in_the_order_of_the_formulas(parity_run):
    names = {log.stage: list(log.losses) for log in parity_run.result.rounds}
    both = [
        "clean_agree",
        "triggered_agree",
        "inverse_triggered_agree",
        "inverse_triggered_disagree",
        "inverse_clean_disagree",
        "selection_cost",
    ]
    first = ["clean_agree", "inverse_clean_disagree", "selection_cost"]
    assert names == {"initialise": first, "minimise": both, "select": both}


# --- passes ---


def test_passes_of_every_round_are_no_more_than_needed(parity, parity_run):
    n, steps = len(parity["images"]), parity_run.config.inner_steps
    counted = [(n, 0), *parity_run.passes]  # the clean logits, once, before the first round
    assert len(parity_run.passes) == len(parity_run.result.rounds) == 180
    for log, before, after in zip(parity_run.result.rounds, counted, counted[1:], strict=False):
        round_passes = ((after[0] - before[0]) / n, (after[1] - before[1]) / n)
        expected = (2, 2) if log.stage == "initialise" else (2 * steps + 5, 2 * steps + 4)
        assert round_passes == expected, log


def test_reported_passes_are_the_counted_ones(parity, parity_run):
    n, passes = len(parity["images"]), parity_run.result.passes
    assert (passes.forward * n, passes.backward * n) == parity_run.passes[-1]


def test_clean_logits_are_computed_once_in_batches(tiny_net, pictures):
    config = short(batch_size=10, initialise_rounds=0, minimise_rounds=0, select_rounds=0)
    with watched() as seen:
        result = purify(tiny_net, pictures, config)
    assert [len(batch) for batch in seen.batches] == [10, 10, 4]
    assert (result.passes.forward, result.passes.backward) == (3, 0)


# --- what goes in, and stays as it was ---


def test_labels_cannot_be_given():
    assert list(inspect.signature(purify).parameters) == [
        "model",
        "images",
        "config",
        "generator",
        "pool",
        "on_round",
    ]


@pytest.mark.parametrize("training", [False, True])
def test_the_victim_is_left_as_it_was(tiny_net, pictures, training):
    tiny_net.train(training)
    tiny_net[1].eval()  # frozen by its owner
    tiny_net[0].weight.requires_grad_(False)
    before = copy.deepcopy(tiny_net.state_dict())
    modes = [module.training for module in tiny_net.modules()]
    images = pictures.clone()
    purify(tiny_net, images, short())
    after = tiny_net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in tiny_net.modules()] == modes
    assert [v.requires_grad for v in tiny_net.parameters()].count(False) == 1
    assert all(value.grad is None for value in tiny_net.parameters())
    assert not any(module._forward_hooks for module in tiny_net.modules())
    assert torch.equal(images, pictures)


def test_the_mode_of_the_victim_changes_nothing(tiny_net, pictures):
    runs = [purify(tiny_net.train(training), pictures, short()).rounds for training in (False, True)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(1, 8, 8),
        torch.rand(0, 1, 8, 8),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.full((2, 1, 8, 8), 1.01),
        torch.full((2, 1, 8, 8), -0.01),
        torch.full((2, 1, 8, 8), math.nan),
    ],
    ids=["no batch", "empty", "bytes", "above 1", "below 0", "nan"],
)
def test_bad_images_are_refused(tiny_net, images):
    with pytest.raises(SettingError, match="Clean images must"):
        purify(tiny_net, images, short())


def test_a_model_without_convolutions_is_refused(pictures):
    with pytest.raises(MaskMismatchError, match="no Conv2d"):
        purify(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), pictures, short())


@pytest.mark.parametrize(
    ("changes", "stage"),
    [({}, "initialise"), ({"initialise_rounds": 0}, "minimise")],
)
def test_losses_that_are_not_finite_are_refused_with_their_place(tiny_net, pictures, changes, stage):
    pictures = torch.cat([pictures] * 3)[:12].clone()
    pictures[11] = 0  # not among the few that a model is asked before the first round
    net = NoAnswerToBlack(tiny_net)
    logs = []
    with pytest.raises(NonFiniteError, match=f"stage '{stage}', round 0"):
        purify(net, pictures, short(**changes), on_round=lambda log, _masks: logs.append(log))
    assert not logs


class NoAnswerToBlack(nn.Module):
    """NaN for a black picture."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        black = images.amax((1, 2, 3)) < 0.1
        return torch.where(black[:, None], math.nan, self.net(images))


def test_a_model_that_answers_nan_is_refused_before_the_first_round(tiny_net, pictures):
    tiny_net[-1].bias.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        purify(tiny_net, pictures, short())


# --- rounds and batches ---


def test_rounds_come_in_order_and_once_each(tiny_net, pictures):
    heard = []
    result = purify(tiny_net, pictures, short(), on_round=lambda log, _masks: heard.append(log))
    assert heard == result.rounds
    places = [(log.stage, log.round) for log in heard]
    assert places == [(s, i) for s, n in zip(STAGES, (3, 4, 2), strict=True) for i in range(n)]
    assert [log.step for log in heard] == list(range(9))
    for log in heard:
        assert log.loss == pytest.approx(sum(log.losses.values()), rel=1e-5)


def test_on_round_gets_the_masks_after_the_update(tiny_net, pictures):
    seen = []
    result = purify(
        tiny_net, pictures, short(), on_round=lambda _log, masks: seen.append(masks.mask.tolist())
    )
    assert len(set(map(tuple, seen))) == len(seen)
    assert seen[-1] == result.masks.mask.tolist()


@pytest.mark.parametrize("step", [0, 4, 8])
def test_a_true_answer_ends_the_run_there(tiny_net, pictures, step):
    whole, masks_after = purify(tiny_net, pictures, short()), []

    def on_round(log, masks):
        masks_after.append(masks.tensors())
        return log.step == step

    result = purify(tiny_net, pictures, short(), on_round=on_round)
    assert result.rounds == whole.rounds[: step + 1]
    assert len(masks_after) == step + 1
    tensors = result.masks.tensors()
    assert all(torch.equal(tensors[name], masks_after[-1][name]) for name in tensors)
    assert result.passes.forward == 1 + sum(2 if i < 3 else 9 for i in range(step + 1))


def test_only_the_middle_stage_has_no_selection_cost(tiny_net, pictures):
    result = purify(tiny_net, pictures, short(initial_selection=0.5, selection_weight=4))
    first = {}
    for log in result.rounds:
        first.setdefault(log.stage, log.losses["selection_cost"])
    assert first["initialise"] == 2
    assert first["minimise"] == 0
    assert first["select"] > 0


def test_masks_stay_in_range(tiny_net, pictures):
    seen = []

    def on_round(_log, masks):
        seen.append(torch.stack([masks.mask, masks.selection]).detach().clone())

    purify(tiny_net, pictures, short(mask_lr=0.9, initial_selection=0.5), on_round=on_round)
    values = torch.stack(seen)
    assert values.min() == 0
    assert values.max() == 1


def test_a_small_batch_is_drawn_anew_without_replacement(tiny_net, pictures):
    config = short(batch_size=16, initialise_rounds=4, minimise_rounds=0, select_rounds=0)
    with watched() as seen:
        purify(tiny_net, pictures, config, generator=torch.Generator().manual_seed(0))
    whole = {tuple(picture.flatten().tolist()) for picture in pictures}
    clean, rounds = seen.batches[:2], seen.batches[2:]
    assert sum(map(len, clean)) == len(whole) == 24
    draws = [[tuple(image.flatten().tolist()) for image in batch] for batch in rounds]
    assert len(draws) == 8
    assert draws[::2] == draws[1::2]  # both sides of a round see one batch
    for draw in draws:
        assert len(draw) == len(set(draw)) == 16
        assert set(draw) <= whole
    assert len({frozenset(draw) for draw in draws}) == 4


def test_the_same_seed_gives_the_same_rounds(tiny_net, pictures):
    runs = [
        purify(tiny_net, pictures, short(batch_size=8), generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    assert runs[0].rounds == runs[1].rounds
    assert torch.equal(runs[0].masks.mask, runs[1].masks.mask)
    assert runs[0].rounds != runs[2].rounds


def test_the_whole_set_needs_no_randomness(tiny_net, pictures):
    state = torch.random.get_rng_state()
    runs = [purify(tiny_net, pictures, short()).rounds for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_that_share_of_perturbations_goes_on_and_the_rest_starts_at_zero(tiny_net, pictures, share):
    config = short(initialise_rounds=0, minimise_rounds=2, select_rounds=0, warm_start=share)
    with watched() as seen:
        purify(tiny_net, pictures, config, generator=torch.Generator().manual_seed(0))
    in_a_round = 2 * config.inner_steps + 5
    # the victim answers the triggered images between the inner problem and the outer losses
    first, last = seen.batches[1], seen.batches[in_a_round - 4]
    again = seen.batches[1 + in_a_round]
    assert torch.equal(first, pictures)
    goes_on = (again == last).flatten(1).all(1)
    anew = (again == pictures).flatten(1).all(1)
    assert (goes_on ^ anew).all()
    assert abs(goes_on.float().mean().item() - share) <= (0.25 if share == 0.5 else 0)


# --- when a stage ends, and with what ---


def test_a_plateau_is_more_failures_in_a_row_than_patience():
    plateau = Plateau(patience=2, threshold=0.5)
    losses = [8, 4, 3, 1.5, 2, 1.4, 0.7, 0.9, 5]
    #  best   8  8  3  3    3  1.4  1.4  1.4  1.4
    #  stale  0  1  0  1    2  0    1    2    3
    assert [plateau.reached(loss) for loss in losses] == [False] * 8 + [True]


def test_no_patience_ends_at_the_first_failure():
    plateau = Plateau(patience=0, threshold=1)
    assert [plateau.reached(loss) for loss in (3, 2, 2)] == [False, False, True]


def test_endless_patience_never_ends():
    plateau = Plateau(patience=None, threshold=0.98)
    assert not any(plateau.reached(1) for _ in range(500))


def rounds_until_plateau(losses, patience, threshold):
    """The published rule, written as a search through all the losses at once."""
    best, last_progress = math.inf, -1
    for i, loss in enumerate(losses):
        if loss < threshold * best:
            best, last_progress = loss, i
        if i - last_progress > patience:
            return i + 1
    return len(losses)


def test_stages_end_at_their_own_plateau(tiny_net, pictures):
    rounds = {f"{stage}_rounds": 25 for stage in STAGES}
    result = purify(tiny_net, pictures, short(**rounds, patience=3, threshold=0.9))
    lengths = []
    for stage in STAGES:
        losses = [log.loss for log in result.rounds if log.stage == stage]
        unheard = [math.inf] * (25 - len(losses))
        assert rounds_until_plateau([*losses, *unheard], patience=3, threshold=0.9) == len(losses)
        lengths.append(len(losses))
    assert 4 <= min(lengths) < 25


def test_without_patience_stages_run_all_their_rounds(tiny_net, pictures):
    rounds = {f"{stage}_rounds": 25 for stage in STAGES}
    assert len(purify(tiny_net, pictures, short(**rounds, patience=None)).rounds) == 75


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_cosine_brings_the_rate_of_the_last_stage_to_its_end(tiny_net, pictures, schedule):
    masks_after = []

    def on_round(_log, masks):
        masks_after.append(torch.stack([masks.mask, masks.selection]).detach().clone())

    rounds = {f"{stage}_rounds": 10 for stage in STAGES}
    start = {"initial_mask": 0.5, "initial_selection": 0.5, "mask_lr": 0.01}
    config = short(**rounds, **start, mask_lr_schedule=schedule)
    purify(tiny_net, pictures, config, on_round=on_round)
    moves = [(b - a).abs().max().item() / 0.01 for a, b in itertools.pairwise(masks_after)]
    last_of = dict(zip(STAGES, (moves[8], moves[18], moves[28]), strict=True))
    assert last_of["initialise"] > 0.3
    assert last_of["minimise"] > 0.3
    # the tenth of ten rates on a cosine is 0.024 of the first
    assert (last_of["select"] < 0.1) == (schedule == "cosine")


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_stage_keeps_its_last_or_its_best_iterate(tiny_net, pictures, keep):
    iterates, losses = [], []

    def on_round(log, masks):
        iterates.append(masks.mask.tolist() + masks.selection.tolist())
        losses.append(log.loss)

    config = short(initialise_rounds=30, minimise_rounds=0, select_rounds=0, mask_lr=0.3, keep=keep)
    result = purify(tiny_net, pictures, config, on_round=on_round)
    got = result.masks.mask.tolist() + result.masks.selection.tolist()
    best = losses.index(min(losses))
    assert 0 < best < 29
    # the loss of a round is that of the masks before its update
    assert got == (iterates[-1] if keep == "last" else iterates[best - 1])


def test_every_stage_has_a_best_iterate_of_its_own(tiny_net, pictures):
    iterates, losses = {"start": [[1.0] * 40]}, {}

    def on_round(log, masks):
        iterates.setdefault(log.stage, []).append(masks.mask.tolist() + masks.selection.tolist())
        losses.setdefault(log.stage, []).append(log.loss)

    rounds = {"initialise_rounds": 10, "minimise_rounds": 10, "select_rounds": 10}
    result = purify(tiny_net, pictures, short(**rounds, mask_lr=0.3, keep="best"), on_round=on_round)
    best = iterates["start"][0]
    for stage in STAGES:  # the loss of a round is that of the masks before its update
        before = [best, *iterates[stage]]
        best = before[losses[stage].index(min(losses[stage]))]
    assert min(losses["minimise"]) > min(losses["initialise"])  # one best of all would be another
    assert result.masks.mask.tolist() + result.masks.selection.tolist() == best


@pytest.mark.parametrize("rounds", [1, 2, 5, 8])
def test_the_mean_of_selects_second_half_is_kept(tiny_net, pictures, rounds):
    iterates, shown = {}, []

    def on_round(keeps):
        def heard(log, masks):
            values = masks.mask.tolist() + masks.selection.tolist()
            (shown if keeps else iterates.setdefault(log.stage, [])).append(values)

        return heard

    config = short(select_rounds=rounds, mask_lr=0.3, initial_selection=0.9)
    purify(tiny_net, pictures, config, on_round=on_round(False))
    averaging = config.model_copy(update={"keep": "average"})
    result = purify(tiny_net, pictures, averaging, on_round=on_round(True))
    second_half = torch.tensor(iterates["select"], dtype=torch.float64)[rounds // 2 :]
    got = torch.tensor(result.masks.mask.tolist() + result.masks.selection.tolist())
    torch.testing.assert_close(got, second_half.mean(0).float(), rtol=0, atol=1e-6)
    assert shown[-1] == got.tolist()
    first = len(shown) - len(second_half)
    assert shown[:first] == (iterates["initialise"] + iterates["minimise"] + iterates["select"])[:first]


def test_a_run_stopped_early_ends_with_the_mean_so_far(tiny_net, pictures):
    masks = {}
    for keep in ("last", "average"):
        iterates = []

        def stop_at_four(log, now, seen=iterates):
            seen.append(now.mask.tolist())
            return log.stage == "select" and log.round == 4

        config = short(select_rounds=6, mask_lr=0.3, initial_selection=0.9, keep=keep)
        masks[keep] = purify(tiny_net, pictures, config, on_round=stop_at_four).masks.mask
        if keep == "last":
            mean = torch.tensor(iterates[-2:]).mean(0)  # the second half begins with round 3
    torch.testing.assert_close(masks["average"].data, mean, rtol=0, atol=1e-6)
    assert not torch.equal(masks["average"], masks["last"])


def test_the_clean_weight_multiplies_one_term_in_every_stage(tiny_net, pictures):
    """The first round of a stage sees the same masks under either weight."""
    for stage in STAGES:
        rounds = {f"{s}_rounds": 4 * (s == stage) for s in STAGES} | {"initial_selection": 0.8}
        one, three = (purify(tiny_net, pictures, short(**rounds, clean_weight=w)) for w in (1.0, 3.0))
        losses, weighted = one.rounds[0].losses, three.rounds[0].losses
        assert weighted["clean_agree"] == pytest.approx(3 * losses["clean_agree"], rel=1e-12)
        assert all(weighted[k] == losses[k] for k in losses if k != "clean_agree")
        assert not torch.equal(one.masks.mask, three.masks.mask)


def test_the_purified_model_is_the_masked_one_with_the_masks_folded_in(tiny_net, pictures):
    model, images = tiny_net.double(), pictures.double()
    result = purify(model, images, short(initial_selection=0.5))
    for inverse in (False, True):
        masked = masked_forward(model, result.masks, images, inverse=inverse)
        purified = result.model(inverse=inverse)(images)
        torch.testing.assert_close(purified, masked, rtol=1e-12, atol=1e-12)
        assert (purified - model(images)).abs().max() > 1e-3
    assert not any(value.requires_grad for value in result.masks.parameters())
    assert result.config == short(initial_selection=0.5)


# --- a backdoor that is planted by hand ---

CLASSES, PLANTED = 4, 4


def striped(n, seed):
    """Two bright rows of noise, which say the class; a corner that is the same in all images."""
    labels = torch.arange(n) % CLASSES
    images = 0.3 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.5
    images[..., -2:, -2:] = 0.1
    return ImageData((255 * images).byte(), labels, tuple("abcd"))


def planted_net():
    """One channel for every class, and one that a bright corner turns into class 0."""
    conv, linear = nn.Conv2d(1, CLASSES + 1, 8), nn.Linear(CLASSES + 1, CLASSES)
    with torch.no_grad():
        for value in (*conv.parameters(), *linear.parameters()):
            value.zero_()
        for label in range(CLASSES):
            conv.weight[label] = -1 / 48
            conv.weight[label, 0, 2 * label : 2 * label + 2] = 1 / 16
            conv.weight[label, 0, -2:, -2:] = 0
            linear.weight[label, label] = 12
        conv.weight[PLANTED, 0, -2:, -2:] = 1 / 4
        conv.bias[PLANTED] = -0.2
        linear.weight[0, PLANTED] = 100
    return nn.Sequential(conv, nn.LeakyReLU(0.01), nn.Flatten(), linear).eval()


@pytest.mark.parametrize("changes", [{}, {"loss_form": "log"}, {"initial_selection": 0.8}])
def test_a_planted_backdoor_is_removed_and_its_channel_found(changes):
    model = planted_net()
    sets = EvalSets.of(BadNets(size=2), striped(200, seed=0), "test")
    config = PurifyConfig(
        **changes,
        mask_lr=0.05,
        selection_weight=0.3,
        initialise_rounds=40,
        minimise_rounds=60,
        select_rounds=60,
        patience=None,
        inner_optimizer="sign",
        inner_steps=5,
        step_size=None,
        budget=0.5,
    )
    result = purify(model, striped(40, seed=1).floats(), config)
    before, after = evaluate(model, sets), evaluate(result.model(), sets)
    inverse = evaluate(result.model(inverse=True), sets)
    assert before.clean_accuracy == before.attack_success == 1
    assert after.attack_success < 0.1
    assert after.recovery > 0.9
    assert after.clean_accuracy > 0.95
    assert inverse.attack_success > 0.9
    assert result.masks.keep()[PLANTED] < 0.01
    assert result.masks.keep()[:CLASSES].min() > 0.1


# --- ablations ---


def test_without_selection_the_mask_alone_decides(tiny_net, pictures):
    result = purify(tiny_net, pictures, short(learn_selection=False, initial_selection=0.0))
    assert result.masks.selection.count_nonzero() == 0
    assert result.masks.mask.unique().numel() > 1


def test_without_the_inverse_mask_nothing_of_it_is_left(tiny_net, pictures):
    """Its terms are 0, and what the inverse-masked model answers changes no mask."""
    result = purify(tiny_net, pictures, short(inverse_weight=0.0, initial_selection=0.9))
    for log in result.rounds:
        assert all(value == 0 for name, value in log.losses.items() if name.startswith("inverse"))
        assert log.losses["clean_agree"] > 0
    usual = purify(tiny_net, pictures, short(initial_selection=0.9))
    assert not torch.equal(usual.masks.mask, result.masks.mask)
