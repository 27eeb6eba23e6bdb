"""What a model may answer and do, and be defended: put right and told, or refused in one sentence."""

import copy
import importlib.util
import json
import sys
import threading
import warnings
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.errors import BimaskError, ModelError, NonFiniteError
from bimask.masking.discovery import masks_for
from bimask.masking.masks import masked_forward
from bimask.nets.admission import admit
from bimask.nets.door import Door

SPEC = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "families.py")
families = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)

CLASSES = families.CLASSES
QUICK = PurifyConfig(
    profile="fast",
    precision="float32",
    initialise_rounds=1,
    minimise_rounds=1,
    select_rounds=1,
    selection_weight=0,
    initial_selection=0.8,
)


class Net(nn.Module):
    """A small classifier; `answer` makes of its logits what it answers, `enter` of images what it
    sees."""

    def __init__(self, answer=None, enter=None, *, channels=3, norm=None):
        super().__init__()
        self.answer, self.enter = answer, enter
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def features(self, x):
        x = x if self.enter is None else self.enter(x)
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x):
        logits = self.fc(self.features(x).mean((2, 3)))
        return logits if self.answer is None else self.answer(logits)


def seeded(make, *args, **settings):
    """A net with random weights, always the same, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = families.randomised(make(*args, **settings))
    for module in net.modules():
        if isinstance(module, nn.Linear) and module.out_features == CLASSES:
            module.weight.data.mul_(4)
    return net


def images(count=6, channels=3, height=12, width=12):
    family = SimpleNamespace(shape=(channels, 4 * -(-height // 4), 4 * -(-width // 4)))
    return families.pictures(family, count)[:, :, :height, :width].contiguous()


def refusal(model, given=None, error=ModelError):
    """The one sentence that both doors refuse a model with."""
    given = images() if given is None else given
    kept = given.clone()
    with pytest.raises(error) as refused:
        admit(model, given)
    with pytest.raises(error) as again:
        purify(model, given, QUICK)
    said = str(refused.value)
    assert str(again.value) == said
    assert type(refused.value) is error
    assert "\n" not in said
    assert said.endswith(".")
    assert "Traceback" not in said
    assert "; " in said  # and what to do
    assert torch.equal(given, kept)
    return said


def plain_logits(net, given):
    """What a `Net` computes before it answers."""
    with torch.no_grad():
        return net.fc(net.features(given.clone()).mean((2, 3)))


def purified(model, given=None, **settings):
    given = images() if given is None else given
    config = QUICK.model_copy(update=settings)
    return purify(model, given, config, generator=torch.Generator().manual_seed(0))


# --- what is let in as it is ---


def test_a_plain_net_is_let_in_as_it_is():
    net = seeded(Net)
    admitted = admit(net, images())
    assert admitted.door == Door()
    assert admitted.findings == ()
    assert admitted.plain is net
    assert admitted.model is not net
    assert not admitted.model.training
    with torch.no_grad():
        assert torch.equal(admitted.model(images()), net(images()))


DOORS = {
    "lenet, view": Door(contiguous=True),
    "wide resnet": Door(take=1),
    "ends in 1x1, not flat": Door(flatten=True),
    "vit, transformers": Door(take="logits"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_families_need_no_door_but_for_their_answers(name):
    family = families.FAMILIES[name]
    if family.needs is not None:
        pytest.importorskip(family.needs)
    model, given = families.built(family), families.pictures(family)
    admitted = admit(model, given)
    assert admitted.door == DOORS.get(name, Door())
    with torch.no_grad():
        logits = admitted.model(given)
        assert logits.shape == (len(given), CLASSES)
        laid_out = given.clone(memory_format=torch.channels_last)
        torch.testing.assert_close(admitted.model(laid_out), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make", [Net, lambda: Net(lambda z: F.softmax(z, 1)), lambda: Net(nn.Softmax(1))]
)
def test_the_users_model_is_left_as_it_is(make, training):
    net = seeded(make).train(training)
    before = copy.deepcopy(net.state_dict())
    modules = list(net.named_modules())
    result = purified(net, sites="all")
    result.model()
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert list(net.named_modules()) == modules
    assert all(module.training == training for module in net.modules())
    assert all(value.requires_grad and value.grad is None for value in net.parameters())
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- probabilities ---


@pytest.mark.parametrize(
    "answer",
    [
        lambda z: F.softmax(z, dim=1),
        lambda z: torch.softmax(z, 1).clone(),
        lambda z: z.softmax(-1),
        lambda z: z.exp() / z.exp().sum(1, keepdim=True),
        lambda z: F.log_softmax(z, 1).exp(),
    ],
)
def test_probabilities_are_undone(answer):
    net = seeded(Net, answer)
    admitted = admit(net, images())
    assert admitted.door == Door(undo="log")
    (said,) = admitted.findings
    assert said == "The model answers with probabilities; their logarithms are taken as logits."
    with torch.no_grad():
        logits = plain_logits(net, images())
        expected = logits.log_softmax(1)
        torch.testing.assert_close(admitted.model(images()), expected, rtol=1e-4, atol=1e-4)


def test_a_net_that_answers_probabilities_is_purified_as_its_logits_are():
    answering, plain = seeded(Net, lambda z: F.softmax(z, 1)), seeded(Net)
    results = [purified(net, sites="all") for net in (answering, plain)]
    assert results[0].changed
    for name in ("mask", "selection"):
        got, expected = (getattr(result.masks, name) for result in results)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert (got - got.max()).abs().max() > 0.01
    with torch.no_grad():
        folded = results[0].model()(images())
        torch.testing.assert_close(folded.sum(1), torch.ones(len(folded)))
        assert (folded - answering(images())).abs().max() > 0.01


def test_a_softmax_at_the_end_is_stepped_around():
    net = seeded(lambda: Net(nn.Softmax(dim=1)))
    admitted = admit(net, images())
    assert admitted.door == Door(bypass=("answer",))
    assert admitted.findings == ("The model ends in Softmax (answer), which is stepped around.",)
    with torch.no_grad():
        assert torch.equal(admitted.model(images()), plain_logits(net, images()))
    result = purified(net)
    assert result.changed
    assert type(result.model().answer) is nn.Softmax


@pytest.mark.parametrize("answer", [nn.LogSoftmax(1), lambda z: F.log_softmax(z, 1)])
def test_a_log_softmax_is_harmless(answer):
    net = seeded(Net, answer)
    admitted = admit(net, images())
    assert admitted.door == Door()
    assert admitted.findings == ()
    assert purified(net).changed


class Attending(nn.Module):
    """One softmax module, in an attention and, if `ends`, behind the logits as well."""

    def __init__(self, ends=True):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, CLASSES)
        self.softmax, self.ends = nn.Softmax(-1), ends

    def forward(self, x):
        x = self.stem(x).flatten(2)
        logits = self.fc((x * self.softmax(x.sum(1, keepdim=True))).sum(2))
        return self.softmax(logits) if self.ends else logits


def test_a_softmax_that_is_used_elsewhere_too_is_not_left_out():
    net, without = seeded(Attending), seeded(Attending, ends=False)
    admitted = admit(net, images())
    assert admitted.door == Door(undo="log")
    assert admit(without, images()).door == Door()
    with torch.no_grad():
        expected = without(images()).log_softmax(1)
        torch.testing.assert_close(admitted.model(images()), expected, rtol=1e-4, atol=1e-4)


def test_a_softmax_under_two_names_is_left_out_under_both():
    net = seeded(lambda: Net(nn.Softmax(dim=1)))
    del net.answer
    net.first = net.answer = nn.Softmax(dim=1)
    admitted = admit(net, images())
    with torch.no_grad():
        assert torch.equal(admitted.model(images()), plain_logits(net, images()))


def test_probabilities_of_0_have_lost_their_logits():
    net = seeded(Net, lambda z: F.softmax(1000 * z, 1))
    assert "exactly 0" in refusal(net)
    assert "before" not in refusal(net)
    ended = seeded(lambda: Net(nn.Softmax(1)))
    ended.fc.weight.data.mul_(1000)
    assert admit(ended, images()).door.bypass == ("answer",)  # nothing is lost there


@pytest.mark.parametrize(
    "answer", [torch.sigmoid, lambda z: z.sigmoid(), F.sigmoid, torch.special.expit]
)
def test_sigmoids_are_refused(answer):
    assert "sigmoid" in refusal(seeded(Net, answer))


def test_a_sigmoid_module_at_the_end_is_stepped_around():
    net = seeded(lambda: Net(nn.Sigmoid()))
    admitted = admit(net, images())
    assert admitted.door.bypass == ("answer",)
    with torch.no_grad():
        assert torch.equal(admitted.model(images()), plain_logits(net, images()))
    assert purified(net).changed


def test_a_sigmoid_inside_is_no_answer():
    net = seeded(Net, enter=lambda x: x * x.sigmoid())
    assert admit(net, images()).door == Door()


# --- other answers ---

Named = namedtuple("Named", ["features", "logits"])


@pytest.mark.parametrize(
    ("answer", "take"),
    [
        (lambda z: (z,), 0),
        (lambda z: [z], 0),
        (lambda z: (z, None), 0),
        (lambda z: (torch.zeros(len(z), 6, 3, 3), z), 1),
        (lambda z: (z, torch.zeros(len(z), 6, 3, 3)), 0),
        (lambda z: {"logits": z, "features": z.new_zeros(len(z), 9)}, "logits"),
        (lambda z: {"features": z.new_zeros(len(z), 9), "out": z}, "out"),
        (lambda z: OrderedDict(anything=z), "anything"),
        (lambda z: Named(z.new_zeros(len(z), 9), z), "logits"),
        (lambda z: SimpleNamespace(loss=None, logits=z), "logits"),
        (lambda z: (z.argmax(1), z), 1),
    ],
)
def test_logits_are_found_in_what_a_model_answers(answer, take):
    net = seeded(Net, answer)
    admitted = admit(net, images())
    assert admitted.door == Door(take=take)
    (said,) = admitted.findings
    assert said.endswith(f"its entry {take!r} is taken as the logits.")
    with torch.no_grad():
        assert torch.equal(admitted.model(images()), plain_logits(net, images()))
    result = purified(net)
    assert result.changed
    assert type(result.model()(images())) is type(net(images()))


def test_probabilities_in_a_tuple_are_undone():
    net = seeded(Net, lambda z: (z.softmax(1), None))
    assert admit(net, images()).door == Door(take=0, undo="log")
    assert purified(net).changed


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda z: (z, z.new_zeros(len(z), 9)), "(0: (6, 5), 1: (6, 9))"),
        (lambda z: {"a": z, "b": z.new_zeros(len(z), 9)}, "(a: (6, 5), b: (6, 9))"),
        (lambda z: None, "NoneType"),
        (lambda z: "a cat", "str"),
        (lambda z: {}, "dict"),
        (lambda z: (z.argmax(1),), "tuple"),
        (lambda z: z.argmax(1), "torch.int64 (6,)"),
        (lambda z: z[:, 0], "torch.float32 (6,)"),
        (lambda z: z[:, :, None, None].expand(-1, -1, 3, 3), "(6, 5, 3, 3)"),
        (lambda z: z.mean(), "torch.float32 ()"),
        (lambda z: z.sum(0, keepdim=True), "(1, 5)"),
        (lambda z: z[:, :1], "one logit"),
        (lambda z: z[:, :1].sigmoid(), "one logit"),
        (lambda z: (z[:, :1], None), "one logit"),
    ],
)
def test_answers_that_hold_no_row_of_logits_are_refused(answer, said):
    assert said in refusal(seeded(Net, answer))


def test_what_is_said_of_one_logit_helps():
    def two_columns(z):
        z = z[:, :1]
        return torch.cat([torch.zeros_like(z), z], 1)

    assert "torch.cat([torch.zeros_like(z), z], 1)" in refusal(seeded(Net, lambda z: z[:, :1]))
    assert admit(seeded(Net, two_columns), images()).door == Door()


def test_logits_of_one_place_are_flattened():
    net = seeded(Net, lambda z: z[:, :, None, None])
    admitted = admit(net, images())
    assert admitted.door == Door(flatten=True)
    with torch.no_grad():
        assert torch.equal(admitted.model(images()), plain_logits(net, images()))
    result = purified(net)
    assert result.changed
    assert result.model()(images()).shape == (6, CLASSES, 1, 1)


@pytest.mark.parametrize(
    "door",
    [Door(), Door(take="out", undo="log", flatten=True), Door(take=1, clone=True, bypass=("a", "b.c"))],
)
def test_a_door_is_kept_as_json(door):
    assert Door.from_json(json.loads(json.dumps(door.as_json()))) == door


@pytest.mark.parametrize("content", [{"take": [1]}, {"undo": "exp"}, {"window": True}])
def test_other_json_is_no_door(content):
    with pytest.raises(TypeError):
        Door.from_json(content)


# --- images ---


def normalising(x):
    return x.sub_(0.5).div_(0.25)


def test_images_that_a_model_changes_are_given_as_clones():
    net, same = seeded(Net, enter=normalising), seeded(Net, enter=lambda x: (x - 0.5) / 0.25)
    given = images()
    admitted = admit(net, given)
    assert admitted.door == Door(clone=True)
    assert "in-place" in admitted.findings[0]
    result = purified(net, given)
    assert torch.equal(given, images())
    with torch.no_grad():
        assert torch.equal(admitted.model(given), same(images()))
        assert torch.equal(admitted.model(given), same(images()))
    assert torch.equal(given, images())
    expected = purified(same)
    torch.testing.assert_close(result.masks.mask, expected.masks.mask, rtol=0, atol=1e-5)
    assert result.changed


class Viewing(nn.Module):
    """Lays its maps out flat by `view`, which needs the plain memory layout."""

    def __init__(self, channels=3, height=12, width=12):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, stride=2)
        self.fc = nn.Linear(4 * ((height - 1) // 2) * ((width - 1) // 2), CLASSES)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.view(x.size(0), -1))


def channels_last(x):
    """Images whose strides are those of channels_last, of one channel too."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "laid_out", [lambda x: x, channels_last, lambda x: x.flip(0).mT.contiguous().mT]
)
def test_views_are_given_the_plain_layout(channels, laid_out):
    net = seeded(Viewing, channels)
    given = images(channels=channels)
    admitted = admit(net, laid_out(given))
    assert admitted.door == Door(contiguous=True)
    with torch.no_grad():
        assert torch.equal(admitted.model(channels_last(given)), net(given))
    for sites in ("published", "all"):
        result = purified(net, laid_out(given), sites=sites)
        assert result.changed
        with torch.no_grad():
            expected = masked_forward(net, result.masks, given)
            torch.testing.assert_close(result.model()(given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (4, 4)])
