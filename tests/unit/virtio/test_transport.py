"""The registers of a virtio device, through both interfaces (virtio 1.2, 4.1.4; hostile-input 1, 4-7, 9, 10)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.virtio import spec
from vmd.virtio.transport import LEGACY_CONFIG, LEGACY_CONFIG_MSIX, QueueRegisters, Transport

FEATURES = 1 << spec.VIRTIO_BLK_F_FLUSH | 1 << spec.VIRTIO_F_RING_EVENT_IDX
LEGACY_ONLY = 1 << spec.VIRTIO_F_NOTIFY_ON_EMPTY | 1 << spec.VIRTIO_F_ANY_LAYOUT
CONFIG = bytes(range(24))


class Backend:
    """A backend that records the calls of the registers."""

    def __init__(self) -> None:
        self.activated: list[int] = []
        self.resets = 0
        self.vector_changes = 0
        self.isr = 0
        self.config_interrupts = 0
        self.usable = True
        self.written: list[tuple[int, bytes]] = []
        self.complaints: list[str] = []

    def activate(self, features: int, queues: list[QueueRegisters]) -> bool:
        """Record the features."""
        self.activated.append(features)
        return self.usable

    def reset(self) -> None:
        """Count a reset."""
        self.resets += 1

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Record the write."""
        self.written.append((offset, data))
        return CONFIG

    def take_isr(self) -> int:
        """Return ISR, and clear it."""
        taken, self.isr = self.isr, 0
        return taken

    def vectors_changed(self) -> None:
        """Count a change."""
        self.vector_changes += 1

    def raise_config(self) -> None:
        """Count an interrupt."""
        self.config_interrupts += 1

    def complain(self, text: str) -> None:
        """Record a complaint."""
        self.complaints.append(text)


def device() -> tuple[Transport, Backend]:
    """Return new registers with two queues, and their backend."""
    backend = Backend()
    return Transport(FEATURES | LEGACY_ONLY, (256, 64), CONFIG, 3, backend), backend


def negotiate(registers: Transport, features: int) -> None:
    """Write the registers as a modern driver does up to FEATURES_OK."""
    registers.common_write(20, 1, spec.ACKNOWLEDGE)
    registers.common_write(20, 1, spec.ACKNOWLEDGE | spec.DRIVER)
    for select in (0, 1):
        registers.common_write(8, 4, select)
        registers.common_write(12, 4, features >> 32 * select & 0xFFFFFFFF)
    registers.common_write(20, 1, spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK)


def test_modern_driver_starts() -> None:
    """After features, queue addresses and DRIVER_OK, the device is activated once, with the accepted features."""
    registers, backend = device()
    wanted = 1 << spec.VIRTIO_F_VERSION_1 | FEATURES
    negotiate(registers, wanted)
    assert registers.common_read(20, 1) & spec.FEATURES_OK
    registers.common_write(22, 2, 1)
    registers.common_write(24, 2, 32)
    for offset, half in ((32, 0x1000), (36, 1), (40, 0x2000), (48, 0x3000)):
        registers.common_write(offset, 4, half)
    registers.common_write(28, 2, 1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)

    queue = registers.queues[1]
    assert (queue.size, queue.desc, queue.avail, queue.used, queue.enabled) == (32, 0x100001000, 0x2000, 0x3000, True)
    assert backend.activated == [wanted]


def test_features_that_were_not_offered_are_refused() -> None:
    """Case 7: FEATURES_OK stays clear, and DRIVER_OK without it activates nothing."""
    for extra in (1 << 40, 1 << spec.VIRTIO_F_NOTIFY_ON_EMPTY, 1 << spec.VIRTIO_F_ANY_LAYOUT):
        features = FEATURES | 1 << spec.VIRTIO_F_VERSION_1 | extra
        registers, backend = device()
        negotiate(registers, features)
        assert not registers.status & spec.FEATURES_OK
        registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
        assert not backend.activated


def test_a_running_device_ignores_changes() -> None:
    """Case 4: sizes, addresses, PFNs and features written after DRIVER_OK are ignored."""
    registers, _ = device()
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    for offset, size, value in ((24, 2, 8), (28, 2, 1), (32, 4, 0x5000), (12, 4, 1)):
        registers.common_write(offset, size, value)
    registers.legacy_write(8, 4, 7)
    registers.legacy_write(4, 4, FEATURES)
    queue = registers.queues[0]
    assert (queue.size, queue.enabled, queue.desc, queue.pfn) == (256, False, 0, 0)
    assert registers.driver_features == 1 << spec.VIRTIO_F_VERSION_1


