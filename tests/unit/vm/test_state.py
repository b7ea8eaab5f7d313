"""Whether a machine that was sent can go on here, and records with impossible values (hostile-input 26, 55)."""

import os
from collections.abc import Iterator
from typing import Any, cast

import msgpack
import pytest

from tests.support import saved
from tests.support.saved import CPUID, INTEL, entries, leaf
from tests.support.virtiopci import CONFIG, Machine
from vmd.config.model import DiskConfig, NicConfig, VmConfig
from vmd.ipc import devmsg
from vmd.ipc.imsg import pack, unpack
from vmd.ipc.messages.shared import DiskImages
from vmd.record import Part, Record
from vmd.virtio import spec
from vmd.vm import state
from vmd.vm.chips.mc146818 import Mc146818
from vmd.vm.chips.ns8250 import Uart
from vmd.vm.header import CpuidLeaf, DeviceHead, Header
from vmd.vm.kinds import Given
from vmd.vm.slots import LAYOUT, LAYOUT_FIRST, plan
from vmd.vm.state import MachineState, Register

NO_VECTOR = 0xFFFF


# --- processors ---------------------------------------------------------------------------------------------------


def test_same_processor_is_accepted() -> None:
    """A host accepts its own stream."""
    state.check_processor(saved.header(), entries(CPUID))


def test_additional_features_are_accepted() -> None:
    """A guest does not need the features that its old processor lacked."""
    better = (*CPUID[:1], leaf(1, ecx=0xFF, edx=0xFF), leaf(7, ebx=0xFFF), leaf(0x80000001, ecx=1))
    state.check_processor(saved.header(), entries(better))


@pytest.mark.parametrize(("changed", "what"), [
    (leaf(1, ecx=0x7, edx=0xF), "cpuid 0x1.0 ecx 0x8"),
    (leaf(1, ecx=0xF, edx=0), "cpuid 0x1.0 edx 0xf"),
    (leaf(7, ebx=0x10), "cpuid 0x7.0 ebx 0xe0"),
])  # fmt: skip
def test_missing_feature_is_named(changed: CpuidLeaf, what: str) -> None:
    """The error names the leaf, the register and the bits."""
    ours = tuple(changed if each.function == changed.function else each for each in CPUID)
    with pytest.raises(ValueError, match=f"needs processor features that this host lacks: {what}"):
        state.check_processor(saved.header(), entries(ours))


REGISTERS_OF_FEATURES = [
    (0x1, 0, "ecx"), (0x1, 0, "edx"), (0x7, 0, "ebx"), (0x7, 0, "ecx"), (0x7, 0, "edx"), (0x7, 1, "eax"),
    (0x7, 1, "edx"), (0xD, 0, "eax"), (0xD, 1, "eax"), (0x80000001, 0, "ecx"), (0x80000001, 0, "edx"),
    (0x80000007, 0, "edx"), (0x80000008, 0, "ebx"), (0x40000001, 0, "eax"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "index", "register"), REGISTERS_OF_FEATURES)
def test_a_bit_missing_in_any_register_of_features_is_named(function: int, index: int, register: str) -> None:
    """Otherwise an invalid opcode would end the guest, after the sender has given it up."""
    vendor = CPUID[:1]
    theirs = saved.header(cpuid=(*vendor, leaf(function, index, **{register: 0x50})))
    for bit in range(32):
        if (function, register, bit) != (1, "ecx", 27):  # OSXSAVE, which is no feature
            sent = saved.header(cpuid=(*vendor, leaf(function, index, **{register: 1 << bit})))
            with pytest.raises(ValueError, match=f" {register} {1 << bit:#x}$"):
                state.check_processor(sent, entries(vendor))
    for ours, missing in ((0x10, 0x40), (0x40, 0x10), (0, 0x50)):
        with pytest.raises(ValueError, match="needs processor features") as refused:
            state.check_processor(theirs, entries((*vendor, leaf(function, index, **{register: ours}))))
        assert str(refused.value).endswith(f": cpuid {function:#x}.{index} {register} {missing:#x}")
    state.check_processor(theirs, entries((*vendor, leaf(function, index, **{register: 0xF0}))))


