import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bimask.defences.ims.synthesis import TriggerSynthesizer
from bimask.masking.masks import MaskSet, fold
from bimask.metrics.agreement import agree, disagree

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "sign"])


@pytest.fixture
def inverse_net(tiny_net):
    masks = MaskSet.for_model(tiny_net, mask=0.6, selection=0.3)
    masks.mask.data.uniform_(0, 1, generator=torch.Generator().manual_seed(3))
    return fold(tiny_net, masks, inverse=True)


def both(inverse, reference):
    """What a synthesizer asks for: the reference's logits, then the inverse-masked ones."""
    return lambda images: (reference(images), inverse(images))


def norm_of(delta, norm):
    return delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.square().sum((1, 2, 3)).sqrt()


def losses(inverse, reference, images, delta, form="paper"):
    with torch.no_grad():
        logits, clean_logits = reference(images + delta), reference(images)
        agreed = agree(inverse(images + delta), logits, form=form)
        return agreed.item(), disagree(logits, clean_logits, form=form).item()


def test_recorded_inner_problem(parity, parity_victim):
    masks = MaskSet.for_model(parity_victim)
    for kind in ("mask", "selection"):
        values = [torch.from_numpy(parity[f"inner.{kind}.{j}"]) for j in range(3)]
        getattr(masks, kind).data = torch.cat(values)
    images = torch.from_numpy(parity["images"])
    clean_logits = parity_victim(images).detach()
    inverse = fold(parity_victim, masks, inverse=True)

    def check(got, name):
        wanted = torch.from_numpy(parity[f"inner.{name}"])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)

    check(clean_logits, "logits_reference")
    check(fold(parity_victim, masks)(images).detach(), "logits_masked")
    check(inverse(images).detach(), "logits_inverse")
    synthesize = TriggerSynthesizer(steps=20, step_size=0.01, budget=0.15, weight_decay=0.01)
    triggers = synthesize(both(inverse, parity_victim), images, clean_logits)
    check(triggers.delta, "delta")
    check(triggers.agree, "agree")
    check(triggers.disagree, "disagree")


@NORMS
@OPTIMIZERS
def test_perturbations_end_inside_the_budget_and_reach_it(
    tiny_net, inverse_net, pictures, norm, optimizer
):
    settings = {"steps": 8, "step_size": 0.05, "norm": norm, "optimizer": optimizer}
    clean_logits = tiny_net(pictures).detach()

    @given(budget=st.floats(1e-3, 0.2), clip=st.booleans())
    def check(budget, clip):
        synthesize = TriggerSynthesizer(budget=budget, clip_images=clip, **settings)
        delta = synthesize(both(inverse_net, tiny_net), pictures, clean_logits).delta
        norms = norm_of(delta, norm)
        if clip:
            assert norms.max() <= budget + 1e-6  # the pixels' rounding, not the budget's
            assert (pictures + delta).min() >= 0
            assert (pictures + delta).max() <= 1
        else:
            assert budget * (1 - 1e-3) <= norms.max() <= budget * (1 + 1e-6)

    check()


