"""The orders in which drivers use the registers of a virtio PCI device, with the expected results.

Each row names the project and the file with this order.  `steps` are its accesses, one word each:

    name=value      write the register in its own width; an address is written as two halves, the lower one first
    name:size=value write `size` bytes
    name?           read the register; if a value follows, the register must have it
    notify=queue    notify the queue
    msix=1          write the enable bit of MSI-X
    table=vector    fill in and unmask an entry of the MSI-X table

Registers have the names of the specification (virtio 1.2, 4.1.4.3 and 4.1.4.10), without `device_` and `queue_` where
that is clear.  Values are hexadecimal, or: F the features that the device offers in this half; DESC0, AVAIL0, USED0 the
parts of queue 0, and PFN0 its page; DESC1 and so on for queue 1; OFF the value that was read of queue_notify_off.

A row for `blk` uses queue 0 only.  It is also run against the process of a disk, which has to serve a request.
"""

from typing import NamedTuple

LEGACY, MODERN, MAPPED = "legacy", "modern", "mapped"  # MAPPED: with 8-byte accesses, which ports do not have

BOTH = (0, 1)


class Order(NamedTuple):
    """The order of one driver."""

    driver: str
    source: str
    interface: str
    steps: str
    queues: tuple[int, ...] = BOTH  # the queues that work afterwards
    sizes: tuple[int, ...] = (256, 64)
    device: str = "any"
    early: bool = False  # the device works before DRIVER_OK
    complaints: tuple[str, ...] = ()


# Pieces that several rows have in common.
OFFERED = "device_feature_select=0 device_feature?F device_feature_select=1 device_feature?1"
ACCEPT = "driver_feature_select=0 driver_feature=0 driver_feature_select=1 driver_feature=1"
HALVES0, HALVES1 = "desc=DESC0 avail=AVAIL0 used=USED0", "desc=DESC1 avail=AVAIL1 used=USED1"
WHOLE0 = "desc:8=DESC0 avail:8=AVAIL0 used:8=USED0"
WHOLE1 = "desc:8=DESC1 avail:8=AVAIL1 used:8=USED1"