def test_every_register_of_features_is_tried() -> None:
    """The list above equals the table in `state`."""
    assert list(state.FEATURES) == REGISTERS_OF_FEATURES


def test_missing_leaf_is_a_missing_feature() -> None:
    """An older processor may lack a whole leaf."""
    with pytest.raises(ValueError, match=r"cpuid 0x7\.0 ebx 0xf0"):
        state.check_processor(saved.header(), entries(CPUID[:2]))


def test_osxsave_is_no_feature_of_the_processor() -> None:
    """KVM sets the bit in a vCPU's table when the guest has enabled XSAVE."""
    assert state.OSXSAVE == 1 << 27  # bit 27 of leaf 1's ECX
    theirs = saved.header(cpuid=(*CPUID[:1], leaf(1, ecx=1 << 27)))
    state.check_processor(theirs, entries((*CPUID[:1], leaf(1))))


@pytest.mark.parametrize("cpuid", [
    (), CPUID[1:], (leaf(0, ebx=0x68747541, ecx=0x444D4163, edx=0x69746E65), *CPUID[1:]),
    (leaf(0, ebx=INTEL[0], ecx=INTEL[1], edx=INTEL[2]), *CPUID[1:]),
])  # fmt: skip
def test_other_vendor_is_refused(cpuid: tuple[CpuidLeaf, ...]) -> None:
    """The features do not matter then."""
    with pytest.raises(ValueError, match="another vendor"):
        state.check_processor(saved.header(cpuid=cpuid), entries(CPUID))


@pytest.mark.parametrize(("theirs", "good"), [
    (2_500_000, True), (2_500_625, True), (2_499_375, True), (2_500_626, False), (2_499_374, False), (0, False),
    (-2_500_000, False), (1 << 63, False),
])  # fmt: skip
def test_rate_of_the_time_stamp_counter(theirs: int, good: bool) -> None:
    """The rates may differ by 250 ppm, as for KVM."""
    if good:
        state.check_tsc(theirs, 2_500_000)
    else:
        with pytest.raises(ValueError, match=f"its time stamp counter runs at {theirs} kHz, this host's at 2500000"):
            state.check_tsc(theirs, 2_500_000)


def test_numbers_of_a_cpuid_table_are_cut_to_registers() -> None:
    """A stream may contain any number."""
    theirs = saved.header(cpuid=(leaf(-1, eax=1 << 40, ebx=-1),))
    (entry,) = state.cpuid_of(theirs)
    assert (entry.function, entry.eax, entry.ebx) == (0xFFFFFFFF, 0, 0xFFFFFFFF)


# --- devices ------------------------------------------------------------------------------------------------------


def config(**changes: object) -> VmConfig:
    """Return a VM's configuration."""
    return VmConfig(name="sent").replace(**changes)


def heads(*kinds: str) -> tuple[DeviceHead, ...]:
    """Return devices of these kinds."""
    return tuple(DeviceHead(kind=kind, slot=1 + number, features=0) for number, kind in enumerate(kinds))


DISK = DiskConfig(path="/disk")


@pytest.mark.parametrize(("configured", "kinds"), [
    (config(), ("rng",)),
    (config(disks=(DISK, DISK), cdrom="/disc"), ("rng", "blk", "blk", "scsi")),
    (config(nics=(NicConfig(),), disks=(DISK,)), ("rng", "net", "blk")),
])  # fmt: skip
def test_devices_are_those_of_the_configuration(configured: VmConfig, kinds: tuple[str, ...]) -> None:
    """They are in order of slots.  A device more, a device less or another device is refused."""
    state.check_devices(saved.header(config=configured, devices=heads(*kinds)))

    for wrong in (kinds[:-1], (*kinds, "blk"), (*kinds[:-1], "gpu"), kinds[1:], ()):
        with pytest.raises(ValueError, match="are not the"):
            state.check_devices(saved.header(config=configured, devices=heads(*wrong)))


