"""The base of every machine: a small tree of files below its root, made once and never changed.

Sandboxes write over it, each in a layer of its own. It has what programs of the host's `/usr` look for in `/etc` and
`/var`, of files that everybody may read; of the host's users, secrets and credentials it has nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

__all__ = ["Entry", "base_entries", "make_base", "without_secrets"]

_FROM_HOST = (
    *("adduser.conf", "alternatives", "apk", "bash.bashrc", "bash_completion.d", "bindresvport.blacklist"),
    *("ca-certificates", "ca-certificates.conf", "debconf.conf", "debian_version", "default/useradd", "deluser.conf"),
    *("dnf", "dpkg", "fonts", "gai.conf", "host.conf", "inputrc", "ld.so.cache", "ld.so.conf", "ld.so.conf.d"),
    *("libaudit.conf", "locale.alias", "locale.conf", "localtime", "login.defs", "lsb-release", "magic", "magic.mime"),
    *("mime.types", "os-release", "pacman.conf", "pacman.d", "pam.conf", "pam.d", "perl", "pki/ca-trust"),
    *("pki/rpm-gpg", "pki/tls/certs", "pki/tls/openssl.cnf", "profile", "protocols", "python3", "redhat-release"),
    *("rpm", "security", "services", "shells", "skel", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone"),
    *("wgetrc", "xattr.conf", "yum.repos.d"),
)
"""Of /etc: what belongs to the system and its package manager, and says nothing about the host's users."""
_OF_APT = (
    *("apt.conf", "apt.conf.d", "keyrings", "preferences", "preferences.d", "sources.list", "sources.list.d"),
    *("trusted.gpg", "trusted.gpg.d"),
)
"""Of /etc/apt: all but its credentials."""
_CREDENTIALS = re.compile(rb"(\w+://)[^/\s\"']*@")
_TELLING = re.compile(rb"(?im)^.*(?:proxy|password|username|sslclientkey|sslclientcert).*\n?")
"""Lines of a package manager's configuration that name the host's own way out, or a secret."""
_SHELLS = ("bash.bashrc", "profile", "skel", "wgetrc")
"""Left out as a whole where a line names such things: a script with a line less may not run."""
_CONFIGURATION = ("apt", "dnf", "yum.repos.d", "pacman.conf", "pacman.d", "apk")
_FILE_BYTES = 4 * 1024 * 1024

_DIRECTORIES: Mapping[str, int] = {
    **dict.fromkeys(("etc", "etc/apt", "home", "home/ash", "media", "mnt", "opt", "run", "srv", "usr", "var"), 0o755),
    **dict.fromkeys(("var/backups", "var/cache", "var/cache/apt", "var/cache/apt/archives", "var/lib"), 0o755),
    **dict.fromkeys(
        ("var/cache/apt/archives/partial", "var/cache/debconf", "var/lib/apt", "var/lib/apt/lists"), 0o755
    ),
    **dict.fromkeys(("var/lib/apt/lists/partial", "var/lib/dpkg", "var/lib/misc", "var/local", "var/log"), 0o755),
    **dict.fromkeys(("var/log/apt", "var/mail", "var/opt", "var/spool", "usr/local"), 0o755),
    **dict.fromkeys(("run/lock", "tmp", "var/tmp"), 0o1777),
    "root": 0o700,
}
_LINKS = {"var/run": "/run", "var/lock": "/run/lock", "etc/mtab": "../proc/self/mounts"}

_SYSTEM_USERS = """\
daemon 1 1 /usr/sbin
bin 2 2 /bin
sys 3 3 /dev
sync 4 65534 /bin
games 5 60 /usr/games
man 6 12 /var/cache/man
lp 7 7 /var/spool/lpd
mail 8 8 /var/mail
news 9 9 /var/spool/news
uucp 10 10 /var/spool/uucp
proxy 13 13 /bin
www-data 33 33 /var/www
backup 34 34 /var/backups
list 38 38 /var/list
irc 39 39 /run/ircd
_apt 42 65534 /nonexistent
nobody 65534 65534 /nonexistent
"""
_GROUPS = (
    "root:0 daemon:1 bin:2 sys:3 adm:4 tty:5 disk:6 lp:7 mail:8 news:9 uucp:10 man:12 proxy:13 kmem:15 dialout:20 "
    "fax:21 voice:22 cdrom:24 floppy:25 tape:26 sudo:27 audio:29 dip:30 www-data:33 backup:34 operator:37 list:38 "
    "irc:39 src:40 shadow:42 utmp:43 video:44 sasl:45 plugdev:46 staff:50 games:60 users:100 ash:1000 nogroup:65534"
)
"""Users and groups with numbers that Debian gives to every system."""


class Entry(NamedTuple):
    """One thing of the base: a directory without content, a file, or a link to its content."""

    kind: Literal["directory", "file", "link"]
    content: bytes = b""
    mode: int = 0o755
    owner: int = 0


