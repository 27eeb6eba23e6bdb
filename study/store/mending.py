"""What a crash or a bad disk left of a study: what can be read stays, the rest is said and made again.

A record is a promise that a trial's files are there. Where a line of a file of records cannot be read,
or the files that a record promises cannot, the line is taken out, and the trial has not ended. What is
taken out is kept beside the file, as NAME.damaged: nothing of a user's is ever thrown away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from bimask.errors import MOST_PROBLEMS, VictimError
from bimask.files.atomic import atomic_write, sync
from bimask.files.bounded import read_json
from bimask.files.tensors import require_header
from bimask.nets.weights import file_sha256
from study.spec.config import StudyError
from study.store import records, schema
from study.store.environment import first_line
from study.store.files import Line, lines_of
from study.store.schema import TrialRecord

BLOCK = 2**20  # bytes
PICTURES = (".png",)  # nothing is read from them
Checked = Callable[[Mapping[str, object]], object]


def mend(folder: Path) -> list[str]:
    """Take out of a study's records what cannot be read, so that it is made again.

    Returns:
        A sentence for each thing that was lost: what it is, why, and what happens with it.

    Raises:
        NewerSchemaError: a later version wrote a record; nothing is taken out then.
        OSError: a file that is there cannot be read now.
    """
    notes = mend_lines(folder / records.TRIALS, _trial_with_files(folder), "{} is run again")
    notes += mend_lines(
        folder / records.REPORTS, schema.step_report, "a point of the curves of {} is lost"
    )
    notes += mend_lines(
        folder / records.CONFIRM, schema.confirm_record, "this purification is run again"
    )
    if (folder / records.SUMMARY).exists():
        try:
            records.read_summary(folder)
        except StudyError as error:
            notes.append(f"{str(error).partition(';')[0]}; it is made again.")
    return notes


def digests_of(folder: Path) -> dict[str, str]:
    """What a trial's record promises of its folder: `TrialRecord.files`."""
    return {
        path.name: file_sha256(path)[:16]
        for path in sorted(folder.iterdir())
        if path.suffix not in PICTURES
    }


def fault_of(folder: Path, record: TrialRecord) -> str | None:
    """Why the files of a COMPLETE trial cannot be read; None where they can.

    Args:
        folder: the trial's.

    Raises:
        OSError: the environment does not let us read what is there.
    """
    if (promised := record.get("files")) is None:
        return _fault_of_unsigned(folder, record)
    for name, digest in promised.items():
        try:
            if file_sha256(folder / name)[:16] != digest:
                return f"its file {name} has another content than was written"
        except VictimError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from error  # of the environment, and no verdict on the trial
            return f"its file {name} cannot be read ({first_line(error.__cause__ or error)})"
    return None


def _fault_of_unsigned(folder: Path, record: TrialRecord) -> str | None:
    """The same of a record of before there were digests: what every trial leaves can be opened."""
    for run in {**record["scores"], **record.get("runs", {})}:
        found = folder.glob(f"{run}.*.safetensors")
        stored = [
            path
            for path in found
            if "." not in path.name.removeprefix(f"{run}.")[: -len(".safetensors")]
        ]
        if not stored:
            return f"its file {run}.*.safetensors is missing"
        try:
            require_header(stored[0])
        except (OSError, SafetensorError) as error:
            return f"its file {stored[0].name} cannot be read ({error})"
    for path in folder.glob("*.rounds.json"):
        try:
            read_json(path)
        except (OSError, ValueError) as error:
            return f"its file {path.name} cannot be read ({error})"
    return None


def _trial_with_files(folder: Path) -> Checked:
    def checked(row: Mapping[str, object]) -> None:
        record = schema.trial_record(row)
        if record["status"] != "COMPLETE":
            return
        if fault := fault_of(folder / "trials" / f"{record['number']:03d}", record):
            raise StudyError(fault)

    return checked


def mend_lines(path: Path, checked: Checked, consequence: str) -> list[str]:
    """Take lines out of a file that cannot be read, or that `checked` raises a StudyError for."""
    good: list[tuple[int, int]] = []
    bad: list[tuple[int, int]] = []
    notes: list[str] = []
    lost = 0
    for line in lines_of(path):
        fault = line.fault
        if fault is None:
            try:
                checked(line.row)
            except schema.NewerSchemaError as error:
                raise schema.NewerSchemaError(f"{path}:{line.number}: {error}.") from error
            except StudyError as error:
                fault = str(error)
        parts = good if fault is None else bad
        if parts and parts[-1][1] == line.start:
            parts[-1] = (parts[-1][0], line.start + line.size)
        else:
            parts.append((line.start, line.start + line.size))
        if fault is not None:
            lost += 1
            if lost <= MOST_PROBLEMS:
                notes.append(f"{path}:{line.number}: {fault}; {consequence.format(_trial(line))}.")
    if lost > MOST_PROBLEMS:
        notes.append(f"{path}: so it is with {lost - MOST_PROBLEMS} more lines.")
    if bad:
        kept = path.with_name(f"{path.name}.damaged")
        with path.open("rb") as source:
            with kept.open("ab") as target:
                _copy(source, target, bad)
            sync(kept)
            with atomic_write(path) as part, part.open("wb") as target:
                _copy(source, target, good)
    return notes


def _copy(source: BinaryIO, target: BinaryIO, parts: Sequence[tuple[int, int]]) -> None:
    """Parts of a file, from and to which byte, each ended as a line is."""
    for start, end in parts:
        source.seek(start)
        last = b""
        while start < end and (block := source.read(min(BLOCK, end - start))):
            target.write(block)
            start, last = start + len(block), block[-1:]
        if last != b"\n":
            target.write(b"\n")


def _trial(line: Line) -> str:
    """Which trial a line is of, as far as it says so."""
    found = re.search(rb'"number": ?(\d{1,6})\b', line.content)
    return f"trial {int(found[1])}" if found else "the trial that it was of"
