"""Near duplicates by MinHash and locality-sensitive hashing (Broder, 1997; Leskovec et al., chapter 3), with `datasketch`.

    index = NearIndex()
    index.add("a", text)
    index.alike(text)        # ["a"]

Time grows with the number of texts, not with its square.
"""

from __future__ import annotations

import re
from typing import Any

from lorikeet.errors import MissingExtraError

THRESHOLD = 0.8
"""Texts whose sets of shingles have at least this Jaccard similarity are near duplicates."""

SHINGLE = 3
"""Words in a shingle; shorter texts are one shingle."""

PERMUTATIONS = 128
"""Hash functions of a signature: the similarity is estimated to about 1 / sqrt(128) = 0.09."""

_WORD = re.compile(r"\w+")


class NearIndex:
    """Texts that can be asked for those that are nearly the same."""

    def __init__(self) -> None:
        """Start empty. Raises MissingExtraError if datasketch is not installed."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("datasketch", "tune") from error
        self._make = MinHash
        self._index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        self._signatures: dict[str, Any] = {}

    def add(self, key: str, text: str) -> None:
        """Enter `text` under `key`, which is new."""
        signature = self._signature(text)
        self._signatures[key] = signature
        self._index.insert(key, signature)

    def alike(self, text: str) -> list[str]:
        """Return the keys of the texts that are near duplicates of `text`, sorted."""
        signature = self._signature(text)
        found = self._index.query(signature)
        return sorted(key for key in found if self._signatures[key].jaccard(signature) >= THRESHOLD)

    def _signature(self, text: str) -> Any:
        signature = self._make(num_perm=PERMUTATIONS, seed=1)
        signature.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles(text)])
        return signature


def shingles(text: str) -> set[str]:
    """Return the runs of `SHINGLE` words of `text`, without case and punctuation."""
    words = _WORD.findall(text.casefold())
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
