"""What benchmarks/peers.py compares with published code: numbers of the shapes that it returns."""

from __future__ import annotations

import pytest
import torch
import zoo
from asked import case_of

pytest.importorskip("peers", reason="the benchmarks are part of the repository only")

import peer_worker
import tables
from peers import PEERS, Peer, relative

pytestmark = pytest.mark.once


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.other)
def test_every_peer_is_asked_the_same_as_the_package(peer: Peer) -> None:
    model = zoo.shared(case_of("bert" if "BERT" in peer.on else "gpt2"))
    ids = torch.arange(5, 5 + peer.rows * 8).view(peer.rows, 8) % 20 + 5
    with torch.no_grad():
        found = peer.ours(model, ids)
    assert peer.key in peer_worker.PEERS
    assert all(bool(one.isfinite().all()) and bool(one.any()) for one in found.values())
    assert relative(found, {name: one.tolist() for name, one in found.items()}) < 1e-6
    with pytest.raises(AssertionError):
        relative(found, {name: (one * 1.01).tolist() for name, one in found.items()})


def test_the_reason_stands_beside_a_ratio_below_one() -> None:
    row = {"method": "globenc", "other": "X", "on": "Y", "difference": 0.0, "bound": 0}
    row |= {"operations": (2, 1), "seconds": (1.0, 3.0), "shown": "globenc", "note": "why"}
    assert "| 0.5 | 1 | 3 | why |" in tables.peers({"peers": [row], "peers machine": "here"})
    grown = {"operations": [4], "own_exponent": None, "seconds": 1.0, "lengths": [8]}
    grown |= {"kind": "causal-lm"}
    rows = {"forward pass, causal-lm": grown, "globenc": grown}
    assert "X (why)" in tables.speed({"growth": rows, "peers": [row], "machine": ""})
