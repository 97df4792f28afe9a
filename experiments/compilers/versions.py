"""Which compilers are installed, and whether they belong to the jax that is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharding.price.target import Target

PLUGINS = (("jax-cuda12-plugin", "cuda12-local"), ("jax-cuda13-plugin", "cuda13-local"))
"""The packages of the GPU compiler, and jax's extra that says which version belongs to it."""


def missing(target: Target) -> str:
    """What is not installed, or does not belong to this jax, without which nothing can be compiled for `target`, and the
    command that installs it; "" where all is there.
    """
    if target.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            return "the TPU compiler is not installed: pip install 'shardlab[tpu]'"
        return _unfit("libtpu", "tpu", "shardlab[tpu]")
    if target.platform == "gpu":
        there = [(p, extra) for p, extra in PLUGINS if _version(p)]
        if not there or importlib.util.find_spec("jax_plugins") is None:
            return "the GPU compiler is not installed: pip install 'shardlab[gpu-compiler]' (no NVIDIA packages are needed)"
        told = [_unfit(p, extra, "shardlab[gpu-compiler]") for p, extra in there]
        return "" if "" in told else told[0]
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unfit(package: str, extra: str, ours: str) -> str:
    """Why the installed version of a package does not belong to this jax; "" where it does, or where none is known."""
    version, wanted = _version(package), _wanted(package, extra)
    if not version or not wanted or fits(version, wanted):
        return ""
    return (
        f"{package} {version} is installed, but jax {_version('jax')} goes with {package}{wanted}: "
        f"pip install --upgrade '{ours}'"
    )


def _wanted(package: str, extra: str) -> str:
    """The versions of a package that jax's extra asks for, such as "==0.0.42.*"."""
    for line in importlib.metadata.requires("jax") or ():
        need, _, condition = line.partition(";")
        found = re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*(.*)", need.strip())
        if found and found[1] == package and re.search(f"""extra == ['"]{extra}['"]""", condition):
            return found[2].strip()
    return ""


def fits(version: str, wanted: str) -> bool:
    """Whether a version such as "0.0.42.1" is one of `wanted`: comparisons with a comma between, ==, <=, >=, == with .*."""
    have = _parts(version)
    for clause in filter(None, (c.strip() for c in wanted.split(","))):
        found = re.fullmatch(r"(==|<=|>=|<|>|~=|!=)\s*([\d.]+?)(\.\*)?", clause)
        if found is None:
            return True  # a form that pip checks and we cannot
        sign, bound = found[1], _parts(found[2])
        if found[3] is not None:
            if have[: len(bound)] != bound:
                return False
            continue
        size = max(len(have), len(bound))
        a, b = (x + (0,) * (size - len(x)) for x in (have, bound))
        if not {"==": a == b, "<=": a <= b, ">=": a >= b, "<": a < b, ">": a > b}.get(sign, True):
            return False
    return True


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(p) for p in re.findall(r"\d+", version.partition("+")[0]))


__all__ = ["fits", "missing"]
