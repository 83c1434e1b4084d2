#!/usr/bin/env bash
# Proves deploy/Dockerfile where there is no container engine: its instructions are carried out in a bare Debian root file
# system, and the image's container is started with a read-only root, asked for its health, given photos, and stopped.
#
# Needs root on Debian (or a relative with apt), Linux namespaces, and the package registries that apt and pip are set up for.
#   ARTIFACT  a directory that export wrote; without it the development environment exports the toy one
#   ROOTFS    what is kept from run to run: Debian's root, pip's cache (default: .rootfs)
# Ends with "N passed, N failed". All mounts are in namespaces that end with their processes, however those end.
set -euo pipefail
cd "$(dirname "$0")/.."
rootfs=$(realpath -m "${ROOTFS:-.rootfs}")
base=$rootfs/base
mkdir -p "$rootfs"
work=$(mktemp -d "$rootfs/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

if [ "$(id -u)" != 0 ]; then
    echo "rootfs.sh must be run as root: it makes devices, mounts and namespaces" >&2
    exit 2
fi
missing=()
for tool in debootstrap ip:iproute2 nsenter:util-linux; do
    command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq
    apt-get install -qq --yes --no-install-recommends "${missing[@]}" >"$work/apt.log" || { cat "$work/apt.log" && exit 1; }
fi

# Debian's root as its image has it, from the mirror that this machine uses.
if [ ! -d "$base" ]; then
    [ -n "$(apt-get indextargets 'Created-By: Packages')" ] || apt-get update -qq
    python3 -m deploy.rootfs.outside >"$work/sources.list"
    read -r _ mirror suite _ <"$work/sources.list"
    echo "debootstrap $suite"
    # In a mount namespace, so that what debootstrap mounts is gone even if it is killed.
    unshare --mount debootstrap --variant=minbase "$suite" "$work/base" "$mirror" >"$work/debootstrap.log" ||
        { tail -n 20 "$work/debootstrap.log" && exit 1; }
    cp "$work/sources.list" "$work/base/etc/apt/sources.list"
    # An image's base knows nothing of the machine it was made on.
    rm -rf "$work/base/etc/hostname" "$work/base"/var/{cache/apt/archives/*.deb,lib/apt/lists/*,log/bootstrap.log}
    : >"$work/base/etc/resolv.conf"
    # As Debian's image does, so that packages that were installed do not stay as archives too.
    echo 'DPkg::Post-Invoke {"rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin";};' \
        >"$work/base/etc/apt/apt.conf.d/docker-clean"
    mv "$work/base" "$base"
fi

artifact=${ARTIFACT:-}
if [ -z "$artifact" ]; then
    artifact=$work/artifact
    .venv/bin/python -m export --model random:toy --out "$artifact" >"$work/export.log" || { cat "$work/export.log" && exit 1; }
fi
python3 -m deploy.rootfs.proof --base "$base" --work "$work" --caches "$rootfs/caches" --artifact "$artifact"
