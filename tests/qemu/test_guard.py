# SPDX-License-Identifier: Apache-2.0
"""The guard, with a QEMU that is still at what its dead client asked."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

from lab.qemu import BareQemu
from pullback.qemu import guard
from tests.support.product import MIB, Stage
from tests.support.survival import Fault, survives

ROUNDS = 8


def test_a_reply_to_the_dead_one_is_not_taken_for_its_own(lab_dir: Path, bare_qemu: Callable[..., BareQemu]) -> None:
    """QEMU gives it to whoever is connected by then; the guard would leave before its ``cont`` is read."""
    qemu = bare_qemu([Stage(lab_dir).disk("vda", MIB)], running=True)
    busy = {"command-line": f'qemu-io -d {qemu.qdev("vda")} "sleep 200"'}
    asked = [
        {"execute": "qmp_capabilities"},
        {"execute": "stop", "id": "dead"},
        {"execute": "human-monitor-command", "arguments": busy, "id": "dead"},
    ]
    for _ in range(ROUNDS):
        with survives(Fault.KILLED_AT_A_COMMAND), socket.socket(socket.AF_UNIX) as dead:
            dead.connect(str(qemu.qmp_path))
            with dead.makefile("rwb") as lines:
                lines.readline()
                for command in asked[:2]:
                    lines.write(json.dumps(command).encode())
                    lines.flush()
                    while b"return" not in lines.readline():
                        pass
                lines.write(json.dumps(asked[2]).encode())
                lines.flush()
                time.sleep(0.1)  # QEMU is at it by now, and not done yet
            dead.close()
            guard._persist("qmp", str(qemu.qmp_path))
            assert qemu.qmp("query-status")["status"] == "running"