class Device(Machine):
    """The function of `tests.support.virtiopci`, whose process records its commands."""

    @property
    def commands(self) -> list[int]:
        """Return the commands that its process got."""
        found: list[int] = self.process.commands
        return found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Yield a new function with two queues."""
    made = Device.fake()
    made.process.commands = []
    made.process.command = made.process.commands.append
    yield made
    made.close()


def test_device_goes_on_from_its_saved_state(device: Device) -> None:
    """Registers have the saved values.  The process is paused, and then gets the rings with their positions."""
    theirs = saved.device(config=CONFIG, queues=2)
    device.function.restore_registers(theirs)
    device.function.restore_rings(theirs)

    assert device.status == 0xF
    assert device.commands == [devmsg.PAUSE]
    row = (64, True, 0x10000, 0x11000, 0x12000, 7, 7)
    assert device.process.lives == [(1 << 32, [row, row])]
    assert device.kvm.irqfds == {}  # they are attached when the machine resumes
    assert device.kvm.ioeventfds != {}


def test_pending_interrupts_come_when_the_machine_resumes(device: Device) -> None:
    """One has a masked vector, and for the other the guest has not read ISR."""
    theirs = saved.device(
        config=CONFIG, queues=0, config_pending=True,
    ).replace(queues=(saved.queue(unseen=True), saved.queue(called=True)))  # fmt: skip
    device.function.restore_registers(theirs)
    device.function.restore_rings(theirs)
    assert device.kvm.injected == []

    device.function.attach_interrupts()
    device.kvm.deliver()

    assert len(device.kvm.injected) >= 2
    assert device.function.take_isr() == spec.ISR_QUEUE | spec.ISR_CONFIG
    assert device.function.take_isr() == 0


@pytest.mark.parametrize("changes", [
    {"status": 256}, {"status": -1}, {"driver_features": 1 << 64}, {"driver_features": -1}, {"queue_select": 1 << 16},
    {"device_feature_select": 1 << 32}, {"driver_feature_select": -1}, {"config_vector": -1},
    {"config_vector": 1 << 16}, {"generation": 256}, {"config": b""}, {"config": bytes(61)}, {"queues": ()},
    {"queues": (saved.queue(),) * 3},
    *({"queues": (saved.queue(**{name: value}), saved.queue())} for name, value in (
        ("size", 0), ("size", 3), ("size", 512), ("size", -64), ("size", 1 << 16), ("desc", 1 << 64), ("desc", -1),
        ("avail", 1 << 64), ("used", -1), ("pfn", 1 << 32), ("pfn", -1), ("vector", -1), ("vector", 1 << 16),
        ("next_avail", 1 << 16), ("next_avail", -1), ("next_used", 1 << 16), ("next_used", -1),
    )),
])  # fmt: skip
def test_impossible_registers_are_refused(device: Device, changes: dict[str, object]) -> None:
    """They are refused before the process gets anything."""
    theirs = saved.device(config=CONFIG).replace(**changes)

    with pytest.raises(ValueError, match=r"."):
        device.function.check_registers(theirs, 0)

    assert device.process.lives == []


# The widths of the registers of a device and of its queues, in bits.
WIDTHS = {
    "status": 8, "driver_features": 64, "device_feature_select": 32, "driver_feature_select": 32, "queue_select": 16,
    "config_vector": 16, "generation": 8,
}  # fmt: skip
QUEUE_WIDTHS = {"desc": 64, "avail": 64, "used": 64, "pfn": 32, "vector": 16, "next_avail": 16, "next_used": 16}


@pytest.mark.parametrize(("name", "bits"), [*WIDTHS.items(), *QUEUE_WIDTHS.items()])
def test_a_register_may_have_any_value_of_its_width(device: Device, name: str, bits: int) -> None:
    """One more, or less than 0, is refused by name."""
    for value, good in ((0, True), ((1 << bits) - 1, True), (1 << bits, False), (-1, False)):
        theirs = saved.device(config=CONFIG)
        if name in WIDTHS:
            theirs = theirs.replace(**{name: value})
        else:
            theirs = theirs.replace(queues=(saved.queue(), saved.queue(**{name: value})))
        if good:
            device.function.check_registers(theirs, 0)
        else:
            with pytest.raises(ValueError, match=f"^{name} is {value}, which does not fit {bits} bits$"):
                device.function.check_registers(theirs, 0)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"queues": (saved.queue(),)}, "vioblk0 has other queues or another size of configuration"),
    ({"config": CONFIG[:-1]}, "vioblk0 has other queues or another size of configuration"),
    ({"queues": (saved.queue(), saved.queue(size=128))}, "vioblk0 has a queue of 128"),
    ({"queues": (saved.queue(), saved.queue(size=48))}, "vioblk0 has a queue of 48"),
    ({"addresses": b"x"}, "impossible addresses of the guest of vioblk0"),
])  # fmt: skip
def test_the_error_names_the_device(device: Device, changes: dict[str, object], sentence: str) -> None:
    """An operator sees which device of the stream is wrong."""
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        device.function.check_registers(saved.device(config=CONFIG).replace(**changes), 0)


def test_features_that_the_driver_uses_must_exist_here(device: Device) -> None:
    """Features count that were offered at the sender.  A driver may have accepted others, which had no effect."""
    missing = 1 << 40
    theirs = saved.device(config=CONFIG, driver_features=1 << 32 | missing)
    device.function.check_registers(theirs, 0)
    with pytest.raises(ValueError, match="uses features 0x10000000000, which vioblk0 does not have here"):
        device.function.check_registers(theirs, missing)


def test_what_the_driver_has_written_to_configuration_is_written_again(device: Device) -> None:
    """The whole configuration, from its first byte on.  A reset undoes it, as at the sender."""
    theirs = saved.device(config=b"\x05" + CONFIG[1:])
    device.process.answer = theirs.config
    device.function.restore_registers(theirs)
    device.function.restore_rings(theirs)
    assert device.process.written == [(0, theirs.config)]
    assert device.function.transport.configured


def test_the_kind_of_a_device_is_checked(device: Device) -> None:
    """A stream of an earlier version has no kind there, so the kind in the header counts."""
    for kind in ("", "blk"):
        device.function.check_registers(saved.device(config=CONFIG, kind=kind), 0)
    with pytest.raises(ValueError, match="a device of kind 'net' in the place of vioblk0"):
        device.function.check_registers(saved.device(config=CONFIG, kind="net"), 0)


def test_every_part_of_a_stream_has_a_version() -> None:
    """A record that is no part belongs to a part, whose version covers it."""
    for part in (Header, MachineState, *(declared.__args__[0] for declared in MachineState.fields.values()
                 if getattr(declared, "__args__", ()) and issubclass(declared.__args__[0], Record))):  # fmt: skip
        assert issubclass(part, Part), part


@pytest.mark.parametrize("vector", [NO_VECTOR, 3, 0x7FFF])
def test_vectors_that_do_not_exist_become_no_vector(device: Device, vector: int) -> None:
    """The result is the same as when a driver writes them."""
    theirs = saved.device(config=CONFIG, config_vector=vector, queues=0).replace(
        queues=(saved.queue(vector=vector),) * 2
    )
    device.function.restore_registers(theirs)
    device.enable_msix()

    assert device.read(0x10, 2) == NO_VECTOR
    assert device.pending() == 0


def test_unusable_rings_ask_for_a_reset(device: Device) -> None:
    """The process cannot use them, so the guest is asked to reset the device.  Nothing else is affected."""
    device.process.usable = False
    theirs = saved.device(config=CONFIG, queues=0).replace(queues=(saved.queue(desc=(1 << 64) - 16),) * 2)

    device.function.restore_registers(theirs)
    device.function.restore_rings(theirs)

    assert device.status == 0xF | spec.DEVICE_NEEDS_RESET
    assert device.function.take_isr() == spec.ISR_CONFIG


def test_disk_of_another_size_is_refused(device: Device) -> None:
    """The guest would access sectors that do not exist."""
    theirs = saved.device(config=bytes(59) + b"\x01")
    device.process.answer = CONFIG
    device.function.restore_registers(theirs)

    with pytest.raises(ValueError, match="vioblk0 is a different device here"):
        device.function.restore_rings(theirs)


def test_an_inactive_device_needs_no_rings(device: Device) -> None:
    """Its driver has not started yet, or has reset it."""
    theirs = saved.device(config=CONFIG, active=False, status=0)
    device.function.restore_registers(theirs)
    device.function.restore_rings(theirs)

    assert device.process.lives == []
    assert device.kvm.ioeventfds == {}


# --- chips --------------------------------------------------------------------------------------------------------


def uart() -> Uart:
    """Return a UART without connections."""
    return Uart(lambda level: None, lambda data: None, lambda: None)


def clock() -> Mc146818:
    """Return a clock that is stopped at 1970."""
    return Mc146818(lambda level: None, lambda: 0.0, cast("Any", lambda delay, callback: None), 8 << 20, 1)


def changed(chip: Any, **registers: int | bytes | None) -> state.ChipState:  # noqa: ANN401
    """Return a chip's state with some registers changed, or with None left out."""
    merged = chip.state() | registers
    return saved.chip("chip", **{name: value for name, value in merged.items() if value is not None})


