# SPDX-License-Identifier: Apache-2.0
"""The command line of the QEMU that boots a backup: what is ours, and what the user's arguments take away."""

from __future__ import annotations

import json

import pytest

from pullback.plan.boot import BootDisk, Booting, Console, arguments, names_accelerator, probe, serial_socket

DISKS = (BootDisk("vda", "/x/vda.qcow2"), BootDisk("0-odd", "/x/a,b.qcow2"))


def booting(console: Console = "socket", accel: str = "kvm") -> Booting:
    return Booting("/bin/qemu", "web,1", DISKS, "/x/qmp,1", "/x/serial", accel, 2, console)


def pairs(argv: list[str]) -> list[tuple[str, str]]:
    """Our options with their values."""
    return list(zip(argv[1::2], argv[2::2], strict=False))


def test_without_arguments_everything_is_ours() -> None:
    found = pairs(arguments(booting(), ()))
    assert [pair for pair in found if pair[0] not in ("-blockdev", "-device")] == [
        ("-name", "guest=web,,1"),
        ("-machine", "q35"),
        ("-accel", "kvm"),
        ("-cpu", "host"),
        ("-m", "2G"),
        ("-smp", "2"),
        ("-nic", "none"),
        ("-display", "none"),
        ("-serial", "unix:/x/serial,server=on,wait=off"),
        ("-qmp", "unix:/x/qmp,,1,server=on,wait=off"),
    ]
    assert ("-cpu", "max") in pairs(arguments(booting(accel="tcg"), ()))


def test_disks_keep_their_order_and_their_names_where_these_can_be_names() -> None:
    found = pairs(arguments(booting(), ()))
    nodes = [json.loads(value) for option, value in found if option == "-blockdev"]
    devices = [json.loads(value) for option, value in found if option == "-device"]
    assert [node["file"]["filename"] for node in nodes] == ["/x/vda.qcow2", "/x/a,b.qcow2"]
    assert devices == [
        {"driver": "virtio-blk-pci", "id": "vda", "drive": nodes[0]["node-name"], "bootindex": 1},
        {"driver": "virtio-blk-pci", "id": "virtio-disk1", "drive": nodes[1]["node-name"], "bootindex": 2},
    ]


def test_a_disk_is_a_qcow2_file_that_gives_back_what_the_domain_discards() -> None:
    (node, _) = (json.loads(value) for option, value in pairs(arguments(booting(), ())) if option == "-blockdev")
    assert node == {
        "driver": "qcow2",
        "node-name": "disk0",
        "discard": "unmap",
        "file": {"driver": "file", "filename": "/x/vda.qcow2", "discard": "unmap"},
    }


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        (("-m", "4G"), {"-m"}),
        (("--m", "4G"), {"-m"}),
        (("-accel", "tcg"), {"-accel", "-cpu"}),
        (("-enable-kvm",), {"-accel", "-cpu"}),
        (("-M", "pc,accel=tcg"), {"-machine", "-accel", "-cpu"}),
        (("-machine", "pc"), {"-machine"}),
        (("-cpu", "qemu64"), {"-cpu"}),
        (("-smp", "4"), {"-smp"}),
        (("-name", "other"), {"-name"}),
        (("-nic", "user"), {"-nic"}),
        (("-netdev", "user,id=n", "-device", "e1000,netdev=n"), {"-nic"}),
        (("-vnc", ":1"), {"-display"}),
        (("-nographic",), {"-display", "-serial"}),
        (("-serial", "null"), {"-serial"}),
        (("-monitor", "stdio"), {"-serial"}),
        (("-display", "curses"), {"-display", "-serial"}),
        (("-kernel", "/x/m"), set()),
    ],
)
def test_what_the_user_names_is_not_said_twice(given: tuple[str, ...], gone: set[str]) -> None:
    before = {option for option, _ in pairs(arguments(booting("output"), ()))}
    argv = arguments(booting("output"), given)
    after = {option for option, _ in pairs(argv[: -len(given)])}
    assert before - after == gone
    assert argv[-len(given) :] == list(given)


def test_a_disk_that_the_user_gives_a_device_has_one_only() -> None:
    for device in ("ide-hd,drive=disk0", '{"driver": "ide-hd", "drive": "disk0"}'):
        argv = arguments(booting(), ("-device", device))
        assert [json.loads(argv[i + 1])["drive"] for i, word in enumerate(argv[:-2]) if word == "-device"] == ["disk1"]
    assert len([word for word in arguments(booting(), ("-device", "x,drive=disk01")) if word == "-device"]) == 3


def test_another_boot_order_is_the_users() -> None:
    assert not any("bootindex" in word for word in arguments(booting(), ("-boot", "d")))


def test_the_serial_port_is_where_it_is_said_to_be() -> None:
    assert ("-serial", "mon:stdio") in pairs(arguments(booting("terminal"), ()))
    assert ("-serial", "stdio") in pairs(arguments(booting("output"), ()))
    assert serial_socket(booting(), ()) == "/x/serial"
    assert serial_socket(booting("output"), ()) == serial_socket(booting(), ("-serial", "null")) == ""


@pytest.mark.parametrize("given", [("-monitor", "stdio"), ("-chardev", "stdio,id=m")])
def test_a_serial_port_at_a_socket_stays_there_whoever_has_standard_output(given: tuple[str, ...]) -> None:
    assert ("-serial", "unix:/x/serial,server=on,wait=off") in pairs(arguments(booting(), given))
    assert serial_socket(booting(), given) == "/x/serial"


def test_kvm_is_probed_unless_the_user_chose() -> None:
    assert names_accelerator(("-M", "accel=tcg,type=pc"))
    assert not names_accelerator(("-device", "x,noaccel=1"))
    assert probe("/bin/qemu")[:5] == ["/bin/qemu", "-accel", "kvm", "-machine", "q35"]
