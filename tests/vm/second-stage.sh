#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Process 1 of a guest, once the host's root is its own: the rest of the file systems, the command, the end.
# /run/vm is a directory of the host: `command` is what to run; what is written there outlives the guest.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
hostname blksnap-vm
mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
[ ! -e /sys/bus/virtio/devices ] || modprobe virtio_blk

# Booting is quiet; from here on the console log has everything the kernel says.
echo 8 >/proc/sys/kernel/printk

[ ! -e /run/vm/init ] || . /run/vm/init

read -r up _ </proc/uptime
echo "vm: command starts after $up s" >/dev/kmsg
/bin/sh /run/vm/command </dev/null >/dev/vport0p1 2>&1
status=$?
echo "vm: command ended with $status" >/dev/kmsg
sync
echo "$status" >/run/vm/status.part && mv /run/vm/status.part /run/vm/status
echo o >/proc/sysrq-trigger
# Process 1 must not end before the machine does.
while :; do sleep 1; done
