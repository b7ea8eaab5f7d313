"""Reads the records of streams of version 2, which carried fields in order: gives them their names.

The layouts below are a copy of the order in version 2 and do not depend on the present records.  A field that was added
later is missing here and takes its default.  So this module stays as it is when the records change.
"""

VERSION = 2

# The layout of a record is a dict, in order: the name of each field and its layout.
# The layout of a list is a list that has one layout, which is that of each element.
PLAIN = None  # the layout of a value that is neither a record nor a list of records


def _plain(*names: str) -> dict[str, object]:
    return dict.fromkeys(names, PLAIN)


OWNER = _plain("uid", "gid")
PREFIX = _plain("address", "length")
DISK_CONFIG = _plain("path", "format")
NIC_CONFIG = _plain("tap", "switch", "group", "lladdr", "locked", "local", "rdomain", "up")
RIGHTS = {"boot": OWNER, "disks": OWNER, "cdrom": OWNER}
ALLOW_INSTANCE = {"flags": PLAIN, "owner": OWNER}
VM_CONFIG = {
    **_plain("name", "parent", "enabled", "given", "memory_bytes", "vcpus", "kernel", "initrd", "cmdline"),
    "boot_device": PLAIN,
    "disks": [DISK_CONFIG],
    "nics": [NIC_CONFIG],
    "cdrom": PLAIN,
    "owner": OWNER,
    "allow": ALLOW_INSTANCE,
    **_plain("virtio", "sev", "sev_es", "origin", "plan_id"),
    "plan_prefix4": PREFIX,
    "plan_prefix6": PREFIX,
    "rights": RIGHTS,
}
CPUID_LEAF = _plain("function", "index", "flags", "eax", "ebx", "ecx", "edx")
DEVICE_HEAD = _plain("kind", "slot", "features")
HEADER = {
    "config": VM_CONFIG,
    **_plain("one_shot", "firmware_bytes", "touched_bytes", "xsave_bytes", "tsc_khz"),
    "cpuid": [CPUID_LEAF],
    "devices": [DEVICE_HEAD],
}

VCPU = _plain(
    "mp_state", "regs", "sregs", "xsave", "xcrs", "debugregs", "events", "lapic", "msrs", "tsc", "tsc_deadline"
)
CHIP = {"name": PLAIN, "registers": [_plain("name", "number", "data")]}
FUNCTION = _plain("slot", "config", "msix")
QUEUE = _plain(
    "size", "enabled", "desc", "avail", "used", "pfn", "vector", "next_avail", "next_used", "called", "unseen"
)
VIRTIO = {
    **_plain("status", "driver_features", "features_locked", "active", "device_feature_select"),
    **_plain("driver_feature_select", "queue_select", "config_vector", "generation", "config"),
    **_plain("config_pending", "config_called"),
    "queues": [QUEUE],
}
MACHINE = {
    "vcpus": [VCPU],
    **_plain("irqchips", "pit", "kvmclock_ns"),
    "chips": [CHIP],
    "pci_address": PLAIN,
    "functions": [FUNCTION],
    "virtio": [VIRTIO],
    "vmmci": CHIP,
}


def header(values: object) -> object:
    """Return the fields of a header by name.  Raises ValueError."""
    return _by_name(HEADER, values, "Header")


def machine(values: object) -> object:
    """Return the fields of a machine's state by name.  Raises ValueError."""
    return _by_name(MACHINE, values, "MachineState")


def _by_name(layout: object, values: object, where: str) -> object:
    """Return values with the names of a layout.  The records check the values themselves."""
    if layout is PLAIN or values is None:
        return values
    if not isinstance(values, list):
        raise ValueError(f"{where}: {type(values).__name__} is not a list")
    if isinstance(layout, list):
        return [_by_name(layout[0], each, where) for each in values]
    assert isinstance(layout, dict)
    if len(values) != len(layout):
        raise ValueError(f"{where}: wrong number of fields")
    return {
        name: _by_name(inner, value, f"{where}.{name}")
        for (name, inner), value in zip(layout.items(), values, strict=True)
    }
