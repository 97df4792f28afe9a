"""What kind of error an array has beside others: the factor that all gradients share, the part of a parameter by which its
update is off. NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sharding.proof.diagnose import EXPLAINED, Error, axes_of, ratio_of

ALIKE = 0.95
"""Correlation from which on two arrays are the same but for a factor and some rounding."""


def common(errors: Sequence[Error], norms: tuple[float, float]) -> str:
    """What it means when all gradients are off by one and the same factor; "" where they are not, or where axes have it and the
    norm as well. norms: the reported norm of the gradients, as found and as it should be.
    """
    pairs = [(e.found.astype(np.float64), e.want.astype(np.float64)) for e in errors]
    found, want = (np.concatenate([x.ravel() for x in side]) for side in zip(*pairs, strict=True))
    ratio = ratio_of(found, want)
    if not ratio or not np.isfinite(ratio):
        return ""
    # A reduction too many or too few is in the norm too: where that is right, what clips or divides afterwards is wrong.
    after = abs(norms[0] - norms[1]) <= min(1e-3, 0.1 * abs(ratio - 1)) * norms[1]
    if axes_of(ratio, errors[0].sizes) and not after:
        return ""
    # What is nothing but rounding beside the largest gradient has no factor.
    least = 1e-5 * float(np.linalg.norm(want))
    told = [(f, w) for f, w in pairs if np.linalg.norm(w) > least]
    if any(np.linalg.norm(f - ratio * w) > EXPLAINED * np.linalg.norm(f - w) for f, w in told):
        return ""
    told = f"{ratio:.6g} times the right values, as every gradient is"
    if after:
        return (
            f"{told}, though their norm is reported right: suspect what is done with it, the clipping (the norm by which they "
            f"are clipped, the largest that is allowed, whether they are clipped at all), or a factor after it"
        )
    return (
        f"{told}, which is no product of axis sizes: suspect what they have in common, the norm by which they are clipped, "
        f"the weight by which they are divided, or a scale of the loss"
    )


def decay(error: Error, held: np.ndarray) -> str:
    """What it means when the error of an update is a multiple of the parameter itself; "" where it is not.

    held: the parameter before the update, whole.
    """
    if error.found.shape != held.shape:
        return ""
    off, held = (x.astype(np.float64) for x in (error.found - error.want, held))
    part, sizes = ratio_of(off, held), float(np.linalg.norm(off) * np.linalg.norm(held))
    if not part or not np.isfinite(sizes) or abs(float(np.vdot(off, held))) < ALIKE * sizes:
        return ""
    why = (
        "a weight decay that is missing, or one that is taken from too little"
        if part > 0
        else "a weight decay too much: one that this parameter should not have, or that is taken twice"
    )
    return f"the update is off by {part:+.1e} times the parameter itself: {why}"
