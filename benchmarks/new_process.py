"""Work in a process of its own: PyTorch keeps a set of threads for each thread that computes, and two sets disturb."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """Return what the function returns in a new interpreter that ends afterwards; all must be picklable."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()
