# SPDX-License-Identifier: Apache-2.0
"""NBD connections that break, refuse, stop short or lie, between pullback and QEMU and between it and its daemon.

One clear error, or a backup that is right; the domain never notices, and the next backup is incremental.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback.errors import NbdProtocolError, PullbackError, SnapshotBroken, TransferError
from tests.support import nbd_proxy as nbd
from tests.support.life import Life
from tests.support.nbd_proxy import NbdProxy, Reply, altered, error
from tests.support.product import references, run_state
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]


class Wired(Life):
    """A domain whose backups go over a wire on which things happen; after every third comes one that is left alone."""

    _hits = 0

    def hit(self, proxy: NbdProxy) -> PullbackError | None:
        """A backup through the proxy; how it ended, after all that has to hold was seen to hold."""
        self.go_on()
        before, state = self.chains(), references(self.qemu)
        with proxy.between():
            failed = self.attempt()
        assert proxy.happened
        assert self.adopt(state) == (failed is None)
        if failed is not None:
            assert isinstance(failed, TransferError | SnapshotBroken), repr(failed)
            assert "\n" not in str(failed)
            assert self.chains() == before
        self.nothing_left()
        assert run_state(self.qemu) == "running"
        self._hits += 1
        if self._hits % 3 == 0:
            self.go_on()
            self.backup()
        return failed

    def goes_on(self) -> None:
        """The next backup is incremental and right, and all earlier ones are as they were."""
        self.backup()
        self.judge_all()


@pytest.fixture
def life(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> Wired:
    return Wired(lab_dir, bare_qemu, monkeypatch)


def test_connections_are_reset(life: Wired) -> None:
    """After bytes that are spread over all that a backup reads, handshakes and last replies included."""
    life.go_on()
    with NbdProxy().between() as whole:
        life.backup()
    assert whole.carried > 300_000
    failed = 0
    places = [1, 18, 30, 100, *range(200, whole.carried - 64, whole.carried // 8)]
    for place in places:
        with survives(Fault.NBD_RESET):
            failed += life.hit(NbdProxy(reset_after=place)) is not None
    assert failed > len(places) - 3
    life.goes_on()


#: Which request of a backup, by the order in which it asks: of one disk's map, then of the other's and of data.
REQUESTS = [(nbd.BLOCK_STATUS, 1), (nbd.BLOCK_STATUS, 3), (nbd.READ, 1), (nbd.READ, 2), (nbd.TRIM, 1)]


def test_requests_are_refused(life: Wired) -> None:
    numbers = [errno.EIO, errno.ENOSPC, errno.ESHUTDOWN, errno.EINVAL, errno.EPERM, errno.ENOMEM, 12345]
    for at, number in enumerate(numbers):
        command, nth = REQUESTS[at % len(REQUESTS)]
        with survives(Fault.NBD_ERROR):
            failed = life.hit(NbdProxy(deed=error(number), command=command, nth=nth, instead=True))
            if command == nbd.READ:
                assert failed is not None
                # QEMU's word for a frozen view that was lost.
                assert isinstance(failed, SnapshotBroken) == (number in (errno.EINVAL, errno.EPERM)), failed
    life.goes_on()


def test_replies_stop_short(life: Wired) -> None:
    cuts: list[Callable[[Reply], bytes]] = [
        lambda reply: bytes(reply)[: len(bytes(reply)) // 2],
        lambda reply: bytes(reply)[:7],
        lambda reply: bytes(reply)[:-1],
    ]
    for at, (command, nth) in enumerate(REQUESTS[:4]):
        with survives(Fault.NBD_SHORT):
            assert life.hit(NbdProxy(deed=cuts[at % 3], command=command, nth=nth, cut=True)) is not None
    # Short, and it says so: as if that were all.
    half = NbdProxy(deed=lambda reply: bytes(replace(reply, payload=reply.payload[: len(reply.payload) // 2])))
    with survives(Fault.NBD_SHORT):
        assert "ended a read before all of it had come" in str(life.hit(half))
    life.goes_on()


def extents(*pairs: tuple[int, int]) -> Callable[[Reply], bytes]:
    """Another answer to a block status, in the same context."""
    body = b"".join(length.to_bytes(4, "big") + flags.to_bytes(4, "big") for length, flags in pairs)
    return lambda reply: bytes(replace(reply, payload=reply.payload[:4] + body))


def elsewhere(reply: Reply) -> bytes:
    """Data of a place that was not asked for."""
    return bytes(
        replace(reply, payload=(reply.request.offset + reply.request.length).to_bytes(8, "big") + reply.payload[8:])
    )


LIES: dict[str, tuple[int, Callable[[Reply], bytes]]] = {
    "a request that nobody sent": (nbd.READ, altered(cookie=0xDEAD)),
    "no reply at all": (nbd.READ, altered(magic=0x01020304)),
    "a chunk of an unknown type": (nbd.READ, altered(kind=77)),
    "an unknown kind of error": (nbd.READ, altered(kind=0x8077, payload=b"\0")),
    "four gigabytes": (nbd.READ, altered(length=0xFFFFFFFF)),
    "a byte less than it sends": (nbd.READ, lambda reply: bytes(replace(reply, length=len(reply.payload) - 1))),
    "data from elsewhere": (nbd.READ, elsewhere),
    "a hole beyond the end": (nbd.READ, altered(kind=2, payload=(1 << 62).to_bytes(8, "big") + b"\xff\xff\xff\xff")),
    "an end without data": (nbd.READ, altered(kind=nbd.NONE_CHUNK, payload=b"")),
    "a simple reply to a read": (nbd.READ, lambda reply: nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, reply.request.cookie)),
    "another request's answer": (nbd.BLOCK_STATUS, altered(kind=nbd.DATA_CHUNK)),
    "an empty extent": (nbd.BLOCK_STATUS, extents((65536, 1), (0, 0), (65536, 0))),
    "no extents": (nbd.BLOCK_STATUS, extents()),
    "half an extent": (nbd.BLOCK_STATUS, lambda reply: bytes(replace(reply, payload=reply.payload[:10]))),
    "extents beyond the end": (nbd.BLOCK_STATUS, extents((0xFFFFFFFF, 1), (0xFFFFFFFF, 1))),
    "a map of nobody's": (
        nbd.BLOCK_STATUS,
        lambda reply: bytes(replace(reply, payload=b"\0\0\x70\x07" + reply.payload[4:])),
    ),
}


def test_replies_lie(life: Wired) -> None:
    """What the protocol does not allow ends the backup, at once and without the memory that a lie asks for."""
    for name, (command, deed) in LIES.items():
        with survives(Fault.NBD_LIE):
            failed = life.hit(NbdProxy(deed=deed, command=command))
            assert isinstance(failed, NbdProtocolError), name
            assert failed.exit_code == 7
    life.goes_on()
