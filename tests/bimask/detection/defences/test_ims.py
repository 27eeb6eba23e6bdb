import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.detection import Detector
from bimask.detection.defences import DEFENCES
from bimask.detection.defences.ims import masks_of, object_answers
from bimask.detection.nets.matched import Matched, matched
from bimask.errors import ModelError
from bimask.masking.masks import fold, masked


def test_folded_weights_answer_as_the_masked_detector(family, detector_of, pictures):
    detector, (images, targets) = detector_of(family), pictures()
    masks = masks_of(detector)
    assert all(name.startswith("net.backbone.") for name in masks.sites)
    with torch.no_grad():
        masks.mask.uniform_(0, 1, generator=torch.Generator().manual_seed(0))
        masks.selection.uniform_(0, 0.5, generator=torch.Generator().manual_seed(1))
    for inverse in (False, True):
        folded = fold(detector, masks, inverse=inverse)
        assert folded.state_dict().keys() == detector.state_dict().keys()
        with torch.no_grad():
            torch.manual_seed(0)
            with masked(detector, masks, inverse=inverse):
                expected = object_answers(matched(detector, images, targets), targets)
            torch.manual_seed(0)
            got = object_answers(matched(folded, images, targets), targets)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not any(m._forward_hooks for m in detector.modules())


def test_an_object_is_answered_by_the_mean_of_its_predictions_and_none_of_the_classes_is_zero():
    seen = Matched(
        logits=torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        labels=torch.tensor([0, 0, 1]),
        picture=torch.tensor([0, 0, 1]),
        object=torch.tensor([1, 1, 0]),
        loss=torch.zeros(()),
        losses={},
    )
    targets = [
        {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2).long()},
        {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1).long()},
    ]
    expected = [[0.0, 0.0, 0.0], [2.0, 3.0, 0.0], [5.0, 6.0, 0.0]]
    assert object_answers(seen, targets).tolist() == expected


def test_the_terms_of_each_stage_are_those_of_the_paper(detector_of, pictures):
    images, targets = pictures(5)
    defence = DEFENCES["ims"]
    config = defence.config(
        initialise_rounds=1, minimise_rounds=1, select_rounds=1, batch_size=4, inner_steps=1
    )
    (result,) = defence.run(
        detector_of("fcos"), CleanData(images, targets), [config], generators=[torch.Generator()]
    )
    clean = {"clean_agree", "inverse_clean_disagree", "detection"}
    moved = {f"{who}_{what}" for who, what in (("triggered", "agree"), ("inverse_triggered", "agree"))}
    moved |= {"inverse_triggered_disagree"}
    assert [set(log.losses) for log in result.history] == [
        clean | {"selection_cost"},
        clean | moved,
        clean | moved | {"selection_cost"},
    ]


class Bare(nn.Module):
    def forward(self, images, targets=None):
        return {}


def test_a_detector_without_a_convolution_in_its_backbone_is_refused():
    with pytest.raises(ModelError, match="a `backbone` has nothing to mask"):
        masks_of(Detector(Bare(), [0]))
