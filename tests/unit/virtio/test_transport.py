"""The registers of a virtio device, through both interfaces (virtio 1.2, 4.1.4; hostile-input 1, 4-7, 9, 10)."""

from hypothesis import given
from hypothesis import strategies as st

from vmd.virtio import spec
from vmd.virtio.transport import LEGACY_CONFIG, LEGACY_CONFIG_MSIX, QueueRegisters, Transport

FEATURES = 1 << spec.VIRTIO_BLK_F_FLUSH | 1 << spec.VIRTIO_F_RING_EVENT_IDX
LEGACY_ONLY = 1 << spec.VIRTIO_F_NOTIFY_ON_EMPTY | 1 << spec.VIRTIO_F_ANY_LAYOUT
CONFIG = bytes(range(24))


class Backend:
    """Notes what the registers ask for."""

    def __init__(self) -> None:
        self.activated: list[int] = []
        self.resets = 0
        self.isr = 0
        self.config_interrupts = 0
        self.usable = True
        self.written: list[tuple[int, bytes]] = []
        self.complaints: list[str] = []

    def activate(self, features: int, queues: list[QueueRegisters]) -> bool:
        """Note the features in force."""
        self.activated.append(features)
        return self.usable

    def reset(self) -> None:
        """Count."""
        self.resets += 1

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Take everything."""
        self.written.append((offset, data))
        return CONFIG

    def take_isr(self) -> int:
        """Return and clear."""
        taken, self.isr = self.isr, 0
        return taken

    def vectors_changed(self) -> None:
        """Nothing to do."""

    def raise_config(self) -> None:
        """Count."""
        self.config_interrupts += 1

    def complain(self, text: str) -> None:
        """Note."""
        self.complaints.append(text)


def device() -> tuple[Transport, Backend]:
    """Return fresh registers with two queues."""
    backend = Backend()
    return Transport(FEATURES | LEGACY_ONLY, (256, 64), CONFIG, 3, backend), backend


def negotiate(registers: Transport, features: int) -> None:
    """Do what a modern driver does up to FEATURES_OK."""
    registers.common_write(20, 1, spec.ACKNOWLEDGE)
    registers.common_write(20, 1, spec.ACKNOWLEDGE | spec.DRIVER)
    for select in (0, 1):
        registers.common_write(8, 4, select)
        registers.common_write(12, 4, features >> 32 * select & 0xFFFFFFFF)
    registers.common_write(20, 1, spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK)


def test_modern_driver_comes_up() -> None:
    """Features, queue addresses, DRIVER_OK: activated once, with what was accepted."""
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
    """Case 7: FEATURES_OK does not stick, and DRIVER_OK without it activates nothing."""
    for extra in (1 << 40, 1 << spec.VIRTIO_F_NOTIFY_ON_EMPTY, 1 << spec.VIRTIO_F_ANY_LAYOUT):
        features = FEATURES | 1 << spec.VIRTIO_F_VERSION_1 | extra
        registers, backend = device()
        negotiate(registers, features)
        assert not registers.status & spec.FEATURES_OK
        registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
        assert not backend.activated


def test_nothing_that_runs_changes() -> None:
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
    """Case 1."""
    registers, _ = device()
    for size in (0, 3, 512, 0xFFFF):
        registers.common_write(24, 2, size)
        assert registers.common_read(24, 2) == 256


def test_selecting_no_queue_reads_zero_and_writes_nothing() -> None:
    """Case 5."""
    registers, _ = device()
    registers.common_write(22, 2, 99)
    registers.common_write(24, 2, 8)
    registers.common_write(32, 4, 0x1000)
    assert registers.common_read(24, 2) == 0
    assert registers.common_read(26, 2) == spec.VIRTIO_MSI_NO_VECTOR
    assert registers.legacy_read(12, 2) == 0
    assert all(queue.desc == 0 for queue in registers.queues)


def test_legacy_driver_comes_up() -> None:
    """One page number lays out all three parts; features are 32 bits, masked by what was offered."""
    registers, backend = device()
    registers.legacy_write(18, 1, spec.ACKNOWLEDGE | spec.DRIVER)
    registers.legacy_write(4, 4, 0xFFFFFFFF)
    registers.legacy_write(14, 2, 1)
    registers.legacy_write(8, 4, 5)
    registers.legacy_write(18, 1, spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK)
    queue = registers.queues[1]
    assert (queue.desc, queue.avail, queue.used, queue.size) == (0x5000, 0x5400, 0x6000, 64)
    assert backend.activated == [FEATURES | LEGACY_ONLY]


def test_features_of_legacy_drivers_are_not_offered_to_others() -> None:
    """NOTIFY_ON_EMPTY and ANY_LAYOUT show in the legacy registers only (6.3)."""
    registers, _ = device()

    assert registers.legacy_read(0, 4) == FEATURES | LEGACY_ONLY
    assert registers.common_read(4, 4) == FEATURES


def test_device_configuration_moves_while_msix_is_enabled() -> None:
    """The two vectors stand where it began (4.1.4.10)."""
    registers, _ = device()
    assert registers.legacy_read(LEGACY_CONFIG, 4) == int.from_bytes(CONFIG[:4], "little")
    registers.msix_enabled = True
    assert registers.legacy_read(LEGACY_CONFIG_MSIX, 4) == int.from_bytes(CONFIG[:4], "little")
    registers.legacy_write(LEGACY_CONFIG, 2, 2)
    assert registers.legacy_read(LEGACY_CONFIG, 2) == 2
    registers.legacy_write(LEGACY_CONFIG, 2, 3)  # there are three, from 0
    assert registers.legacy_read(LEGACY_CONFIG, 2) == spec.VIRTIO_MSI_NO_VECTOR


def test_reset_forgets_everything() -> None:
    """Status 0: the device lets go of its rings, and registers are as after power-on."""
    registers, backend = device()
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    registers.common_write(20, 1, 0)
    assert (backend.resets, registers.status, registers.active, registers.driver_features) == (1, 0, False, 0)
    registers.common_write(20, 1, 0)
    assert backend.resets == 1  # nothing was active


def test_rings_that_cannot_be_used_ask_for_a_reset() -> None:
    """The device says so in its status and by a configuration interrupt (2.1.2)."""
    registers, backend = device()
    backend.usable = False
    negotiate(registers, 1 << spec.VIRTIO_F_VERSION_1)
    registers.common_write(20, 1, registers.status | spec.DRIVER_OK)
    assert registers.common_read(20, 1) & spec.DEVICE_NEEDS_RESET
    assert backend.config_interrupts == 1


def test_configuration_changes_are_counted() -> None:
    """A driver that reads in pieces sees by the generation that it has to read again."""
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
    """Cases 7, 9, 10: nothing raises; sizes stay powers of two, vectors exist, only DRIVER_OK activates."""
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
