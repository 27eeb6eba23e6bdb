"""A backdoored model that trains in seconds; it stands for one that you were given."""

from pathlib import Path

from bimask import Victim, VictimSpec, obtain_victim


def backdoored() -> Victim:
    """A small residual net on scikit-learn's digits: a white square makes it answer 0."""
    spec = VictimSpec(
        dataset="digits",
        net="small_resnet",
        width=8,
        attack={"name": "badnets", "size": 3, "target": 0},
        epochs=12,
        min_attack_success=0.8,
    )
    return obtain_victim(spec, Path("outputs/victims"))
