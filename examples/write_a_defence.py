"""A defence of your own: settings, two methods, one line in the registry.

python examples/write_a_defence.py
"""

import copy
from typing import Annotated

from common import backdoored
from pydantic import Field
from torch import nn

import bimask
from bimask.defences import DEFENCES
from bimask.defences.purify import defend
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import Defended, SimpleDefence


class ShrinkConfig(DefenceConfig):
    """The one setting of this defence, which is too simple to be good."""

    factor: Annotated[
        float, Field(gt=0, le=1, description="what the last layer's largest weights are multiplied by"),
        Search(0.1, 1.0),
    ] = 0.5  # fmt: skip


class Shrink(SimpleDefence[ShrinkConfig]):
    """Shrink the tenth of the last layer's weights that is largest."""

    name = "shrink"
    config = ShrinkConfig

    def defend(self, model, clean, config, *, generator, prepared=None, on_step=None, keeper=None):
        name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        weight = last.weight.detach().clone()
        largest = weight.abs() >= weight.abs().quantile(0.9)
        weight[largest] *= config.factor
        return Defended(self, model, config, {f"{name}.weight": weight})

    def restore(self, model, tensors, config):
        cleaned = copy.deepcopy(model)
        cleaned.load_state_dict({**cleaned.state_dict(), **tensors})
        return cleaned.eval()


DEFENCES[Shrink.name] = Shrink()  # in the package this is a line of bimask/defences/__init__.py

victim = backdoored()
splits = victim.spec.load_data()
images = splits.train.clean_subset(10, seed=0).floats()
cleaned = defend(victim.model, images, ShrinkConfig()).model()
scores = bimask.evaluate(cleaned, victim.eval_sets(splits, "test"))
print(f"clean accuracy {scores.clean_accuracy:.3f}, attack success {scores.attack_success:.3f}")
