"""What a protocol leaves in its folder, and how it is read back.

outputs/NAME/protocol.yaml          the protocol, resolved
outputs/NAME/protocol.csv           one row a case and entry
outputs/NAME/protocol.json, .html   the tables, and the page
outputs/NAME.DATASET.NET            the comparison of one net and data set
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bimask.files.atomic import atomic_directory
from study.spec.config import StudyError
from study.spec.protocol import ProtocolConfig, load_protocol
from study.store.files import begun_folder
from study.store.records import write_yaml

PROTOCOL = "protocol.yaml"
TABLES, CSV, PAGE = "protocol.json", "protocol.csv", "protocol.html"


def begin(folder: Path, config: ProtocolConfig) -> None:
    """Make the protocol's folder, whole or not at all."""
    with atomic_directory(folder) as part:
        content = config.model_dump(mode="json", by_alias=True)
        write_yaml(part / PROTOCOL, content, f"protocol {config.name}, resolved")


def reopen(
    outputs: Path, name: str, path: Path | None, overrides: Mapping[str, object]
) -> tuple[ProtocolConfig, Path]:
    """The protocol NAME and its folder, to be gone on with.

    Raises:
        StudyError: there is no such protocol, or it would be another one.
    """
    folder = begun_folder(outputs, "protocol", name, PROTOCOL)
    begun = load_protocol(folder / PROTOCOL)
    config = load_protocol(path or folder / PROTOCOL, {**overrides, "name": name})
    if config.digest != begun.digest:
        raise StudyError(
            f"The protocol {name!r} was begun with other settings; only concurrency may change. Start "
            "a new one under another --name."
        )
    return config, folder
