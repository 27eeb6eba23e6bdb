import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bimask.defences.ims.optim import AdamWState, bias_corrections

rates = st.floats(1e-4, 0.5)
decays = st.floats(0, 0.5)


class Rows:
    """Rows of one state, each at a step of its own, beside a torch.optim.AdamW for every row."""

    def __init__(self, lrs, decays, shape=(3, 2), seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.values = self.random(len(lrs), *shape)
        self.lrs = torch.tensor(lrs, dtype=torch.float64)
        self.decays = torch.tensor(decays, dtype=torch.float64)
        self.state, self.steps = AdamWState(self.values), [0] * len(lrs)
        self.wanted = [row.clone().requires_grad_() for row in self.values]
        self.torchs = [None] * len(lrs)
        for row in range(len(lrs)):
            self.renew(row)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def renew(self, row):
        lr, decay = self.lrs[row].item(), self.decays[row].item()
        self.torchs[row] = torch.optim.AdamW([self.wanted[row]], lr=lr, weight_decay=decay)

    def step(self, *rows):
        index, gradient = torch.tensor(rows), self.random(len(rows), *self.values.shape[1:])
        for row, of_row in zip(rows, gradient, strict=True):
            self.steps[row] += 1
            self.wanted[row].grad = of_row.clone()
            self.torchs[row].step()
        firsts, seconds = zip(*(bias_corrections(self.steps[row]) for row in rows), strict=True)
        moved = self.values[index]
        self.state.step_(
            moved,
            gradient,
            lr=self.column(self.lrs[index]),
            weight_decay=self.column(self.decays[index]),
            corrections=(self.column(firsts), self.column(seconds)),
            rows=index,
        )
        self.values[index] = moved

    def column(self, values):
        values = torch.as_tensor(values, dtype=torch.float64)
        return values.view(-1, *[1] * (self.values.ndim - 1))

    def check(self):
        wanted = torch.stack(self.wanted).detach()
        torch.testing.assert_close(self.values, wanted, rtol=1e-12, atol=1e-12)


@given(settings=st.lists(st.tuples(rates, decays), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_row_moves_as_torchs_adamw_moves_it_alone(settings, seed):
    rows = Rows(*zip(*settings, strict=True), seed=seed)
    for _ in range(5):
        rows.step(*range(len(settings)))
    rows.check()


@given(turns=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=8))
def test_rows_may_stand_at_different_steps_and_come_in_any_order(turns):
    rows = Rows([0.1, 0.02, 0.3, 0.001], [0.0, 0.01, 0.2, 0.5])
    for turn in turns:
        rows.step(*sorted(turn, key=lambda row: -row))
    rows.check()


def test_a_forgotten_row_starts_anew_and_the_others_go_on():
    rows = Rows([0.1, 0.02, 0.3], [0.01, 0.01, 0.0])
    for _ in range(3):
        rows.step(0, 1, 2)
    rows.state.forget(1)
    rows.steps[1] = 0
    rows.renew(1)
    for _ in range(3):
        rows.step(0, 1, 2)
    rows.check()


def test_a_slice_of_rows_is_updated_in_place_and_the_rest_is_left():
    rows = Rows([0.1, 0.1, 0.1], [0.01, 0.01, 0.01])
    before, gradient = rows.values.clone(), rows.random(2, 3, 2)
    settings = {"lr": rows.column(rows.lrs[:2]), "weight_decay": rows.column(rows.decays[:2])}
    rows.state.step_(
        rows.values[:2], gradient, **settings, corrections=bias_corrections(1), rows=slice(2)
    )
    for row in range(2):
        rows.wanted[row].grad = gradient[row]
        rows.torchs[row].step()
    rows.check()
    assert torch.equal(rows.values[2], before[2])
    assert not rows.state.first[2].any()
    assert not rows.state.second[2].any()


def test_the_first_step_by_hand():
    values = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    gradient = torch.tensor([[4.0, -0.25, 0.0]], dtype=torch.float64)
    AdamWState(values).step_(
        values,
        gradient,
        lr=torch.tensor(0.1),
        weight_decay=torch.tensor(0.5),
        corrections=bias_corrections(1),
    )
    # decay by 0.05 of the value, then 0.1 against the sign; without a gradient decay only
    assert values.tolist() == [pytest.approx([0.95 - 0.1, -1.9 + 0.1, 0.475], abs=1e-7)]


@pytest.mark.parametrize("step", [1, 2, 50, 10_000])
def test_corrections_are_the_sums_of_the_moments_weights(step):
    weights = [(1 - beta) * sum(beta**i for i in range(step)) for beta in (0.9, 0.999)]
    assert bias_corrections(step) == pytest.approx(weights)
