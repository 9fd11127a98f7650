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
from pullback.engine.pull import Pull
from pullback.errors import NbdProtocolError, ProofFailed, PullbackError, RestoreError, SnapshotBroken, TransferError
from tests.fault.test_restore_in_place_killed import Halfway
from tests.support import dying
from tests.support import nbd_proxy as nbd
from tests.support.life import Life
from tests.support.nbd_proxy import NbdProxy, Reply, altered, error
from tests.support.product import MIB, Stage, leftovers, references, run_state
from tests.support.restoring import Kept, some_disk
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


# -- lies that only a proof sees ---------------------------------------------------------------------------------------


def other_data(reply: Reply) -> bytes:
    """Other bytes than are there."""
    if reply.kind == nbd.HOLE_CHUNK:
        filled = b"\1" * int.from_bytes(reply.payload[8:], "big")
        return bytes(replace(reply, kind=nbd.DATA_CHUNK, payload=reply.payload[:8] + filled))
    return bytes(replace(reply, payload=reply.payload[:-1] + bytes([reply.payload[-1] ^ 1])))


@pytest.mark.parametrize("command", [nbd.READ, nbd.BLOCK_STATUS], ids=["data", "map"])
def test_a_lie_that_the_protocol_allows_is_seen_by_a_proof(life: Wired, command: int) -> None:
    """Bytes of a disk, or that nothing of it changed: a plain backup has nothing else to go by.  A proof asks again."""
    never = 1 << 30
    lie = NbdProxy(deed=other_data, nth=never)
    if command == nbd.BLOCK_STATUS:
        lie = NbdProxy(deed=extents((0x7FFFFFFF, 0)), command=command)
    # Before, pieces that did not change are compared with the base: a lie about those is seen at once.
    in_the_pull = dying.at_call(Pull, "run")(lambda: setattr(lie, "nth", 0))
    life.go_on()
    with survives(Fault.NBD_LIE):
        before, listed = life.chains(), life.stage.listed()
        with lie.between(), in_the_pull:
            failed = life.attempt(life.stage.request(life.qemu, prove="all"))
        assert lie.happened
        assert isinstance(failed, ProofFailed), failed
        assert failed.exit_code == 16
        assert life.stage.listed() == listed
        assert leftovers(life.qemu, life.stage.scratch) == []
        # Dirty bitmaps that were caught lying are not believed again; the other disk's are as good as before.
        assert life.chains() == ([{}, before[1]] if command == nbd.BLOCK_STATUS else before)
    life.go_on()
    state = references(life.qemu)
    made = life.stage.backup(life.qemu)
    whole = "full" if command == nbd.BLOCK_STATUS else "incremental"
    assert [disk.mode for disk in made.manifest.disks] == [whole, "incremental"]
    assert life.adopt(state)
    life.goes_on()


# -- the other way -----------------------------------------------------------------------------------------------------


def on_the_way_down() -> dict[str, tuple[Fault, NbdProxy]]:
    """What happens to writes; each attempt makes a little progress."""
    return {
        "greeting": (Fault.NBD_RESET, NbdProxy(reset_after=10)),
        "first replies": (Fault.NBD_RESET, NbdProxy(reset_after=400)),
        "no space": (Fault.NBD_ERROR, NbdProxy(deed=error(errno.ENOSPC), command=nbd.WRITE, nth=3, instead=True)),
        "input/output": (Fault.NBD_ERROR, NbdProxy(deed=error(errno.EIO), command=nbd.WRITE, instead=True)),
        "shutting down": (Fault.NBD_ERROR, NbdProxy(deed=error(errno.ESHUTDOWN), command=nbd.WRITE, instead=True)),
        "cut": (Fault.NBD_SHORT, NbdProxy(deed=lambda reply: bytes(reply)[:9], command=nbd.WRITE, nth=2, cut=True)),
        "a write of nobody's": (Fault.NBD_LIE, NbdProxy(deed=altered(cookie=1 << 60), command=nbd.WRITE)),
        "data for a write": (Fault.NBD_LIE, NbdProxy(deed=altered(kind=1, payload=bytes(99)), command=nbd.WRITE)),
        "a flush that failed": (Fault.NBD_ERROR, NbdProxy(deed=error(errno.EIO), command=nbd.FLUSH, instead=True)),
    }


def test_a_restore_goes_on_after_its_connections_broke(tmp_path: Path) -> None:
    """Each attempt goes on with what the one before left, until one is left alone; and no image has a name before."""
    kept = Kept(tmp_path)
    backup = kept.store({"vda": some_disk(4 * MIB, 1), "vdb": some_disk(MIB, 2)})
    to = tmp_path / "to"
    for name, (fault, proxy) in on_the_way_down().items():
        with survives(fault), proxy.between():
            with pytest.raises((TransferError, RestoreError)) as caught:
                kept.restore(backup, to)
            assert proxy.happened, name
            assert isinstance(caught.value, RestoreError) == (name == "no space"), caught.value
            assert not to.exists() or all(path.name.endswith((".partial", ".json")) for path in to.iterdir())
    kept.restore(backup, to)
    kept.judge(backup, to)


def test_a_restore_in_place_is_completed_after_its_connections_broke(lab_dir: Path, bare_qemu: Start) -> None:
    halfway = Halfway(Stage(lab_dir), bare_qemu)
    marked = 0
    for name, (fault, proxy) in on_the_way_down().items():
        with survives(fault), proxy.between():
            with pytest.raises((TransferError, RestoreError)) as caught:
                halfway.restore()
            assert isinstance(caught.value, RestoreError) == (name == "no space"), caught.value
            assert proxy.happened, name
            marked += halfway.marked()
            assert not halfway.daemons()
    assert marked > 3
    assert halfway.is_marked_or_whole()
    halfway.completes()
