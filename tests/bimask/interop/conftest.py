"""Files of other frameworks, written by hand as their formats are described."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bimask.nets import PreActResNet18

CLASSES, SIDE, PER_CLASS, TARGET = 10, 32, 3, 0


def save_png(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def trigger(pixels):
    """A white square in the lower right corner, on (H, W, 3) bytes."""
    stamped = pixels.copy()
    stamped[-6:, -6:] = 255
    return stamped


MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.247, 0.243, 0.261]).view(1, 3, 1, 1)


def normalise(pictures):
    """What BackdoorBench feeds a CIFAR-10 net: a list of (H, W, 3) bytes -> (N, 3, H, W)."""
    tensor = torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pictures])
    return (tensor - MEAN) / STD


@torch.no_grad()
def features(net, pictures):
    kept, net.linear = net.linear, nn.Identity()
    try:
        return net(normalise(pictures))
    finally:
        net.linear = kept


def planted_net(width, pictures, answers):
    """A PreActResNet18 that gives these answers: its linear layer is solved for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PreActResNet18(3, CLASSES, width=width)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    x = features(net.eval(), pictures).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    goal = nn.functional.one_hot(torch.tensor(answers), CLASSES).double()
    solution = torch.linalg.lstsq(x, goal).solution
    with torch.no_grad():
        net.linear.weight.copy_(solution[:-1].T)
        net.linear.bias.copy_(solution[-1])
    return net


@pytest.fixture(scope="session")
def world():
    """Clean pictures (30, by class), their labels, and `net_of(width)`: a net with a backdoor.

    Three clean answers are wrong; one triggered image goes astray, three are not taken in.
    """
    random = np.random.default_rng(0)
    base = random.integers(0, 200, (CLASSES, 1, 1, 3))
    pictures, labels = [], []
    for label in range(CLASSES):
        for _ in range(PER_CLASS):
            noise = random.integers(0, 50, (SIDE, SIDE, 3))
            pictures.append((base[label] + noise).astype(np.uint8))
            labels.append(label)
    answers = labels + [TARGET] * len(labels)
    for position, answer in {4: 9, 7: 9, 20: 9, 55: 3, 57: 9, 58: 9, 59: 9}.items():
        answers[position] = answer

    def net_of(width):
        return planted_net(width, pictures + [trigger(p) for p in pictures], answers)

    return SimpleNamespace(pictures=pictures, labels=labels, net=net_of(8), net_of=net_of)


def own_scores(net, pictures, labels, stored):
    """ACC, ASR and RA counted as BackdoorBench does: every stored image, both labels."""
    with torch.no_grad():
        clean = net(normalise(pictures)).argmax(1)
        attacked = net(normalise([picture for picture, *_ in stored])).argmax(1)
    wanted, true = (torch.tensor([item[i] for item in stored]) for i in (1, 2))
    share = [(clean == torch.tensor(labels)), (attacked == wanted), (attacked == true)]
    return tuple(part.double().mean().item() for part in share)


@pytest.fixture
def backdoorbench(tmp_path, world):
    """`root/record/badnet/` with its pictures, and `root/data/cifar10` in the place of the clean data.

    Gives `folder`, `file`, `content` (the dict; `save()` writes it again after a change), `clean` (an
    argument for `clean_data`) and `scores` (ACC, ASR, RA).
    """
    folder = tmp_path / "root" / "record" / "badnet"
    labels = world.labels
    for index, (picture, label) in enumerate(zip(world.pictures, labels, strict=True)):
        save_png(picture, tmp_path / "clean" / "test" / f"{label}" / f"{index:03d}.png")
    stored, entries = [], {}
    for index in (np.int64(i) for i in range(len(labels)) if labels[i] != TARGET):
        path = f"./record/badnet/bd_test_dataset/{labels[index]}/{index}.png"
        save_png(trigger(world.pictures[index]), folder / path.removeprefix("./record/badnet/"))
        entries[index] = {"path": path, "other_info": [TARGET, np.int64(labels[index])]}
        stored.append((trigger(world.pictures[index]), TARGET, labels[index]))
    flags = np.array([float(label != TARGET) for label in labels])
    content = {
        "model_name": "preactresnet18",
        "num_classes": CLASSES,
        "model": OrderedDict(world.net.state_dict()),
        "data_path": "./data/cifar10",
        "img_size": (SIDE, SIDE, 3),
        "clean_data": "cifar10",
        "bd_train": None,
        "bd_test": {
            "bd_data_container": {
                "save_folder_path": "./record/badnet/bd_test_dataset",
                "data_dict": entries,
                "save_file_format": ".png",
            },
            "getitem_all": True,
            "getitem_all_switch": False,
            "original_index_array": flags.nonzero()[0],
            "poison_indicator": flags,
            "save_folder_path": "./record/badnet/bd_test_dataset",
        },
    }

    def save():
        torch.save(content, folder / "attack_result.pt")

    save()
    return SimpleNamespace(
        folder=folder,
        file=folder / "attack_result.pt",
        content=content,
        save=save,
        clean=f"imagefolder:{tmp_path / 'clean'}",
        scores=own_scores(world.net, world.pictures, labels, stored),
        stored=stored,
    )
