"""The form of records on disk: one line of ASCII JSON each, and back.

JSON has no NaN and no infinities, yet a loss that is not finite is a fact worth keeping: inside ``values`` and
``details`` they are written as the strings "NaN", "Infinity" and "-Infinity" (as protobuf's JSON does) and read back
as floats; a real string that reads like one of these is refused by ``validate``. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from experiments.record_schema import (
    HEADER_KIND,
    NOT_FINITE,
    SCHEMA,
    Header,
    Record,
    RecordError,
    to_json,
    validate,
    validate_header,
)


def to_line(entry: Record | Header) -> bytes:
    """One line of ASCII with its newline. The constant part of a record is left to its header's line."""
    if isinstance(entry, Header):
        line: dict[str, Any] = {
            "kind": HEADER_KIND,
            "schema": SCHEMA,
            "run": entry.run,
            "time": entry.time,
        }
        line |= {
            "config_hash": entry.config_hash,
            "seed": entry.seed,
            "versions": dict(entry.versions),
        }
        line |= {
            "device": dict(entry.device),
            "mesh": dict(entry.mesh),
            "details": to_json(entry.details, "details"),
        }
        if entry.resumed_step is not None:
            line["resumed_step"] = entry.resumed_step
    else:
        line = {
            "kind": entry.kind,
            "run": entry.run,
            "provenance": entry.provenance,
            "time": entry.time,
        }
        if entry.step is not None:
            line["step"] = entry.step
        line["values"] = to_json(entry.values, "values")
    return json.dumps(line, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def from_line(line: bytes, headers: Mapping[str, Header], where: str) -> Record | Header:
    """The inverse of ``to_line``; ``headers`` are those above it, by run. RecordError names ``where`` (file
    and line).
    """
    try:
        entry = json.loads(line.decode("ascii"))
    except ValueError as error:
        raise RecordError(
            f"{where} is not JSON ({error}). Only the last line of a file may be torn, so the file was "
            "damaged or edited; "
            "restore it, or delete that line to go on without it."
        ) from None
    try:
        if entry["kind"] == HEADER_KIND:
            if entry["schema"] != SCHEMA:
                raise RecordError(
                    f"{where} is of schema {entry['schema']!r}; this version reads schema {SCHEMA}."
                )
            names = ("run", "config_hash", "seed", "versions", "device", "mesh")
            header = Header(
                **{n: entry[n] for n in names},
                details=from_json(entry["details"]),
                resumed_step=entry.get("resumed_step"),
                time=entry["time"],
            )
            validate_header(header)
            return header
        if entry["run"] not in headers:
            raise RecordError(
                f"{where} speaks of run {entry['run']!r}, but no header of that run stands above it."
            )
        values, header = from_json(entry["values"]), headers[entry["run"]]
        record = Record(
            entry["kind"],
            entry["provenance"],
            values,
            header,
            entry.get("step"),
            entry["time"],
        )
        validate(record)
        return record
    except RecordError as error:
        raise (error if str(error).startswith(where) else RecordError(f"{where}: {error}")) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{where} is JSON but no record: {error!r}. docs/records.md lists the fields."
        ) from None


def from_json(value: Any) -> Any:
    """The inverse of ``to_json``; tuples come back as lists."""
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [from_json(v) for v in value]
    if isinstance(value, dict):
        return {k: from_json(v) for k, v in value.items()}
    return value
