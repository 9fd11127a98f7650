# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests with real QEMU processes, and the check that none of them is left at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from lab.processes import LabTimeout, wait_for
from lab.qemu import PROGRAM, BareQemu, qemu_version, short_directory
from lab.s3 import S3Address, shared_s3
from lab.vm import Vm
from tests.support.judging import judge_all
from tests.support.survival import FaultTable

MARK = "PULLBACK_TEST_SESSION"

# How long an example takes says how busy the machine is.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_report_header() -> str:
    """Which QEMU the tests run against: the first one in PATH."""
    found = ".".join(map(str, qemu_version())) if shutil.which(PROGRAM) else "none, so most tests fail"
    return f"QEMU: {found} ({shutil.which(PROGRAM)})"


def pytest_configure(config: pytest.Config) -> None:
    """The markers that the tests here have, and the table of faults."""
    config.addinivalue_line(
        "markers", "damages_repository(reason): restic is not asked what it thinks of the repositories of this test"
    )
    config.addinivalue_line("markers", "fault(fault): the test is one fault in the table at the end of the run")
    config.pluginmanager.register(FaultTable())


#: Where tests write repositories through the product.
JUDGED = {"fault", "guest", "peers", "qemu"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test passes only if restic finds nothing wrong in the repositories that it leaves."""
    result = yield
    marker = item.get_closest_marker("damages_repository")
    if marker is not None:
        assert marker.args, "say why"
    elif item.path.parent.name in JUDGED:
        judge_all(getattr(item, "funcargs", {}))
    return result


def _survivors(mark: str) -> dict[int, str]:
    """Every live process that inherited our mark, whoever its parent is by now: pid to command line."""
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit() or int(place.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to look at
            if f"{MARK}={mark}".encode() not in (place / "environ").read_bytes():
                continue
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if command and "multiprocessing.resource_tracker" not in command:
                found[int(place.name)] = command[:300]
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_survives() -> Iterator[None]:
    """Fail the last test of a run (of each worker) that left a process behind, and end that process."""
    mark = os.environ[MARK] = uuid.uuid4().hex
    yield
    try:
        wait_for(lambda: not _survivors(mark), "the end of all processes started by tests", timeout=5)
    except LabTimeout:
        left = _survivors(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pytest.fail("left behind by tests: " + "; ".join(f"{pid}: {line}" for pid, line in left.items()))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the tests is kept where the user's own cache is."""
    os.environ["PULLBACK_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def handles() -> Callable[[], dict[int, str]]:
    """What this process has open.  What earlier tests left to be collected may be closed between two looks."""

    def look() -> dict[int, str]:
        found = {}
        for one in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[int(one.name)] = os.readlink(one)
        return found

    return look


@pytest.fixture
def lab_dir() -> Iterator[Path]:
    """A directory with a path short enough for unix sockets; removed at the end."""
    place = short_directory()
    yield place

    def failed(function: object, path: object, error: tuple[type, BaseException, object]) -> None:
        # A process that was told to end may be removing its sockets just now.
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    shutil.rmtree(place, onerror=failed)


@pytest.fixture
def bare_qemu() -> Iterator[Callable[..., BareQemu]]:
    """A factory of started BareQemu (same arguments as the class); all are ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any, **keywords: Any) -> BareQemu:
            return stack.enter_context(BareQemu(*arguments, **keywords))

        yield start


@pytest.fixture
def guest_vm() -> Iterator[Callable[..., Vm]]:
    """A factory of booted Vm (same arguments as the class; 3 s each without KVM); all are ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any, **keywords: Any) -> Vm:
            return stack.enter_context(Vm(*arguments, **keywords))

        yield start


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Address]:
    """A real S3 server, one for all workers of this run; it starts, in some 10 s, when the first test asks for it."""
    base = tmp_path_factory.getbasetemp()
    place = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    # It may outlive the worker that started it, though never the last one: shared_s3 waits for its end.
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    with shared_s3(place / "s3", environment) as address:
        yield address
