#!/bin/sh
# Become a process of a root file system, as an engine would start it:
#   enter.sh [--read-only] [--tmpfs TARGET]… [--bind SOURCE:TARGET]… [--user UID:GID] ROOT WORKDIR COMMAND…
# Run by `unshare --mount --pid --fork`: as PID 1, its mounts are nobody else's and end with it. Targets must be there.
set -eu
read_only=
user=
mounts=
newline='
'
while :; do
    case $1 in
    --read-only) read_only=yes && shift ;;
    --tmpfs) mounts="$mounts$newline tmpfs $2" && shift 2 ;;
    --bind) mounts="$mounts$newline ${2%%:*} ${2#*:}" && shift 2 ;;
    --user) user=$2 && shift 2 ;;
    *) break ;;
    esac
done
root=$1 workdir=$2
shift 2

mount --bind "$root" "$root"
[ -z "$read_only" ] || mount -o remount,bind,ro "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
mount -t tmpfs -o nosuid,mode=0755 tmpfs "$root/dev"
for device in null zero full random urandom; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
mkdir "$root/dev/shm"
mount -t tmpfs -o nosuid,nodev,noexec,size=64m,mode=1777 tmpfs "$root/dev/shm" # 64 MB is docker's default
echo "$mounts" | while read -r source target; do
    case $source in
    '') ;;
    tmpfs) mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs "$root$target" ;;
    *) mount --bind "$source" "$root$target" ;;
    esac
done
ip link set lo up 2>/dev/null || true # in a network namespace of its own, loopback is down

# shellcheck disable=SC2016  # expanded inside
set -- /bin/sh -c 'cd "$0" && exec "$@"' "$workdir" "$@"
if [ -n "$user" ]; then
    set -- /usr/bin/setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs --bounding-set=-all \
        --inh-caps=-all "$@"
fi
exec chroot "$root" "$@"
