"""What holds for every test: no network, one thread, fixed seeds."""

from __future__ import annotations

import os

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import gc
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from browser import launched
from matrix import FAST, Matrix, is_fast
from zoo import EXPECTED, major

# Some tests are about the benchmarks, where the repository has them.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
_NEWEST = f"runs on TransformerLens {max(EXPECTED)}"
# Tiny matrices: more threads only wait for each other, and sums would depend on their number.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Counts what the contract covers, see `matrix`; adds the markers of `pytest_itemcollected`."""
    config.pluginmanager.register(Matrix(), "matrix")
    config.addinivalue_line("markers", "mostly_once: once, but for the tests marked `every`")
    config.addinivalue_line("markers", "every: on every version, unlike the rest of its file")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Reads no other file for `-m fast`: that alone would take a third of its time."""
    other = collection_path.suffix == ".py" and collection_path.stem not in FAST
    return True if config.option.markexpr == "fast" and other else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keeps the garbage collector from looking through thousands of tests again and again."""
    gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what is `fast`; the `newest` version's own are `once`, and skipped on the others."""
    if is_fast(item):
        item.add_marker("fast")
    if item.get_closest_marker("every"):
        return
    if item.get_closest_marker("mostly_once"):
        item.add_marker("once")
    if item.get_closest_marker("newest"):
        item.add_marker("once")
        item.add_marker(pytest.mark.skipif(major() < max(EXPECTED), reason=_NEWEST))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def causal() -> Any:
    """The demo model that predicts the next token; no test changes it."""
    return _demo("causal-lm")


@pytest.fixture(scope="session")
def masked() -> Any:
    """The demo model that fills masks; no test changes it."""
    return _demo("masked-lm")


def _demo(name: Any) -> Any:
    # Imported here: jaxtyping checks only what is imported after this file.
    import tl_contextmix as cm

    return cm.load_demo(name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running browser. Not for a whole session: others may be launched by themselves."""
    with launched() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail every connection that leaves the machine; local ones serve notebooks and workers."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host not in ("127.0.0.1", "::1", "localhost"):
                _refuse(host)
        connect(self, address)

    def no_names(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host in (None, "127.0.0.1", "::1", "localhost"):
            return lookup(host, *args, **kwargs)
        return _refuse(host)

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)


def _refuse(host: Any) -> NoReturn:
    raise AssertionError(f"a test tried to reach {host}; tests run without a network")