def test_chips_are_restored() -> None:
    """A chip gets the saved registers of another one."""
    ours, theirs = uart(), uart()
    theirs.pio_write(7, 1, 0x5A)
    state._restore_chip(changed(theirs), ours.state(), ours.restore)
    assert ours.pio_read(7, 1) == 0x5A


@pytest.mark.parametrize("registers", [
    {"rx": 1 << 40}, {"rx_errors": -1}, {"lcr": b"x"}, {"lcr": None}, {"rx": bytes(17), "rx_errors": b""},
])  # fmt: skip
def test_impossible_states_of_a_uart_are_refused(registers: dict[str, int | bytes | None]) -> None:
    """One case has a number in place of bytes: bytes() would make as many zeroes of it."""
    with pytest.raises(ValueError, match="chip"):
        state._restore_chip(changed(uart(), **registers), uart().state(), uart().restore)


@pytest.mark.parametrize("registers", [{"ram": 1 << 40}, {"ram": b""}, {"offset_us": 1 << 62}, {"index": b"0"}])
def test_impossible_states_of_a_clock_are_refused(registers: dict[str, int | bytes | None]) -> None:
    """Numbers in place of bytes, bytes in place of numbers and wrong lengths are errors."""
    with pytest.raises(ValueError, match="chip"):
        state._restore_chip(changed(clock(), **registers), clock().state(), clock().restore)


