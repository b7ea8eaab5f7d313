"""Start and end of device processes, tested with the simplest one: a drive without a disc."""

import os
import socket
import struct
from pathlib import Path

import pytest

from tests.support.fakedriver import Device
from vmd.ipc import devmsg


def drive() -> Device:
    """Start the process of a drive."""
    return Device("vioscsi", queues=3)


def test_process_is_small_and_starts_soon() -> None:
    """The figures are printed, not checked."""
    with drive() as device:
        device.start()
        print(f"vioscsi: ready {device.ready_ms:.1f} ms after spawn, PSS {device.pss_kib() / 1024:.1f} MiB")


def test_a_vm_that_ends_while_it_starts() -> None:
    """The process ends too, and logs nothing."""
    with drive() as device:
        device.send_start(device.start_packet())
        device.sync.shutdown(socket.SHUT_RDWR)

        assert device.status() == 1
        assert device.read_log() == ""


def test_a_slot_that_there_is_not() -> None:
    """The process ends, and the figures of other devices are unchanged."""
    with drive() as device:
        device.send_start(device.start_packet(slot=devmsg.FIGURES_SLOTS))
        assert b"slot 16 of 16 for figures" in device.sync.recv(devmsg.PACKET_MAX)
        assert not any(os.pread(device.figures_fd, devmsg.FIGURES_BYTES, 0))


def test_end_of_a_channel_ends_the_process() -> None:
    """The process ends when a channel closes, because the VM has ended."""
    with drive() as device:
        device.start().sync.close()

        assert device.status() == 0


@pytest.mark.parametrize("packet", [b"", b"\0", struct.pack("<I", 77), bytes(range(64))])
def test_process_is_not_started_by_garbage(packet: bytes) -> None:
    """The process ends on any invalid start message."""
    with drive() as device:
        if packet:
            device.send_start(packet)
        else:
            device.sync.close()

        assert device.status() == 1
        assert "Traceback" not in device.read_log()


def test_process_is_confined() -> None:
    """The process has a seccomp filter."""
    with drive() as device:
        device.start()
        assert "Seccomp:\t2\n" in Path(f"/proc/{device.child.pid}/status").read_text()
