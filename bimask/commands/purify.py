"""`python -m bimask purify`."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from safetensors.torch import save_file

from bimask.commands.terminal import Device, TrustCode, console, progress_bar, score_table
from bimask.config import PurifyConfig
from bimask.devices import resolve_device
from bimask.errors import SettingError
from bimask.metrics import evaluate
from bimask.purify import purify
from bimask.victim import open_victim


def purify_command(
    victim: Annotated[Path, typer.Option(help="Folder of a victim (manifest and weights).")],
    config: Annotated[Path, typer.Option(help="YAML with settings, such as best.yaml.")],
    out: Annotated[Path, typer.Option(help="New folder for the cleaned model.")],
    clean_images_per_class: Annotated[int, typer.Option(help="What the defender has.")] = 10,
    seed: Annotated[int | None, typer.Option(help="Default: the configuration's, or 0.")] = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Purify a victim: a plain model of the same architecture, its masks, and before and after."""
    settings = PurifyConfig.from_yaml(config)
    if seed is None:
        seed = yaml.safe_load(config.read_text()).get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise SettingError(f"`seed` must be a whole number >= 0, got {seed!r}.")
    if out.exists():
        raise SettingError(f"The folder {out} exists; give a new one with --out.")
    where = resolve_device(device)
    found = open_victim(victim, own_code=trust_code, device=where)
    splits = found.spec.load_data()
    images = splits.train.clean_subset(clean_images_per_class, seed=seed).floats().to(where)
    rounds = settings.initialise_rounds + settings.minimise_rounds + settings.select_rounds
    model = found.model.to(where)
    with progress_bar("rounds", rounds) as advance:
        result = purify(
            model,
            images,
            settings,
            generator=torch.Generator().manual_seed(seed),
            on_round=lambda _log, _masks: advance(1),
        )
    cleaned = result.model()
    test = found.eval_sets(splits, "test").to(where)
    before, after = found.scores["test"], evaluate(cleaned, test)
    _write(
        out,
        {name: value.cpu().contiguous() for name, value in cleaned.state_dict().items()},
        result.masks.cpu().tensors(),
        {
            "victim": found.spec.digest,
            "purify": settings.model_dump(),
            "seed": seed,
            "clean_images_per_class": clean_images_per_class,
            "before": asdict(before),
            "after": asdict(after),
            "passes": asdict(result.passes),
            "seconds": result.seconds,
        },
    )
    score_table({"before": before, "after": after})
    console.print(f"cleaned model: {out / 'model.safetensors'}", soft_wrap=True)


def _write(
    out: Path,
    weights: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
    manifest: dict[str, Any],
) -> None:
    """All files of a cleaned model, or none."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".cleaned-", dir=out.parent))
    except OSError as error:
        raise SettingError(f"Cannot write to {out.parent}: {error.strerror}.") from error
    try:
        save_file(weights, part / "model.safetensors")
        save_file(masks, part / "masks.safetensors")
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
