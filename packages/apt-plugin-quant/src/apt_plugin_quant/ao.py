"""What this package takes of torchao, imported without what it says of kernels for other machines."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


with _quietly():
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

__all__ = ["Int8Tensor", "IntxUnpackedToInt8Tensor", "PerRow", "QuantizeTensorToInt8Kwargs"]
