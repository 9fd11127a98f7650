# SPDX-License-Identifier: Apache-2.0
"""What the Linux in the demo does to its two disks.

vda   ledger (24 MiB)   2 MiB of it are overwritten all the time
      attic  (8 MiB)    deleted and trimmed between the backups
      notes/            small files, rewritten in part
vdb   table  (20 MiB)   4 MiB of it are overwritten all the time
      sheet  (8 MiB)    4 MiB of it are overwritten with zeroes between the backups
"""

from __future__ import annotations

from lab.processes import wait_for
from lab.vm import GuestJob, Vm

DISKS = {"vda": 96 << 20, "vdb": 64 << 20}
"""Target to virtual size; small, since a Linux without KVM reads and hashes about 30 MiB in a second."""

_PLACES = " ".join(f"/mnt/{disk}" for disk in DISKS)

_MOUNT = """
for disk in vda vdb; do mkdir -p /mnt/$disk && mount -o noatime /dev/$disk /mnt/$disk || exit 1; done
"""

_FILL = """
set -e
random() { dd if=/dev/urandom of=$1 bs=1M count=$2 iflag=fullblock 2>/dev/null; }
random /mnt/vda/ledger 32
random /mnt/vda/attic 8
mkdir /mnt/vda/notes
for n in $(seq 40); do seq $n 1000 >/mnt/vda/notes/$n; done
random /mnt/vdb/table 24
random /mnt/vdb/sheet 8
sync
"""

# fsync: what dd has written has reached the disk when the next one starts.
_WRITER = """
n=0
while n=$((n + 1)); do
    dd if=/dev/urandom of=/mnt/vda/ledger bs=64k count=2 seek=$((320 + n * 2 % 16)) conv=notrunc,fsync
    dd if=/dev/urandom of=/mnt/vdb/table bs=64k count=4 seek=$((n * 4 % 32)) conv=notrunc,fsync
    usleep 5000
done
"""

_CHANGE = """
set -e
dd if=/dev/urandom of=/mnt/vda/ledger bs=64k count=16 seek=40 conv=notrunc 2>/dev/null
for n in 3 14 15; do echo changed >>/mnt/vda/notes/$n; done
rm /mnt/vda/attic /mnt/vda/notes/9
dd if=/dev/urandom of=/mnt/vdb/new bs=1M count=2 iflag=fullblock 2>/dev/null
dd if=/dev/zero of=/mnt/vdb/sheet bs=1M count=2 seek=3 conv=notrunc 2>/dev/null
sync
fstrim -v /mnt/vda
"""

_DISK_SUM = "set -o pipefail; dd if=/dev/{} bs=1M iflag=direct status=none | sha256sum"


def mount(vm: Vm) -> None:
    """Mount both file systems; reading then writes nothing (noatime)."""
    vm.run(_MOUNT)


def fill(vm: Vm) -> None:
    """Write the first files."""
    vm.run(_FILL, timeout=120)


def start_writer(vm: Vm) -> GuestJob:
    """Overwrite parts of two files, one on each disk, for ever."""
    return vm.start_background(_WRITER)


def change(vm: Vm) -> str:
    """Overwrite, append, add, delete, fill with zeroes, discard; what the last of these said."""
    return vm.run(_CHANGE, timeout=120).strip()


def freeze(vm: Vm) -> None:
    """Make the file systems write out what they hold and stop: a writer is blocked until ``thaw``."""
    vm.run(" && ".join(f"fsfreeze --freeze /mnt/{disk}" for disk in DISKS))


def thaw(vm: Vm) -> None:
    """Let the writer go on, in this instant."""
    vm.run("; ".join(f"fsfreeze --unfreeze /mnt/{disk}" for disk in DISKS))


def disk_sums(vm: Vm) -> dict[str, str]:
    """SHA-256 of each whole disk, read and computed by the guest.

    Past the page cache: a page that holds a used block of the file system's own beside others is never dropped, and
    does not notice what is written to the others through files (seen: after fstrim it still had the old content).
    """
    return {disk: vm.run(_DISK_SUM.format(disk), timeout=180).split()[0] for disk in DISKS}


def file_sums(vm: Vm) -> str:
    """SHA-256 of each file on both disks, in the order of their names."""
    return vm.run(f"find {_PLACES} -type f | sort | xargs sha256sum", timeout=180)


def listing(vm: Vm) -> str:
    """What ``ls`` shows of both disks."""
    return vm.run(f"ls -l {_PLACES}")


def written(vm: Vm) -> dict[str, int]:
    """Bytes that the guest has written to each disk since it was started, as QEMU counts them at the devices."""
    counts = {}
    for one in vm.qmp("query-blockstats"):
        for disk in DISKS:
            if f"/{disk}/" in one.get("qdev", ""):
                counts[disk] = int(one["stats"]["wr_bytes"])
    return counts


def wait_until_written(vm: Vm, since: dict[str, int], least: int) -> None:
    """Return when the guest has written ``least`` bytes more than ``since`` to each disk; LabTimeout if it does not."""

    def enough() -> bool:
        now = written(vm)
        return all(now[disk] - since[disk] >= least for disk in DISKS)

    wait_for(enough, f"{least} bytes written by the guest on each disk", timeout=30)


def wreck(vm: Vm) -> None:
    """Delete everything on both disks, durably."""
    vm.run(f"rm -rf {' '.join(f'/mnt/{disk}/*' for disk in DISKS)}; sync")
