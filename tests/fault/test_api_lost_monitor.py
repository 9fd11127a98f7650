# SPDX-License-Identifier: Apache-2.0
"""The monitor lost in the middle of a command: one clear error, and the next command clears what is left."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from lab.qemu import BareQemu
from pullback.engine.domain_lock import domain_lock, qemu_identity
from pullback.qemu import monitor as monitor_module
from tests.support.api import Api, difference, state_of
from tests.support.monitor_proxy import How, MonitorProxy
from tests.support.product import MIB, Stage, run_state
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]
SIZE = 2 * MIB


@contextlib.contextmanager
def _through(api: Api, count: int, how: How) -> Iterator[MonitorProxy]:
    """Commands go through a proxy, and a reply has to come soon."""
    proxy = MonitorProxy(api.stage.place / "proxy", api.qemu.qmp_path, count, how)
    direct, api.domain = api.domain, f"qmp:{proxy.path}"
    defaults = monitor_module.Monitor.execute.__defaults__
    assert defaults is not None
    try:
        with mock.patch.object(monitor_module.Monitor.execute, "__defaults__", (*defaults[:-1], 1.0)):
            yield proxy
    finally:
        api.domain = direct
        proxy.close()


@pytest.fixture
def api(lab_dir: Path, bare_qemu: Start) -> Api:
    stage = Stage(lab_dir)
    return Api(stage, bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True))


@pytest.mark.parametrize("how", ["cut", "deaf", "lost"])
@pytest.mark.parametrize("count", [1, 10, 16])
def test_the_monitor_is_lost_while_a_snapshot_is_made(api: Api, how: How, count: int) -> None:
    with survives(Fault.MONITOR_CUT if how == "cut" else Fault.REPLY_NEVER):
        _lose_the_monitor(api, how, count)


def _lose_the_monitor(api: Api, how: How, count: int) -> None:
    before = state_of(api.qemu)
    with _through(api, count, how) as proxy:
        words = ("snapshot", "create", "s", "--scratch", api.stage.scratch, "--checkpoint", "one")
        done = api.attempt(*words)
    assert proxy.done and done.code == 4, done.err
    assert done.err.count("pullback: ") == 1 and "Traceback" not in done.err
    api.do("recover", "")
    for one in api.do("checkpoint", "list")["checkpoints"]:
        api.do("checkpoint", "delete", one["name"])
    assert difference(state_of(api.qemu), before) == []
    assert run_state(api.qemu) == "running"
    api.snapshot("s")
    api.do("snapshot", "delete", "s")
    assert api.clean() == []


@pytest.mark.fault(Fault.QEMU_KILLED)
def test_qemu_is_killed_in_the_middle(api: Api) -> None:
    stage, qemu = api.stage, api.qemu
    ended = threading.Event()

    def trace(self: object, command: str, *_: object) -> None:
        if command == "blockdev-add" and not ended.is_set():
            ended.set()
            qemu.kill()

    with mock.patch.object(monitor_module.Monitor, "_note", trace):
        done = api.attempt("snapshot", "create", "s", "--scratch", stage.scratch, "--checkpoint", "one")
    assert done.code == 4 and done.err.count("pullback: ") == 1, done.err
    qemu.start()
    qemu.qmp("cont")
    api.snapshot("s", "--checkpoint", "one")
    api.do("snapshot", "delete", "s")
    assert api.clean() == []


@pytest.mark.fault(Fault.TWO_AT_ONCE)
def test_two_at_once(api: Api) -> None:
    """The second one says which process holds the domain."""
    with domain_lock(qemu_identity(api.qemu.pid, str(api.qemu.qmp_path)), "web"):
        done = api.attempt("snapshot", "create", "s", env={})
    assert done.code == 4 and f"another pullback (process {os.getpid()})" in done.err