def test_images_need_not_be_square(shape):
    for make in (Net, lambda: Viewing(3, *shape)):
        assert purified(seeded(make), images(5, 3, *shape), sites="all").changed


@pytest.mark.parametrize("make", [Net, Viewing, Attending])
def test_one_image_is_enough(make):
    net = seeded(make, *([False] if make is Attending else []))
    result = purified(net, images(1), sites="all")
    assert result.changed
    with torch.no_grad():
        expected = masked_forward(net, result.masks, images())
        torch.testing.assert_close(result.model()(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        images(12)[::2],
        images(height=24)[:, :, ::2],
        images(channels=6)[:, ::2],
        images().transpose(2, 3),
        images(1).expand(6, -1, -1, -1),
        images()[:, :1].expand(-1, 3, -1, -1),
    ],
)
def test_images_need_not_be_contiguous(given):
    assert not given.is_contiguous()
    kept = given.clone()
    results = [purified(seeded(Net), x) for x in (given, kept.contiguous())]
    assert torch.equal(given, kept)
    assert torch.equal(results[0].masks.mask, results[1].masks.mask)


def test_images_in_double_precision_are_taken():
    results = [purified(seeded(Net), given) for given in (images().double(), images())]
    assert torch.equal(results[0].masks.mask, results[1].masks.mask)


