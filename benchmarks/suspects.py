"""What a study on a suspect chooses, held against the trigger that the study never sees.

    python -m benchmarks.suspects [ATTACK ...]      # about five minutes an attack on two cores

The victims are those of `benchmarks.blind_runs`. A study gets the weights, the name of the net and the
450 images of `val` as pictures, nothing else; the space is that of `make study` without the points that
earlier searches found. The truth is measured afterwards, on the 450 images of `test`. Writes
benchmarks/results/suspects.json and prints the table of docs/suspects.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.blind_runs import SPACE, victim_of
from bimask.data import ImageData
from bimask.metrics import evaluate
from bimask.nets import Normalised
from bimask.victim import Victim
from study.config import load_config
from study.objectives import spread
from study.provenance import commit, versions
from study.run import run_study
from study.trial import purified

FOLDER = Path("outputs/benchmarks/suspects")
RESULTS = Path("benchmarks/results/suspects.json")
ATTACKS = ("badnets", "blended", "wanet", "low_frequency")
KEPT = ("trials", "repeats", "seed", "early_stopping", "clean_images_per_class", "fixed", "space")


def write_suspect(victim: Victim, pictures: ImageData, folder: Path) -> Path:
    """The user's files, and the study on them."""
    assert isinstance(victim.model, Normalised)
    for row, (image, label) in enumerate(zip(pictures.images, pictures.labels.tolist(), strict=True)):
        home = folder / "pictures" / pictures.classes[label]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(home / f"{row:04d}.png")
    save_file(victim.model.net.state_dict(), folder / "weights.safetensors")
    shipped = yaml.safe_load(SPACE.read_text())
    study = {key: shipped[key] for key in KEPT} | {
        "name": f"suspect-{victim.spec.attack['name']}",
        "suspect": {
            "model": str(folder / "weights.safetensors"),
            "net": victim.spec.net,
            "width": victim.spec.width,
            "channels": 1,
            "clean": str(folder / "pictures"),
            "mean": victim.model.get_buffer("mean").flatten().tolist(),
            "std": victim.model.get_buffer("std").flatten().tolist(),
        },
        "reference_point": {"clean_accuracy": 0.5},
        "choose": {"max_accuracy_drop": 0.02},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def truth(folder: Path, number: int, victim: Victim, settings: Any) -> dict[str, Any]:
    """Scores on `test` under the true trigger, of every run of a trial."""
    sets = victim.eval_sets(victim.load_data(), "test")
    paths = sorted((folder / "trials" / f"{number:03d}").glob("suspect*.masks.safetensors"))
    runs = [evaluate(purified(victim.model, load_file(path), settings), sets) for path in paths]
    names = ("clean_accuracy", "attack_success", "recovery")
    return {name: spread([getattr(run, name) for run in runs]) for name in names}


def measure(attack: str) -> dict[str, Any]:
    """A study on the suspect, and what its trials are worth."""
    victim, splits = victim_of(attack)
    home = FOLDER / attack
    home.mkdir(parents=True, exist_ok=True)
    path = write_suspect(victim, splits.val, home)
    config = load_config(path)
    folder = FOLDER / config.name
    resume = config.name if folder.is_dir() else None
    run_study(path, {}, outputs=FOLDER, address=None, resume=resume)
    summary = json.loads((folder / "summary.json").read_text())
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    complete = [trial for trial in trials if trial["status"] == "COMPLETE"]
    known = {
        t["number"]: truth(folder, t["number"], victim, config.purify_config(t["parameters"]))
        for t in complete
    }
    table = pd.DataFrame(
        {
            "risk": {t["number"]: t["risk"] for t in complete},
            "accuracy": {t["number"]: t["clean_accuracy"] for t in complete},
            "asr": {number: scores["attack_success"]["mean"] for number, scores in known.items()},
        }
    )
    accurate = table[table["accuracy"] >= summary["min_clean_accuracy"]]
    chosen = summary["chosen"]["number"]
    return {
        "before": {name: getattr(victim.scores["test"], name) for name in known[chosen]},
        "chosen": {"number": chosen, "risk": summary["chosen"]["risk"], **known[chosen]},
        "least_attack_success": float(accurate["asr"].min()),
        "spearman": float(table["risk"].rank().corr(table["asr"].rank())),
        "trials": {"complete": len(complete), "pruned": summary["n_pruned"]},
        "pictures": {
            split: summary["victims"]["suspect"][split]["n_clean"] for split in ("val", "test")
        },
        "seconds": summary["seconds"]["total"],
    }


def row(attack: str, found: dict[str, Any]) -> str:
    before, chosen = found["before"], found["chosen"]
    left = chosen["attack_success"]
    return (
        f"| {attack} | {before['clean_accuracy']:.3f} / {before['attack_success']:.3f} "
        f"| {chosen['clean_accuracy']['mean']:.3f} "
        f"| {left['mean']:.3f} ({left['min']:.3f}-{left['max']:.3f}) | {chosen['risk']:.3f} "
        f"| {found['least_attack_success']:.3f} "
        f"| {found['spearman']:.2f} ({found['trials']['complete']}) |"
    )


def main(attacks: list[str]) -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"attacks": {}}
    for attack in attacks:
        kept["attacks"][attack] = measure(attack)
        kept |= {"commit": commit(), "versions": versions()}
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    print(
        "| suspect | ACC / ASR before | ACC | ASR (least-most run) | risk "
        "| least ASR of any accurate trial | Spearman of risk and ASR (trials) |"
    )
    print("|---|---|---|---|---|---|---|")
    for attack, found in kept["attacks"].items():
        print(row(attack, found))


if __name__ == "__main__":
    main(sys.argv[1:] or list(ATTACKS))
