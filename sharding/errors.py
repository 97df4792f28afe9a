"""The one exception for input that cannot be served."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one paragraph: what was asked, the numbers, what to change.

    The command line prints the paragraph and exits with code 2; in Python it is an ordinary ValueError.
    """


def first_line(error: Exception) -> str:
    """An error of a library as its kind and the head of its first line: tensorstore's and XLA's go on for pages."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
