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
@given(family=st.integers(0, 2**32 - 1), protocol=st.integers(0, 2**32 - 1))
def test_sockets_are_of_families_that_a_network_namespace_confines(machine: str, family: int, protocol: int) -> None:
    allowed = family in (1, 2, 10) or (family == 16 and protocol == 0)
    assert (verdict(machine, "socket", family, 1, protocol) == 0) is allowed


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
