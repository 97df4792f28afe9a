"""What a record is: its fields, its provenance and the rules it must meet. Standard library only.

The prose, with an example of each kind, is in ``docs/records.md``; ``record_lines`` has the form on disk.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

SCHEMA = 1
PROVENANCES = ("measured", "compiled", "modelled")
HEADER_KIND = "run"
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_PACKAGES = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "numpy": "numpy",
}


class RecordError(ValueError):
    """A record, a file of records or a choice of records that cannot be used; the text is one paragraph."""


class MissingRecords(RecordError):
    """No record of the kind that was asked for."""


@dataclass(frozen=True)
class Header:
    """The constant part of a run's records; one line of kind ``run``.

    ``device`` is {platform, kind, count, processes}; ``mesh`` maps axis names to sizes (empty where a run
    spans several meshes, as a sweep does); ``details`` holds anything else that is constant, such as ``name``
    and ``data``. ``resumed_step`` is the last step whose records stay valid when a run goes on; ``time`` is
    stamped by the writer.
    """

    run: str
    config_hash: str
    seed: int
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    mesh: Mapping[str, int]
    details: Mapping[str, Any] = field(default_factory=dict)
    resumed_step: int | None = None
    time: str = ""


@dataclass(frozen=True)
class Record:
    """One fact, joined with the header of its run. ``values`` are numbers, strings, booleans, None, lists,
    mappings.
    """

    kind: str
    provenance: str
    values: Mapping[str, Any]
    header: Header
    step: int | None = None
    time: str = ""

    @property
    def run(self) -> str:
        return self.header.run

    @property
    def config_hash(self) -> str:
        return self.header.config_hash

    @property
    def seed(self) -> int:
        return self.header.seed

    @property
    def versions(self) -> Mapping[str, str]:
        return self.header.versions

    @property
    def device(self) -> Mapping[str, Any]:
        return self.header.device

    @property
    def mesh(self) -> Mapping[str, int]:
        return self.header.mesh

    @property
    def details(self) -> Mapping[str, Any]:
        return self.header.details


def utc_now() -> str:
    """The present time, UTC, ISO 8601 with microseconds: ``2026-03-01T12:00:00.000000Z``; sorts as text."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def installed_versions() -> dict[str, str]:
    """Versions of python, jax, flax, optax, orbax and numpy, read from package metadata without importing
    any.

    A package that is not installed is ``absent``.
    """
    found = {"python": platform.python_version()}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def validate(record: Record) -> None:
    """Raises RecordError, with what is wrong and what is expected, unless the record can be written and read
    back.
    """
    where = f"A record of kind {record.kind!r}"
    if not _is_text(record.kind) or record.kind == HEADER_KIND:
        raise RecordError(
            f"{where} cannot be written: the kind is a word such as 'step', 'eval', 'sweep' or 'bench'; "
            f"{HEADER_KIND!r} is "
            "the header's, which the writer adds by itself."
        )
    if record.provenance not in PROVENANCES:
        raise RecordError(
            f"{where} has the provenance {record.provenance!r}; it is one of {', '.join(PROVENANCES)}: what "
            "a clock or a "
            "device said, what a compiler said, or what a formula said."
        )
    if record.step is not None and not _is_count(record.step, 0):
        raise RecordError(f"{where} has the step {record.step!r}; a step is a whole number from 0, or None.")
    if not isinstance(record.values, Mapping) or not record.values:
        raise RecordError(
            f"{where} has no values; they are a mapping with at least one name, not {record.values!r}."
        )
    to_json(record.values, f"{where}: values")
    _check_time(record.time, where)
    validate_header(record.header)


def validate_header(header: Header) -> None:
    """Raises RecordError unless the header says which run, config, seed, versions, devices and mesh it speaks
    of.
    """
    where = f"The header of run {header.run!r}"
    for name in ("run", "config_hash"):
        if not _is_text(getattr(header, name)):
            raise RecordError(
                f"{where} has {name} = {getattr(header, name)!r}; it is a text that is not empty."
            )
    if not isinstance(header.seed, int) or isinstance(header.seed, bool):
        raise RecordError(f"{where} has the seed {header.seed!r}; it is a whole number.")
    missing = [n for n in ("python", *_PACKAGES) if not _is_text(header.versions.get(n))]
    if missing:
        raise RecordError(
            f"{where} lacks the version of {', '.join(missing)}; experiments.records.installed_versions() "
            "has them all."
        )
    device = header.device
    if not all(_is_text(device.get(n)) for n in ("platform", "kind")) or not all(
        _is_count(device.get(n), 1) for n in ("count", "processes")
    ):
        raise RecordError(
            f"{where} has the device {dict(device)!r}; it needs platform and kind (texts), count and "
            "processes (whole "
            "numbers from 1), for instance {'platform': 'cpu', 'kind': 'cpu', 'count': 8, 'processes': 1}."
        )
    if not all(_is_text(a) and _is_count(s, 1) for a, s in header.mesh.items()):
        raise RecordError(f"{where} has the mesh {dict(header.mesh)!r}; it maps axis names to sizes from 1.")
    if header.resumed_step is not None and not _is_count(header.resumed_step, 0):
        raise RecordError(
            f"{where} has resumed_step = {header.resumed_step!r}; it is a whole number from 0, or None."
        )
    to_json(header.details, f"{where}: details")
    _check_time(header.time, where)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_time(time: str, where: str) -> None:
    try:
        if len(time) == len(utc_now()) and time.endswith("Z"):
            datetime.fromisoformat(time)
            return
    except (TypeError, ValueError):
        pass
    raise RecordError(f"{where} has the time {time!r}; it is UTC like {utc_now()}, as utc_now() writes it.")


def to_json(value: Any, where: str) -> Any:
    """The value in plain JSON types; numbers and arrays of numpy and jax become Python's (``tolist``)."""
    if isinstance(value, str):
        if value in NOT_FINITE:
            raise RecordError(
                f"{where} holds the string {value!r}, which stands for a float; spell it another way."
            )
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if isinstance(value, Mapping):
        odd = [k for k in value if not isinstance(k, str)]
        if odd:
            raise RecordError(f"{where} has the key {odd[0]!r}; keys are strings.")
        return {k: to_json(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "tolist"):
        return to_json(value.tolist(), where)
    raise RecordError(
        f"{where} is a {type(value).__name__}, which a record cannot hold; use numbers, strings, booleans, "
        "None, lists and "
        "mappings of these."
    )
