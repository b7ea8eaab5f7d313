"""The memory and processor time of a VM, from a /proc that the tests make, and from the real one."""

import builtins
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmd.parent import usage
from vmd.parent.usage import PAGE_BYTES, TICK_NS
from vmd.units import NS

GONE = 1 << 30  # no process has this pid
STAT = "7 (a ) (b) S 1 2 3 4 5 6 7 8 9 10 1000 234 99 98 20 0 1 0 5\n"  # 1000 and 234 are the ticks of user and system


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that writes a file of /proc, which is at another place in this test."""
    real_open: Any = open
    real_list = os.listdir

    def there(path: str) -> str:
        return f"{tmp_path}{path}" if str(path).startswith("/proc/") else path

    def write_file(path: str, text: str) -> None:
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(builtins, "open", lambda path, *rest, **more: real_open(there(path), *rest, **more))
    monkeypatch.setattr(os, "listdir", lambda path: real_list(there(path)))
    return write_file


def test_the_processor_time_of_a_process(write: Callable[[str, str], None]) -> None:
    """In user and in system mode.  The name of a process may contain anything."""
    write("/proc/7/stat", STAT)
    assert usage.cpu_ns(7) == 1234 * TICK_NS
    assert TICK_NS * os.sysconf("SC_CLK_TCK") == NS
    for text in ("", "7 (a) S 1", STAT.replace("1000", "many")):
        write("/proc/7/stat", text)
        assert usage.cpu_ns(7) == 0
    assert usage.cpu_ns(8) == 0


def test_the_processor_time_of_a_thread(write: Callable[[str, str], None]) -> None:
    """Kernels without schedstat do not tell it."""
    write("/proc/7/task/9/schedstat", "123456789 22 3\n")
    assert usage.thread_ns(7, 9) == 123456789
    for text in ("", "many 22 3\n"):
        write("/proc/7/task/9/schedstat", text)
        assert usage.thread_ns(7, 9) == 0
    assert usage.thread_ns(7, 10) == 0


def test_the_memory_of_a_process(write: Callable[[str, str], None]) -> None:
    """Without files and shared memory, which are counted once for the guest."""
    write("/proc/7/statm", "9000 500 120 1 0 77 0\n")
    assert usage.private_bytes(7) == 380 * PAGE_BYTES
    for text in ("", "9000 500", "9000 some 120 1\n"):
        write("/proc/7/statm", text)
        assert usage.private_bytes(7) == 0
    assert usage.private_bytes(8) == 0


def test_the_memory_of_a_vm(write: Callable[[str, str], None]) -> None:
    """What its guest has touched, and the memory of its process and of its devices."""
    write("/proc/7/statm", "9000 500 100 1 0 77 0\n")
    write("/proc/7/task/7/children", "8 9 \n")
    write("/proc/8/statm", "9000 30 10 1 0 77 0\n")
    write("/proc/9/statm", "9000 5 4 1 0 77 0\n")
    memory = os.memfd_create("memory")
    os.ftruncate(memory, 1 << 30)
    os.pwrite(memory, b"touched", 1 << 20)

    assert usage.children(7) == [8, 9]
    assert usage.used_bytes(None, 7) == 421 * PAGE_BYTES
    assert usage.guest_bytes(memory) == PAGE_BYTES
    assert usage.used_bytes(memory, 7) == 422 * PAGE_BYTES
    os.close(memory)
    for text in ("", "many\n"):
        write("/proc/7/task/7/children", text)
        assert usage.children(7) == []
    assert usage.children(8) == []


def test_the_threads_of_a_process(write: Callable[[str, str], None]) -> None:
    """By their names."""
    for thread, name in ((7, "vm/a"), (9, "vcpu 0"), (10, "vcpu 1")):
        write(f"/proc/7/task/{thread}/comm", f"{name}\n")
    assert usage.threads(7) == {"vm/a": 7, "vcpu 0": 9, "vcpu 1": 10}
    assert usage.threads(8) == {}


def test_the_pid_of_a_pidfd() -> None:
    """It is 0 for another descriptor, and for none."""
    pidfd = os.pidfd_open(os.getpid())
    assert usage.host_pid(pidfd) == os.getpid()
    os.close(pidfd)
    assert usage.host_pid(pidfd) == 0
    with open(os.devnull, encoding="ascii") as other:
        assert usage.host_pid(other.fileno()) == 0


def test_a_process_that_has_ended() -> None:
    """Its pidfd says so."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    assert usage.host_pid(pidfd) == 0
    os.close(pidfd)
    assert (usage.private_bytes(GONE), usage.cpu_ns(GONE), usage.children(GONE)) == (0, 0, [])


def test_the_files_of_this_kernel() -> None:
    """They have the form that is expected."""
    pid, thread = os.getpid(), threading.get_native_id()
    while time.process_time_ns() < 4 * TICK_NS:
        pass
    assert 0 < usage.cpu_ns(pid) <= time.process_time_ns() + 4 * TICK_NS
    assert usage.private_bytes(pid) > PAGE_BYTES
    assert thread in usage.threads(pid).values()
    assert usage.thread_ns(pid, thread) >= 0