@pytest.mark.parametrize("value", [-1, (1 << 64) - 1, -(1 << 63), 0xFFFF_FFFF])
def test_any_number_is_cut_to_its_register(value: int) -> None:
    """Chips cut the saved numbers to the widths of their registers."""
    chip = uart()
    numbers = {name: value for name, old in chip.state().items() if isinstance(old, int)}
    state._restore_chip(changed(chip, **numbers), chip.state(), chip.restore)
    for offset in range(8):
        assert 0 <= chip.pio_read(offset, 1) <= 0xFF


# --- records ------------------------------------------------------------------------------------------------------


def test_records_are_packed_and_unpacked() -> None:
    """A packed record is unpacked to the same record."""
    assert unpack(MachineState, pack(saved.machine_state())) == saved.machine_state()
    assert unpack(Header, pack(saved.header())) == saved.header()


def test_every_prefix_of_a_record_is_refused() -> None:
    """No prefix of a packed header is a header."""
    raw = pack(saved.header())
    for length in range(len(raw)):
        with pytest.raises(ValueError, match=r"."):
            unpack(Header, raw[:length])


def test_registers_that_a_chip_does_not_have_are_ignored() -> None:
    """A newer vmd may have more registers of a chip."""
    chip = uart()
    state._restore_chip(changed(uart(), scr=7, wheels=4, tyres=b"4"), chip.state(), chip.restore)
    assert chip.pio_read(7, 1) == 7


def test_fields_are_stored_by_name() -> None:
    """Unknown fields are ignored, and missing fields get their default.  Without a default, that is an error."""
    head = DeviceHead(kind="blk", slot=2, features=5, layout=1, serial=b"x")
    fields = head.as_dict()
    assert msgpack.unpackb(pack(head)) == fields
    assert unpack(DeviceHead, msgpack.packb(fields | {"colour": "red"})) == head
    del fields["serial"], fields["layout"]
    assert unpack(DeviceHead, msgpack.packb(fields)) == DeviceHead(kind="blk", slot=2, features=5)
    del fields["slot"]
    with pytest.raises(ValueError, match=r"^DeviceHead: no slot$"):
        unpack(DeviceHead, msgpack.packb(fields))


