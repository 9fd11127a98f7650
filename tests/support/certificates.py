# SPDX-License-Identifier: Apache-2.0
"""Certificates for QEMU's NBD server, good for an hour: ca-cert.pem, server-cert.pem and server-key.pem."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: ec.EllipticCurvePrivateKey, authority: bool
) -> bytes:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name("authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(names, critical=False)
        .sign(issuer, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def write_certificates(directory: Path) -> None:
    """Write a new authority's certificate, and a server's with its key, where QEMU looks for them."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (directory / "ca-cert.pem").write_bytes(_certificate("authority", authority, authority, authority=True))
    (directory / "server-cert.pem").write_bytes(_certificate("localhost", server, authority, authority=False))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "server-key.pem").write_bytes(server.private_bytes(*pem))
