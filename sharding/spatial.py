"""Convolutions and their kin as named ops: positions may be split over mesh axes, what crosses devices is the halo.

A window dim is called `kernel_` and the name of the dim that it slides along, so that the text of an op says what it
does: "batch height width channels, kernel_height kernel_width channels embed -> batch height width embed". Every other
name is as in an einsum: what the result lacks is summed over, and the plan of its contraction says what moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from sharding.contraction import parse
from sharding.errors import InputError
from sharding.layout import Dims, spec_of
from sharding.operands import Operand, operand_lies, operands_of
from sharding.ops import einsum
from sharding.region import Region, current, names_of, tap, value
from sharding.relayout import finish, relayout, vary
from sharding.scope import named
from sharding.windows import Padding, Window, borrowed, check_neighbours, halo

KERNEL = "kernel_"
"""What the name of a window's dim begins with."""


@named
def convolution(spec: str, x: Array, kernel: Operand, stride: int = 1, padding: Padding = "same") -> Array:
    """Sum of the kernel with every window of `x`: one kernel for all positions.

    `convolution("batch height width channels, kernel_height kernel_width channels embed -> batch height width embed",
    x, w)`. One name is summed over, one is new, one (`batch`) has nothing to do with the kernel; any number of dims have
    windows, which begin every `stride` positions. padding: "same" puts zeros around, "valid" does not.
    Collectives: the halo of each split dim, kernel - stride positions; and what the contraction needs for the other names
    (summed names that are split: a reduction). InputError where the windows do not lie as the positions are split.
    """
    terms, result = _terms("convolution", spec, x, kernel)
    slides, orders = _form(spec, terms, result)
    region = current()
    sizes = _sizes(region, kernel, terms[1])
    along = lambda lies=(): tuple(
        _window(region, x, terms[0], n, sizes[KERNEL + n], stride, padding, lies) for n in slides
    )
    if region is None or region.mesh is None:
        return tap("convolution", result, _convolve(x, value(kernel, x.dtype), orders, along()))
    ready = operands_of(region, spec, (x, kernel), x.dtype)
    plan = ready.plan
    if any(plan.operands[1][terms[1].index(KERNEL + n)] for n in slides):
        raise InputError(
            f"convolution {spec!r}: a rule splits a dim of the kernel's windows ({', '.join(KERNEL + n for n in slides)}) "
            f"in use, but every position needs the whole window. Split the kernel at rest (role param), or another dim."
        )
    seen = along(plan.operands[0])
    split = {s.name: (s.before, s.after) for s in seen if s.axes}

    def local(x: Array, w: Array) -> Array:
        made = _convolve(borrowed(x, plan.operands[0], split, terms[0]), w, orders, seen, frozenset(split))
        return finish(made, plan.reduce, plan.produced, ready.wanted)

    if region.manual:
        return tap("convolution", result, local(*ready.moved(region)))
    return tap(
        "convolution", result, _island(region, local, ready.arrays, ready.use, plan.operands, ready.wanted)
    )


@named
def windows(
    x: Array, names: str, sizes: Mapping[str, int], stride: int = 1, padding: Padding = "same"
) -> Array:
    """Every window of `x`, whose dims are `names`: those, with the dims `kernel_NAME` of the windows before the last.

    `windows(x, "batch height width channels", {"height": 3, "width": 3})` lies by `batch height width kernel_height
    kernel_width channels` and is 9 times as large; what is multiplied with it need not be the same everywhere.
    Collectives: the halo of each split dim.
    """
    words = tuple(names.split())
    result = (*words[:-1], *(KERNEL + n for n in sizes), words[-1])
    region = current()
    lies = ((),) * x.ndim if region is None or region.mesh is None else region.dims(words)
    if not set(sizes) <= set(words[:-1]):
        raise InputError(
            f"windows over {', '.join(sizes)} are asked for an array of the dims {names}. Name dims of it, and not its last."
        )
    seen = [_window(region, x, words, n, sizes[n], stride, padding, lies) for n in sizes]

    def local(x: Array) -> Array:
        x = borrowed(x, lies, {w.name: (w.before, w.after) for w in seen}, words)
        for w in reversed(seen):  # each puts its dim before the last, and so before the one put there last
            reach = (w.count - 1) * stride + 1
            taken = [lax.slice_in_dim(x, i, i + reach, stride, axis=w.at) for i in range(w.size)]
            x = jnp.stack(taken, axis=len(words) - 1)
        return x

    made = (*lies[:-1], *((),) * len(seen), lies[-1])
    if region is None or region.mesh is None:
        return tap("windows", result, local(x))
    if region.manual:
        return tap("windows", result, region.move(local(x), made, region.dims(result)))
    found = _island(region, local, (x,), (lies,), (lies,), made)
    return tap("windows", result, region.constrain(found, region.dims(result)))


