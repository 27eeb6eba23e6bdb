"""`python -m bimask`: train a victim, look at it, audit it, purify it, see before and after."""

from __future__ import annotations

import typer

from bimask.cli.audit import audit_command
from bimask.cli.export import export_command
from bimask.cli.gallery import gallery_command
from bimask.cli.interop import export_backdoorbench_command, import_command
from bimask.cli.purify import purify_command
from bimask.cli.settings import settings_command
from bimask.cli.sites import sites_command
from bimask.cli.train_victim import train_victim_command
from bimask.cli.train_victims import train_victims_command
from bimask.commands import refusals

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("train-victim")(train_victim_command)
app.command("train-victims")(train_victims_command)
app.command("purify")(purify_command)
app.command("audit")(audit_command)
app.command("sites")(sites_command)
app.command("settings")(settings_command)
app.command("export")(export_command)
app.command("gallery")(gallery_command)
app.command("import")(import_command)
app.command("export-backdoorbench")(export_backdoorbench_command)


def main() -> None:
    """Run the command; what it refuses is one sentence and exit code 2."""
    with refusals():
        app()


if __name__ == "__main__":
    main()
