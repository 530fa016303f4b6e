"""Every random stream is a function of its key alone."""

from __future__ import annotations

import hashlib

import torch

from fedloom.seeds import derive, generator, numpy_generator


def test_the_derivation_is_pinned() -> None:
    """Runs of earlier versions repeat only while this stays."""
    digest = hashlib.sha256(b"7\x1f3\x1fclient-1\x1frows").digest()
    assert derive(7, 3, "client-1", "rows") == int.from_bytes(digest[:8], "big") // 2
    assert derive(0) == 3456079177858693020


def test_every_element_of_the_key_matters() -> None:
    keys = [(0, 1, "a", "rows"), (1, 1, "a", "rows"), (0, 2, "a", "rows"), (0, 1, "b", "rows"), (0, 1, "a", "dropout")]
    keys += [(0, None, "a", "rows"), (0, 1, None, "rows"), (0, "1a", "", "rows"), (0, 1, "a\x1frow", "s")]
    assert len({derive(*key) for key in keys}) == len(keys)
    assert all(0 <= derive(*key) < 2**63 for key in keys)


def test_streams_repeat_and_leave_the_global_ones_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = torch.rand(5, generator=generator(0, 1, "a", "x"))
    torch.manual_seed(4)
    assert torch.equal(first, torch.rand(5, generator=generator(0, 1, "a", "x")))
    assert not torch.equal(first, torch.rand(5, generator=generator(0, 1, "b", "x")))
    assert (numpy_generator(0, 1, "a", "x").random(5) == numpy_generator(0, 1, "a", "x").random(5)).all()
    torch.manual_seed(3)
    assert torch.equal(torch.random.get_rng_state(), before)