def test_sizes_that_are_no_power_of_two_are_ignored() -> None:
    """Case 1: the old size stays."""
    registers, _ = device()
    for size in (0, 3, 512, 0xFFFF):
        registers.common_write(24, 2, size)
        assert registers.common_read(24, 2) == 256


def test_selecting_no_queue_reads_zero_and_writes_nothing() -> None:
    """Case 5: the selected queue does not exist."""
    registers, _ = device()
    registers.common_write(22, 2, 99)
    registers.common_write(24, 2, 8)
    registers.common_write(32, 4, 0x1000)
    assert registers.common_read(24, 2) == 0
    assert registers.common_read(26, 2) == spec.VIRTIO_MSI_NO_VECTOR
    assert registers.legacy_read(12, 2) == 0
    assert all(queue.desc == 0 for queue in registers.queues)


def test_legacy_driver_starts() -> None:
    """One page number gives the places of all parts.  Only offered features are accepted, of 32 bits."""
    registers, backend = device()
    registers.legacy_write(18, 1, spec.ACKNOWLEDGE | spec.DRIVER)
    registers.legacy_write(4, 4, 0xFFFFFFFF)
    registers.legacy_write(14, 2, 1)
    registers.legacy_write(8, 4, 5)
    registers.legacy_write(18, 1, spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK)
    queue = registers.queues[1]
    assert (queue.desc, queue.avail, queue.used, queue.size) == (0x5000, 0x5400, 0x6000, 64)
    assert backend.activated == [FEATURES | LEGACY_ONLY]


def test_legacy_features_are_offered_to_legacy_drivers_only() -> None:
    """NOTIFY_ON_EMPTY and ANY_LAYOUT are only in the legacy registers (6.3)."""
    registers, _ = device()

    assert registers.legacy_read(0, 4) == FEATURES | LEGACY_ONLY
    assert registers.common_read(4, 4) == FEATURES


def test_device_configuration_moves_while_msix_is_enabled() -> None:
    """The two vectors take its first place (4.1.4.10)."""
    registers, _ = device()
    assert registers.legacy_read(LEGACY_CONFIG, 4) == int.from_bytes(CONFIG[:4], "little")
    registers.msix_enabled = True
    assert registers.legacy_read(LEGACY_CONFIG_MSIX, 4) == int.from_bytes(CONFIG[:4], "little")
    registers.legacy_write(LEGACY_CONFIG, 2, 2)
    assert registers.legacy_read(LEGACY_CONFIG, 2) == 2
    registers.legacy_write(LEGACY_CONFIG, 2, 3)  # the vectors are 0, 1 and 2
    assert registers.legacy_read(LEGACY_CONFIG, 2) == spec.VIRTIO_MSI_NO_VECTOR


def test_reset_clears_everything() -> None:
    """After status 0 the device has released its rings, and registers are as after power-on."""
    registers, backend = device()
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    registers.common_write(20, 1, 0)
    assert (backend.resets, registers.status, registers.active, registers.driver_features) == (1, 0, False, 0)
    registers.common_write(20, 1, 0)
    assert backend.resets == 1  # the device was not active


def test_rings_that_cannot_be_used_ask_for_a_reset() -> None:
    """The status has the request, and the driver gets a configuration interrupt (2.1.2)."""
    registers, backend = device()
    backend.usable = False
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    assert registers.common_read(20, 1) & spec.DEVICE_NEEDS_RESET
    assert backend.config_interrupts == 1


def test_configuration_changes_are_counted() -> None:
    """The generation tells a driver that reads in pieces that it has to read again."""
    registers, _ = device()
    before = registers.common_read(21, 1)
    registers.config_changed(bytes(24))
    assert registers.common_read(21, 1) == before + 1
    assert registers.read_config(0, 4) == 0
    assert registers.read_config(1000, 4) == 0


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(("common", "legacy")), st.integers(0, 0x7F), st.sampled_from((1, 2, 4)), st.integers(0, 1 << 32)
    ),
    max_size=60,
)


