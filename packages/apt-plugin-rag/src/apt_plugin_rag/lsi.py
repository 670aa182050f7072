"""Latent semantic indexing: vectors from the terms of the texts themselves, without a model.

Deerwester et al. 1990: the truncated singular value decomposition of the matrix of term weights. Weights are (1 + log
tf) idf, rows of length one (scikit-learn's `TfidfTransformer(sublinear_tf=True)`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apt_plugin_rag.contents import Floats, TermCounts, Vectors

ARRAYS = ("lsi_vocabulary", "lsi_idf", "lsi_components")
"""What is kept to make vectors of queries: the terms as UTF-8 lines, their idf [V], the singular vectors [K, V]."""


def fit(terms: TermCounts, dimensions: int) -> tuple[Vectors, dict[str, NDArray[Any]]]:
    """The vectors of all passages, of length one, and the arrays that `embed` needs.

    A passage without terms has no vector. Where passages or terms are no more than `dimensions`, as many singular
    vectors as there are do.
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    shape = (len(terms.starts) - 1, len(terms.vocabulary))
    counts_NV = csr_matrix((terms.counts.astype(np.float64), terms.terms, terms.starts), shape=shape)
    weighting = TfidfTransformer(sublinear_tf=True)
    weights_NV = weighting.fit_transform(counts_NV)
    if min(shape) <= dimensions:
        components_KV = np.linalg.svd(weights_NV.toarray(), full_matrices=False)[2]
    else:
        # ARPACK's vectors are exact to rounding: no seed decides what is found.
        components_KV = TruncatedSVD(dimensions, algorithm="arpack", random_state=0).fit(weights_NV).components_
    vectors_NK = np.asarray(weights_NV @ components_KV.T)
    lengths_N = np.linalg.norm(vectors_NK, axis=1)
    owners = np.flatnonzero(lengths_N > 1e-9)
    points = vectors_NK[owners] / lengths_N[owners, None]
    words = np.frombuffer("\n".join(terms.vocabulary).encode(), np.uint8)
    arrays = dict(
        zip(ARRAYS, (words, weighting.idf_.astype(np.float32), components_KV.astype(np.float32)), strict=True)
    )
    return Vectors.of(points.astype(np.float32), owners.astype(np.int64)), arrays


class LSI:
    """Makes queries into vectors.

    Args:
        arrays: what `fit` returned.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        words, self._idf_V, self._components_KV = (arrays[name] for name in ARRAYS)
        self._number = {term: index for index, term in enumerate(bytes(words).decode().split("\n"))}

    def embed(self, counts: Mapping[str, int]) -> Floats | None:
        """The vector [K] of a text with these terms, of length one; None if none of them is known."""
        known = {self._number[term]: count for term, count in counts.items() if term in self._number}
        if not known:
            return None
        columns = np.fromiter(known, np.int64)
        weights = (1 + np.log(np.fromiter(known.values(), np.float64))) * self._idf_V[columns]
        vector_K = self._components_KV[:, columns] @ (weights / np.linalg.norm(weights))
        length = np.linalg.norm(vector_K)
        return (vector_K / length).astype(np.float32) if length > 1e-9 else None
