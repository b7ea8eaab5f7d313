"""A VM that is received: whether it can go on here, and closing what was only made to find that out."""

import errno
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import saved
from vmd.errors import HostError, OperatorError
from vmd.vm import arrival, state
from vmd.vm.arrival import FromStream, check_host, close_in_background
from vmd.vm.header import DeviceHead, Header
from vmd.vm.kinds import DISK, ENTROPY
from vmd.vm.slots import Slot

DEADLINE_S = 60.0


def test_a_vm_is_closed_on_its_own_thread() -> None:
    """The caller does not wait for the kernel to close the VM."""
    go, closed = threading.Event(), threading.Event()

    def close() -> None:
        assert go.wait(DEADLINE_S)
        closed.set()

    vm: Any = SimpleNamespace(close=close)

    close_in_background(vm)

    assert not closed.is_set()
    go.set()
    assert closed.wait(DEADLINE_S)


def test_a_vm_is_closed_if_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller closes the VM itself."""

    def refuse(name: str, _start: object) -> None:
        raise HostError(f"start thread {name}", errno.EAGAIN)

    closed: list[bool] = []
    vm: Any = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(arrival, "start_thread", refuse)

    close_in_background(vm)

    assert closed == [True]


# --- whether a machine can go on here --------------------------------------------------------------------------------


class Host:
    """KVM of a host: its processor, and how it answers."""

    def __init__(self) -> None:
        self.cpuid = saved.CPUID
        self.tsc_khz, self.xsave_bytes = saved.TSC_KHZ, saved.header().xsave_bytes
        self.refusal: OSError | None = None
        self.numbers: list[int] = []
        self.closed = threading.Event()
        self.left = 0  # vCPUs that were not closed

    def __call__(self, _fd: int) -> "Host":
        """Open /dev/kvm."""
        return self

    def supported_cpuid(self) -> Any:  # noqa: ANN401
        """Return the table of the processor."""
        return saved.entries(self.cpuid)

    def create_vm(self) -> "Host":
        """Return a VM."""
        return self

    def create_irqchip(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the VM."""
        self.closed.set()

    def create_vcpu(self, number: int) -> "Host":
        """Return a vCPU."""
        self.numbers.append(number)
        return self

    def __enter__(self) -> "Host":
        self.left += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.left -= 1

    def get_tsc_khz(self) -> int:
        """Return the frequency of its TSC."""
        return self.tsc_khz

    def set_cpuid2(self, _table: object) -> None:
        """Take a processor, or refuse."""
        if self.refusal is not None:
            raise self.refusal


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host that is like the sender."""
    made = Host()
    monkeypatch.setattr(arrival, "System", made)
    return made


def released(host: Host) -> bool:
    """Return whether the VM that was only made to ask is closed."""
    return host.closed.wait(DEADLINE_S) and host.left == 0


def test_a_host_like_the_sender(host: Host) -> None:
    """It is asked for the vCPU with the highest number."""
    check_host(saved.header(config=saved.header().config.replace(vcpus=7)))
    assert host.numbers == [6]
    assert released(host)


@pytest.mark.parametrize(("changes", "text"), [
    ({"tsc_khz": saved.TSC_KHZ * 2}, "its time stamp counter runs at 2500000 kHz, this host's at 5000000 kHz"),
    ({"xsave_bytes": 8192}, "its extended state has 4096 bytes, not 8192"),
    ({"refusal": OSError(errno.EINVAL, "KVM_SET_CPUID2")}, "KVM does not take its processor: "),
])  # fmt: skip
def test_a_host_that_differs(host: Host, changes: dict[str, Any], text: str) -> None:
    """The sentence says how.  Nothing stays open."""
    vars(host).update(changes)
    with pytest.raises(ValueError, match=text):
        check_host(saved.header())
    assert released(host)


def test_a_host_with_a_lesser_processor(host: Host) -> None:
    """No VM is made to find that out."""
    host.cpuid = (saved.CPUID[0], saved.leaf(1), saved.CPUID[2])
    with pytest.raises(ValueError, match="it needs processor features that this host lacks: cpuid 0x1"):
        check_host(saved.header())
    assert host.numbers == []


@pytest.mark.parametrize(("header", "text"), [
    (saved.header(firmware_bytes=1), "it has firmware of 1 bytes"),
    (saved.header(devices=()), "its 0 devices are not the 2 of its configuration"),
])  # fmt: skip
def test_a_machine_that_no_host_could_have(host: Host, header: Header, text: str) -> None:
    """No VM is made to find that out."""
    with pytest.raises(ValueError, match=text):
        check_host(header)
    assert host.numbers == []


@pytest.mark.parametrize(("error", "text"), [
    (ValueError("the uart has no register lcr"), "the stream is not usable: the uart has no register lcr"),
    (OSError(errno.EINVAL, "KVM_SET_SREGS"), "the stream is not usable: KVM does not take it: "),
])  # fmt: skip
def test_a_state_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    """The operator hears why, whether KVM has found it or a chip."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(state, "restore", refuse)
    source = FromStream(saved.header(), cast("Any", None), saved.machine_state())
    with pytest.raises(OperatorError, match=text) as caught:
        source.finish(cast("Any", SimpleNamespace(virtio=[])))
    assert caught.value.number == errno.EINVAL


def test_rings_go_on_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of each device.  The machine is paused, with the clocks of the stream."""
    clocks = object()
    monkeypatch.setattr(state, "restore", lambda *_: clocks)
    rings: list[object] = []
    outside = SimpleNamespace(loop=None)
    machine: Any = SimpleNamespace(
        virtio=[SimpleNamespace(restore_rings=rings.append)] * 2, outside=outside, listening=True,
        timers=SimpleNamespace(hold=lambda: None),
    )  # fmt: skip
    devices = (saved.device(), saved.device(queues=1))
    pause = FromStream(saved.header(), cast("Any", None), saved.machine_state(virtio=devices)).finish(machine)
    assert rings == [*devices]
    assert pause.paused
    assert pause.clocks is clocks


def test_a_machine_is_made_as_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the processor of the sender, and the layout and serial number of each device.  Its clock stands still."""
    log: list[object] = []

    class Made:
        def __init__(self, *arguments: object, cpuid: object) -> None:
            log.append((arguments, cpuid))
            self.clock = SimpleNamespace(stop=lambda: log.append("stopped"))

    monkeypatch.setattr(arrival, "Machine", Made)
    rng, disk = (DeviceHead(kind="rng", slot=1, features=0), DeviceHead(kind="blk", slot=2, features=0, serial=b"s"))
    header = saved.header(devices=(rng, disk), firmware_bytes=4096)
    slots = [Slot(kind=kind, index=0, number=number) for number, kind in enumerate((ENTROPY, DISK), 1)]
    empty, outside, memory = cast("Any", ("empty", "outside", "memory"))
    FromStream(header, memory, saved.machine_state()).machine(empty, header.config, slots, outside)

    ((given, cpuid), stopped) = cast("Any", log)
    assert given == (
        "empty", header.config, "memory", 4096, [slots[0].replace(layout=1), slots[1].replace(layout=1, serial=b"s")],
        "outside",
    )  # fmt: skip
    assert [(each.function, each.ecx) for each in cpuid] == [(each.function, each.ecx) for each in header.cpuid]
    assert stopped == "stopped"


def test_devices_that_a_host_does_not_have() -> None:
    """The machine is not built."""
    source = FromStream(saved.header(), cast("Any", None), saved.machine_state())
    nothing: Any = None
    with pytest.raises(OperatorError, match="the stream is not usable: "):
        source.machine(nothing, saved.header().config, [], nothing)
