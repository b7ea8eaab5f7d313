"""The order in which a machine is built."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

import vmd.vm.build
from vmd.config.model import VmConfig
from vmd.vm.build import FromImages, build
from vmd.vm.kinds import INTERFACE, SEED
from vmd.vm.slots import Slot


def is_open(fd: int) -> bool:
    """Return whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Source:
    """A source of a machine.  It records which descriptors are open while it is read."""

    def __init__(self, *fds: int) -> None:
        self.fds = fds
        self.open: dict[str, list[bool]] = {}

    def _look(self, when: str) -> None:
        self.open[when] = [is_open(fd) for fd in self.fds]

    def machine(self, *_: object) -> SimpleNamespace:
        """Give descriptors to the devices."""
        self._look("machine")
        return SimpleNamespace(plug_devices=lambda: None, create_vcpus=lambda: None)

    def fill(self, _machine: object) -> None:
        """Take the place of reading a boot image or a stream."""
        self._look("fill")

    def finish(self, machine: SimpleNamespace) -> SimpleNamespace:
        """Return the machine."""
        return machine


def test_no_device_descriptor_is_open_while_a_boot_image_is_read() -> None:
    """The taps, packet sockets and seeds have gone to their devices.  The seed was read before."""
    tap, packets = os.pipe()
    seed = os.memfd_create("seed")
    os.write(seed, b"cidata")
    source: Any = Source(tap, packets, seed)
    host: Any = SimpleNamespace(close=lambda: None)
    nic = Slot(kind=INTERFACE, index=0, number=2, fds=(tap, packets))

    built: Any = build(host, source, VmConfig(name="a"), [nic, Slot(kind=SEED, index=4, number=31, fds=(seed,))], host)

    assert source.open == {"machine": [True] * 3, "fill": [False] * 3}
    assert built.seed == b"cidata"


@pytest.mark.parametrize("firmware_bytes", [0, 128 << 10])
def test_the_last_steps_of_a_machine_from_images(firmware_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest without firmware finds its devices at addresses that we have assigned.  SeaBIOS assigns them itself."""
    steps: list[object] = []
    first, second = (SimpleNamespace(vcpu=name) for name in ("first", "second"))
    machine: Any = SimpleNamespace(
        firmware_bytes=firmware_bytes,
        pci=SimpleNamespace(assign_resources=lambda: steps.append("assign")),
        vcpus=[first, second],
        outside=SimpleNamespace(loop="loop"),
    )
    monkeypatch.setattr(
        vmd.vm.build, "set_boot_msrs", lambda vcpus, *, direct_boot: steps.append((*vcpus, direct_boot))
    )
    monkeypatch.setattr(vmd.vm.build, "apply_start", lambda vcpu, start: steps.append((vcpu, start)))
    monkeypatch.setattr(vmd.vm.build, "Pause", lambda *arguments: arguments)
    source: Any = FromImages(-1, "", None, "", -1)
    source.start = "its state"

    assert source.finish(machine) == (machine, "loop")
    direct = not firmware_bytes
    assert steps == [*["assign"] * direct, ("first", "second", direct), ("first", "its state")]