ORDERS = [
    Order(
        "Linux", "drivers/virtio/virtio_pci_modern.c", MODERN,
        f"status=0 status?0 status=1 status=3 {OFFERED} {ACCEPT} status=b status?b num_queues?2 "
        f"table=0 table=1 msix=1 config_vector=0 config_vector?0 "
        f"select=0 size?100 enable?0 notify_off? size=100 {HALVES0} vector=1 vector?1 "
        f"select=1 size?40 enable?0 notify_off? size=40 {HALVES1} vector=1 vector?1 "
        "select=0 enable=1 select=1 enable=1 status?b status=f",
    ),
    Order(
        "Linux", "drivers/virtio/virtio_pci_legacy.c", LEGACY,
        "status=0 status?0 status=1 status=3 features?F guest_features=0 "
        "table=0 table=1 msix=1 config_vector=0 config_vector?0 "
        "select=0 size?100 pfn?0 pfn=PFN0 queue_vector=1 queue_vector?1 "
        "select=1 size?40 pfn?0 pfn=PFN1 queue_vector=1 queue_vector?1 status=7",
    ),
    Order(
        "Linux, a driver that is unloaded and comes back", "drivers/virtio/virtio_pci_legacy.c", LEGACY,
        "status=3 select=0 pfn=PFN0 select=1 pfn=PFN1 status=7 status=0 status?0 "
        "select=0 queue_vector=ffff isr? pfn=0 select=1 queue_vector=ffff isr? pfn=0 "
        "status=1 status=3 guest_features=0 select=0 pfn?0 pfn=PFN0 select=1 pfn?0 pfn=PFN1 status=7",
    ),
    Order(
        "Linux, features of 128 bits", "drivers/virtio/virtio_pci_modern_dev.c", MODERN,
        f"status=0 status=1 status=3 {OFFERED} device_feature_select=2 device_feature?0 device_feature_select=3 "
        f"device_feature?0 {ACCEPT} driver_feature_select=2 driver_feature=0 driver_feature_select=3 driver_feature=0 "
        f"status=b status?b select=0 {HALVES0} enable=1 select=1 {HALVES1} enable=1 status=f",
    ),
    Order(
        "SeaBIOS", "src/hw/virtio-pci.c", MODERN,
        f"status=0 isr?0 status=3 {OFFERED} {ACCEPT} status=b status?b select=0 size?100 size=80 size?80 enable?0 "
        f"{HALVES0} enable=1 notify_off?0 status=f notify=0 isr?",
        queues=(0,), sizes=(128, 64), device="blk",
    ),
    Order(
        "SeaBIOS", "src/hw/virtio-blk.c, as of 2010", LEGACY,
        "status=0 isr?0 status=3 select=0 size?100 pfn?0 pfn=PFN0 config:4? features?F status=7 notify=0 isr?",
        queues=(0,), device="blk",
    ),
    Order(
        "iPXE", "src/drivers/net/virtio-net.c", MODERN,
        f"status=0 isr?0 status?0 status=1 status?1 status=3 {OFFERED} config? {OFFERED} {ACCEPT} status?3 status=b "
        f"status?b num_queues?2 select=0 size?100 notify_off? size=100 {HALVES0} select=1 size?40 notify_off? size=40 "
        f"{HALVES1} select=0 enable=1 select=1 enable=1 status=f notify=0 isr?",
    ),
    Order(
        "iPXE, which fills a queue and notifies before it says that it is a driver",
        "src/drivers/net/virtio-net.c", LEGACY,
        "status=0 isr?0 config? status=0 isr?0 select=0 size?100 pfn?0 pfn=PFN0 select=1 size?40 pfn?0 pfn=PFN1 "
        "notify=0 features?F guest_features=0 status=6",
    ),
    Order(
        "OpenBSD", "sys/dev/pci/virtio_pci.c", MODERN,
        f"status=0 status?0 status=1 status=3 {OFFERED} {ACCEPT} status?3 status=b status?b select=0 size?100 "
        f"{HALVES0} "
        f"enable=1 notify_off? select=1 size?40 {HALVES1} enable=1 notify_off? table=0 table=1 table=2 msix=1 "
        "config_vector=0 select=0 vector=1 select=1 vector=2 select=2 vector=3 status?b status=f",
    ),
    Order(
        "OpenBSD, which sets a vector of one queue more than there is", "sys/dev/pci/virtio_pci.c", LEGACY,
        "status=0 status=1 status=2 features?F guest_features=0 select=0 size?100 pfn=PFN0 select=1 size?40 pfn=PFN1 "
        "table=0 table=1 table=2 msix=1 config_vector=0 select=0 queue_vector=1 select=1 queue_vector=2 "
        "select=2 queue_vector=3 status=4",
    ),
    Order(
        "OpenBSD, which takes its vectors away while the device runs", "sys/dev/pci/virtio_pci.c", LEGACY,
        "status=0 status=3 select=0 pfn=PFN0 select=1 pfn=PFN1 msix=1 select=0 queue_vector=0 status=7 "
        "select=0 queue_vector=ffff select=1 queue_vector=ffff msix=0 notify=0 isr?",
    ),
    Order(
        "NetBSD, the upper half of an address first", "sys/dev/pci/virtio_pci.c", MODERN,
        f"status=0 status?0 status=1 status?1 status=3 {OFFERED} {ACCEPT} status?3 status=b status?b "
        "select=0 size?100 desc_hi=0 desc_lo=DESC0 avail_hi=0 avail_lo=AVAIL0 used_hi=0 used_lo=USED0 enable=1 "
        "notify_off? vector=1 select=1 size?40 desc_hi=0 desc_lo=DESC1 avail_hi=0 avail_lo=AVAIL1 used_hi=0 "
        "used_lo=USED1 enable=1 notify_off? vector=1 status?b status=f",
    ),
    Order(
        "NetBSD, which frees the queues of a device that runs", "sys/dev/pci/virtio_pci.c", LEGACY,
        "status=0 status=3 select=0 pfn=PFN0 select=1 pfn=PFN1 status=7 select=0 pfn=0 pfn?0 select=1 pfn=0 pfn?0",
        queues=(),
    ),
    Order(
        "NetBSD, which frees the queues of a device that runs", "sys/dev/pci/virtio_pci.c", MODERN,
        f"status=3 {ACCEPT} status=b select=0 {HALVES0} enable=1 select=1 {HALVES1} enable=1 status=f "
        "select=0 enable=0 desc=0 status=0 status?0",
        queues=(),
        complaints=(
            "writes queue_enable of queue 0 after queue 0 is enabled",
            *["writes an address of queue 0 after queue 0 is enabled"] * 2,
        ),
    ),
    Order(
        "FreeBSD", "sys/dev/virtio/pci/virtio_pci_modern.c", MODERN,
        f"status=0 status?0 status?0 status=1 status?1 status=3 {OFFERED} {ACCEPT} status?3 status=b status?b "
        f"num_queues?2 select=0 size?100 notify_off? size=100 {HALVES0} select=1 size?40 notify_off? size=40 {HALVES1} "
        "table=0 table=1 table=2 msix=1 config_vector=0 config_vector?0 select=0 vector=1 vector?1 select=1 vector=2 "
        "vector?2 select=0 enable=1 select=1 enable=1 status?b status=f config_generation? config:4? "
        "config_generation?",
    ),
    Order(
        "FreeBSD, a second life", "sys/dev/virtio/pci/virtio_pci_modern.c", MODERN,
        f"status=3 {ACCEPT} status=b select=0 {HALVES0} enable=1 select=1 {HALVES1} enable=1 msix=1 status=f "
        f"status=0 status?0 status=1 status=3 {OFFERED} {ACCEPT} status=b status?b "
        f"select=0 enable?0 vector?ffff size=100 {HALVES0} select=1 size=40 {HALVES1} config_vector=0 select=0 "
        "vector=1 "
        "select=1 vector=2 select=0 enable=1 select=1 enable=1 status=f",
    ),
    Order(
        "FreeBSD, which asks a disk for its name while it attaches", "sys/dev/virtio/block/virtio_blk.c, as of 2012",
        LEGACY,
        "status=0 status=1 status=3 features?F guest_features=0 config:4? select=0 size?100 pfn=PFN0 notify=0 isr? "
        "status=7",
        queues=(0,), device="blk", early=True,
    ),
    Order(
        "edk2", "OvmfPkg/VirtioBlkDxe/VirtioBlk.c over OvmfPkg/Virtio10Dxe/Virtio10.c", MODERN,
        f"status=0 status=1 status=3 {OFFERED} config:4? config:4? {ACCEPT} status=b status?b select=0 size?100 "
        "size?100 "
        f"{HALVES0} enable=1 status=f select? select=0 notify_off?OFF select=0 notify=0",
        queues=(0,), device="blk",
    ),
    Order(
        "edk2, features last", "OvmfPkg/VirtioBlkDxe/VirtioBlk.c over OvmfPkg/VirtioPciDeviceDxe", LEGACY,
        "status=0 status=1 status=3 features?F config:1? config:1? select=0 size?100 pfn=PFN0 guest_features=0 "
        "status=7 "
        "notify=0",
        queues=(0,), device="blk",
    ),
    Order(
        "U-Boot", "drivers/virtio/virtio_pci_modern.c", MODERN,
        f"status=0 status?0 status?0 status=1 status?1 status=3 {OFFERED} {ACCEPT} status=b status?b num_queues? "
        f"select=0 size?100 enable?0 size=100 {HALVES0} enable=1 status?b status=f select=0 notify_off?OFF notify=0",
        queues=(0,), device="blk",
    ),
    Order(
        "U-Boot, a device that is removed", "drivers/virtio/virtio_pci_modern.c", MODERN,
        f"status=3 {ACCEPT} status=b select=0 {HALVES0} enable=1 select=1 {HALVES1} enable=1 status=f status=0 "
        "status?0 "
        "select=0 enable=0 select=1 enable=0",
        queues=(),
    ),
    Order(
        "Windows", "VirtIO/VirtIOPCIModern.c", MODERN,
        f"status=0 status?0 status?0 status=1 status?1 status=3 config:4? {OFFERED} {ACCEPT} status=b status?b "
        f"num_queues?2 select=0 size?100 num_queues?2 select=1 size?40 table=0 table=1 msix=1 config_vector=0 "
        f"config_vector?0 select=0 size?100 notify_off? size=100 {HALVES0} vector=1 vector?1 select=1 size?40 size=40 "
        f"{HALVES1} vector=1 vector?1 select=0 enable=1 select=1 enable=1 status?b status=f",
    ),
    Order(
        "virtio-drivers", "src/transport/pci.rs", MAPPED,
        f"status=0 status=3 {OFFERED} {ACCEPT} status=b select=0 enable?0 select=0 size?100 select=0 size=10 {WHOLE0} "
        "enable=1 status=f select=0 notify_off?OFF notify=0 isr?",
        queues=(0,), sizes=(16, 64), device="blk",
    ),
    Order(
        "virtio-drivers, a device that is dropped", "src/transport/pci.rs", MAPPED,
        f"status=0 status=3 {ACCEPT} status=b select=0 size=10 {WHOLE0} enable=1 status=f status=0 status?0",
        queues=(),
    ),
    Order(
        "Hermit, the upper half of the features first", "src/drivers/virtio/transport/pci.rs", MAPPED,
        "status=0 status?0 status=1 status?1 status=3 device_feature_select=1 device_feature?1 device_feature_select=0 "
        "device_feature?F driver_feature_select=1 driver_feature=1 driver_feature_select=0 driver_feature=0 status=b "
        f"status?b select=0 size?100 select=0 size=100 size?100 select=0 {WHOLE0} select=0 notify_off? select=0 "
        "enable=1 "
        f"select=1 size?40 size=40 {WHOLE1} enable=1 select=2 size?0 status=f",
    ),
    Order(
        "Redox", "virtio-core/src/probe.rs", MAPPED,
        f"status=0 status?0 status=1 status?1 status=3 config_vector=0 config_vector?0 {OFFERED} {ACCEPT} status=b "
        f"status?b select=0 size?100 {WHOLE0} vector=1 vector?1 enable=1 notify_off? select=1 size?40 {WHOLE1} "
        "vector=1 "
        "enable=1 notify_off? status=f",
    ),
    Order(
        "9front", "sys/src/9/pc/ethervirtio10.c", MAPPED,
        "status=0 status?0 status=3 device_feature_select=1 device_feature?1 device_feature_select=0 device_feature?F "
        "driver_feature_select=1 driver_feature=1 driver_feature_select=0 driver_feature=0 status?3 status=b "
        f"select=0 size?100 notify_off? {WHOLE0} select=1 size?40 notify_off? {WHOLE1} select=2 size?0 config? "
        "select=0 enable=1 select=1 enable=1 status?b status=f isr? notify=0",
    ),
    Order(
        "9front", "sys/src/9/pc/ethervirtio.c", LEGACY,
        "status=0 status=3 features?F guest_features=0 select=0 size?100 pfn=PFN0 select=1 size?40 pfn=PFN1 "
        "select=2 size?0 config? status?3 status=7",
    ),
    Order(
        "OSv, a vector before the page", "drivers/virtio-pci-device.cc", LEGACY,
        "msix=1 table=0 table=1 status=0 status=1 status=3 features?F guest_features=0 config? select=0 size?100 "
        "queue_vector=0 queue_vector?0 pfn=PFN0 select=1 size?40 queue_vector=1 queue_vector?1 pfn=PFN1 select=2 "
        "size?0 "
        "status=7",
    ),
    Order(
        "OSv, MSI-X before everything", "drivers/virtio-pci-device.cc", MODERN,
        f"msix=1 table=0 table=1 status=0 status=1 status=3 {OFFERED} {ACCEPT} status=b status?b select=0 size?100 "
        f"vector=0 vector?0 notify_off? size=100 {HALVES0} enable=1 select=1 size?40 vector=1 vector?1 notify_off? "
        f"size=40 {HALVES1} enable=1 select=2 size?0 status=f",
    ),
    Order(
        "MINIX, which writes one status bit at a time", "minix/lib/libvirtio/virtio.c", LEGACY,
        "status=0 status=1 features?F guest_features=0 status=2 select=0 size?100 pfn=PFN0 select=1 size?40 pfn=PFN1 "
        "status=4 status?7",
    ),
    Order(
        "Solo5, which notifies before DRIVER_OK and then writes only that", "bindings/virtio/virtio_net.c", LEGACY,
        "status=0 status=1 status=2 features?F guest_features=0 config? select=0 size?100 pfn=PFN0 select=1 size?40 "
        "pfn=PFN1 notify=0 status=4 status?7",
        early=True,
    ),
    Order(
        "Haiku", "src/add-ons/kernel/busses/virtio/virtio_pci/virtio_pci.cpp", LEGACY,
        "status=0 status=1 status?1 status=3 features?F guest_features=0 config:4? table=0 table=1 table=2 msix=1 "
        "config_vector=0 config_vector?0 select=0 queue_vector=1 queue_vector?1 select=1 queue_vector=2 queue_vector?2 "
        "select=0 size?100 select=0 pfn=PFN0 select=1 size?40 select=1 pfn=PFN1 status?3 status=7",
    ),
    Order(
        "Haiku, which writes its features where the device's are",
        "src/add-ons/kernel/busses/virtio/virtio_pci/virtio_pci.cpp", MAPPED,
        "status=0 status=1 status=3 device_feature_select=0 device_feature=0 device_feature_select=1 device_feature=1 "
        f"select=0 {WHOLE0} enable=1 status=7",
        queues=(),
        complaints=(
            *["writes 4 bytes at 4 of the common configuration, where no writable field of this size begins"] * 2,
            "uses the registers of virtio 1.x without VIRTIO_F_VERSION_1: DRIVER_OK is refused",
        ),
    ),
    # The specification allows these orders, and some small kernels use them.
    Order(
        "status all at once", "virtio 1.2, 3.1.1, by a driver that leaves FEATURES_OK out", MODERN,
        f"status=0 {ACCEPT} select=0 {HALVES0} enable=1 select=1 {HALVES1} enable=1 status=7 status?7",
    ),
    Order(
        "queues before features", "virtio 1.2, 4.1.5.1.3 has no order of the two", MODERN,
        f"status=3 select=1 {HALVES1} enable=1 select=0 {HALVES0} enable=1 {ACCEPT} status=b status?b status=f",
    ),
    Order(
        "a queue is enabled twice", "virtio 1.2, 4.1.4.3.2: 1 is what it reads as", MODERN,
        f"status=3 {ACCEPT} status=b select=0 {HALVES0} enable=1 enable=1 enable?1 select=1 {HALVES1} enable=1 "
        "status=f "
        "enable=1",
    ),
    Order(
        "a notification before DRIVER_OK", "virtio 1.2, 3.1.1 forbids it: the ring is looked at when the device starts",
        MODERN,
        f"status=3 {ACCEPT} status=b select=0 {HALVES0} enable=1 notify=0 status=f",
        queues=(0,), device="blk",
    ),
    Order(
        "features after they were accepted", "virtio 1.2, 2.2.1 forbids it", MODERN,
        f"status=3 {ACCEPT} status=b driver_feature_select=0 driver_feature=1 select=0 {HALVES0} enable=1 status=f",
        queues=(0,), device="blk", complaints=("writes its features after it has accepted them",),
    ),
    Order(
        "one queue of several", "virtio 1.2, 3.1.1: a driver discovers those that it uses", LEGACY,
        "status=3 guest_features=0 select=1 pfn=PFN1 status=7",
        queues=(1,),
    ),
    Order(
        "wider accesses than the registers are", "small kernels that know in and out of 32 bits only", LEGACY,
        "status:4=0 status:4?0 status:4=3 guest_features=0 select:2=0 size:4?100 pfn=PFN0 select:2=1 size:4?40 "
        "pfn=PFN1 "
        "status:2=7 status:4?7",
    ),
    Order(
        "narrower accesses than the registers are", "small kernels that read a byte at a time", LEGACY,
        "status=3 select:1=0 size:1?0 pfn=PFN0 pfn:2?PFN0 select:1=1 size:1?40 pfn=PFN1 status=7",
    ),
]