# --- each image by itself ---


@pytest.mark.parametrize("count", [1, 6])
def test_statistics_of_the_batch_are_refused(count):
    net = seeded(Net, norm=nn.BatchNorm2d(6, track_running_stats=False))
    said = refusal(net, images(count))
    assert "norm has no running statistics" in said
    assert "`track_running_stats=True`" in said


def test_a_norm_that_stays_in_training_is_refused():
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    assert "norm stays in training mode" in refusal(seeded(Net, norm=Stubborn(6, momentum=0.0)))


def test_a_centred_batch_is_refused():
    said = refusal(seeded(Net, enter=lambda x: x - x.mean(0)))
    assert "depends on the other images" in said
    assert "by itself" in said


@pytest.mark.parametrize(
    "enter", [lambda x: F.dropout(x, 0.5), lambda x: x + 0.1 * torch.randn_like(x)]
)
def test_noise_that_eval_does_not_switch_off_is_refused(enter):
    said = refusal(seeded(Net, enter=enter))
    assert "`training=self.training`" in said


def test_attention_over_images_is_refused():
    def forward(net, x):
        tokens = net.stem(x).flatten(2).transpose(1, 2)
        return net.fc(net.encoder(tokens).mean(1))

    layer = nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        encoder = nn.TransformerEncoder(layer, 1)
    stem, fc = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, CLASSES)
    said = refusal(seeded(lambda: families.Net(forward, stem=stem, encoder=encoder, fc=fc)))
    assert "encoder.layers.0" in said
    assert "`batch_first=True`" in said


