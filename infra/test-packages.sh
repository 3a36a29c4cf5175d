#!/usr/bin/env bash
# Installs the Debian packages of the integration tests: Ceph's S3 gateway with a monitor and an OSD, and a browser with
# its driver. Needs root or sudo; does nothing if all are installed.
set -euo pipefail
wanted=(ceph-common ceph-mon ceph-osd radosgw chromium chromium-driver)

is_installed() {
    [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]
}

if ! command -v dpkg-query apt-get >/dev/null; then
    echo "error: expected Debian or a derivative (dpkg-query, apt-get); install by hand: ${wanted[*]}" >&2
    exit 2
fi
missing=()
for package in "${wanted[@]}"; do
    is_installed "$package" || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    echo "test packages: all installed (${wanted[*]})"
    exit 0
fi

as_root=()
if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
        echo "error: installing ${missing[*]} needs root or sudo; got neither" >&2
        exit 2
    fi
    as_root=(sudo --non-interactive)
fi
echo "test packages: installing ${missing[*]}"
"${as_root[@]}" apt-get update --quiet=2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --quiet=2 --yes --no-install-recommends --option Dpkg::Use-Pty=0 "${missing[@]}"

for package in "${missing[@]}"; do
    is_installed "$package" || { echo "error: $package is still missing after apt-get install" >&2; exit 1; }
done
echo "test packages: installed ${missing[*]}"
