"""The one exception for input that cannot be served."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one paragraph: what was asked, the numbers, what to change.

    The command line prints the paragraph and exits with code 2; in Python it is an ordinary ValueError.
    """
