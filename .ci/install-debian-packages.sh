#!/usr/bin/env bash
# What some tests start for real and PyPI has not: two Slurm nodes, mpirun, a browser. Needs root.
set -euo pipefail
packages=(slurm-wlm munge openmpi-bin chromium)
missing=()
for package in "${packages[@]}"; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
