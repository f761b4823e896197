"""What `ash wrap` reads: command lines of package runners, files of servers, registries, programs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ash_hub.egress.policy import Policy
from ash_hub.wrap.packages import Package, package_of
from ash_hub.wrap.program import hidden_arguments, shown_for
from ash_hub.wrap.registries import python_registries
from ash_hub.wrap.servers_file import replacement
from ash_mcp.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("npx -y @a/server /data --flag", Package("npm", ("@a/server",), None, ("/data", "--flag"))),
        ("/opt/node/bin/npx --yes server@1.2", Package("npm", ("server@1.2",), None, ())),
        ("npx -p one --package=two tool -y", Package("npm", ("one", "two"), "tool", ("-y",))),
        ("npm exec -- server --help", Package("npm", ("server",), None, ("--help",))),
        (
            "uvx mcp-server-git --repository x",
            Package("pypi", ("mcp-server-git",), "mcp-server-git", ("--repository", "x")),
        ),
        ("uvx server[web]@1.2", Package("pypi", ("server[web]==1.2",), "server", ())),
        ("uvx server@latest", Package("pypi", ("server",), "server", ())),
        ("uvx --from pack==2 tool", Package("pypi", ("pack==2",), "tool", ())),
        ("uvx --with extra server", Package("pypi", ("server", "extra"), "server", ())),
        ("uv tool run server", Package("pypi", ("server",), "server", ())),
        ("pipx run --spec pack tool a", Package("pypi", ("pack",), "tool", ("a",))),
        ("uvx --python 3.12 server", None),
        ("npx --call x", None),
        ("npx -y", None),
        ("uv run server", None),
        ("node server.js", None),
    ],
)
def test_a_package_is_read_from_its_runners_command_line(line: str, package: Package | None) -> None:
    assert package_of(line.split()) == package


def test_a_file_of_servers_is_replaced_and_says_what_changes(tmp_path: Path) -> None:
    given = {
        "mcpServers": {
            "files": {
                "command": "npx",
                "args": ["-y", "server", str(tmp_path)],
                "env": {"TOKEN": "t"},
                "disabled": True,
            },
            "remote": {"url": "https://x.test/mcp", "headers": {"Authorization": "Bearer z"}},
            "wrapped": {"command": "/usr/bin/ash", "args": ["wrap", "--", "x"]},
        },
        "other": 1,
    }
    text, notes = replacement(json.dumps(given))
    made = json.loads(text)
    assert made["mcpServers"]["files"] == {
        "command": "ash",
        "args": ["wrap", "--folder", str(tmp_path), "--env", "TOKEN", "--", "npx", "-y", "server", str(tmp_path)],
        "env": {"TOKEN": "t"},
        "disabled": True,
    }
    assert made["other"] == 1 and made["mcpServers"]["remote"] == given["mcpServers"]["remote"]  # type: ignore[index]
    assert made["mcpServers"]["wrapped"]["args"] == ["wrap", "--", "x"]
    assert [note.partition(":")[0] for note in notes] == ["files", "files", "remote", "wrapped"]


def test_a_file_of_vs_code_keeps_its_references() -> None:
    entry = {"type": "stdio", "command": "uvx", "args": ["git", "${workspaceFolder}"], "env": {"A": "${input:a}"}}
    made = json.loads(replacement(json.dumps({"servers": {"git": entry}, "inputs": []}))[0])
    assert made["servers"]["git"]["args"] == [
        *("wrap", "--folder", "${workspaceFolder}", "--env", "A", "--", "uvx", "git", "${workspaceFolder}"),
    ]
    assert made["servers"]["git"]["env"] == {"A": "${input:a}"} and made["servers"]["git"]["type"] == "stdio"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "has no servers"),
        ('{"mcpServers": {"a": {"command": "x", "env": ["TOKEN=hush"]}}}', "a: env"),
        ('{"mcpServers": {"a": {"command": "x", "args": "y"}}}', "a: args"),
    ],
)
def test_what_is_no_file_of_servers_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        replacement(text)


def test_pips_registries_lose_their_credentials(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://user:pw@192.168.7.7:8443/simple\n")
    found = python_registries({"UV_EXTRA_INDEX_URL": "http://localhost:3141/x"}, [tmp_path / "pip.conf"])
    assert found.environment == {
        "PIP_INDEX_URL": "https://192.168.7.7:8443/simple",
        "PIP_EXTRA_INDEX_URL": "http://registry-of-this-host.test:3141/x",
        "PIP_TRUSTED_HOST": "registry-of-this-host.test",
    }
    Policy.parse(found.network)
    assert found.network == ("192.168.7.7:8443", "registry-of-this-host.test=127.0.0.1:3141")


def test_an_address_of_a_registry_that_is_none_is_told() -> None:
    for url in ("http://[::1", "https://host:port/simple"):
        with pytest.raises(ConfigError, match="address of a registry is none"):
            python_registries({"PIP_INDEX_URL": url}, [])


def test_the_narrowest_installation_is_shown_and_never_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    node = tmp_path / ".nvm" / "v22"
    (node / "bin").mkdir(parents=True)
    (node / "lib" / "node_modules" / "npm").mkdir(parents=True)
    (node / "bin" / "node").write_bytes(b"\x7fELF")
    (node / "lib" / "node_modules" / "npm" / "cli.js").write_text("#!/usr/bin/env sh\n")
    (node / "bin" / "npx").symlink_to("../lib/node_modules/npm/cli.js")
    assert list(shown_for(str(node / "bin" / "npx"), ["/usr", "/bin"])) == [str(node)]

    tool = tmp_path / ".local" / "share" / "uv" / "tools" / "x"
    (tool / "bin").mkdir(parents=True)
    (tool / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (tool / "bin" / "server").write_text(f"#!{tool}/bin/python3\n")
    (tmp_path / ".local" / "bin").mkdir()
    (tmp_path / ".local" / "lib" / "python3.12").mkdir(parents=True)
    link = tmp_path / ".local" / "bin" / "server"
    link.symlink_to(tool / "bin" / "server")
    assert list(shown_for(str(link), ["/usr", "/bin"])) == [str(link), str(tool)]

    own = tmp_path / "bin" / "own"
    own.parent.mkdir()
    own.write_text("#!/bin/sh\n")
    (tmp_path / "pyvenv.cfg").write_text("")
    assert list(shown_for(str(own), ["/usr", "/bin"])) == [str(own)]


def test_a_script_whose_first_line_names_nothing_is_shown_alone(tmp_path: Path) -> None:
    for number, head in enumerate(("#!", "#!\n", "#! \nx", "#!/usr/bin/env\n")):
        script = tmp_path / f"s{number}"
        script.write_text(head)
        assert list(shown_for(str(script), ["/usr"])) == [str(script)]


def test_this_python_is_shown_with_what_it_stands_on() -> None:
    shown = list(shown_for(sys.executable, ["/usr", "/bin", "/lib", "/lib64"]))
    assert all(os.path.isdir(path) for path in shown)
    assert sys.prefix.startswith("/usr") or sys.prefix in shown


def test_arguments_that_are_not_shown_are_found(tmp_path: Path) -> None:
    words = ["--root", str(tmp_path), "/usr/bin", "/no/such", "relative"]
    assert hidden_arguments(words, ["/usr"]) == [str(tmp_path)]
    assert hidden_arguments(words, ["/usr", str(tmp_path.parent)]) == []
