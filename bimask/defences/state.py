"""Where a run of a defence stands between two steps: one file of tensors and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self

from bimask.errors import SettingError
from bimask.files.atomic import atomic_write
from bimask.files.bounded import parsed_json
from bimask.files.tensors import OF_STATES, read_tensors


@dataclass(frozen=True)
class DefenceState:
    """Where a run stands between two steps.

    Attributes:
        tensors: name -> tensor on the CPU.
        members: of each configuration what is known, as JSON types.
        seconds: wall time so far.
    """

    tensors: dict[str, Tensor]
    members: list[dict[str, Any]]
    seconds: float

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        about = json.dumps({"members": self.members, "seconds": self.seconds})
        with atomic_write(path) as part:
            save_file(self.tensors, part, metadata={"population": about})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a state back.

        Raises:
            SettingError: no file, or none that `save` wrote.
        """
        try:
            tensors, kept = read_tensors(path, OF_STATES)
            about = parsed_json(kept["population"].encode())
            members, seconds = about["members"], float(about["seconds"])
            if not isinstance(members, list) or not all(isinstance(one, dict) for one in members):
                raise TypeError("its members are none")
            return cls(tensors, members, seconds)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise SettingError(f"{path} holds no state of a defence ({error}).") from error
