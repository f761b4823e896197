"""The system call filter, run by a small interpreter of its own for every architecture."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_hub.backends.local import seccomp
from ash_hub.backends.local._syscalls import ARCHITECTURES

ALLOWED = 0x7FFF0000
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
EVERYWHERE = sorted(ARCHITECTURES)


def decision(program: bytes, audit: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Return what the program returns for a system call."""
    words = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, audit, 0, *(word & (2**64 - 1) for word in words))
    code = list(struct.iter_unpack("<HBBI", program))
    position = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[position]
        position += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
            continue
        holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: accumulator & value != 0}[operation]
        position += if_true if holds else if_false


def verdict(machine: str, name: str, *arguments: int) -> int:
    """Return the error that a call gets, 0 for none."""
    architecture = ARCHITECTURES[machine]
    returned = decision(seccomp.build(architecture), architecture.audit, architecture.numbers[name], arguments)
    return 0 if returned == ALLOWED else returned & 0xFFFF


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_a_refused_call_gets_its_error(machine: str) -> None:
    assert verdict(machine, "unshare", 0) == errno.EPERM
    assert verdict(machine, "mount") == errno.EPERM
    assert verdict(machine, "clone3") == errno.ENOSYS
    assert verdict(machine, "io_uring_setup") == errno.ENOSYS
    assert verdict(machine, "io_setup", 1) == errno.ENOSYS


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_clone_is_for_processes_and_threads_only(machine: str) -> None:
    assert verdict(machine, "clone", 0x01200011) == 0
    assert verdict(machine, "clone", 0x003D0F00) == 0
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, "clone", flag | 17) == errno.EPERM


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_a_terminal_takes_no_injected_input(machine: str) -> None:
    assert verdict(machine, "ioctl", 0, 0x5401) == 0
    for request in (0x5412, 0x541C, 0x5412 | 7 << 32):
        assert verdict(machine, "ioctl", 0, request) == errno.EPERM


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_a_debugger_traces_what_it_starts_and_nothing_else(machine: str) -> None:
    assert verdict(machine, "ptrace", 0) == 0
    assert verdict(machine, "ptrace", 16) == errno.EPERM
    assert verdict(machine, "ptrace", 0x4206) == errno.EPERM


@pytest.mark.parametrize("machine", EVERYWHERE)
@given(
    family=st.sampled_from((1, 2, 10, 16)) | st.integers(0, 2**32 - 1),
    kind=st.integers(0, 15),
    flags=st.sampled_from((0, 0x800, 0x80000, 0x80800)),
    protocol=st.sampled_from((0, 1, 6, 17, 58, 132, 136, 256, 262)) | st.integers(0, 2**32 - 1),
)
def test_sockets_are_of_unix_tcp_udp_and_routing(
    machine: str, family: int, kind: int, flags: int, protocol: int
) -> None:
    of_internet = family in (2, 10) and kind < 4 and protocol in (0, 6, 17)
    allowed = family == 1 or of_internet or (family == 16 and protocol == 0)
    assert (verdict(machine, "socket", family, kind | flags, protocol) == 0) is allowed


@pytest.mark.parametrize("machine", EVERYWHERE)
@given(family=st.integers(0, 2**32 - 1), kind=st.integers(1, 5))
def test_pairs_of_sockets_are_of_unix(machine: str, family: int, kind: int) -> None:
    assert verdict(machine, "socketpair", 1, kind) == 0
    assert (verdict(machine, "socketpair", family, kind) == 0) is (family == 1)


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_files_can_be_locked_but_nobody_is_told_who_opens_them(machine: str) -> None:
    for control in (0, 3, 5, 6, 7, 36, 37, 38, 1025, 1030, 1031, 1033):
        assert verdict(machine, "fcntl", 3, control) == 0
    for control in (1024, 1026, 1040):
        assert verdict(machine, "fcntl", 3, control) == errno.EPERM


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("pointer", [4096, 1 << 32, 0x7FFC_0000_0000])
def test_the_limit_on_cores_stays_and_no_program_minds(machine: str, pointer: int) -> None:
    architecture = ARCHITECTURES[machine]
    program = seccomp.build(architecture)
    done = 0x00050000  # the call is left out, and its answer is 0
    refused = done | errno.EPERM  # nothing would fill in the old limit

    def returned(name: str, *arguments: int) -> int:
        return decision(program, architecture.audit, architecture.numbers[name], arguments)

    assert returned("setrlimit", 4, pointer) == done
    assert returned("prlimit64", 0, 4, pointer, 0) == done
    assert returned("prlimit64", 0, 4, 0, pointer) == ALLOWED
    for other in (1, 1 << 32, pointer):
        assert returned("prlimit64", 0, 4, other, pointer) == returned("prlimit64", 0, 4, pointer, other) == refused
    assert returned("setrlimit", 7, pointer) == returned("prlimit64", 0, 7, pointer, 0) == ALLOWED


@pytest.mark.parametrize("machine", EVERYWHERE)
@given(number=st.integers(0, 2**32 - 1))
def test_calls_of_another_architecture_do_not_exist(machine: str, number: int) -> None:
    for other in {it.audit for it in ARCHITECTURES.values()} | {0x40000003}:
        if other != ARCHITECTURES[machine].audit:
            returned = decision(seccomp.build(ARCHITECTURES[machine]), other, number)
            assert returned & 0xFFFF == errno.ENOSYS and returned != ALLOWED


@pytest.mark.parametrize("machine", EVERYWHERE)
@given(number=st.integers(0x40000000, 2**32 - 1))
def test_numbers_of_x32_do_not_exist(machine: str, number: int) -> None:
    returned = decision(seccomp.build(ARCHITECTURES[machine]), ARCHITECTURES[machine].audit, number)
    assert returned & 0xFFFF == errno.ENOSYS and returned != ALLOWED


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_what_is_not_named_is_allowed(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program = seccomp.build(architecture)
    named = set(architecture.numbers.values())
    for number in range(600):
        if number not in named:
            assert decision(program, architecture.audit, number) == ALLOWED


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_numbers_are_those_of_the_kernel(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    kernel: Mapping[str, int] = {
        name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", header.read_text())
    }
    ours = ARCHITECTURES[machine].numbers
    known = {name: number for name, number in ours.items() if name in kernel}
    assert len(known) > 45
    assert known == {name: kernel[name] for name in known}


def test_an_unknown_machine_has_no_filter() -> None:
    assert seccomp.for_machine("riscv64") is None
    assert seccomp.for_machine("x86_64") == seccomp.build(ARCHITECTURES["x86_64"])
