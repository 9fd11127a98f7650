# SPDX-License-Identifier: Apache-2.0
"""Pull-mode incremental backup for QEMU virtual machines."""

__version__ = "0.1.0"
