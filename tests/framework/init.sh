#!/bin/busybox sh
# The guest's first program. hindsight.mode on the kernel's command line says what the guest is for:
#   agent   run commands that come in on the second serial port (the default)
#   shell   give a person a shell on the console
#   root    hand over to the system that is installed on /dev/vda
export PATH=/tools:/bin HOME=/root
/bin/busybox mkdir -p /bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
# The kernel was told to wake one processor (the builder says why); the others come in now that every device has its place.
for switch in /sys/devices/system/cpu/cpu*/online; do [ ! -e "$switch" ] || echo 1 >"$switch"; done

case "$(cat /proc/cmdline)" in
*hindsight.mode=root*)
    until [ -b /dev/vda ]; do usleep 10000; done
    mount -t ext4 /dev/vda /mnt || exec sh
    for dir in proc sys dev; do mount -o move "/$dir" "/mnt/$dir"; done
    exec switch_root /mnt /sbin/init
    ;;
*hindsight.mode=shell*)
    echo
    echo "This guest's disk is /dev/vda. Try: mkfs.ext4 /dev/vda && mount /dev/vda /mnt"
    echo "Leave with 'poweroff -f', or Ctrl-A X."
    while true; do setsid cttyhack sh -l </dev/ttyS0 >/dev/ttyS0 2>&1; done
    ;;
*)
    # Send dirty pages to the disk soon, so that a crash finds requests in flight.
    echo 10 >/proc/sys/vm/dirty_writeback_centisecs
    echo 50 >/proc/sys/vm/dirty_expire_centisecs
    stty -F /dev/ttyS1 raw -echo
    exec guest-agent serve /dev/ttyS1
    ;;
esac
