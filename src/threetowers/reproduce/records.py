"""The record of a unit: a small JSON file. Tables, figures and verdicts are made from records, without training."""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from threetowers.errors import DataError
from threetowers.files import write_whole

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """What is kept of a finished unit.

    settings: part, label, method, third, seed, lr, steps, num_train and size. metrics: shares in [0, 1] by
    `task/metric`. combination, control: sweeps over α as `combine.Sweep.figures` gives them. hits: by query, packed.
    checks: the claims without chance. described: parameters, seconds, scale, configuration and machine.
    """

    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    combination: Mapping[str, Any] | None = None
    control: Mapping[str, Any] | None = None
    hits: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, bool] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        return bool(self.described.get("diverged"))


def pack(hits: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A bool array as text of an eighth of its bytes.

    >>> unpack(pack(np.array([True, False, True]))).tolist()
    [True, False, True]
    """
    return {"num": len(hits), "bits": base64.b64encode(np.packbits(hits).tobytes()).decode()}


def unpack(packed: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The array that `pack` was given."""
    bits = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
    return np.unpackbits(bits, count=packed["num"]).astype(bool)


def write_record(path: Path, record: Record) -> None:
    """Writes a record; a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, **vars(record)}
    write_whole(path, json.dumps(_rounded(content), indent=1, ensure_ascii=False) + "\n")


def read_record(path: Path) -> Record:
    """Raises DataError for a file that is no record of this version."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("schema") != SCHEMA:
            raise DataError(f"{path}: a record of another version; delete it, and the unit is run again")
        return Record(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: no record of a unit ({error}); delete it, and the unit is run again"
        ) from None


def read_records(folder: Path) -> dict[str, Record]:
    """The records of a folder by the name of their unit."""
    return {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}


def of_part(records: Iterable[Record], part: str) -> list[Record]:
    """The records of a part."""
    return [record for record in records if record.settings["part"] == part]


def within(folder: Path, value: Any) -> Any:
    """Plain values with the paths below a folder as seen from there, so that a record says nothing of its machine.

    >>> within(Path("/home/me/runs"), {"third": ["file:/home/me/runs/towers/rich"], "steps": 5})
    {'third': ['file:towers/rich'], 'steps': 5}
    """
    if isinstance(value, str):
        return value.replace(f"{folder}/", "")
    if isinstance(value, Mapping):
        return {key: within(folder, each) for key, each in value.items()}
    return [within(folder, each) for each in value] if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, which is beyond what any figure is read to."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
