# SPDX-License-Identifier: GPL-2.0-or-later
#
# Read by process 1 of a guest that boots systemd, which it becomes: the host's own, without what the host would start.
# /dev/vda is what such a machine keeps over a boot: /etc/fstab, /etc/blksnap and /var/lib/blksnap; made at the first.
# Service, data path, units and udev rules are the tree's. The command runs when the boot is done; at its end the machine
# is shut down in order, and only then its exit status is told.
kept=/run/kept
system=/etc/systemd/system
tree=$(sed -n 's/^cd \(.*\) || exit .*/\1/p' /run/vm/command)
venv=$(sed -n 's/^export PATH=\([^:]*\):.*/\1/p' /run/vm/command)

mkdir -p $kept
blkid /dev/vda >/dev/kmsg || mkfs.ext4 -q /dev/vda
mount /dev/vda $kept
mkdir -p $kept/etc $kept/lib /etc/blksnap /var/lib/blksnap
chmod 700 $kept/lib
mount --bind $kept/etc /etc/blksnap
mount --bind $kept/lib /var/lib/blksnap
touch $kept/fstab
cp $kept/fstab /etc/fstab

# Where these are, systemd takes itself to be in a container, reads no command line and starts no udevd.
rm -f /.dockerenv /run/.containerenv
# What the host has enabled is none of this machine's.
mount -t tmpfs -o mode=755 system $system
cp "$tree"/dbus/systemd/*.service $system
mkdir -p /etc/udev/rules.d /usr/libexec/blksnap
cp "$tree"/dbus/udev/*.rules /etc/udev/rules.d
ln -s "$venv/blksnapd" /usr/libexec/blksnap
# The one the other tests take.
built=$tree/datapath/target/release/blksnap-datapath
[ -x "$built" ] || built=$venv/blksnap-datapath
ln -s "$built" /usr/libexec/blksnap
# Emulation is ten to thirty times slower than the machines the limits are for.
mkdir -p $system/service.d
printf '[Service]\nTimeoutStartSec=300\nTimeoutStopSec=300\n' >$system/service.d/slow.conf
mkdir -p /run/systemd/system.conf.d
printf '[Manager]\nDefaultTimeoutStartSec=300\nDefaultTimeoutStopSec=300\nDefaultDeviceTimeoutSec=300\n' \
    >/run/systemd/system.conf.d/slow.conf
cat >/etc/dbus-1/system.d/org.blksnap.Blksnap1.conf <<'EOF'
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <policy user="root"><allow own="org.blksnap.Blksnap1"/></policy>
  <policy context="default"><allow send_destination="org.blksnap.Blksnap1"/></policy>
</busconfig>
EOF
cat >$system/vm.target <<'EOF'
[Unit]
Requires=basic.target
Wants=local-fs.target dbus.socket blksnapd.service vm.service
After=basic.target
EOF
cat >$system/vm.service <<'EOF'
[Unit]
After=local-fs.target blksnapd.service
SuccessAction=poweroff
FailureAction=poweroff
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh -c '/bin/sh /run/vm/command </dev/null >/dev/vport0p1 2>&1; echo $? >/run/vm/status'
EOF
ln -s vm.target $system/default.target
# Modules for devices that nobody uses are most of the time of a boot under emulation.
mkdir $system/systemd-udev-trigger.service.d
cat >$system/systemd-udev-trigger.service.d/vm.conf <<'EOF'
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-match=block --subsystem-match=misc --subsystem-match=mem
EOF
mkdir -p /run/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nForwardToConsole=yes\nMaxLevelConsole=info\nRateLimitBurst=0\n' >/run/systemd/journald.conf.d/vm.conf
echo 00000000000000000000000000000001 >/etc/machine-id
exec /lib/systemd/systemd
