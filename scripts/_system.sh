# Sourced by scripts/setup and scripts/images: what they need from the system, and how that gets there.
# Uses `level`, `missing` and `python` of scripts/setup.
# shellcheck shell=bash disable=SC2154,SC2034

say() { printf '%s\n' "ash setup: $*" >&2; }
stop() { say "$*"; exit 1; }

# Without a terminal nobody can answer, and whoever started us that way wants it done.
agree() {
  [ -t 0 ] || return 0
  local answer
  read -r -p "$1 [Y/n] " answer || return 1
  [[ $answer =~ ^([Yy].*|)$ ]]
}

as_root() {
  if [ "$EUID" = 0 ]; then "$@"
  elif [ -t 0 ]; then sudo "$@"
  else sudo --non-interactive "$@"
  fi
}

can_be_root() { [ "$EUID" = 0 ] || command -v sudo >/dev/null; }

find_missing_commands() {
  command -v bwrap >/dev/null || missing+=(bubblewrap)
  [ "$level" = run ] || command -v redis-server >/dev/null || missing+=(redis-server)
  [ "$level" = run ] || command -v openssl >/dev/null || missing+=(openssl)
}

# True when find_missing_commands would find nothing and namespaces are allowed; costs next to nothing.
system_ready() {
  local missing=()
  find_missing_commands
  [ ${#missing[@]} = 0 ] && namespaces_allowed
}

# Prints the newest of the caller's Pythons from 3.11 on that passes a line of Python, by trying each: a name on PATH
# may be a shim for something that is not installed. PYTHON=… in the environment is the only one tried.
newest_python() {
  local name names=(python3.13 python3.12 python3.11 python3)
  [ -z "${PYTHON:-}" ] || names=("$PYTHON")
  for name in "${names[@]}"; do
    "$name" -c "import sys; assert sys.version_info >= (3, 11); $1" >/dev/null 2>&1 && echo "$name" && return 0
  done
  return 1
}

# Sets `python`, or adds to `missing` what would bring one; with `again`, when all has been tried, it stops instead.
find_python() {
  python=$(newest_python "import ensurepip, venv") && return
  [ -z "${PYTHON:-}" ] || stop "PYTHON=$PYTHON is not a Python from 3.11 on with its venv module."
  if [ "${1:-}" = again ]; then
    stop "No Python from 3.11 on with its venv module is on PATH. Install one, or name it: PYTHON=/path/to/python3.12"
  fi
  if python=$(newest_python "assert sys.prefix == '/usr'"); then
    missing+=("$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
  else
    missing+=(python3 python3-venv)
  fi
}

install_system_packages() {
  local command="apt-get install --no-install-recommends $*"
  say "Missing on this system: $*"
  command -v apt-get >/dev/null || stop "There is no apt-get. Install them your system's way, then run this again."
  can_be_root || stop "This user is not root and there is no sudo. Let an administrator run: $command"
  [[ " $* " != *" redis-server "* ]] ||
    say "The tests start a redis-server of their own; its package may start one as a service as well."
  agree "Install with \`$command\`?" || stop "Nothing was installed. When you have run \`$command\`, run this again."
  say "Running $command"
  local apt=(env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l apt-get -qq -o DPkg::Lock::Timeout=120)
  as_root "${apt[@]}" update || say "apt-get update failed; going on with the package lists that are there"
  as_root "${apt[@]}" install --yes --no-install-recommends "$@" >/dev/null ||
    stop "The packages could not be installed. As root, run: $command"
  hash -r
}

restriction=/proc/sys/kernel/apparmor_restrict_unprivileged_userns

# Ubuntu lets ordinary users make namespaces only where an AppArmor profile says so. Root needs none.
namespaces_allowed() {
  [ "$EUID" != 0 ] && [ -r "$restriction" ] && [ "$(<"$restriction")" = 1 ] || return 0
  bwrap --unshare-all --ro-bind / / true 2>/dev/null
}

allow_namespaces() {
  if namespaces_allowed; then return; fi
  local profile=/etc/apparmor.d/ash-bwrap
  say "This system's AppArmor keeps bubblewrap from making sandboxes. A profile for /usr/bin/bwrap allows it."
  say "It is scripts/bwrap.apparmor; it goes to $profile, and lets every user make namespaces through bwrap."
  if ! can_be_root || ! agree "Install and load it?"; then
    say "Not done. As root: install -D -m 644 scripts/bwrap.apparmor $profile && apparmor_parser --replace $profile"
    return
  fi
  { as_root install -D -m 644 scripts/bwrap.apparmor "$profile" && as_root apparmor_parser --replace "$profile"; } ||
    say "The profile could not be loaded."
  namespaces_allowed || say "bubblewrap still cannot make a sandbox; \`ash doctor\` says more"
}