class Squeezing(nn.Module):
    """`squeeze` takes the dimension of images as well where there is one image."""

    def __init__(self, norm=False):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 6, 3), nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).squeeze()
        return self.fc2(F.relu(self.fc1(self.norm(x))))


@pytest.mark.parametrize("sites", ["published", "all"])
def test_squeezes_are_borne(sites):
    assert purified(seeded(Squeezing), sites=sites).changed


def test_a_forward_that_fails_on_one_image_alone_is_refused():
    said = refusal(seeded(Squeezing, norm=True))
    assert "`flatten(1)`" in said
    assert "self.fc2(F.relu(self.fc1(self.norm(x))))" in said


def test_a_number_of_images_in_the_forward_is_refused():
    said = refusal(seeded(Net, lambda z: z + torch.zeros(6, CLASSES)[: len(z)].view(6, -1)))
    assert ".view(6, -1)" in said


# --- what cannot be asked ---


def test_an_error_of_the_forward_is_told_with_its_line():
    def broken(x):
        return x @ x.new_zeros(3, 3)

    said = refusal(seeded(Net, enter=broken))
    line = broken.__code__.co_firstlineno + 1
    assert f"(line {line} of test_admission.py: return x @ x.new_zeros(3, 3))" in said
    assert "(6, 3, 12, 12) of torch.float32" in said


