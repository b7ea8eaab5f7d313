"""The line of the log that names a refused system call, for developers."""

import ctypes
import signal
import subprocess
import sys

import pytest

from vmd.log import log
from vmd.privsep import refused


def test_a_call_is_named_with_its_arguments() -> None:
    """The innermost function comes first."""
    line = refused.refusal_line(41, [1, 16], sys._getframe())

    beginning, callers = line.split("; called in ")
    assert beginning == "system call socket(0x1, 0x10) is refused by the filter"
    assert callers.split(" < ")[0].startswith(f"{__name__}.test_a_call_is_named_with_its_arguments:")


def test_the_innermost_callers_are_named() -> None:
    """All of them would be too long for a line."""

    def deep(left: int) -> str:
        return deep(left - 1) if left else refused.refusal_line(0, [], sys._getframe())

    callers = deep(20).split("; called in ")[1].split(" < ")

    assert len(callers) == refused.FRAMES_SHOWN
    assert all(".deep:" in caller for caller in callers)


def test_a_call_that_is_not_known_has_its_number() -> None:
    """It may be newer than the list, or there may be no Python code that has made it."""
    assert refused.refusal_line(9999, [], None) == (
        "system call number 9999() is refused by the filter; called in "
    )


def test_the_names_have_their_numbers() -> None:
    """Both parts of the list begin at their own number."""
    assert [refused.NAMES[number] for number in (0, 1, 334, 424, 435, 461)] == [
        "read", "write", "rseq", "pidfd_send_signal", "clone3", "lsm_list_modules",
    ]  # fmt: skip
    assert 335 not in refused.NAMES


def test_a_refused_call_is_logged_and_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the signal, as without a handler."""
    info, context = ctypes.create_string_buffer(128), ctypes.create_string_buffer(512)
    ctypes.c_int.from_buffer(info, refused.SYSCALL_AT).value = 41
    for place, value in enumerate((8, 9, 12, 2, 0, 1)):
        ctypes.c_uint64.from_buffer(context, refused.REGISTERS_AT + 8 * value).value = 16 + place
    lines: list[str] = []
    done: list[tuple[object, ...]] = []
    monkeypatch.setattr(log, "crit", lines.append)
    monkeypatch.setattr(signal, "signal", lambda *given: done.append(given))
    monkeypatch.setattr(signal, "raise_signal", lambda *given: done.append(given))

    refused.on_refusal(signal.SIGSYS, ctypes.addressof(info), ctypes.addressof(context))

    beginning, callers = lines[0].split("; called in ")
    assert beginning == "system call socket(0x10, 0x11, 0x12, 0x13, 0x14, 0x15) is refused by the filter"
    assert callers.startswith(f"{__name__}.test_a_refused_call_is_logged_and_ends_the_process:")
    assert done == [(signal.SIGSYS, signal.SIG_DFL), (signal.SIGSYS,)]


def test_layouts_are_the_systems() -> None:
    """A compiler compares them."""
    numbers = {
        "offsetof(siginfo_t, si_syscall)": refused.SYSCALL_AT,
        "offsetof(ucontext_t, uc_mcontext.gregs)": refused.REGISTERS_AT,
        "SA_SIGINFO": refused.SA_SIGINFO,
        "sizeof(struct sigaction)": ctypes.sizeof(refused.sigaction),
        "offsetof(struct sigaction, sa_flags)": refused.sigaction.sa_flags.offset,
    }
    registers = ("REG_RDI", "REG_RSI", "REG_RDX", "REG_R10", "REG_R8", "REG_R9")
    numbers |= dict(zip(registers, refused.ARGUMENTS, strict=True))
    lines = ["#define _GNU_SOURCE", "#include <signal.h>", "#include <stddef.h>", "#include <ucontext.h>"]
    lines += [f'_Static_assert(({name}) == {value}, "{name}");' for name, value in numbers.items()]

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input="\n".join(lines) + "\n", text=True, check=True)
