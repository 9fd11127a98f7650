# SPDX-License-Identifier: Apache-2.0
"""The laboratory: real QEMU processes for the tests, the demo and the benchmarks.  Not part of the product.

processes   start, wait for a condition with a deadline, end by pid
monitor     a QMP client of our own, so that the product's client is never its own judge
disks       DiskSpec, and the one table from kinds of disks to arguments
qemu        Qemu, and BareQemu: no operating system, writes go through the device
guest       the kernel and the initramfs of a tiny Linux
vm          Vm: that Linux, booted
images      make, read and compare disk images
"""
