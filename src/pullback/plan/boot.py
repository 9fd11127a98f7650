# SPDX-License-Identifier: Apache-2.0
"""The command line of the QEMU that boots a backup: sensible defaults, of which the user's arguments replace any.

An argument of the user's that names the same thing takes ours away, it is not merely added: QEMU takes the first of
two ``-accel``, and would give standard input and output to two who cannot share them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

#: Where the domain's first serial port goes: to a terminal, to standard input and output, or to a unix socket.
Console = Literal["terminal", "output", "socket"]

#: The user's options, without dashes, that take one of ours away.
_REPLACED_BY = {
    "name": {"name"},
    "machine": {"machine", "M"},
    "accel": {"accel", "enable-kvm", "no-kvm"},
    "cpu": {"cpu"},
    "m": {"m"},
    "smp": {"smp"},
    "nic": {"nic", "net", "netdev"},
    "display": {"display", "nographic", "vnc", "spice", "curses"},
    "serial": {"serial", "nographic", "curses"},
}
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
#: The firmware runs to its end, finds nothing to boot and resets; QEMU ends instead of that.
_PROBE = ("-nodefaults", "-no-user-config", "-display", "none", "-m", "64", "-no-reboot", "-boot", "reboot-timeout=1")


@dataclass(frozen=True, slots=True)
class BootDisk:
    """One disk: what the domain's backups call it, and its image."""

    target: str
    path: str


@dataclass(frozen=True, slots=True)
class Booting:
    """What is booted, and how: ``accel`` is kvm or tcg, ``qmp`` and ``serial`` the paths of sockets to make."""

    program: str
    name: str
    disks: tuple[BootDisk, ...]
    qmp: str
    serial: str
    accel: str
    cpus: int
    console: Console


def names_accelerator(given: Sequence[str]) -> bool:
    """Whether the user's arguments say how the processor is to be run."""
    return bool(_options(given) & _REPLACED_BY["accel"]) or any(re.search(r"(^|,)accel=", word) for word in given)


def probe(program: str) -> list[str]:
    """A QEMU that ends by itself, with 0, if KVM can run a processor at all: some machines offer it and hang."""
    return [program, "-accel", "kvm", "-machine", "q35", *_PROBE]


def arguments(what: Booting, given: Sequence[str]) -> list[str]:
    """QEMU's whole command line; ``given`` are the user's arguments, which come last."""
    options = _options(given)
    ours = [
        ("name", f"guest={_escaped(what.name)}"),
        ("machine", "q35"),
        *([] if names_accelerator(given) else [("accel", what.accel), ("cpu", _cpu(what.accel))]),
        ("m", "2G"),
        ("smp", str(what.cpus)),
        ("nic", "none"),
        ("display", "none"),
        *([] if _takes_stdio(given, what.console) else [("serial", _serial(what))]),
    ]
    argv = [what.program, *_flat(pair for pair in ours if not options & _REPLACED_BY[pair[0]])]
    for number, disk in enumerate(what.disks):
        argv += ["-blockdev", json.dumps(_blockdev(number, disk))]
        if not _device_is_given(number, given):
            argv += ["-device", json.dumps(_device(number, disk, "boot" in options))]
    return [*argv, "-qmp", f"unix:{_escaped(what.qmp)},server=on,wait=off", *given]


def serial_socket(what: Booting, given: Sequence[str]) -> str:
    """The socket that the domain's serial port is at; empty where it is elsewhere."""
    return what.serial if what.console == "socket" and not _options(given) & _REPLACED_BY["serial"] else ""


def node_name(number: int) -> str:
    """The block node of a disk, by which the user can give it another device."""
    return f"disk{number}"


def _options(given: Sequence[str]) -> set[str]:
    return {word.lstrip("-") for word in given if word.startswith("-")}


def _flat(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [word for name, value in pairs for word in (f"-{name}", value)]


def _escaped(value: str) -> str:
    """A value among QEMU's comma-separated ones."""
    return value.replace(",", ",,")


def _cpu(accel: str) -> str:
    """All that is to be had: systems of today do not run on the processor that QEMU emulates if told nothing."""
    return "host" if accel == "kvm" else "max"


def _serial(what: Booting) -> str:
    if what.console == "socket":
        return f"unix:{_escaped(what.serial)},server=on,wait=off"
    return "mon:stdio" if what.console == "terminal" else "stdio"


def _takes_stdio(given: Sequence[str], console: Console) -> bool:
    """Whether the user gives our standard input and output to something else."""
    return console != "socket" and any("stdio" in word or word.startswith("curses") for word in given)


def _blockdev(number: int, disk: BootDisk) -> dict[str, object]:
    file = {"driver": "file", "filename": disk.path, "discard": "unmap"}
    return {"driver": "qcow2", "node-name": node_name(number), "discard": "unmap", "file": file}


def _device(number: int, disk: BootDisk, order_is_given: bool) -> dict[str, object]:
    # Backups of the booted domain call a disk by its device: the same name as before.
    name = disk.target if _ID.fullmatch(disk.target) else f"virtio-{node_name(number)}"
    order = {} if order_is_given else {"bootindex": number + 1}
    return {"driver": "virtio-blk-pci", "id": name, "drive": node_name(number), **order}


def _device_is_given(number: int, given: Sequence[str]) -> bool:
    wanted = rf'(^|,)drive={node_name(number)}(,|$)|"drive":\s*"{node_name(number)}"'
    return any(re.search(wanted, word) for word in given)
