"""Poisoning: which pictures, which pixels, which labels, and how many; what is asked under attack."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from bimask.detection import DetectionData
from bimask.detection.attacks import AnyAttack, ObjectDisappearance, RegionMisclassification
from bimask.errors import DataError, SettingError

BLUE = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1)


def data(count=20):
    """Grey pictures with two objects: class 0 and, in every second one, class 1, else class 2."""
    boxes = torch.tensor([[4.0, 4.0, 24.0, 20.0], [30.4, 30.4, 46.4, 42.4]])
    targets = tuple(
        {"boxes": boxes.clone(), "labels": torch.tensor([0, 1 + row % 2])} for row in range(count)
    )
    images = tuple(torch.full((3, 48, 48), 100, dtype=torch.uint8) for _ in range(count))
    return DetectionData(images, targets, ("a", "b", "c"))


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(before, after):
    """(H, W) bool, of one picture."""
    return (before != after).any(0)


def inside(box, shape=(48, 48)):
    """Pixels with their centre in a box: (H, W) bool."""
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in shape), indexing="ij")
    return (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])


RMA, ODA = RegionMisclassification(target=2), ObjectDisappearance()


@pytest.mark.parametrize("attack", [RMA, ODA], ids=["rma", "oda"])
@pytest.mark.parametrize(("source", "pool"), [(None, 20), (0, 20), (1, 10)])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_poisoning_changes_what_it_says_and_nothing_else(attack, source, pool, rate):
    attack = attack.model_copy(update={"source": source})
    clean = data()
    before = clean.digest
    poisoned = attack.poison(clean, rate=rate, generator=drawn())
    assert clean.digest == before
    touched = 0
    for row in range(len(clean)):
        old, new = clean.targets[row], poisoned.data.targets[row]
        pixels = changed(clean.images[row], poisoned.data.images[row])
        bearing = poisoned.triggered[row]
        if not len(bearing["labels"]):
            assert not pixels.any()
            assert torch.equal(new["boxes"], old["boxes"])
            assert torch.equal(new["labels"], old["labels"])
            continue
        touched += 1
        mine = torch.ones(2, dtype=torch.bool) if source is None else old["labels"] == source
        assert torch.equal(bearing["boxes"], old["boxes"][mine])
        assert torch.equal(bearing["labels"], old["labels"][mine])
        squares = 0
        for box in bearing["boxes"]:
            square = pixels & inside(box)
            squares += int(square.sum())
            # a quarter of the longer side: of 20 pixels 5, of 16 pixels 4
            assert int(square.sum()) == round(0.25 * float((box[2:] - box[:2]).max())) ** 2
            assert (poisoned.data.images[row][:, square] == BLUE).all()
        assert squares == int(pixels.sum())
        if attack.kind == "misclassification":
            assert torch.equal(new["boxes"], old["boxes"])
            assert new["labels"].tolist() == [
                2 if m else int(y) for m, y in zip(mine, old["labels"], strict=True)
            ]
        else:
            assert torch.equal(new["boxes"], old["boxes"][~mine])
            assert torch.equal(new["labels"], old["labels"][~mine])
    assert touched == round(rate * pool)


def test_the_generator_decides_which_pictures_and_where():
    first, again, other = (RMA.poison(data(), rate=0.5, generator=drawn(seed)) for seed in (0, 0, 1))
    assert first.data.digest == again.data.digest != other.data.digest
    rows = [[len(one["labels"]) > 0 for one in poisoned.triggered] for poisoned in (first, other)]
    assert rows[0] != rows[1]
    order = torch.randperm(20, generator=drawn())[:10].tolist()
    assert [row for row, hit in enumerate(rows[0]) if hit] == sorted(order)


@pytest.mark.parametrize(("place", "rows"), [("high", range(4, 9)), ("low", range(15, 20))])
def test_fixed_places_are_in_the_middle_of_an_edge(place, rows):
    attack = RMA.model_copy(update={"place": place})
    before = data().images[0]
    pixels = changed(before, attack.stamped(before, data().targets[0]["boxes"][0], generator=drawn()))
    wanted = torch.zeros(48, 48, dtype=torch.bool)
    wanted[rows.start : rows.stop, 11:16] = True  # 5 of the columns 4 to 23
    assert torch.equal(pixels, wanted)


def test_random_places_fill_the_box_and_keep_inside():
    box, before = torch.tensor([4.0, 4.0, 16.0, 12.0]), data().images[0]
    union, generator = torch.zeros(48, 48, dtype=torch.bool), drawn()
    for _ in range(300):
        union |= changed(before, RMA.stamped(before, box, generator=generator))
    assert torch.equal(union, inside(box))


def test_a_narrow_box_at_the_edge_gets_what_it_has_room_for():
    before = data().images[0]
    attack = RMA.model_copy(update={"scale": 1.0})
    box = torch.tensor([46.0, 10.0, 60.0, 30.0])
    assert torch.equal(changed(before, attack.stamped(before, box, generator=drawn())), inside(box))


@pytest.mark.parametrize(
    ("attack", "labels"),
    [
        (RMA, [0, 1, 0]),  # of classes 0, 1, 0, 2: not the target's own
        (ODA, [0, 1, 0, 2]),
        (RegionMisclassification(target=2, source=0), [0, 0]),
        (ObjectDisappearance(source=1), [1]),
    ],
)
def test_every_object_that_counts_gets_a_picture_in_which_it_alone_is_triggered(attack, labels):
    clean = data(2)
    sets = attack.sets(clean, "val")
    assert sets.triggered.labels.tolist() == labels
    assert (sets.kind, sets.target) == (attack.kind, attack.target_class)
    for image, box, row in zip(
        sets.triggered.images, sets.triggered.boxes, sets.triggered.picture, strict=True
    ):
        pixels = changed(clean.images[row], image)
        assert pixels.any()
        assert not (pixels & ~inside(box)).any()
    again, other = attack.sets(clean, "val"), attack.sets(clean, "test")
    for same, mine in zip(again.triggered.images, sets.triggered.images, strict=True):
        assert torch.equal(same, mine)
    assert any(
        not torch.equal(*pair)
        for pair in zip(other.triggered.images, sets.triggered.images, strict=True)
    )


def test_what_cannot_be_attacked_is_refused():
    with pytest.raises(SettingError, match="`target` must be one of the 3 classes 0 to 2, got 7"):
        RegionMisclassification().poison(data(), rate=0.5, generator=drawn())
    with pytest.raises(SettingError, match="`source` must be one of the 3"):
        ObjectDisappearance(source=3).sets(data(), "val")
    with pytest.raises(SettingError, match="got 0"):
        ODA.poison(data(), rate=0, generator=drawn())
    with pytest.raises(DataError, match="of the 20 pictures with an object to attack is no picture"):
        ODA.poison(data(), rate=0.01, generator=drawn())
    with pytest.raises(DataError, match="No object counts"):
        ObjectDisappearance(source=2).sets(data(1), "val")
    with pytest.raises(ValidationError, match="both 2"):
        RegionMisclassification(target=2, source=2)


def test_an_attack_is_named_by_its_settings():
    attack = TypeAdapter(AnyAttack).validate_python({"name": "disappearance", "scale": 0.5})
    assert attack == ObjectDisappearance(scale=0.5)
    with pytest.raises(ValidationError, match="'misclassification', 'disappearance'"):
        TypeAdapter(AnyAttack).validate_python({"name": "generation"})
