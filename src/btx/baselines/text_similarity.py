"""Which of several kinds of text a context is most like: tf-idf of the context against the mean tf-idf of each kind.

The router of Branch-Train-Merge (BTX paper, section 4.1; c-BTM, arXiv 2303.14177, section 2.2). Terms are the models'
own tokens, which every language and every beginning of a text has. Weights are c-BTM's, exp(-distance² / T) of the K
nearest, normalised; with vectors of length 1, distance² = 2 - 2 cos, so they are a softmax of 2 cos / T over the K
largest cosines.

Shape letters: N kinds of text, C contexts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from btx.errors import CheckpointError, DataError
from btx.system_errors import blame

TEMPERATURE = 0.1
"""c-BTM's T."""
WINDOW = 64
"""Tokens between two looks at the context, unless said otherwise."""


def looks(length: int, window: int = WINDOW) -> list[int]:
    """Positions of a text at which weights are computed from all tokens up to there: 0, 1, 2, 4, ... window, then every
    `window`. The early ones are close because the first few words tell most."""
    early = [0, *(2**i for i in range(window.bit_length()) if 2**i < window)]
    return [position for position in [*early, *range(window, length, window)] if position < length]


@dataclass(frozen=True, eq=False)
class TextSimilarity:
    """Means of several kinds of text in tf-idf space, ready to compare contexts with."""

    names: tuple[str, ...]
    idf_V: np.ndarray
    """Inverse document frequency of each token; 0 for special tokens, which say nothing."""
    means_NV: np.ndarray
    """Mean tf-idf vector of each kind, scaled to length 1."""
    temperature: float

    @classmethod
    def fit(
        cls, pieces: Mapping[str, Sequence[np.ndarray]], vocab_size: int, *, special: Sequence[int] = ()
    ) -> TextSimilarity:
        """From pieces of text of each kind, with c-BTM's T.

        Args:
            pieces: name → token ids of its pieces, each (tokens,).
            special: tokens that do not count.

        Raises:
            DataError: a kind has no piece of text.
        """
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfTransformer

        for name, texts in pieces.items():
            if not len(texts):
                raise DataError(f"btm: no text of {name!r} to compare contexts with")
        counts = {name: _counts(texts, vocab_size) for name, texts in pieces.items()}
        tf_idf = TfidfTransformer(sublinear_tf=True)
        tf_idf.fit(vstack(list(counts.values()), format="csr"))
        idf_V = tf_idf.idf_.copy()
        idf_V[list(special)] = 0.0
        tf_idf.idf_ = idf_V
        means_NV = np.stack(
            [np.asarray(tf_idf.transform(counts_of_domain).mean(axis=0))[0] for counts_of_domain in counts.values()]
        )
        lengths_N1 = np.linalg.norm(means_NV, axis=1, keepdims=True)
        means_NV = (means_NV / np.maximum(lengths_N1, np.finfo(np.float32).tiny)).astype(np.float32)
        return cls(tuple(pieces), idf_V.astype(np.float32), means_NV, TEMPERATURE)

    def cosines(self, contexts: Sequence[np.ndarray]) -> np.ndarray:
        """Cosine of each context's tf-idf vector with each mean: (C, N); 0 for a context without any known token."""
        if not len(contexts):
            return np.zeros((0, len(self.names)))
        vectors_CV = self._tf_idf.transform(_counts(contexts, len(self.idf_V)))
        return np.asarray(vectors_CV @ self.means_NV.T, np.float64)

    def weights(self, contexts: Sequence[np.ndarray], top_k: int) -> np.ndarray:
        """Weights (C, N) of the `top_k` most similar kinds for each context, the others 0; rows sum to 1.

        A context that says nothing (no token but special ones) has equal weights for all kinds.
        """
        from scipy.special import softmax

        cosines_CN = self.cosines(contexts)
        order_CN = np.argsort(-cosines_CN, axis=1, kind="stable")
        chosen_CN = np.zeros_like(cosines_CN, bool)
        np.put_along_axis(chosen_CN, order_CN[:, :top_k], True, axis=1)
        chosen_CN[~cosines_CN.any(axis=1)] = True
        return np.asarray(softmax(np.where(chosen_CN, 2 * cosines_CN / self.temperature, -np.inf), axis=1))

    def save(self, file: Path) -> None:
        """Write to an .npz file; the names and T are the caller's to keep."""
        np.savez_compressed(file, idf=self.idf_V, means=self.means_NV)

    @classmethod
    def load(cls, file: Path, names: Sequence[str], temperature: float) -> TextSimilarity:
        """Read what `save` wrote."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                idf_V, means_NV = arrays["idf"], arrays["means"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            blame(error)
            raise CheckpointError(f"{file}: cannot be read ({error}); run its stage again") from error
        if idf_V.ndim != 1 or means_NV.shape != (len(names), len(idf_V)):
            raise CheckpointError(f"{file}: means of shape {means_NV.shape} for {len(names)} models and a vocabulary "
                                  f"of {len(idf_V)}; run its stage again")  # fmt: skip
        return cls(tuple(names), idf_V, means_NV, temperature)

    @cached_property
    def _tf_idf(self) -> Any:
        from sklearn.feature_extraction.text import TfidfTransformer

        tf_idf = TfidfTransformer(sublinear_tf=True)
        tf_idf.idf_ = self.idf_V
        return tf_idf


def _counts(texts: Sequence[np.ndarray], vocab_size: int) -> Any:
    """How often each token is in each text: sparse (C, V)."""
    from scipy.sparse import csr_matrix

    starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    ids = np.concatenate([np.asarray(text, np.int64) for text in texts])
    counts = csr_matrix((np.ones(len(ids), np.float32), ids, starts), shape=(len(texts), vocab_size))
    counts.sum_duplicates()
    return counts
