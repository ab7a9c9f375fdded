#!/bin/sh
# Installs what this project needs and the machine lacks: `make deps`. Debian and its derivatives.
#
#   deps.sh            everything: building, the end-to-end tests, and a kernel for their guests
#   deps.sh PACKAGE…   only these packages
#
# Nothing is touched that is already there. Needs root, or sudo, only when something is missing.
set -eu

cache="${XDG_CACHE_HOME:-$HOME/.cache}/hindsight"
backports=/etc/apt/sources.list.d/bookworm-backports.sources
wanted="$*"

say() { echo "deps: $*" >&2; }
die() { say "$*"; exit 2; }

may_be_root() { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "this needs root, and there is no sudo here. As root, run: $0${wanted:+ $wanted}"
    fi
}

# A machine image without package lists (or with lists older than its mirror) cannot install anything.
# One dead third-party source must not stop us: what we then cannot find, apt names below.
update_lists() {
    [ -z "${lists_are_fresh:-}" ] || return 0
    lists_are_fresh=yes
    # Without root what is missing cannot be installed anyhow, and a kernel can be fetched with the lists as they are.
    may_be_root || return 0
    say "refreshing apt's package lists"
    as_root apt-get -q update >&2 || say "some package lists could not be refreshed"
}

installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

# install PACKAGE… [with apt options in $apt_options]
install() {
    missing=
    for package in "$@"; do installed "$package" || missing="$missing $package"; done
    [ -n "$missing" ] || return 0
    update_lists
    say "installing$missing"
    # shellcheck disable=SC2086  # both are lists of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends ${apt_options:-} install $missing >&2
}

# QEMU 10 where Debian has it. In bookworm that is backports, whose source is added here if need be
# (the file $backports, on Debian's own mirror); should it be out of reach, bookworm's 7.2 will do, and the source goes
# again: with it every refreshing of the lists would fail.
install_qemu() {
    command -v qemu-system-x86_64 >/dev/null && command -v qemu-storage-daemon >/dev/null \
        && command -v qemu-img >/dev/null && return 0
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    if [ "$codename" = bookworm ] && may_be_root; then
        added=
        if ! apt-cache policy | grep -q 'n=bookworm-backports'; then
            say "adding $backports, for QEMU 10"
            printf '%s\n' 'Types: deb' 'URIs: http://deb.debian.org/debian' 'Suites: bookworm-backports' \
                'Components: main' 'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' \
                | as_root tee "$backports" >/dev/null
            added=yes
            lists_are_fresh=
        fi
        update_lists
        if (apt_options='-t bookworm-backports'; install qemu-system-x86 qemu-utils); then return 0; fi
        say "bookworm-backports is out of reach: QEMU 7.2 it is"
        [ -z "$added" ] || as_root rm -f "$backports"
    fi
    install qemu-system-x86 qemu-utils
}

# The guests' kernel: Debian's cloud kernel, unpacked into the cache. It is not installed on this machine.
fetch_kernel() {
    [ -e "$cache/kernel/current" ] && return 0
    update_lists
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64, the guests' kernel"
    say "fetching $package into $cache/kernel (it is not installed)"
    mkdir -p "$cache/kernel"
    work=$(mktemp -d "$cache/kernel/fetching.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get -q -o APT::Sandbox::User=root download "$package" >&2)
    mkdir "$work/unpacked"
    dpkg-deb -x "$work"/*.deb "$work/unpacked"
    rm -rf "$cache/kernel/$package"
    mv "$work/unpacked" "$cache/kernel/$package"
    ln -sfn "$package" "$cache/kernel/current"
}

command -v apt-get >/dev/null || die "no apt-get here; the packages needed are listed in this file: $0"
if [ $# -gt 0 ]; then install "$@"; exit; fi

[ "$(uname -m)" = x86_64 ] || die "the end-to-end tests boot an x86-64 guest with this machine's own programs in it"
install build-essential make libclang-dev libssl-dev pkg-config ca-certificates
install e2fsprogs util-linux debootstrap xz-utils zstd
# NBD clients that others wrote; nbd-client runs inside the guests.
install libnbd-bin python3-libnbd nbdkit fio nbd-client
# Debian's other busybox conflicts with this one, and serves as well.
command -v busybox >/dev/null || install busybox-static
install_qemu
fetch_kernel
say "everything is here"