def test_an_error_of_many_lines_is_told_in_one():
    def broken(_x):
        raise ValueError("first line\nsecond line")

    assert "ValueError: first line (line" in refusal(seeded(Net, enter=broken))


@pytest.mark.parametrize("given", [images(channels=1), images(channels=4), images(height=16)])
def test_images_of_another_shape_are_refused(given):
    said = refusal(seeded(Viewing), given)
    assert str(tuple(given.shape)) in said
    assert "of the size and channels it was trained on" in said


def test_a_net_of_torchs_modules_alone_is_told_without_a_line():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, CLASSES)))
    said = refusal(net, images(height=13))
    assert "(line" not in said


def test_numbers_that_are_no_numbers_are_refused():
    net = seeded(Net)
    net.fc.weight.data[0, 0] = float("nan")
    assert "NaN or infinite" in refusal(net, error=NonFiniteError)
    net.fc.weight.data[0, 0] = float("inf")
    assert "NaN or infinite" in refusal(net, error=NonFiniteError)


@pytest.mark.parametrize(
    "enter",
    [
        lambda x: x.detach(),
        lambda x: x.round(),
        lambda x: torch.from_numpy(x.detach().numpy()),
        lambda x: (x * 255).byte().float() / 255,
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_images_that_no_gradient_reaches_are_refused(enter, frozen):
    net = seeded(Net, enter=enter).requires_grad_(not frozen)
    assert "No gradient gets through" in refusal(net)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_is_refused(context):
    class Without(Net):
        @context()
        def forward(self, x):
            return super().forward(x)

    said = refusal(seeded(Without))
    assert "`torch.no_grad`" in said


def test_a_backward_that_fails_is_refused():
    def spoilt(x):
        y = x.exp()
        return y * y.add_(1)

    said = refusal(seeded(Net, enter=spoilt))
    assert "in-place" in said


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_anew_for_gradients_are_refused(reentrant):
    class Checkpointed(Net):
        def features(self, x):
            return checkpoint(super().features, x, use_reentrant=reentrant)

    said = refusal(seeded(Checkpointed))
    assert "checkpoint" in said
    assert reentrant or "The model calls norm once more for its gradients" in said


def test_logits_of_a_constant_sum_have_gradients():
    net = seeded(Net, lambda z: torch.stack([z[:, 0], -z[:, 0]], 1))
    assert admit(net, images()).door == Door()


def test_torchscript_is_refused():
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, CLASSES)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit's end
        made = torch.jit.script(plain), torch.jit.trace(plain, images())
    for model in made:
        assert "TorchScript" in refusal(model)


def test_what_is_no_module_is_refused():
    net = seeded(Net)
    assert "OrderedDict" in refusal(net.state_dict())
    assert "function" in refusal(lambda x: net(x))


def test_a_model_that_cannot_be_copied_is_refused():
    net = seeded(Net)
    net.lock = threading.Lock()
    assert "cannot be copied (TypeError: cannot pickle '_thread.lock' object)" in refusal(net)


# --- wrappers, precision, computed tensors ---


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.DataParallel(nn.DataParallel(m))])
def test_parallel_training_is_unwrapped(wrap):
    net = seeded(Net)
    admitted = admit(wrap(net), images())
    assert admitted.plain is net
    assert "taken out of DataParallel" in admitted.findings[0]
    assert type(purified(wrap(net)).model()) is Net