@pytest.mark.parametrize("values", [b"\x90", b"\xc0", b"\xa0", b"\x01", b"\xc1", b"\x81\x90\x00"])
def test_values_without_names_are_no_record(values: bytes) -> None:
    """The lists of version 2 are an example."""
    with pytest.raises(ValueError, match=r"^DeviceHead: "):
        unpack(DeviceHead, values)


@pytest.mark.parametrize("version", [0, 2, -1])
def test_a_part_of_a_newer_version_is_refused(version: int) -> None:
    """A new version number means that older readers must not read the part."""
    packed = msgpack.packb(msgpack.unpackb(pack(saved.chip("uart", lcr=3))) | {"version": version})
    with pytest.raises(ValueError, match=f"ChipState of version {version}, where this vmd reads 1 to 1"):
        unpack(state.ChipState, packed)


def test_a_layout_of_a_function_that_is_unknown_here_is_refused() -> None:
    """The guest would not find its BARs at the old places."""
    for layout in (LAYOUT_FIRST - 1, LAYOUT + 1):
        devices = (saved.header().devices[0], saved.header().devices[1].replace(layout=layout))
        with pytest.raises(ValueError, match=f"the device in PCI slot 2 has layout {layout}, where this vmd has"):
            state.check_devices(saved.header(devices=devices))


@pytest.mark.parametrize("serial", [b"x" * 21, b"a\nb", b"a\0", b"\xff"])
def test_a_serial_number_that_no_disk_can_have_is_refused(serial: bytes) -> None:
    """A serial number goes into a message of fixed length, and from there to the guest and to the next stream."""
    devices = (saved.header().devices[0], saved.header().devices[1].replace(serial=serial))
    with pytest.raises(ValueError, match="the disk in PCI slot 2 has serial number b'"):
        state.check_devices(saved.header(devices=devices))


def test_a_guest_keeps_layout_and_serial_number_of_its_devices() -> None:
    """Layout and serial number of each device are the sender's, not those of new devices here."""
    heads = (
        DeviceHead(kind="rng", slot=1, features=0, layout=7),
        DeviceHead(kind="blk", slot=2, features=0, layout=1, serial=b"a disk"),
    )
    slots = state.as_sent(plan(Given(config=config(disks=(DISK,)), disks=(DiskImages(images=()),))), heads)
    assert [(slot.layout, slot.serial) for slot in slots] == [(7, b""), (1, b"a disk")]


def test_of_duplicate_registers_the_last_one_counts() -> None:
    """The result is the same as if the registers were written one after another."""
    theirs = changed(uart())
    twice = theirs.replace(registers=(*theirs.registers, Register(name="scr", number=7)))
    chip = uart()
    state._restore_chip(twice, chip.state(), chip.restore)
    assert chip.pio_read(7, 1) == 7


def test_a_state_fits_its_limit() -> None:
    """The limit of a small machine is less than 1 MiB, and with 16 vCPUs it is less than 2 MiB."""
    header = saved.header()
    assert 200 << 10 < state.bytes_max(header) < 1 << 20
    assert state.bytes_max(header.replace(config=config(vcpus=16))) < 2 << 20


def test_eventfds_are_left_as_they_were(device: Device) -> None:
    """Saving reads their state without resetting them."""
    device.process.export = lambda: ([(1, 1), (2, 2)], b"")
    device.start()
    device.function.detach_interrupts()
    os.eventfd_write(device.process.calls[1], 1)

    theirs = device.function.save()

    assert [each.called for each in theirs.queues] == [False, True]
    assert [(each.next_avail, each.next_used) for each in theirs.queues] == [(1, 1), (2, 2)]
    assert os.eventfd_read(device.process.calls[1]) == 1


def test_the_own_state_of_a_device_is_saved(device: Device) -> None:
    """It is saved unchanged, and may not be longer than the limit of a device process."""
    device.process.export = lambda: ([(0, 0), (0, 0)], b"own")
    device.start()

    theirs = device.function.save()

    assert theirs.own == b"own"
    device.function.check_registers(theirs, 0)
    with pytest.raises(ValueError, match="65 bytes of own state of vioblk0"):
        device.function.check_registers(theirs.replace(own=bytes(65)), 0)
