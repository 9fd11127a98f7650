# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from pullback.errors import UsageError
from pullback.nbd.address import Address, NbdUri, TcpAddress, UnixAddress, parse_uri


@pytest.mark.parametrize(
    ("text", "address", "export", "tls"),
    [
        ("nbd://example.com", TcpAddress("example.com", 10809), "", False),
        ("nbd://example.com:10/", TcpAddress("example.com", 10), "", False),
        ("nbds://[::1]:10810/a/b", TcpAddress("::1", 10810), "a/b", True),
        ("nbd://h//x", TcpAddress("h"), "/x", False),
        ("nbd+tcp://h/a%20b%C3%BC", TcpAddress("h"), "a bü", False),
        ("nbd+unix:///?socket=/run/a.sock", UnixAddress("/run/a.sock"), "", False),
        ("nbds+unix:///sda?socket=/run/a%20b%26c", UnixAddress("/run/a b&c"), "sda", True),
        ("nbd+unix:///sda?other=1&socket=/run/a+b", UnixAddress("/run/a+b"), "sda", False),
    ],
)
def test_parse(text: str, address: Address, export: str, tls: bool) -> None:
    assert parse_uri(text) == NbdUri(address, export, tls)


@pytest.mark.parametrize(
    "address", [UnixAddress("/run/x y/ü?&=#%+;sock"), TcpAddress("::1", 1), TcpAddress("host.example", 65535)]
)
@pytest.mark.parametrize("export", ["", "sda", "/lead", "a b", "ü/ö", "?&=#%+;", "..", "100%25"])
@pytest.mark.parametrize("tls", [False, True])
def test_what_is_written_is_read_back(address: Address, export: str, tls: bool) -> None:
    assert parse_uri(address.uri(export, tls=tls)) == NbdUri(address, export, tls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/run/a.sock",
        "http://host/x",
        "nbd+ssh://host/x",
        "nbd://",
        "nbd:///x?socket=/run/a",
        "nbd://host:99999/x",
        "nbd://host:no/x",
        "nbd://[::1/x",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix:///x?socket=/a&socket=/b",
        "nbd+unix://host/x?socket=/a",
        "nbd+unix:x?socket=/a",
        "nbd://host/%ff",
        "nbd://host/a#b",
    ],
)
def test_what_is_no_uri(text: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(text)