def test_compiled_models_are_unwrapped():
    net = seeded(Net)
    compiled = torch.compile(net, backend="eager")
    admitted = admit(compiled, images())
    assert admitted.plain is net
    assert admitted.findings == (
        "The model was taken out of torch.compile; the result is the plain module.",
    )
    results = [purified(model) for model in (compiled, net)]
    assert torch.equal(results[0].masks.mask, results[1].masks.mask)
    assert type(results[0].model()) is Net


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_with_in_single(dtype):
    net = seeded(Net).to(dtype)
    admitted = admit(net, images())
    assert "half precision" in admitted.findings[0]
    assert {value.dtype for value in admitted.model.parameters()} == {torch.float32}
    result = purified(net, sites="all")
    assert result.changed
    folded = result.model()
    assert {value.dtype for value in folded.parameters()} == {dtype}
    with torch.no_grad():
        expected = masked_forward(admitted.model, result.masks, images())
        torch.testing.assert_close(folded.float()(images()), expected, rtol=0.05, atol=0.1)
    assert {value.dtype for value in net.parameters()} == {dtype}


def test_double_precision_is_kept():
    net = seeded(Net).double()
    assert admit(net, images()).findings == ()
    result = purified(net, sites="all")
    assert result.changed
    with torch.no_grad():
        expected = masked_forward(net, result.masks, images().double())
        torch.testing.assert_close(result.model()(images().double()), expected, rtol=0, atol=1e-11)


class Keeping(Net):
    """Keeps the features of its last pass, as for a look at them."""

    def forward(self, x):
        self.kept = self.features(x)
        return self.fc(self.kept.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["keeping", "pruned", "weight norm, old"])
def test_tensors_that_a_training_left_behind_are_no_hindrance(name):
    net = seeded(Keeping if name == "keeping" else families.FAMILIES[name].make)
    net(images()).sum().backward()  # `copy.deepcopy(net)` fails from here on
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    before = [value.clone() for value in net.parameters()]
    admitted = admit(net, images())
    copy.deepcopy(admitted.model)
    masks = masks_for(admitted.model, images(), "all")
    result = purified(net, sites="all")
    assert result.masks.gates == masks.gates
    assert result.changed
    with torch.no_grad():
        expected = masked_forward(net, result.masks, images())
        torch.testing.assert_close(result.model()(images()), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_every_refusal_is_of_the_packages_own():
    assert issubclass(ModelError, BimaskError)
    assert issubclass(NonFiniteError, BimaskError)


def test_a_result_says_what_was_done_about_the_model():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Softmax(1))
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rounds = {"initialise_rounds": 1, "minimise_rounds": 0, "select_rounds": 0}
    rounds |= {"initial_selection": 0.5}
    result = purify(net, images, PurifyConfig(profile="fast", **rounds))
    assert any("Softmax" in finding for finding in result.findings)
    assert result.changed
    assert purify(net[:4], images, PurifyConfig(profile="fast", **rounds)).findings == ()