@given(ACCESSES)
def test_random_accesses_keep_the_invariants(accesses: list[tuple[str, int, int, int]]) -> None:
    """Cases 7, 9, 10: no access raises, sizes are powers of two, vectors exist, and only DRIVER_OK activates."""
    registers, _ = device()
    for interface, offset, size, value in accesses:
        value &= (1 << 8 * size) - 1
        if interface == "common":
            registers.common_write(offset, size, value)
            assert 0 <= registers.common_read(offset, size) < 1 << 8 * size
        else:
            registers.legacy_write(offset, size, value)
            assert 0 <= registers.legacy_read(offset, size) < 1 << 32
        for queue in registers.queues:
            assert 0 < queue.size <= queue.max_size
            assert queue.size & queue.size - 1 == 0
            assert queue.vector in (0, 1, 2, spec.VIRTIO_MSI_NO_VECTOR)
        if not registers.status & spec.DRIVER_OK:
            assert not registers.active


# --- each register -------------------------------------------------------------------------------------------------

# Of `common`: field, offset, size, value after power-on, a value to write (None: read-only), and the value then.
COMMON_FIELDS = [
    ("device_feature_select", 0, 4, 0, 1, 1),
    ("device_feature", 4, 4, FEATURES, None, FEATURES),
    ("driver_feature_select", 8, 4, 0, 1, 1),
    ("driver_feature", 12, 4, 0, FEATURES, FEATURES),
    ("config_msix_vector", 16, 2, spec.VIRTIO_MSI_NO_VECTOR, 2, 2),
    ("num_queues", 18, 2, 2, None, 2),
    ("device_status", 20, 1, 0, spec.ACKNOWLEDGE, spec.ACKNOWLEDGE),
    ("config_generation", 21, 1, 0, None, 0),
    ("queue_select", 22, 2, 0, 1, 1),
    ("queue_size", 24, 2, 256, 128, 128),
    ("queue_msix_vector", 26, 2, spec.VIRTIO_MSI_NO_VECTOR, 1, 1),
    ("queue_enable", 28, 2, 0, 1, 1),
    ("queue_notify_off", 30, 2, 0, None, 0),
    ("queue_desc", 32, 8, 0, 0x1_2345_6000, 0x1_2345_6000),
    ("queue_driver", 40, 8, 0, 0x1_2345_7000, 0x1_2345_7000),
    ("queue_device", 48, 8, 0, 0x1_2345_8000, 0x1_2345_8000),
    ("queue_notify_data", 56, 2, 0, None, 0),
    ("queue_reset", 58, 2, 0, None, 0),
]


@pytest.mark.parametrize(
    ("offset", "size", "first", "value", "then"),
    [field[1:] for field in COMMON_FIELDS],
    ids=[f[0] for f in COMMON_FIELDS],
)
def test_field_of_the_common_configuration(offset: int, size: int, first: int, value: int | None, then: int) -> None:
    """A field has its values after power-on, a write and a reset (4.1.4.3).  A write to a read-only field is logged."""
    registers, backend = device()
    assert registers.common_read(offset, size) == first
    others = {at: registers.common_read(at, width) for _, at, width, *_ in COMMON_FIELDS if at != offset}

    registers.common_write(offset, size, 3 if value is None else value)

    assert registers.common_read(offset, size) == then
    for at in range(size):  # each byte can be read alone
        assert registers.common_read(offset + at, 1) == then >> 8 * at & 0xFF
    assert len(backend.complaints) == (value is None)
    if "select" not in COMMON_FIELDS[[field[1] for field in COMMON_FIELDS].index(offset)][0]:
        assert others == {at: registers.common_read(at, width) for _, at, width, *_ in COMMON_FIELDS if at != offset}
    registers.common_write(20, 1, 0)
    assert registers.common_read(offset, size) == first


def test_absent_queues_and_feature_words_read_as_zero() -> None:
    """Both selectors accept any value."""
    registers, _ = device()
    for select, features in ((0, FEATURES), (1, 1 << spec.VIRTIO_F_VERSION_1 - 32), (2, 0), (0xFFFFFFFF, 0)):
        registers.common_write(0, 4, select)
        assert registers.common_read(4, 4) == features
    registers.common_write(22, 2, 2)
    assert [registers.common_read(at, size) for at, size in ((24, 2), (26, 2), (28, 2), (30, 2))] == [
        0, spec.VIRTIO_MSI_NO_VECTOR, 0, 0,
    ]  # fmt: skip
    assert [registers.common_read(at, 8) for at in (32, 40, 48)] == [0, 0, 0]
    assert [registers.legacy_read(at, size) for at, size in ((8, 4), (12, 2))] == [0, 0]
    for at, size in ((24, 2), (26, 2), (28, 2), (32, 8)):
        registers.common_write(at, size, 1)
    registers.legacy_write(8, 4, 5)
    assert [(queue.size, queue.vector, queue.enabled, queue.desc, queue.pfn) for queue in registers.queues] == [
        (256, spec.VIRTIO_MSI_NO_VECTOR, False, 0, 0), (64, spec.VIRTIO_MSI_NO_VECTOR, False, 0, 0),
    ]  # fmt: skip


