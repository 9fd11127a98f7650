# SPDX-License-Identifier: Apache-2.0
"""The XML documents of the pull backup API that was proposed for libvirt in 2018.

    values      what the documents say, as frozen values
    checks      what a name, a path, a host, a port may be
    element     untrusted bytes in, elements with line numbers out
    reading     parse_snapshot, parse_export
    printing    print_snapshot, print_export, print_domain

``element`` and ``printing`` load lxml when they are imported; the other modules do not.  The documents are described
in docs/xml.md.
"""