@NORMS
def test_only_clipping_keeps_images_in_range(tiny_net, inverse_net, norm):
    edges = torch.randint(0, 2, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    clean_logits = tiny_net(edges).detach()
    ends = {}
    for clip in (False, True):
        synthesize = TriggerSynthesizer(
            steps=5, step_size=0.1, budget=0.3, norm=norm, optimizer="sign", clip_images=clip
        )
        ends[clip] = edges + synthesize(both(inverse_net, tiny_net), edges, clean_logits).delta
    assert ends[False].min() < 0
    assert ends[False].max() > 1
    assert ends[True].min() >= 0
    assert ends[True].max() <= 1
    assert not torch.equal(ends[True], edges)


@NORMS
@OPTIMIZERS
@pytest.mark.parametrize("form", ["paper", "log"])
def test_loss_falls(tiny_net, inverse_net, pictures, norm, optimizer, form):
    clean_logits = tiny_net(pictures).detach()
    synthesize = TriggerSynthesizer(
        steps=10, step_size=0.01, budget=0.5, norm=norm, optimizer=optimizer, form=form
    )
    triggers = synthesize(both(inverse_net, tiny_net), pictures, clean_logits)
    before = losses(inverse_net, tiny_net, pictures, 0, form)
    after = losses(inverse_net, tiny_net, pictures, triggers.delta, form)
    assert sum(after) < sum(before) - 1e-3
    assert triggers.agree[0] == pytest.approx(before[0], rel=1e-5)
    assert triggers.disagree[0] == pytest.approx(before[1], rel=1e-5)
    assert len(triggers.agree) == len(triggers.disagree) == 10


def test_losses_are_those_before_each_step(tiny_net, inverse_net, pictures):
    clean_logits = tiny_net(pictures).detach()
    run = [
        TriggerSynthesizer(steps=steps, step_size=0.02)(
            both(inverse_net, tiny_net), pictures, clean_logits
        )
        for steps in (3, 4)
    ]
    agreed, disagreed = losses(inverse_net, tiny_net, pictures, run[0].delta)
    assert run[1].agree[3] == pytest.approx(agreed, rel=1e-5)
    assert run[1].disagree[3] == pytest.approx(disagreed, rel=1e-5)


def test_one_sign_step_is_the_step_size_down_the_gradient(tiny_net, inverse_net, pictures):
    clean_logits = tiny_net(pictures).detach()
    delta = torch.zeros_like(pictures, requires_grad=True)
    logits = tiny_net(pictures + delta)
    total = agree(inverse_net(pictures + delta), logits) + disagree(logits, clean_logits)
    (gradient,) = torch.autograd.grad(total, delta)
    lengths = gradient.square().sum((1, 2, 3), keepdim=True).sqrt()
    wanted = {"linf": -0.01 * gradient.sign(), "l2": -0.01 * gradient / lengths}
    for norm, step in wanted.items():
        synthesize = TriggerSynthesizer(steps=1, step_size=0.01, norm=norm, optimizer="sign")
        got = synthesize(both(inverse_net, tiny_net), pictures, clean_logits).delta
        torch.testing.assert_close(got, step, rtol=1e-4, atol=1e-8)


@NORMS
def test_momentum_by_hand(tiny_net, inverse_net, pictures, norm):
    model, inverse, images = tiny_net.double(), inverse_net.double(), pictures.double()
    clean_logits = model(images).detach()

    def gradient_at(delta):
        delta = delta.clone().requires_grad_()
        logits = model(images + delta)
        total = agree(inverse(images + delta), logits) + disagree(logits, clean_logits)
        (gradient,) = torch.autograd.grad(total, delta)
        return gradient / gradient.abs().sum((1, 2, 3), keepdim=True)

    def step(velocity):
        lengths = velocity.square().sum((1, 2, 3), keepdim=True).sqrt()
        return 0.01 * (velocity.sign() if norm == "linf" else velocity / lengths)

    velocity = gradient_at(torch.zeros_like(images))
    wanted = -step(velocity)
    velocity = 0.7 * velocity + gradient_at(wanted)
    wanted = wanted - step(velocity)
    deltas = [
        TriggerSynthesizer(steps=2, step_size=0.01, norm=norm, optimizer="sign", momentum=momentum)(
            both(inverse, model), images, clean_logits
        ).delta
        for momentum in (0.7, 0.0)
    ]
    torch.testing.assert_close(deltas[0], wanted, rtol=0, atol=1e-10)
    assert (deltas[1] - wanted).abs().max() > 1e-4


@OPTIMIZERS
def test_last_is_one_step_behind_with_the_answer_to_it(tiny_net, inverse_net, pictures, optimizer):
    clean_logits, answers = tiny_net(pictures).detach(), both(inverse_net, tiny_net)
    run = {
        steps: TriggerSynthesizer(steps=steps, step_size=0.02, optimizer=optimizer)(
            answers, pictures, clean_logits
        )
        for steps in (1, 2, 3)
    }
    assert not run[1].last.any()
    torch.testing.assert_close(run[1].last_logits, clean_logits)
    for steps in (2, 3):
        assert torch.equal(run[steps].last, run[steps - 1].delta)
        answer = tiny_net(pictures + run[steps].last).detach()
        torch.testing.assert_close(run[steps].last_logits, answer)
    assert not torch.equal(run[3].delta, run[3].last)
    assert not run[3].last_logits.requires_grad


MEMBERS = [
    {"steps": 4, "step_size": 0.05, "budget": 0.1, "weight_decay": 0.5},
    {"steps": 2, "step_size": 0.01, "budget": 0.2, "weight_decay": 0.0},
    {"steps": 2, "step_size": 0.3, "budget": 0.15, "weight_decay": 0.01},
    {"steps": 1, "step_size": 0.02, "budget": 1.0, "weight_decay": 0.01},
]
SHARED = [
    {},
    {"norm": "l2", "clip_images": True},
    {"optimizer": "sign", "momentum": 0.8},
    {"optimizer": "sign", "norm": "l2", "form": "log"},
]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("shared", SHARED, ids=str)
def test_members_get_what_each_would_get_alone(tiny_net, inverse_net, pictures, shared, started):
    images = torch.stack([pictures, pictures.flip(0), pictures.flip(3), pictures / 2])
    with torch.no_grad():
        clean_logits = torch.stack([tiny_net(part) for part in images])
    start = 0.05 * torch.rand(images.shape, generator=torch.Generator().manual_seed(5))
    asked = []

    def answers(stacked):
        asked.append(len(stacked))
        flat = stacked.flatten(0, 1)
        logits, inverse_logits = tiny_net(flat), inverse_net(flat)
        return logits.unflatten(0, stacked.shape[:2]), inverse_logits.unflatten(0, stacked.shape[:2])

    lists = {name: [member[name] for member in MEMBERS] for name in MEMBERS[0]}
    together = TriggerSynthesizer(**lists, **shared)(
        answers, images, clean_logits, start=start if started else None
    )
    assert asked == [4, 3, 1, 1]  # those that still have steps to go
    for number, member in enumerate(MEMBERS):
        alone = TriggerSynthesizer(**member, **shared)(
            both(inverse_net, tiny_net),
            images[number],
            clean_logits[number],
            start=start[number] if started else None,
        )
        steps = member["steps"]
        assert torch.equal(together.delta[number], alone.delta)
        assert torch.equal(together.last[number], alone.last)
        assert torch.equal(together.last_logits[number], alone.last_logits)
        # losses are means over few numbers, which single precision sums as it likes
        for history, mine in ((together.agree, alone.agree), (together.disagree, alone.disagree)):
            torch.testing.assert_close(history[:steps, number], mine)
            assert history[steps:, number].isnan().all()


def test_a_start_is_gone_on_from_and_left_alone(tiny_net, inverse_net, pictures):
    clean_logits = tiny_net(pictures).detach()
    synthesize = TriggerSynthesizer(steps=2, step_size=0.01, budget=0.1, optimizer="sign")
    first = synthesize(both(inverse_net, tiny_net), pictures, clean_logits).delta
    before = first.clone()
    second = synthesize(both(inverse_net, tiny_net), pictures, clean_logits, start=first).delta
    assert torch.equal(first, before)
    once = TriggerSynthesizer(steps=4, step_size=0.01, budget=0.1, optimizer="sign")
    assert torch.equal(second, once(both(inverse_net, tiny_net), pictures, clean_logits).delta)


def test_neither_parameters_nor_images_get_gradients(tiny_net, inverse_net, pictures):
    models = (tiny_net, inverse_net)
    assert all(value.requires_grad for model in models for value in model.parameters())
    images, weights = pictures.clone(), [v.clone() for m in models for v in m.state_dict().values()]
    synthesize = TriggerSynthesizer(steps=3, step_size=0.1)
    triggers = synthesize(both(inverse_net, tiny_net), images, tiny_net(images).detach())
    assert all(value.grad is None for model in models for value in model.parameters())
    assert all(map(torch.equal, weights, [v for m in models for v in m.state_dict().values()]))
    assert torch.equal(images, pictures)
    assert not any(t.requires_grad for t in (triggers.delta, triggers.agree, triggers.disagree))


def sharing(images, positions):
    shared = torch.zeros(len(images), 1, 1, 1, dtype=torch.bool)
    shared[positions] = True
    return shared


@NORMS
@OPTIMIZERS
@pytest.mark.parametrize("clip", [False, True])
def test_images_that_share_get_one_perturbation_and_the_others_their_own(
    tiny_net, inverse_net, pictures, norm, optimizer, clip
):
    shared = sharing(pictures, [1, 4, 5])
    settings = {"steps": 3, "step_size": 0.2, "budget": 0.5, "norm": norm, "optimizer": optimizer}
    synthesize = TriggerSynthesizer(**settings, clip_images=clip)
    clean_logits = tiny_net(pictures).detach()
    ask = both(inverse_net, tiny_net)
    delta = synthesize(ask, pictures, clean_logits, shared=shared).delta
    alone = synthesize(ask, pictures, clean_logits).delta
    assert torch.equal(delta[1], delta[4])
    assert torch.equal(delta[1], delta[5])
    assert not torch.equal(delta[1], alone[1])
    others = ~shared.flatten()
    torch.testing.assert_close(delta[others], alone[others], rtol=0, atol=1e-6)
    perturbed = synthesize.perturb(pictures, delta, shared)
    inside = perturbed.min() >= 0 and perturbed.max() <= 1
    assert inside == clip  # at this budget something leaves the range where nothing clips it


def test_a_universal_perturbation_follows_the_sum_of_its_images_gradients(
    tiny_net, inverse_net, pictures
):
    """Against autograd on one tensor that all images add."""
    shared = sharing(pictures, slice(None))
    synthesize = TriggerSynthesizer(steps=1, step_size=0.1, budget=1.0, optimizer="sign", form="log")
    clean_logits = tiny_net(pictures).detach()
    delta = synthesize(both(inverse_net, tiny_net), pictures, clean_logits, shared=shared).delta
    common = torch.zeros_like(pictures[:1]).requires_grad_()
    logits, inverse = tiny_net(pictures + common), inverse_net(pictures + common)
    loss = agree(inverse, logits, form="log") + disagree(logits, clean_logits, form="log")
    (gradient,) = torch.autograd.grad(loss, common)
    assert torch.equal(delta, -0.1 * gradient.sign().expand_as(delta))


def test_a_shared_perturbation_of_one_image_is_its_own(tiny_net, inverse_net, pictures):
    clean_logits = tiny_net(pictures).detach()
    synthesize = TriggerSynthesizer(steps=4, step_size=0.02, budget=0.1)
    ask = both(inverse_net, tiny_net)
    one = synthesize(ask, pictures, clean_logits, shared=sharing(pictures, [2])).delta
    assert torch.equal(one, synthesize(ask, pictures, clean_logits).delta)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("optimizer", ["adamw", "sign"])
def test_budgets_and_steps_of_each_image_are_those_of_separate_calls(
    tiny_net, inverse_net, pictures, norm, optimizer
):
    ask, clean_logits = both(inverse_net, tiny_net), tiny_net(pictures).detach()
    small = sharing(pictures, slice(0, 3))

    def found(step_size, budget):
        settings = {"steps": 3, "norm": norm, "optimizer": optimizer}
        synthesize = TriggerSynthesizer(**settings, step_size=step_size, budget=budget)
        return synthesize(ask, pictures, clean_logits).delta

    mixed = found(torch.where(small, 0.01, 0.2), torch.where(small, 0.02, 0.5))
    torch.testing.assert_close(mixed[:3], found(0.01, 0.02)[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[3:], found(0.2, 0.5)[3:], rtol=0, atol=1e-6)