def test_driver_features_are_written_in_two_halves() -> None:
    """Each write replaces one half.  With other selectors the write is ignored (4.1.4.3)."""
    registers, _ = device()
    for select, value in ((0, 0xFFFF0000), (1, 0xAAAA5555), (0, 0x1234), (2, 0x7777), (3, 0x7777)):
        registers.common_write(8, 4, select)
        registers.common_write(12, 4, value)
    assert registers.driver_features == 0xAAAA5555_00001234
    for select, half in ((0, 0x1234), (1, 0xAAAA5555), (2, 0)):
        registers.common_write(8, 4, select)
        assert registers.common_read(12, 4) == half


def test_addresses_may_be_written_whole_or_in_halves() -> None:
    """The order is free, and each access changes its own part."""
    registers, _ = device()
    queue = registers.queues[0]
    for offset, name in ((32, "desc"), (40, "avail"), (48, "used")):
        registers.common_write(offset, 8, 0x1111_2222_3333_4444)
        registers.common_write(offset + 4, 4, 0x5555_6666)
        assert getattr(queue, name) == 0x5555_6666_3333_4444
        registers.common_write(offset, 4, 0x7777_8888)
        assert getattr(queue, name) == 0x5555_6666_7777_8888


def test_queues_with_their_own_notification_addresses() -> None:
    """4.1.4.4: each queue has its own offset then."""
    registers = Transport(FEATURES, (256, 64), CONFIG, 3, Backend(), separate_notify=True)
    found = []
    for queue in range(3):
        registers.common_write(22, 2, queue)
        found.append(registers.common_read(30, 2))
    assert found == [0, 1, 0]


def test_an_enabled_queue_does_not_change() -> None:
    """It does not change until a reset.  To enable it again is accepted without a complaint."""
    registers, backend = device()
    registers.common_write(24, 2, 64)
    registers.common_write(28, 2, 2)
    assert registers.common_read(28, 2) == 0
    registers.common_write(28, 2, 1)
    registers.common_write(28, 2, 1)
    assert backend.complaints == []
    registers.common_write(24, 2, 32)
    registers.common_write(28, 2, 0)
    registers.common_write(32, 8, 0x1000)
    registers.common_write(22, 2, 1)
    registers.common_write(24, 2, 32)  # the other queue is not enabled
    assert [(queue.size, queue.enabled, queue.desc) for queue in registers.queues] == [(64, True, 0), (32, False, 0)]
    assert len(backend.complaints) == 3


@pytest.mark.parametrize(
    ("size", "good"), [(1, True), (2, True), (256, True), (0, False), (3, False), (257, False), (512, False)]
)
def test_sizes_of_a_queue(size: int, good: bool) -> None:
    """Sizes are powers of two up to the offered size."""
    registers, backend = device()
    registers.common_write(24, 2, size)
    assert registers.common_read(24, 2) == (size if good else 256)
    assert len(backend.complaints) == (not good)


@pytest.mark.parametrize(("vector", "kept"), [(0, 0), (2, 2), (3, 0xFFFF), (0xFFFE, 0xFFFF), (0xFFFF, 0xFFFF)])
def test_vectors(vector: int, kept: int) -> None:
    """There are three vectors.  The backend is told of each write through both interfaces (4.1.5.1.2)."""
    registers, backend = device()
    registers.msix_enabled = True
    registers.common_write(16, 2, vector)
    registers.common_write(26, 2, vector)
    assert (registers.config_vector, registers.queues[0].vector, backend.vector_changes) == (kept, kept, 2)
    registers.legacy_write(20, 2, vector)
    registers.legacy_write(14, 2, 1)
    registers.legacy_write(22, 2, vector)
    assert (registers.legacy_read(20, 2), registers.legacy_read(22, 2), backend.vector_changes) == (kept, kept, 4)
    registers.legacy_write(14, 2, 2)
    registers.legacy_write(22, 2, vector)
    assert (registers.legacy_read(22, 2), backend.vector_changes) == (0xFFFF, 4)


