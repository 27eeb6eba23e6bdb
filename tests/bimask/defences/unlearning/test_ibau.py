import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.unlearning.ibau import (
    Ibau,
    IbauConfig,
    carriers,
    hypergradient,
    inner_objective,
)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        rows = images.flatten(1, 2)
        return self.head(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


@pytest.fixture
def problem():
    """A smooth net of 15 weights, of images of four pixels, and a minimum of its inner problem."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Softplus(), nn.Linear(2, 2)).double()
    net.append(nn.BatchNorm1d(2).double()).eval()
    images, labels = 0.4 + 0.2 * torch.rand(6, 1, 2, 2).double(), torch.arange(6) % 2

    def inner(d):
        return inner_objective(net, images, labels, d, penalty=0.5)

    def outer(d):
        return F.cross_entropy(net(images + d), labels)

    d = torch.zeros(1, 1, 2, 2).double()
    for _ in range(300):
        d = d.detach().requires_grad_()
        (slope,) = torch.autograd.grad(inner(d), d)
        d = d - 0.5 * slope
    return inner, outer, d.detach(), list(net.parameters())


def exact(inner, outer, d, weights):
    """grad_w L - (d2G/dw dd) (d2G/dd dd)^-1 grad_d L, with the whole Hessian."""
    d = d.requires_grad_()
    by_d, *direct = torch.autograd.grad(outer(d), [d, *weights])
    (slope,) = torch.autograd.grad(inner(d), d, create_graph=True)
    hessian = torch.stack(
        [torch.autograd.grad(one, d, retain_graph=True)[0].flatten() for one in slope.flatten()]
    )
    assert (torch.linalg.eigvalsh(hessian) > 0).all(), "a minimum"
    v = torch.linalg.solve(hessian, by_d.flatten()).view_as(d)
    mixed = torch.autograd.grad(slope, weights, v, materialize_grads=True, allow_unused=True)
    return [one - other for one, other in zip(direct, mixed, strict=True)]


def test_the_fixed_point_converges_to_the_exact_implicit_gradient(problem):
    inner, outer, d, weights = problem
    wanted = torch.cat([g.flatten() for g in exact(inner, outer, d, weights)])
    errors = []
    for steps in (1, 5, 25, 125, 625):
        loss, found = hypergradient(inner, outer, d, weights, steps, step_size=0.1)
        errors.append(float((torch.cat([g.flatten() for g in found]) - wanted).norm()))
        assert loss == pytest.approx(float(outer(d)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 * float(wanted.norm())
    (direct,) = (torch.autograd.grad(outer(d.detach()), weights),)
    plain = torch.cat([g.flatten() for g in direct])
    assert float((plain - wanted).norm()) > 1e-3 * float(wanted.norm()), "the implicit part counts"


@pytest.mark.parametrize(
    ("images", "share", "expected"), [(1, 0.01, 1), (20, 0.01, 1), (256, 0.01, 3), (8, 0.5, 4)]
)
def test_one_image_at_least_carries_the_perturbation(images, share, expected):
    carried = carriers(images, share, torch.Generator().manual_seed(0))
    assert carried.shape == (images, 1, 1, 1)
    assert carried.sum() == expected


def test_batch_norms_keep_their_statistics_and_learn_their_weights(toy):
    result = toy.defended(Ibau(), IbauConfig(epochs=1))
    before = toy.net.state_dict()
    for name in ("1.running_mean", "1.running_var", "5.num_batches_tracked"):
        assert torch.equal(result.tensors[name], before[name])
    assert not torch.equal(result.tensors["1.weight"], before["1.weight"])


def test_attention_has_its_second_derivative():
    torch.manual_seed(0)
    net = Attending()
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    (result,) = Ibau().run(
        net.eval(),
        CleanData(images, labels),
        [IbauConfig(epochs=1)],
        generators=[torch.Generator().manual_seed(0)],
    )
    assert result.changed


def test_a_square_that_the_net_obeyed_is_forgotten(toy):
    toy.forgets(Ibau(), IbauConfig(epochs=20, lr=3e-3, patched_share=0.3))