@named
def locally_connected(
    spec: str, x: Array, kernel: Operand, stride: int = 1, padding: Padding = "same"
) -> Array:
    """A convolution whose every position has a kernel of its own (Dean et al. 2012, section 3): nothing is shared.

    `locally_connected("batch height width channels, height width kernel_height kernel_width channels embed -> batch
    height width embed", x, w)`. Where the kernel's positions are split as the activations are (`spatial`), the halo is
    all that moves, forward and backward: no device needs another's parameters, nor its gradients.
    """
    terms, result = _terms("locally_connected", spec, x, kernel)
    sizes = _sizes(current(), kernel, terms[1])
    along = {n: sizes[KERNEL + n] for n in terms[0] if KERNEL + n in sizes}
    lacking = [n for n in along if n not in terms[1]]
    if not along or lacking:
        raise InputError(
            f"locally_connected {spec!r}: the kernel has its windows' dims and the positions that they are at, as in "
            f"'height width kernel_height kernel_width channels embed'; it lacks {', '.join(lacking) or 'both'}. A kernel "
            f"that all positions share is a convolution."
        )
    given = windows(x, " ".join(terms[0]), along, stride, padding)
    named = (*terms[0][:-1], *(KERNEL + n for n in along), terms[0][-1])
    return einsum(f"{' '.join(named)}, {' '.join(terms[1])} -> {' '.join(result)}", given, kernel)


