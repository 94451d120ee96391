"""Corpora on a local Ray of two CPUs, in a process of its own, under a timeout."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_mining import texts

import tl_contextmix as cm
from tl_contextmix.evaluation import over_corpus_on_ray
from tl_contextmix.methods.memories import mine_on_ray

ROOT = Path(__file__).parent.parent

_RUN = """
import os, sys
from pathlib import Path
import torch
import tl_contextmix as cm
from tl_contextmix.evaluation import over_corpus, over_corpus_on_ray
from tl_contextmix.methods.memories import mine_on_ray

out, corpus = Path(sys.argv[1]), sys.argv[2]
options = {"k": 4, "shard_size": 8, "batch_size": 4, "checkpoint_seconds": 0.0}

def load():
    torch.set_num_threads(1)
    from tl_contextmix.methods.memories import mining
    save = mining.save_part

    def once(part, folder):
        save(part, folder)
        mark = Path(folder) / ".killed"
        if not part.done and not mark.exists():
            mark.touch()
            os._exit(137)

    mining.save_part = once
    return cm.load_demo("causal-lm")

calls = Path(corpus).with_name("calls")

def ratio(model, texts):
    # A run that is stopped in its fourth batch; workers, which go on, write into the same file.
    calls.touch()
    if calls.stat().st_size == 3 and not calls.with_name("stopped").exists():
        calls.with_name("stopped").touch()
        raise KeyboardInterrupt
    with calls.open("a") as file:
        file.write(".")
    return cm.mixing_ratio(model, texts)

def demo():
    torch.set_num_threads(1)
    return cm.load_demo("causal-lm")

import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
found = mine_on_ray(load, corpus, out=out, workers=1, parts=3, options=options)
assert (out / ".killed").exists()
del options["k"]
model, folder = demo(), out / "all"
folder.mkdir()
part = folder / "part-00000-of-00003.json"
try:
    over_corpus(model, corpus, ratio, out=part, rank=0, world_size=3, **options)
except KeyboardInterrupt:
    pass
figures = over_corpus_on_ray(demo, corpus, ratio, out=folder, parts=3, options=options)
assert calls.stat().st_size == 18, "17 batches, the one before the stop again"
alone = over_corpus(model, corpus, ratio, out=out / "alone", **options)
assert vars(figures) == vars(alone)
assert (folder / "figures.json").read_bytes() == (out / "alone").read_bytes()
cm.mine_triggers(model, corpus, out=out / "one", k=4, **options)
for name in ("triggers.parquet", "manifest.json"):
    assert (out / name).read_bytes() == (out / "one" / name).read_bytes(), name
print("the same bytes")
"""


@pytest.mark.newest
@pytest.mark.slow
def test_ray_gives_the_same_bytes_also_when_a_worker_is_killed(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(["the keys to the cabinet are red ."] * 5 + texts(60)) + "\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", _RUN, str(tmp_path / "out"), str(corpus)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert "the same bytes" in done.stdout, done.stderr[-3000:]


def test_options_are_known(tmp_path: Path) -> None:
    with pytest.raises(cm.InvalidInput, match="got 'rank'; expected some of"):
        mine_on_ray(object, "corpus.txt", out=tmp_path, options={"rank": 1})
    with pytest.raises(cm.InvalidInput, match="over_corpus does not have this option.*got 'k'"):
        over_corpus_on_ray(object, "corpus.txt", cm.mixing_ratio, out=tmp_path, options={"k": 1})


def test_a_measure_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cm.InvalidInput, match=r"Define one with def"):
        over_corpus_on_ray(object, "corpus.txt", partial(cm.mixing_ratio), out=tmp_path)


def test_without_ray_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(cm.InvalidInput, match=r"Install tl-contextmix\[ray\]"):
        mine_on_ray(object, "corpus.txt", out=tmp_path)


def test_a_ray_that_is_too_small_is_stopped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    ray: Any = ModuleType("ray")
    ray.data = ModuleType("ray.data")
    ray.is_initialized = lambda: bool(done)
    ray.init = lambda **options: done.append("started")
    ray.cluster_resources = lambda: {"CPU": 2.0}
    ray.shutdown = lambda: done.append("stopped")
    for module in (ray, ray.data):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for running in ([], ["started by the user"]):
        done[:] = running
        with pytest.raises(cm.InvalidInput, match="got actors that take 2 of 2 CPUs"):
            mine_on_ray(object, "corpus.txt", out=tmp_path, workers=2)
        assert done == (running or ["started", "stopped"])
