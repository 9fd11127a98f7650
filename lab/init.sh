#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first and only program of the laboratory's guest.  It loads the modules named on the kernel's command line, waits
# for the disks, and then answers on the second serial port:
#
#     host   ID BASE64-OF-A-SHELL-SCRIPT \n
#     guest  ID EXIT-CODE BYTES \n  and that many bytes: what the script wrote (standard output and error)
#
# Lengths instead of end markers, so output may hold anything.

export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /run /mnt
mount -t devpts devpts /dev/pts
mount -t tmpfs run /run
exec </dev/console >/dev/console 2>&1

option() {
    sed -n "s/.*lab\.$1=\([^ ]*\).*/\1/p" /proc/cmdline
}

for module in $(option modules | tr , ' '); do
    while read -r file; do
        [ -e "/run/loaded.$file" ] || insmod "/modules/$file" && touch "/run/loaded.$file"
    done <"/modules/$module.order"
done

# SCSI and ATA disks appear some time after their driver was loaded.
wanted=$(option disks)
tries=0
while [ "$(ls /sys/block | wc -l)" -lt "$wanted" ] && [ "$tries" -lt 500 ]; do
    usleep 10000
    tries=$((tries + 1))
done

exec </dev/ttyS1 >/dev/ttyS1
stty raw -echo
echo "ready $(ls /sys/block | wc -l)"
# In a child: process 1 also gets to know of the end of every orphan, which has busybox's `read` forget what it has
# read of a line so far.
(
    while read -r id script; do
        echo "$script" | base64 -d >/run/script
        sh /run/script </dev/null >/run/output 2>&1
        code=$?
        echo "$id $code $(stat -c %s /run/output)"
        cat /run/output
    done
)
poweroff -f