@named
def pool(
    x: Array, names: str, sizes: Mapping[str, int], kind: Literal["average", "max"] = "average"
) -> Array:
    """Average or maximum of windows that tile dims of `x` (`names`): `pool(x, "batch height width embed", {"height": 2})`.

    Nothing moves: a window lies on one device. InputError where one would not.
    """
    words = tuple(names.split())
    region = current()
    lies = region.dims(words) if region is not None else ((),) * x.ndim
    if kind not in ("average", "max") or not set(sizes) <= set(words) or any(n < 1 for n in sizes.values()):
        raise InputError(
            f"pool of kind {kind!r} with windows {dict(sizes)} is asked for an array of the dims {names}. The kinds are "
            f"'average' and 'max'; name dims of the array, and windows of at least 1."
        )
    for name in sizes:
        check_neighbours(region, name)
    shape: list[int] = []
    for name, n, axes in zip(words, x.shape, lies, strict=True):
        size, parts = sizes.get(name, 1), _parts(region, axes)
        whole = n * parts if region is not None and region.manual else n
        if whole % (size * parts):
            raise InputError(
                f"pool: windows of {size} do not tile {name} = {whole}"
                + (f", which {' x '.join(axes)} splits into {parts} parts" if parts > 1 else "")
                + f". Make {name} a multiple of {size * parts}, or the windows smaller."
            )
        shape += [n // size, size]
    tiled = x.reshape(shape)
    over = tuple(range(1, len(shape), 2))
    made = jnp.mean(tiled, axis=over) if kind == "average" else jnp.max(tiled, axis=over)
    if region is not None and not region.manual:
        made = region.constrain(made, lies)
    return tap("pool", words, made)


def _terms(
    op: str, spec: str, x: Array, kernel: Operand
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Names of the operands and of the result; InputError where the arrays are not as the text says."""
    terms, result = parse(spec)
    if len(terms) != 2:
        raise InputError(f"{op} {spec!r}: write the names of an activation and, after a comma, of a kernel.")
    for names, of in zip(terms, (x, kernel), strict=True):
        if len(names) != value(of).ndim:
            raise InputError(
                f"{op} {spec!r}: the operand {' '.join(names)!r} has {len(names)} names but {value(of).ndim} dims."
            )
    if isinstance(kernel, nnx.Variable) and names_of(kernel) != terms[1]:
        raise InputError(
            f"{op} {spec!r} names the kernel's dims {' '.join(terms[1])!r}, but {kernel.path} was declared as "
            f"{' '.join(names_of(kernel) or ())!r}. Write its own names in their order."
        )
    return terms, result


def _form(
    spec: str, terms: tuple[tuple[str, ...], ...], result: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, str, str]]:
    """The dims that windows slide along, and the three orders of dims as `lax.conv_general_dilated` spells them."""
    of_x, of_kernel = map(set, terms)
    slides = tuple(n for n in terms[0] if KERNEL + n in of_kernel)
    kernels = {KERNEL + n for n in slides}
    summed, new, rows = of_x & of_kernel, of_kernel - of_x - kernels, of_x - of_kernel - set(slides)
    if (
        not slides
        or [len(summed), len(new), len(rows)] != [1, 1, 1]
        or set(result) != rows | set(slides) | new
    ):
        raise InputError(
            f"convolution {spec!r}: the activation has one dim of examples, the positions and one dim that is summed over; "
            f"the kernel a window dim 'kernel_NAME' for each NAME that it slides along, the summed dim and one that is new; "
            f"the result the examples, the positions and the new dim. A kernel for each position is locally_connected."
        )
    letter = {n: str(i) for i, n in enumerate(slides)} | {KERNEL + n: str(i) for i, n in enumerate(slides)}
    (c,), (o,), (b,) = summed, new, rows
    spell = lambda names, own: "".join({**letter, **own}[n] for n in names)
    orders = (
        spell(terms[0], {b: "N", c: "C"}),
        spell(terms[1], {c: "I", o: "O"}),
        spell(result, {b: "N", o: "C"}),
    )
    return slides, orders


def _window(
    region: Region | None, x: Array, words: tuple[str, ...], name: str, size: int, stride: int, padding: Padding,
    lies: Dims,
) -> Window:  # fmt: skip
    """Windows along a dim of `x`, which is as the rules lay `words` and will be brought to `lies` before they are taken."""
    check_neighbours(region, name)
    at = words.index(name)
    whole = x.shape[at]
    if region is not None and region.manual:
        whole *= _parts(region, region.dims(words)[at])
    axes = lies[at] if lies else ()
    return Window.along(name, at, whole, size, stride, padding, axes, _parts(region, axes))


def _sizes(region: Region | None, kernel: Operand, words: tuple[str, ...]) -> dict[str, int]:
    """Whole size of each dim of a kernel, which may be split at rest."""
    shape = value(kernel).shape
    if region is None or not region.manual:
        return dict(zip(words, shape, strict=True))
    rest, _ = operand_lies(region, kernel, words)
    return {n: size * _parts(region, axes) for n, size, axes in zip(words, shape, rest, strict=True)}


def _island(
    region: Region, local: Callable[..., Array], arrays: Sequence[Array], lies: Sequence[Dims], moved: Sequence[Dims],
    out: Dims,
) -> Array:  # fmt: skip
    """What `local` makes of the shards of global arrays, which lie by `lies` and are brought to `moved`: under XLA's
    partitioner, which is told where the result lies, by `out`. XLA's own partitioning of convolutions whose positions are
    split is wrong on CPU (the probe `convolution_split_positions`).
    """
    over = frozenset(a for dims in moved for dim in dims for a in dim)

    def run(*shards: Array) -> Array:
        brought = (relayout(x, src, dst, over) for x, src, dst in zip(shards, lies, moved, strict=True))
        return local(*(vary(x, over) for x in brought))

    placed = tuple(spec_of(dims) for dims in lies)
    return jax.shard_map(run, mesh=region.mesh, in_specs=placed, out_specs=spec_of(out), check_vma=True)(
        *arrays
    )


def _convolve(
    x: Array, kernel: Array, orders: tuple[str, str, str], seen: tuple[Window, ...], held: frozenset[str] = frozenset()
) -> Array:  # fmt: skip
    """The local convolution. `held`: dims whose edges `x` has already, as a halo."""
    zeros = [(0, 0) if w.name in held else (w.before, w.after) for w in seen]
    stride = [w.stride for w in seen]
    return lax.conv_general_dilated(x, kernel, stride, zeros, dimension_numbers=orders)


def _parts(region: Region | None, axes: tuple[str, ...]) -> int:
    return 1 if region is None else math.prod(region.layouts.sizes[a] for a in axes)


__all__ = ["convolution", "halo", "locally_connected", "pool", "windows"]