# Of the legacy block: field, offset, size, value after power-on, a value to write (None: read-only), the value then.
LEGACY_FIELDS = [
    ("device_features", 0, 4, FEATURES | LEGACY_ONLY, None, FEATURES | LEGACY_ONLY),
    ("driver_features", 4, 4, 0, FEATURES, FEATURES),
    ("queue_address", 8, 4, 0, 0x12345, 0x12345),
    ("queue_size", 12, 2, 256, None, 256),
    ("queue_select", 14, 2, 0, 1, 1),
    ("device_status", 18, 1, 0, spec.ACKNOWLEDGE, spec.ACKNOWLEDGE),
    ("config_msix_vector", 20, 2, spec.VIRTIO_MSI_NO_VECTOR, 2, 2),
    ("queue_msix_vector", 22, 2, spec.VIRTIO_MSI_NO_VECTOR, 1, 1),
]


@pytest.mark.parametrize(
    ("offset", "size", "first", "value", "then"),
    [field[1:] for field in LEGACY_FIELDS],
    ids=[f[0] for f in LEGACY_FIELDS],
)
def test_register_of_the_legacy_block(offset: int, size: int, first: int, value: int | None, then: int) -> None:
    """A register has its values after power-on, a write and a reset (4.1.4.10), in accesses of any width."""
    registers, backend = device()
    registers.msix_enabled = True
    assert registers.legacy_read(offset, size) == first

    registers.legacy_write(offset, 4, 0xFFFF0000 << 8 * size & 0xFFFFFFFF | (3 if value is None else value))

    for width in (1, 2, 4):
        assert registers.legacy_read(offset, width) == then & (1 << 8 * min(width, size)) - 1
    for at in range(size):
        assert registers.legacy_read(offset + at, 1) == then >> 8 * at & 0xFF
    assert len(backend.complaints) == (value is None)
    registers.legacy_write(18, 1, 0)
    assert registers.legacy_read(offset, size) == first


def test_a_read_clears_the_interrupt_status() -> None:
    """A read of its byte or a reset clears it.  The notification register reads as zero."""
    registers, backend = device()
    backend.isr = 3
    assert registers.legacy_read(16, 2) == 0
    assert [registers.legacy_read(19, 1), registers.legacy_read(19, 1)] == [3, 0]
    backend.isr = 1
    registers.legacy_write(18, 1, 0)
    assert backend.isr == 0


@pytest.mark.parametrize(
    ("size", "avail", "used"), [(1, 0x7010, 0x8000), (64, 0x7400, 0x8000), (128, 0x7800, 0x8000), (256, 0x8000, 0x9000)]
)
def test_parts_of_a_legacy_queue(size: int, avail: int, used: int) -> None:
    """The available ring with its event index follows the table, and the used ring is in the next page (2.7.2)."""
    queue = QueueRegisters(size)
    queue.set_pfn(7)
    assert (queue.desc, queue.avail, queue.used, queue.enabled) == (0x7000, avail, used, True)
    queue.set_pfn(0)
    assert not queue.enabled


# --- steps ---------------------------------------------------------------------------------------------------------


def test_a_legacy_driver_that_notifies_early() -> None:
    """It starts the device if its queue has a page and the status has DRIVER.  Otherwise nothing happens."""
    registers, backend = device()
    registers.legacy_notify(0)
    registers.legacy_write(8, 4, 5)
    registers.legacy_notify(0)
    registers.legacy_write(18, 1, spec.ACKNOWLEDGE)
    registers.legacy_notify(0)
    registers.legacy_write(18, 1, spec.ACKNOWLEDGE | spec.DRIVER)
    for queue in (1, 2, 99):
        registers.legacy_notify(queue)
    assert backend.activated == []

    registers.legacy_notify(0)
    registers.legacy_notify(0)
    registers.legacy_write(18, 1, spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK)

    assert backend.activated == [0]
    registers.legacy_write(4, 4, FEATURES)
    registers.legacy_write(14, 2, 1)
    registers.legacy_write(8, 4, 6)
    assert len(backend.complaints) == 2


