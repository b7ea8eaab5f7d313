"""What bootprobe answers about a boot image: the same sentences as at a start."""

import os
from collections.abc import Callable

import pytest

from vmd.errors import HostError, ImageError
from vmd.ipc.probemsg import Probe, pack_error, pack_image
from vmd.privsep.confine import BOOTPROBE
from vmd.units import MIB
from vmd.vm import bootprobe
from vmd.vm.boot import loader
from vmd.vm.bootprobe import NoMemory, answer


def file(data: bytes) -> int:
    """Return a file."""
    fd = os.memfd_create("image")
    os.write(fd, data)
    return fd


def test_a_file_that_cannot_be_booted() -> None:
    """The sentence is that of the loader, without the name, which the asker knows."""
    fd = file(b"#!/bin/sh\n")
    with pytest.raises(ImageError) as caught:
        loader.load(NoMemory(), fd, "image", memory_bytes=64 * MIB)
    assert answer(64 * MIB, b"", [fd]) == pack_error(caught.value.what)
    os.close(fd)


def test_what_the_loader_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files, the command line and the size of memory.  The answer has the size of the image."""
    found: list[object] = []

    def load(_memory: object, *names: object, **given: object) -> None:
        found.append((names, given))

    monkeypatch.setattr(loader, "load", load)
    image, initrd = file(b"x" * 1234), file(b"y")
    for files in ([image, initrd], [image]):
        assert answer(64 * MIB, b"console=ttyS0", files) == pack_image(Probe(format="raw", size=1234))
    given = {"memory_bytes": 64 * MIB, "initrd_name": "initrd", "cmdline": b"console=ttyS0"}
    assert found == [
        ((image, "image"), {**given, "initrd_fd": initrd}), ((image, "image"), {**given, "initrd_fd": None}),
    ]  # fmt: skip
    for fd in (image, initrd):
        os.close(fd)


@pytest.mark.parametrize(("error", "text"), [
    (ImageError("initrd", "does not fit into memory"), "initrd does not fit into memory"),
    (ImageError("image", "is not a kernel"), "is not a kernel"),
    (HostError("read image", 5), "read image: Input/output error"),
])  # fmt: skip
def test_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    """The sentence names the initrd if that is the cause."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loader, "load", fail)
    assert answer(64 * MIB, b"", [0]) == pack_error(text)


def test_it_is_confined_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question has the size of memory, and the command line in hexadecimal."""
    steps: list[object] = []

    def serve(answers: Callable[[list[str], list[int]], object]) -> int:
        steps.append("serve")
        assert answers(["1234", "6162"], [7]) == "the answer"
        return 0

    def note(*arguments: object) -> str:
        steps.append(arguments)
        return "the answer"

    monkeypatch.setattr(bootprobe, "confine", note)
    monkeypatch.setattr(bootprobe, "serve", serve)
    monkeypatch.setattr(bootprobe, "answer", note)
    assert bootprobe.main() == 0
    assert steps == [(BOOTPROBE,), "serve", (1234, b"ab", [7])]


def test_the_memory_of_no_guest() -> None:
    """Nothing is stored, and buffers have the right size."""
    memory = bootprobe.NoMemory()
    memory.write(1 << 40, b"x")
    memory.load(1 << 40, b"x")
    assert len(memory.view(1 << 40, 5000)) == 5000
