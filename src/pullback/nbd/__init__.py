# SPDX-License-Identifier: Apache-2.0
"""Blocks on the wire: the NBD protocol, as a codec without I/O and as thin clients and a server around it.

    protocol            numbers and names
    client_handshake    bytes in, bytes out, an ExportInfo at the end
    client_codec        transmission phase of a client; payload lands in the caller's buffer
    server_handshake    \
    server_codec        /  the same, the other half
    address             where a server listens, and its URI
    blocking            NbdConnection: one socket, one thread; the data path
    client, server      asyncio
"""
