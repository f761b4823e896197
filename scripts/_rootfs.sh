# Sourced by scripts/images: one root file system that serves as hub, sandbox and Redis alike, for the test cluster.
# Made of Debian's packages and Python's alone, by this machine's own settings of apt and pip. Kept in .cache/images:
# Debian, and on it what the project depends on; so a change of the sources alone takes seconds.
# shellcheck shell=bash

cache=$PWD/.cache/images
extras=hub,kubernetes,recipes
packages=python3,python3-venv,bash,git,curl,ca-certificates,procps,redis-server

# Replaces the directory.
make_rootfs() { # DIRECTORY
  local out lock
  out=$(realpath -m "$1")
  [ ! -e "$out" ] || [ -x "$out/opt/ash/bin/ash" ] || rmdir "$out" 2>/dev/null ||
    stop "$out is there and is not a root file system of this script. Remove it, or name another directory."
  [ "$EUID" = 0 ] || stop "A root file system has files of several users, so this needs root."
  mkdir -p "$cache" "$(dirname "$out")"
  exec {lock}>"$cache/lock"
  flock "$lock"
  install_tools
  make_debian
  make_base
  say "Installing this checkout into $out"
  rm -rf "$cache/wheel" "$out"
  with_network "$base" "$cache/wheel" --no-deps .
  cp -a "$base" "$out"
  pip_install "$out" "$cache/wheel" --no-deps --force-reinstall ash-mcp
  compile "$out" "$out"/opt/ash/lib/python3*/site-packages/ash_*
}

install_tools() {
  local wanted=()
  command -v debootstrap >/dev/null || wanted+=(debootstrap)
  command -v bwrap >/dev/null || wanted+=(bubblewrap)
  [ ${#wanted[@]} = 0 ] || install_system_packages "${wanted[@]}"
}

hash_of() { sha256sum | cut -c 1-16; }

# Sets `debian`.
make_debian() {
  local suite mirror new=$cache/new-debian proxy=
  # shellcheck source=/dev/null
  suite=$(. /etc/os-release; [ "$ID" = debian ] && echo "$VERSION_CODENAME") ||
    stop "The root file system is made of the Debian that this runs on, and this is none."
  debian=$cache/debian-$({ declare -f make_debian; echo "$suite $packages"; } | hash_of)
  [ ! -d "$debian" ] || return 0
  # shellcheck disable=SC2016 # apt expands these
  mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    awk -v suite="$suite" '$1 == suite && $2 == "main" { print $3; exit }')
  [ -n "$mirror" ] || stop "apt's sources here name no mirror of Debian $suite."
  eval "$(apt-config shell proxy Acquire::http::Proxy)"
  [ -z "$proxy" ] || export http_proxy=$proxy
  say "Installing Debian $suite into $debian (a few minutes, once)"
  rm -rf "$cache"/debian-* "$new"
  debootstrap --variant=minbase --include="$packages" "$suite" "$new" "$mirror" >"$cache/debootstrap.log" 2>&1 || {
    tail -n 5 "$cache/debootstrap.log" >&2
    stop "debootstrap failed; all of it is in $cache/debootstrap.log"
  }
  # What it took from this machine, and what nobody reads in a container.
  : >"$new/etc/apt/sources.list"
  rm -rf "$new"/etc/{resolv.conf,hostname} "$new"/var/cache/apt/*.bin "$new"/var/lib/apt/lists/* \
    "$new"/usr/share/{doc,info,locale,man}/*
  find "$new"/var/log "$new"/var/cache/apt/archives -type f -delete
  compile "$new" "$new"/usr/lib/python3*
  # as in hub/Dockerfile and recipes/Dockerfile
  inside "$new" groupadd --gid 10001 ash
  inside "$new" useradd --uid 10001 --gid 10001 --create-home --home-dir /home/ash --shell /bin/bash ash
  install --directory --owner 10001 --group 10001 "$new"/workspace "$new"/var/lib/ash "$new"/run/ash
  mv "$new" "$debian"
}

# Sets `base`.
make_base() {
  local new=$cache/new-base
  base=$cache/base-$({ cat pyproject.toml constraints.txt; declare -f make_base; echo "$debian $extras"; } | hash_of)
  [ ! -d "$base" ] || return 0
  say "Installing the Python packages into $base (a minute or two, when the dependencies change)"
  rm -rf "$cache"/base-* "$cache/wheels" "$new"
  cp -a "$debian" "$new"
  inside "$new" python3 -m venv /opt/ash
  ln -s /opt/ash/bin/ash "$new/usr/local/bin/ash"
  with_network "$new" "$cache/wheels" --constraint constraints.txt ".[$extras]"
  pip_install "$new" "$cache/wheels" "ash-mcp[$extras]"
  compile "$new" "$new/opt/ash/lib"
  mv "$new" "$base"
}

# Runs a command with a root file system as its own, without a network. /tmp is not part of it; `wheels`, where it is
# set, are at /tmp/wheels.
inside() { # ROOT COMMAND...
  local wheels_there=()
  [ -z "${wheels:-}" ] || wheels_there=(--ro-bind "$wheels" /tmp/wheels)
  env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    bwrap --bind "$1" / --dev /dev --proc /proc --tmpfs /tmp "${wheels_there[@]}" --unshare-net --die-with-parent \
    "${@:2}"
}

# Brings wheels: everything is this machine's, pip's settings and certificates too, but for /usr, so that pip's Python
# is that of the root file system.
with_network() { # ROOT WHEELS ARGUMENTS...
  mkdir -p "$2"
  TMPDIR=$2 bwrap --ro-bind / / --ro-bind "$1/usr" /usr --dev /dev --proc /proc --bind "$2" "$2" --die-with-parent \
    "$1/opt/ash/bin/python" -m pip wheel --quiet --no-cache-dir --wheel-dir "$2" "${@:3}"
}

pip_install() { # ROOT WHEELS ARGUMENTS...
  wheels=$2 inside "$1" /opt/ash/bin/python -m pip install --quiet --no-index --no-compile --no-cache-dir \
    --root-user-action ignore --find-links /tmp/wheels "${@:3}"
}

# By hash, since load-image changes the times of files, and on a read-only root Python can keep nothing.
compile() { # ROOT DIRECTORIES_IN_IT...
  local root=$1
  shift
  inside "$root" python3 -m compileall -q -f --invalidation-mode unchecked-hash "${@#"$root"}"
}
