import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bimask.defences.ims.losses import selection_cost
from bimask.metrics.agreement import agree, disagree

BOTH = pytest.mark.parametrize("loss", [agree, disagree])
FORMS = pytest.mark.parametrize("form", ["paper", "log"])


def random_logits(seed, scale=2.0, classes=10):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(6, classes, generator=generator, dtype=torch.float64)


def two_classes(margin, dtype=torch.float64):
    return torch.tensor([[margin, 0.0]], dtype=dtype, requires_grad=True)


@BOTH
def test_recorded_scalars(parity, loss):
    a, b = torch.from_numpy(parity["logits_a"]), torch.from_numpy(parity["logits_b"])
    assert loss(a, b).item() == pytest.approx(parity[loss.__name__].item(), rel=0, abs=1e-12)


@FORMS
@BOTH
def test_closed_form_of_two_classes(loss, form):
    p, q = 0.8, 0.3
    u = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)
    v = torch.tensor([[math.log(q), math.log(1 - q)]], dtype=torch.float64)
    overlap = p * q + (1 - p) * (1 - q)
    wanted = -math.log(overlap if loss is agree else 1 - overlap)
    assert loss(u, v, form=form).item() == pytest.approx(wanted, abs=1e-7)


@FORMS
@BOTH
def test_is_the_mean_over_the_batch(loss, form):
    u, v = random_logits(0), random_logits(1)
    rows = [loss(u[i : i + 1], v[i : i + 1], form=form).item() for i in range(len(u))]
    assert len(set(rows)) == len(rows)
    assert loss(u, v, form=form).item() == pytest.approx(sum(rows) / len(rows), rel=1e-12)


@FORMS
@BOTH
def test_leading_dimensions_are_batches_of_their_own(loss, form):
    u, v = random_logits(0).view(2, 1, 3, 10), random_logits(1).view(1, 2, 3, 10)
    got = loss(u, v, form=form)
    assert got.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            wanted = loss(u[i, 0], v[0, j], form=form).item()
            assert got[i, j].item() == pytest.approx(wanted, rel=1e-12)


@BOTH
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 12))
def test_log_form_is_the_paper_form_without_its_floor(loss, seed, classes):
    u = random_logits(seed, classes=classes).requires_grad_()
    v = random_logits(seed + 1, classes=classes).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bimask.metrics.agreement.EPSILON", 0.0)
        paper = loss(u, v, form="paper")
        paper_gradients = torch.autograd.grad(paper, (u, v))
    log = loss(u, v, form="log")
    gradients = torch.autograd.grad(log, (u, v))
    torch.testing.assert_close(log, paper, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients, paper_gradients, rtol=1e-9, atol=1e-9)
    assert torch.cat(gradients).abs().max() > 1e-4


@BOTH
def test_the_floor_hardly_matters_at_moderate_margins(loss):
    u, v = random_logits(0, scale=1.0), random_logits(1, scale=1.0)
    paper, log = loss(u, v, form="paper"), loss(u, v, form="log")
    torch.testing.assert_close(log, paper, rtol=0, atol=1e-6)


@BOTH
def test_log_form_is_exact_to_a_margin_of_1e4(loss):
    u = two_classes(1e4, torch.float32)
    v = two_classes(1e4 if loss is disagree else -1e4, torch.float32)
    value = loss(u, v, form="log")
    value.backward()
    # u and v meet in two ways of probability exp(-margin) each
    assert value.item() == pytest.approx(1e4 - math.log(2), rel=1e-6)
    assert u.grad[0, 0].abs().item() == pytest.approx(0.5, rel=1e-3)
    assert u.grad.isfinite().all()


@FORMS
@BOTH
def test_a_constant_on_all_logits_changes_nothing(loss, form):
    u, v = random_logits(4), random_logits(5)
    for shift in (-1e4, 1e4):
        shifted = loss(u + shift, v - shift, form=form)
        torch.testing.assert_close(shifted, loss(u, v, form=form), rtol=1e-9, atol=1e-9)


def test_paper_form_flattens_where_the_log_form_does_not():
    u, v = two_classes(40.0, torch.float32), two_classes(40.0, torch.float32)
    paper = disagree(u, v, form="paper")
    (flat,) = torch.autograd.grad(paper, u)
    (true,) = torch.autograd.grad(disagree(u, v, form="log"), u)
    assert paper.item() == pytest.approx(-math.log(1e-8), abs=1e-4)
    assert flat.abs().max() < 1e-8
    assert true.abs().max().item() == pytest.approx(0.5, rel=1e-3)


@FORMS
@BOTH
def test_is_symmetric(loss, form):
    u, v = random_logits(2), random_logits(3)
    one, other = loss(u, v, form=form), loss(v, u, form=form)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert loss(u, 2 * v, form=form) != one


@FORMS
def test_small_where_it_should_be_and_large_where_not(form):
    sure = 9 * torch.eye(4, dtype=torch.float64)
    other = sure.roll(1, 0)
    assert agree(sure, sure, form=form) < 0.01 < 5 < agree(sure, other, form=form)
    assert disagree(sure, other, form=form) < 0.01 < 5 < disagree(sure, sure, form=form)


def test_selection_cost_is_the_mean_over_all_channels():
    selections = [torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.0])]
    assert selection_cost(selections).item() == (0.5 + 0.75 + 1.0) / 4
    assert selection_cost([torch.ones(3), torch.ones(2)]).item() == 0
    assert selection_cost([torch.zeros(3), torch.zeros(2)]).item() == 1


def test_selection_cost_of_members_is_that_of_each():
    rows = [torch.tensor([[1.0, 0.5], [0.0, 0.0]]), torch.tensor([[0.25], [1.0]])]
    assert selection_cost(rows).tolist() == pytest.approx([1.25 / 3, 2 / 3])
    for member in range(2):
        assert selection_cost(rows)[member] == selection_cost([row[member] for row in rows])


def test_selection_cost_has_no_gradient_at_one_and_an_even_one_below():
    selection = torch.tensor([1.0, 0.9, 0.0, 1.0], requires_grad=True)
    selection_cost([selection]).backward()
    assert selection.grad.tolist() == [0.0, -0.25, -0.25, 0.0]


def test_selection_cost_sums_layers_in_float32():
    wide = torch.zeros(2**12, dtype=torch.float64)
    narrow = torch.tensor([1 - 2**-13], dtype=torch.float64)  # too little to move 4096 in float32
    cost = selection_cost([wide, *[narrow] * 1000])
    assert cost.dtype == torch.float32
    assert cost == torch.tensor(2.0**12) / (2**12 + 1000)
