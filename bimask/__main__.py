"""`python -m bimask`: train a victim, look at it, purify it, see before and after."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file

from bimask.config import PurifyConfig, describe
from bimask.devices import resolve_device
from bimask.errors import BimaskError, SettingError
from bimask.interop import export_victim, find_checkpoint, read_checkpoint, save_imported
from bimask.metrics import Scores, evaluate
from bimask.purify import purify
from bimask.victim import VictimSpec, load_victim, obtain_victim

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the code of an own net.")]


@app.command("train-victim")
def train_victim_command(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="Keys of a victim.")],
    out: Annotated[Path, typer.Option(help="Folder that holds victims.")] = Path("outputs/victims"),
    device: Device = "auto",
) -> None:
    """Train a backdoored model, or find it in OUT if it is there."""
    try:
        parsed = VictimSpec.model_validate(yaml.safe_load(spec.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"Cannot read the victim {spec}: {error}.") from error
    except ValidationError as error:
        raise SettingError(f"{spec}: {describe(error)}") from error
    with _bar("training", 0 if parsed.weights else parsed.epochs) as advance:
        victim = obtain_victim(
            parsed, out, device=resolve_device(device), on_epoch=lambda _log: advance(1)
        )
    _table({"victim": victim.scores["test"]})
    console.print(f"victim: {out / parsed.digest}", soft_wrap=True)


@app.command("purify")
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
    found = load_victim(victim, own_code=trust_code)
    splits = found.spec.load_data()
    images = splits.train.clean_subset(clean_images_per_class, seed=seed).floats().to(where)
    rounds = settings.initialise_rounds + settings.minimise_rounds + settings.select_rounds
    model = found.model.to(where)
    with _bar("rounds", rounds) as advance:
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
    _table({"before": before, "after": after})
    console.print(f"cleaned model: {out / 'model.safetensors'}", soft_wrap=True)


@app.command("gallery")
def gallery_command(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim (manifest and weights).")],
    out: Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.")] = Path("gallery.png"),
    trust_code: TrustCode = False,
) -> None:
    """Draw ten images of `val`: clean, triggered, their difference, and the victim's answers."""
    from bimask.gallery import gallery  # matplotlib

    if out.suffix not in (".png", ".pdf", ".svg"):
        raise SettingError(f"The picture must be a .png, .pdf or .svg, got {out}.")
    found = load_victim(victim, own_code=trust_code)
    figure = gallery(found, found.eval_sets(found.spec.load_data(), "val"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise SettingError(f"Cannot write {out}: {error.strerror}.") from error
    console.print(f"picture: {out}", soft_wrap=True)


@app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(help="A file of another framework, or its folder.")],
    out: Annotated[Path, typer.Argument(help="New folder for the victim.")],
    clean_data: Annotated[
        str | None, typer.Option(help="Folder of the clean data, or imagefolder:PATH.")
    ] = None,
    net: Annotated[str | None, typer.Option(help="Which net it is, if the files do not say.")] = None,
    allow_null_trigger: Annotated[bool, typer.Option("--allow-null-trigger")] = False,
    allow_not_learned: Annotated[bool, typer.Option("--allow-not-learned")] = False,
    device: Device = "auto",
) -> None:
    """Read a victim of another framework, score it anew, and write it without pickles."""
    if out.exists():
        raise SettingError(f"{out} exists; give a new folder.")
    where = resolve_device(device)
    victim = read_checkpoint(source, clean_data=clean_data, net=net, device=where)
    rows = {"victim": victim.scores}
    if victim.before is not None:
        rows = {"victim": victim.before, "defended": victim.scores}
    _table(rows)
    changed, visibly = victim.changed_pixel_rate, victim.changed_visibly
    if changed is None or visibly is None:
        console.print("changed pixels: unknown, the clean counterparts are not stored")
    else:
        shares = f"{100 * changed:.2f} % ({100 * visibly:.2f} % by more than one grey level)"
        console.print(f"changed pixels: {shares}")
    for note in victim.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    victim.refuse_if_useless(allow_null_trigger=allow_null_trigger, allow_not_learned=allow_not_learned)
    save_imported(victim, out, source=find_checkpoint(source)[1])
    console.print(f"imported victim: {escape(str(out))}", soft_wrap=True)


@app.command("export-backdoorbench")
def export_backdoorbench_command(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim, trained here or imported.")],
    out: Annotated[Path, typer.Argument(help="New folder, such as record/NAME.")],
    dataset: Annotated[str | None, typer.Option(help="BackdoorBench's name of the data set.")] = None,
) -> None:
    """Write a victim as BackdoorBench's attack_result.pt, with its triggered test images."""
    scores, notes = export_victim(victim, out, dataset=dataset)
    _table({"victim": scores})
    for note in notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    console.print(f"written: {escape(str(out / 'attack_result.pt'))}", soft_wrap=True)


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


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(text, total=total)
        yield lambda steps: progress.update(task, advance=steps)


def _table(rows: dict[str, Scores]) -> None:
    table = Table("", "ACC %", "ASR %", "RA %", "n clean", "n triggered", "split")
    for name, scores in rows.items():
        values = (scores.clean_accuracy, scores.attack_success, scores.recovery)
        numbers = [f"{100 * value:.1f}" for value in values]
        table.add_row(name, *numbers, str(scores.n_clean), str(scores.n_triggered), scores.split)
    console.print(table)


if __name__ == "__main__":
    try:
        app()
    except BimaskError as error:
        message = f"[bold red]error[/]: {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