def test_a_legacy_driver_takes_a_queue_back() -> None:
    """A page number of 0 resets a running device.  For a queue without a page it is refused."""
    registers, backend = device()
    registers.legacy_write(8, 4, 5)
    registers.legacy_write(8, 4, 0)
    assert (registers.queues[0].enabled, backend.resets) == (False, 0)
    registers.legacy_write(8, 4, 5)
    registers.legacy_write(18, 1, spec.DRIVER | spec.DRIVER_OK)
    registers.legacy_write(14, 2, 1)
    registers.legacy_write(8, 4, 0)
    assert (backend.resets, registers.active) == (0, True)
    registers.legacy_write(14, 2, 0)
    registers.legacy_write(8, 4, 0)
    assert (backend.resets, registers.active, registers.status) == (1, False, 0)


def test_a_modern_driver_that_skips_features_ok() -> None:
    """DRIVER_OK alone accepts its features, if they are allowed.  Otherwise the device does not start."""
    registers, backend = device()
    registers.common_write(8, 4, 1)
    registers.common_write(12, 4, 1)
    registers.common_write(20, 1, spec.DRIVER | spec.DRIVER_OK)
    assert (registers.status, len(backend.activated)) == (spec.DRIVER | spec.DRIVER_OK, 1)

    registers, backend = device()
    registers.common_write(20, 1, spec.DRIVER | spec.DRIVER_OK)
    assert (registers.status, registers.active, backend.activated) == (spec.DRIVER, False, [])
    assert len(backend.complaints) == 1


def test_refused_features_may_be_written_again() -> None:
    """Only FEATURES_OK locks them, through either interface."""
    registers, backend = device()
    negotiate(registers, 1 << 40)
    assert len(backend.complaints) == 1
    assert "0x10000000000" in backend.complaints[0]
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    assert registers.status & spec.FEATURES_OK
    registers.common_write(12, 4, 3)
    assert registers.driver_features == 1 << spec.VIRTIO_F_VERSION_1
    assert len(backend.complaints) == 2

    registers, _ = device()
    registers.legacy_write(18, 1, spec.DRIVER | spec.FEATURES_OK)
    assert registers.status == spec.DRIVER | spec.FEATURES_OK
    registers.legacy_write(4, 4, FEATURES)
    assert registers.driver_features == 0


def test_status_bits_are_only_added() -> None:
    """Only a reset clears them.  The driver cannot set DEVICE_NEEDS_RESET, nor bits above the register."""
    registers, backend = device()
    registers.write_status(0x100 | spec.ACKNOWLEDGE, modern=True)
    registers.write_status(spec.DRIVER | spec.DEVICE_NEEDS_RESET, modern=True)
    assert registers.status == spec.ACKNOWLEDGE | spec.DRIVER
    registers.write_status(0x100, modern=True)
    assert registers.status == 0
    registers.needs_reset()
    assert (registers.status, backend.config_interrupts) == (spec.DEVICE_NEEDS_RESET, 0)


def test_running_drivers_are_told_of_configuration_changes() -> None:
    """The generation is a byte that wraps."""
    registers, backend = device()
    for _ in range(257):
        registers.config_changed(CONFIG)
    assert (registers.common_read(21, 1), backend.config_interrupts) == (1, 0)
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    registers.config_changed(CONFIG)
    assert backend.config_interrupts == 1


def test_writes_to_configuration_must_be_inside() -> None:
    """Writes count up to its last byte.  They are checked when the device starts, and a reset undoes them."""
    registers, backend = device()
    registers.write_config(22, 2, 0x1234)
    registers.write_config(23, 2, 0x1234)
    registers.write_config(24, 1, 0)
    assert backend.written == [(22, b"\x34\x12")]
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    assert backend.written[1:] == [(0, b"")]
    registers.common_write(20, 1, 0)
    assert (backend.resets, backend.written[2:]) == (1, [(0, b"")])
    registers.common_write(20, 1, 0)
    assert (backend.resets, backend.written[3:]) == (1, [])


def test_a_reset_undoes_writes_before_a_start() -> None:
    """The reset reaches the device even if no ring was used."""
    registers, backend = device()
    registers.write_config(0, 1, 1)
    registers.common_write(20, 1, 0)
    assert (backend.resets, backend.written[1:], backend.vector_changes) == (1, [(0, b"")], 1)
