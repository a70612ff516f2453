#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# /init of the initramfs, run by busybox: the host's root over 9p, read-only, under an overlay in memory; then the second
# stage from the tree. /settings and /modules are written by initramfs.py.
. /settings
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ifconfig lo up
while read -r module; do insmod "$module"; done </modules

# loose: nobody changes a program while a test runs it, and every other mode asks the host for each page again.
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /lower
mount -t tmpfs -o mode=755 upper /upper
mkdir /upper/upper /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work overlay /new

mkdir -p "/new/lib/modules/$VM_RELEASE"
mount --bind "/new$VM_MODULES" "/new/lib/modules/$VM_RELEASE"
for directory in proc sys dev; do
    mkdir -p "/new/$directory"
    mount --move "/$directory" "/new/$directory"
done
mount -t tmpfs -o mode=755 run /new/run
[ -z "$VM_TMP" ] || mount -t tmpfs -o mode=1777 tmp /new/tmp
mkdir /new/run/vm
mount -t 9p -o rw,trans=virtio,version=9p2000.L,msize=512000,cache=none run /new/run/vm
exec switch_root /new /bin/sh "$VM_SECOND_STAGE"