def make_base(parent: Path, links: Mapping[str, str], shown: Collection[str] = ()) -> Path:
    """Return the base for this host as it is now; made if there is none yet.

    Args:
        parent: Where bases are, each in a directory named by its content.
        links: Top-level links of the host, as `/bin` -> `usr/bin`.
        shown: Directories of the host that are mounted over it, so that it need not have what is in them.

    Raises:
        OSError: It cannot be written.
    """
    entries = base_entries(links, shown)
    parent.mkdir(mode=0o711, exist_ok=True)
    digest = hashlib.sha256(repr(sorted(entries.items())).encode()).hexdigest()[:16]
    target = parent / digest
    if target.is_dir():
        return target
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    try:
        made.chmod(0o755)
        for name, entry in sorted(entries.items()):  # a directory comes before what is in it
            _write(made / name, entry)
        try:
            os.rename(made, target)
        except OSError:
            if not target.is_dir():  # else another hub of this hive was first
                raise
        return target
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(path: Path, entry: Entry) -> None:
    if entry.kind == "link":
        os.symlink(entry.content, path)
        return
    if entry.kind == "directory":
        path.mkdir(exist_ok=True)
    else:
        path.write_bytes(entry.content)
    path.chmod(entry.mode)
    os.chown(path, entry.owner, entry.owner)


def base_entries(links: Mapping[str, str], shown: Collection[str] = ()) -> dict[str, Entry]:
    """Return what is in a base, by its path below it."""
    found = {name: Entry("directory", mode=mode) for name, mode in _DIRECTORIES.items()}
    found["home/ash"] = Entry("directory", owner=1000)
    for name, target in {**_LINKS, **{path.lstrip("/"): target for path, target in links.items()}}.items():
        found[name] = Entry("link", os.fsencode(target))
    for name in (*_FROM_HOST, *(f"apt/{name}" for name in _OF_APT)):
        _read(Path("/etc", name), found, shown)
    _read(Path("/var/lib/apt/extended_states"), found, shown)
    for name, (content, mode) in _written().items():
        found[f"etc/{name}"] = Entry("file", content.encode(), mode)
    above = {str(path) for name in found for path in PurePosixPath(name).parents} - {"."}
    return {**dict.fromkeys(above, Entry("directory")), **found}


def _read(source: Path, found: dict[str, Entry], shown: Collection[str]) -> None:
    """Take what everybody may read, links as links, and nothing that is neither file nor directory."""
    name = str(source).lstrip("/")
    try:
        status = source.lstat()
        if str(source) in shown:
            found[name] = Entry("directory")
        elif stat.S_ISLNK(status.st_mode):
            found[name] = Entry("link", os.fsencode(os.readlink(source)))
        elif stat.S_ISDIR(status.st_mode) and status.st_mode & 0o005 == 0o005:
            found[name] = Entry("directory")
            for entry in sorted(source.iterdir()):
                _read(entry, found, shown)
        elif stat.S_ISREG(status.st_mode) and status.st_mode & 0o004 and status.st_size <= _FILE_BYTES:
            content = without_secrets(name, source.read_bytes())
            if content is not None:
                found[name] = Entry("file", content, stat.S_IMODE(status.st_mode) & 0o755)
    except OSError:  # it is not there, or was removed meanwhile
        return


def without_secrets(name: str, content: bytes) -> bytes | None:
    """Return what of a file of the host sandboxes are given; None: nothing.

    Args:
        name: Its path, without the first slash.
    """
    kind = name.split("/")[1]
    if (kind not in _CONFIGURATION and kind not in _SHELLS) or name.endswith((".gpg", ".asc")):
        return content
    telling = _TELLING.findall(content)
    if any(line.rstrip().endswith(b"{") for line in telling):  # what follows in the block would be left
        return None
    if kind in _SHELLS:
        return None if telling or _CREDENTIALS.search(content) else content
    return _TELLING.sub(b"", _CREDENTIALS.sub(rb"\1", content))


def _written() -> dict[str, tuple[str, int]]:
    """Return the files of /etc that are the same everywhere, with their modes."""
    users = [line.split() for line in _SYSTEM_USERS.splitlines()]
    names = ["root", *(user[0] for user in users), "ash"]
    passwd = ["root:x:0:0:root:/root:/bin/bash"]
    passwd += [f"{name}:x:{uid}:{gid}:{name}:{home}:/usr/sbin/nologin" for name, uid, gid, home in users]
    passwd.append("ash:x:1000:1000:ash:/home/ash:/bin/bash")
    groups = [f"{name}:x:{gid}:" for name, gid in (each.split(":") for each in _GROUPS.split())]
    return {
        "passwd": ("\n".join(passwd) + "\n", 0o644),
        "group": ("\n".join(groups) + "\n", 0o644),
        "shadow": ("".join(f"{name}:*:20000:0:99999:7:::\n" for name in names), 0o640),
        "gshadow": ("".join(f"{line.split(':')[0]}:*::\n" for line in groups), 0o640),
        "hosts": ("127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost ip6-loopback\n", 0o644),
        "hostname": ("sandbox\n", 0o644),
        "nsswitch.conf": (
            "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
            0o644,
        ),
        "resolv.conf": ("", 0o644),
        "fstab": ("", 0o644),
    }
