"""Loops compiled for the CPU, where plain torch would take a call for every small step."""

from collections.abc import Callable
from typing import Any

import numba
import torch
from numba import njit


def compiled(loop: Callable[..., None]) -> Any:
    """Compile at the first call: seconds, then read from a cache beside the file, or in the home.

    Its `prange` runs on torch's own threads. Those still spin when torch is done with them: a team
    of others would have to push them aside.
    """
    # contract: a multiplication and an addition may be one instruction; nothing else is reordered
    options = {"parallel": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        fast = njit(cache=True, **options)(loop)
    except RuntimeError:  # neither place can be written to
        fast = njit(**options)(loop)

    def run(*arguments: Any) -> None:
        num_threads = torch.get_num_threads()
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
        fast(*arguments)
        if torch.get_num_threads() != num_threads:  # numba starts with a thread for every core
            torch.set_num_threads(num_threads)

    return run
