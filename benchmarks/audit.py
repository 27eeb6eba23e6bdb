"""How well `bimask audit` tells backdoored models from clean ones, and how often it cannot know.

    python -m benchmarks.audit twins           # trains clean twins of the zoo's tune half: 5 minutes
    python -m benchmarks.audit prices [PART]   # of every model of the zoo: 2 to 40 s each on one thread
    python -m benchmarks.audit fit             # writes bimask/inspection/audit_calibration.json
    python -m benchmarks.audit measure         # on the rest: results/audit/measurement.json, audit.md

Calibration: the part "calibration" of the digits zoo, the strangers of the part "tune", and clean twins
of those. What is tuned (kinds of evidence, the band of no verdict, the domain) is tuned there, by
leaving out one model at a time. The part "measurement" of the digits zoo and the strangers of the part
"held" are measured on once. Clean images: five of every class, that no model was trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks import report
from benchmarks.pages.audit import KEPT, conclusion, measurement
from benchmarks.zoo import digits, strangers, train
from benchmarks.zoo.rows import Row, bare, pictures, rows
from bimask.data import load_data
from bimask.inspection import audit
from bimask.inspection.audit import CALIBRATION, Floats, Judged, NetKind, advantage, judge, level
from study.store.provenance import commit, versions

Source = Literal["digits", "tune", "twins", "measurement", "held"]

FOLDER = Path("outputs/benchmarks/zoo/audit")
FITTED_ON: tuple[Source, ...] = ("digits", "tune", "twins")
IMAGES_PER_CLASS = 5
KINDS = ("patch", "pattern", "warp", "tone", "latent")  # by leave-one-out on the calibration
APART = ("sig", "sine")  # sines, which clean models of digits follow, too: docs/decisions/0015-audit.md
REGULARISATION = 1.0  # C of both regressions
FOLDS = 5
ENOUGH = 3  # clean and backdoored models of a kind, so that the audit speaks of it
PRECISION = 0.95  # of what is called backdoored, by models left out
BAND_MARGIN = 0.25  # of log-odds
WIDER = 0.15  # a further margin of the range while the band is chosen
LEVEL_MARGIN = 0.1  # of the range of log prices
TWIN_SEED = 1000  # added to a row's


@dataclass(frozen=True)
class Case:
    """One model of known kind with what its classes cost.

    Attributes:
        attack: kind of its trigger; None for a clean model.
        rule: "clean", "all_to_one", "one_to_one" or "all_to_all".
        target: of all-to-one and one-to-one.
    """

    name: str
    source: Source
    attack: str | None
    rule: str
    target: int | None
    prices: dict[str, Floats]
    kind: NetKind

    @property
    def backdoored(self) -> bool:
        return self.attack is not None

    @property
    def searched(self) -> bool:
        """Whether its trigger is of those that the audit looks for; if not, it is fitted on nowhere."""
        return self.rule in ("clean", "all_to_one") and self.attack not in APART

    def rows(self) -> Floats:
        """(K, kinds): the evidence of every class; of a kind that is not there, 0."""
        nothing = np.ones(self.kind.classes)
        return np.stack([advantage(self.prices.get(kind, nothing)) for kind in KINDS], 1)

    def is_target(self) -> Floats:
        """(K,) of 0 and 1."""
        target = self.target if self.rule == "all_to_one" else None
        classes: Floats = np.arange(self.kind.classes, dtype=float)
        return np.where(classes == (-1 if target is None else target), 1.0, 0.0)


def twins() -> list[Row]:
    """Clean rows, one for every one of the tune half on grey images: the same net, another seed."""
    nothing: dict[str, Any] = {"trigger": None, "rule": "all_to_one", "source": None, "target": None}
    nothing |= {"rate": 0, "cover": 0}
    return [
        row.model_copy(update=nothing | {"name": f"twin-{row.name}", "seed": row.seed + TWIN_SEED})
        for row in rows("tune")
        if row.data != "cifar"
    ]


def train_twins() -> None:
    """Train those that are not there."""
    for row in twins():
        place = _weights(row)
        if not place.is_file():
            begun = time.process_time()
            net, data = None, pictures(row.data)
            for attempt in range(train.TRIES):
                net = train.fit(row, data.train, row.seed + attempt)
                if train.problem(row, train.scores(row, net, data.clean_pool)) is None:
                    break
            assert net is not None
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save({k: v.contiguous() for k, v in net.state_dict().items()}, place)
            print(row.name, f"{time.process_time() - begun:.1f} s", flush=True)


def _weights(row: Row) -> Path:
    return FOLDER / "twins" / f"{row.name}-{row.seed}.pt"


def models(source: Source) -> Iterator[tuple[str, str | None, str, int | None, nn.Module, Tensor]]:
    """Name, attack, rule, target, model and clean images of every model there is."""
    if source in ("digits", "measurement"):
        images = load_data("digits").val.clean_subset(IMAGES_PER_CLASS, seed=0).floats()
        part: digits.Part = "calibration" if source == "digits" else "measurement"
        for member in digits.members(part):
            rule = "clean" if member.attack is None else "all_to_one"
            yield member.name, member.attack, rule, member.target, member.model, images
    elif source not in ("tune", "held"):
        for row in twins():
            if _weights(row).is_file():
                data = pictures(row.data)
                net = bare(row, data.test)
                net.load_state_dict(torch.load(_weights(row), weights_only=True))
                images = data.clean_pool.clean_subset(IMAGES_PER_CLASS, seed=0).floats()
                yield row.name, None, "clean", None, net.eval(), images
    else:
        for found in strangers(source):
            images = found.clean_pool.clean_subset(IMAGES_PER_CLASS, seed=0).floats()
            rule = "clean" if found.attack is None else found.row.rule
            yield found.name, found.attack, rule, found.target, found.model, images


def price(source: Source) -> None:
    """Price every model of a source that is not priced yet."""
    for name, attack, rule, target, model, images in models(source):
        kept = FOLDER / "prices" / source / f"{name}.json"
        if kept.is_file():
            continue
        begun = time.process_time()
        found = audit.measure(model, images)
        seconds = round(time.process_time() - begun, 1)
        row = {
            "name": name,
            "attack": attack,
            "rule": rule,
            "target": target,
            "prices": {kind: values.tolist() for kind, values in found.prices.items()},
            "success": {f: t.success.tolist() for f, t in found.triggers.items()},
            "kind": asdict(found.kind),
            "cpu_seconds": seconds,
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(row) + "\n")
        print(source, name, f"{seconds} s", flush=True)


def priced(source: Source) -> list[Case]:
    """What `price` kept."""
    found = []
    for path in sorted((FOLDER / "prices" / source).glob("*.json")):
        row = json.loads(path.read_text())
        prices = {kind: np.array(values) for kind, values in row["prices"].items()}
        kind = NetKind(**row["kind"])
        found.append(Case(row["name"], source, row["attack"], row["rule"], row["target"], prices, kind))
    return found


def fit_classes(cases: list[Case]) -> tuple[Floats, float]:
    """The regression of a class being the target."""
    evidence = np.concatenate([case.rows() for case in cases])
    wanted = np.concatenate([case.is_target() for case in cases])
    regression = LogisticRegression(C=REGULARISATION, max_iter=1000).fit(evidence, wanted)
    return regression.coef_[0], float(regression.intercept_[0])


def fit(cases: list[Case]) -> dict[str, Any]:
    """Both regressions; the sigmoid is fitted on scores of models that the class regression did not see
    (Platt 1999)."""
    held_out, truth = [], []
    for fold in range(FOLDS):
        weights, intercept = fit_classes([c for i, c in enumerate(cases) if i % FOLDS != fold])
        for case in cases[fold::FOLDS]:
            held_out.append((case.rows() @ weights + intercept).max())
            truth.append(case.backdoored)
    sigmoid = LogisticRegression(C=REGULARISATION).fit(np.array(held_out)[:, None], truth)
    weights, intercept = fit_classes(cases)
    return {
        "coefficients": dict(zip(KINDS, weights.tolist(), strict=True)),
        "intercept": intercept,
        "platt": {"slope": float(sigmoid.coef_[0, 0]), "offset": float(sigmoid.intercept_[0])},
    }


def domain(cases: list[Case]) -> dict[str, Any]:
    """What the calibration has seen enough of, and so may speak of."""
    sizes = _of_both(cases, lambda case: case.kind.height)
    return {
        "nets": _of_both(cases, lambda case: case.kind.net),
        "channels": _of_both(cases, lambda case: case.kind.channels),
        "classes": [5, 20],  # about the 10 of all models
        "answered": 0.8,  # share of the classes that the clean images must be of
        "images": 10,
        "size_factor": 1.15,  # from a size below
        "sizes": {str(size): levels([c for c in cases if c.kind.height == size]) for size in sizes},
    }


def levels(cases: list[Case]) -> dict[str, dict[str, list[float]]]:
    """Where the median prices of models of one size lie, of all and of clean ones: logs, a margin."""
    found: dict[str, dict[str, list[float]]] = {"all": {}, "clean": {}}
    for kind in KINDS:
        everything = sorted(level(case.prices[kind]) for case in cases)
        clean = sorted(level(case.prices[kind]) for case in cases if not case.backdoored)
        # without the outermost clean model on each side: a single odd one must not widen "no sign"
        for name, values in (("all", everything), ("clean", clean[1:-1])):
            margin = LEVEL_MARGIN * (values[-1] - values[0])
            found[name][kind] = [values[0] - margin, values[-1] + margin]
    return found


def _of_both(cases: list[Case], of: Callable[[Case], Any]) -> list[Any]:
    """Values that enough clean and enough backdoored models have."""
    clean = Counter(of(case) for case in cases if not case.backdoored)
    backdoored = Counter(of(case) for case in cases if case.backdoored)
    return sorted(v for v in clean if min(clean[v], backdoored[v]) >= ENOUGH)


def fits_left_out(cases: list[Case]) -> list[dict[str, Any]]:
    """For every model what is fitted on all others that are fitted on, without a band."""
    found = []
    for case in cases:
        others = [other for other in cases if other.searched and other is not case]
        found.append(fit(others) | {"domain": domain(others)})
    return found


def judged_by(cases: list[Case], fits: list[dict[str, Any]], edges: dict[str, float]) -> list[Judged]:
    """The verdict on every model by a fit of its own and one band."""
    return [judge(c.prices, c.kind, f | {"band": edges}) for c, f in zip(cases, fits, strict=True)]


def band(cases: list[Case], fits: list[dict[str, Any]]) -> dict[str, float]:
    """Where no verdict is given, by models left out.

    "No sign" is said below the least probability of all backdoored models that could get it, or nearly
    so, less a margin of the log-odds. "Backdoored" is said from the least probability on where at least
    `PRECISION` of the models that it is said of are backdoored.
    """
    wide = [fitted | {"domain": widened(fitted["domain"])} for fitted in fits]
    low = judged_by(cases, wide, {"no_sign_below": 1.1, "backdoored_from": 1.1})
    high = judged_by(cases, fits, {"no_sign_below": 0.0, "backdoored_from": 0.0})
    searched = [case.searched for case in cases]
    missed = [
        found.probability
        for case, found, counts in zip(cases, low, searched, strict=True)
        if counts and case.backdoored and found.verdict == "no sign"
    ]
    odds = np.log(min(missed) / (1 - min(missed))) - BAND_MARGIN
    called = sorted(
        (found.probability, case.backdoored)
        for case, found, counts in zip(cases, high, searched, strict=True)
        if counts and found.verdict == "backdoored"
    )
    edges = [
        probability
        for i, (probability, _) in enumerate(called)
        if np.mean([backdoored for _, backdoored in called[i:]]) >= PRECISION
    ]
    no_sign, backdoored = float(1 / (1 + np.exp(-odds))), float(min(edges))
    return {"no_sign_below": min(no_sign, backdoored), "backdoored_from": max(no_sign, backdoored)}


def widened(found: dict[str, Any]) -> dict[str, Any]:
    """A domain whose price ranges reach further, so that no model escapes the band by a hair."""
    sizes = {
        size: {
            who: {
                kind: [low - WIDER * (high - low), high + WIDER * (high - low)]
                for kind, (low, high) in ranges.items()
            }
            for who, ranges in groups.items()
        }
        for size, groups in found["sizes"].items()
    }
    return found | {"sizes": sizes}


def figures(cases: list[Case], judged: list[Judged]) -> dict[str, Any]:
    """What verdicts are worth: coverage, ROC-AUC of those with one, errors, targets, reliability."""
    pairs = list(zip(cases, judged, strict=True))
    spoken = [(case, found) for case, found in pairs if found.verdict != "unknown"]
    caught = [(case, found) for case, found in spoken if found.verdict == "backdoored"]
    passed = [case for case, found in spoken if found.verdict == "no sign"]
    aimed = [(case, found) for case, found in caught if case.rule == "all_to_one" and case.backdoored]
    return {
        "n": _count(cases),
        "with verdict": _count([case for case, _ in spoken]),
        "coverage": len(spoken) / max(1, len(pairs)),
        "roc_auc": _auc(spoken),
        "roc_auc of all": _auc(pairs),
        "called backdoored": _count([case for case, _ in caught]),
        "called no sign": _count(passed),
        "right target": [sum(found.target == case.target for case, found in aimed), len(aimed)],
        "reliability": reliability(
            np.array([found.probability for _, found in spoken]),
            np.array([case.backdoored for case, _ in spoken]),
        ),
    }


def _count(cases: list[Case]) -> dict[str, int]:
    backdoored = sum(case.backdoored for case in cases)
    return {"clean": len(cases) - backdoored, "backdoored": backdoored}


def _auc(pairs: list[tuple[Case, Judged]]) -> float | None:
    """None where the models are of one kind."""
    truth = [case.backdoored for case, _ in pairs]
    if len(set(truth)) < 2:
        return None
    return float(roc_auc_score(truth, [found.probability for _, found in pairs]))


def reliability(probabilities: Floats, truth: Floats, bins: int = 5) -> list[dict[str, float]]:
    """Mean probability and share of backdoored models, by equal bins of the probability."""
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            "predicted": float(probabilities[places == place].mean()),
            "observed": float(truth[places == place].mean()),
            "n": int((places == place).sum()),
        }
        for place in range(bins)
        if (places == place).any()
    ]


def listed(cases: list[Case], judged: list[Judged]) -> list[dict[str, Any]]:
    """Every model with its verdict."""
    return [
        {
            "name": case.name,
            "source": case.source,
            "attack": case.attack,
            "rule": case.rule,
            "target": case.target,
            "verdict": found.verdict,
            "suspected": found.target,
            "probability": round(found.probability, 4),
            "reasons": list(found.reasons),
        }
        for case, found in zip(cases, judged, strict=True)
    ]


def write_calibration() -> None:
    """Coefficients, band and domain with their provenance, beside the code that reads them."""
    cases = [case for source in FITTED_ON for case in priced(source) if case.kind.channels == 1]
    searched = [case for case in cases if case.searched]
    fits = fits_left_out(cases)
    edges = band(cases, fits)
    judged = judged_by(cases, fits, edges)
    nets = sorted({case.kind.net for case in cases})
    main = [(case, found) for case, found in zip(cases, judged, strict=True) if case.searched]
    rest = [(case, found) for case, found in zip(cases, judged, strict=True) if not case.searched]
    content = fit(searched) | {
        "band": edges,
        "domain": domain(searched),
        "fitted_on": {
            "models": f"{len(searched)} small nets ({', '.join(nets)}) on grey digits of 16 and 28 "
            "pixels, 10 classes",
            "clean": sum(not case.backdoored for case in searched),
            "backdoored": sum(case.backdoored for case in searched),
            "attacks": sorted({case.attack for case in searched if case.attack is not None}),
            "clean_images": audit.IMAGES,
            "by": "scikit-learn LogisticRegression, Platt's sigmoid on scores of models left out",
            "script": "benchmarks/audit.py",
        },
        "left_out": figures(*map(list, zip(*main, strict=True))),
        "left_out_unsearched": listed(*map(list, zip(*rest, strict=True))),
    }
    path = Path("bimask") / CALIBRATION
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(path.read_text())
    for row in listed(cases, judged):
        if row["verdict"] != {True: "backdoored", False: "no sign"}[row["attack"] is not None]:
            print(row)


def measure() -> None:
    """The measurement, on models of no other use; the tables of audit.md."""
    content: dict[str, Any] = {"commit": commit(), "versions": versions()}
    parts = {"held": priced("held"), "measurement": priced("measurement")}
    parts["together"] = parts["held"] + parts["measurement"]
    for source, cases in parts.items():
        if not cases:
            continue
        judged = [judge(case.prices, case.kind, audit.calibration()) for case in cases]
        pairs = [(c, j) for c, j in zip(cases, judged, strict=True) if c.searched]
        content[source] = {
            "all": figures(cases, judged),
            "searched": figures([c for c, _ in pairs], [j for _, j in pairs]),
            "models": listed(cases, judged),
        }
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(content, indent=1) + "\n")
    report.write()
    print(measurement(content), conclusion(content), sep="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["twins", "prices", "fit", "measure"])
    parser.add_argument("part", nargs="?", choices=get_args(Source))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "twins":
        train_twins()
    elif arguments.what == "prices":
        for source in [arguments.part] if arguments.part else get_args(Source):
            price(source)
    elif arguments.what == "fit":
        write_calibration()
    else:
        measure()


if __name__ == "__main__":
    main()
