"""What simple models make of the held-out text: the figures that a trained model has to beat."""

from __future__ import annotations

import lzma

import numpy as np

XZ_BYTES = 16 << 20  # xz at preset 6 reads about 2 MB/s: longer held-out text is measured on its beginning


class TextStatistics:
    """Byte counts of a text that streams by; with compress="xz", also how far xz compresses its first XZ_BYTES."""

    def __init__(self, compress: str = "none"):
        self.counts = np.zeros(256, np.int64)
        self.xz_bytes = self._packed = 0
        self._xz = lzma.LZMACompressor(preset=6) if compress == "xz" else None

    def add(self, text: bytes) -> None:
        """Take in the next bytes of the text."""
        self.counts += np.bincount(np.frombuffer(text, np.uint8), minlength=256)
        if self._xz and self.xz_bytes < XZ_BYTES:
            head = text[: XZ_BYTES - self.xz_bytes]
            self._packed += len(self._xz.compress(head))
            self.xz_bytes += len(head)

    def xz_bits_per_byte(self) -> float:
        """Size of the xz stream (preset 6, container included) in bits per byte. Call once, at the end."""
        if self._xz is None or not self.xz_bytes:
            raise ValueError("xz was not asked for, or no text came by")
        self._packed += len(self._xz.flush())
        return 8 * self._packed / self.xz_bytes

    def facts(self, training: np.ndarray) -> dict[str, float]:
        """What simple models make of the text, in bits per byte. Call once, at the end.

        `unigram_bits_per_byte`: coded by the byte frequencies of the training text, whose counts are `training` (256,);
        `entropy_bits_per_byte`: by its own; with xz, `xz_bits_per_byte` and the `xz_bytes` of text that it is of.
        """
        facts = {
            "unigram_bits_per_byte": cross_entropy_bits(self.counts, training),
            "entropy_bits_per_byte": entropy_bits(self.counts),
        }
        if self._xz:
            facts |= {"xz_bits_per_byte": self.xz_bits_per_byte(), "xz_bytes": self.xz_bytes}
        return facts


def cross_entropy_bits(text: np.ndarray, model: np.ndarray) -> float:
    """Bits per byte of a text with byte counts `text` (256,) coded by the byte frequencies `model` (256,).

    -sum_b p_text(b) log2 q(b) with q(b) = (model(b) + 1) / (sum + 256): Laplace's rule, so that a byte which the
    model has never seen costs many bits and not infinitely many.
    """
    p = text / text.sum()
    q = (model + 1) / (model.sum() + 256)
    return float(-(p * np.log2(q)).sum())


def entropy_bits(text: np.ndarray) -> float:
    """Entropy of the byte frequencies themselves, bits per byte: what a code fitted to this very text would need."""
    p = text[text > 0] / text.sum()
    return float(-(p * np.log2(p)).sum())
