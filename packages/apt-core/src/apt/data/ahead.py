"""Batches made before they are asked for, so that a step does not wait for the part of a text that is on the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def made_ahead(make: Callable[[int], T], indices: Sequence[int], workers: int) -> Generator[T]:
    """`make(i)` for each index, in order; as many as there are workers are made while the last one is in use.

    The workers are threads: numpy lets go of Python's lock while it copies out of a mapped file, which is where the
    disk is waited for. Closing the generator ends them, once each has made what it is at.

    Args:
        make: called with one index; from several threads at once, if there are several workers.
        indices: what to make.
        workers: 0 to make each one when it is asked for.

    Raises:
        Whatever `make` raises, when that one is asked for.
    """
    if workers == 0:
        yield from map(make, indices)
        return
    coming: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="apt-data") as pool:
        try:
            for index in indices:
                coming.append(pool.submit(make, index))
                if len(coming) > workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
