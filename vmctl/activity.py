"""What `vmctl status -v` says that a VM has done and uses, besides its network interfaces."""

from vmctl.output import clean
from vmd.ipc.figures import CdromFigures, DeviceFigures, DiskFigures, EntropyFigures, GroupFigures
from vmd.ipc.messages.figures import VmFigures
from vmd.scaled import fmt_scaled

UNCOUNTED = "not counted: an earlier vmd has started it"


def describe(vm: VmFigures) -> list[str]:
    """Return the lines of a VM; nothing is said of one that does not run, but how often it was started."""
    name = clean(vm.name)
    lines = [f"{name} life: {times(vm.starts, 'start')}, {times(vm.restarts, 'reset')} by its guest"]
    if not vm.pid:
        return lines
    each = ", ".join(f"vcpu{vcpu.index} {seconds(vcpu.cpu_ns)}" for vcpu in vm.vcpus)
    lines.append(f"{name} processor: {seconds(vm.cpu_ns)}, of which {each}")
    memory = f"{fmt_scaled(vm.guest_bytes)} of {fmt_scaled(vm.memory_bytes)} touched"
    lines.append(f"{name} memory: {memory}, and {fmt_scaled(vm.process_bytes)} of its processes")
    if vm.group is not None:
        lines.append(f"{name} control group: {group_words(vm.group)}")
    for disk in vm.disks:
        lines += device_lines(f"{name} disk {disk.index}", disk, disk_lines(disk))
    if vm.cdrom is not None:
        lines += device_lines(f"{name} cdrom", vm.cdrom, [cdrom_words(vm.cdrom)])
    if vm.entropy is not None:
        lines += device_lines(f"{name} entropy", vm.entropy, [entropy_words(vm.entropy)])
    return lines


def device_lines(label: str, device: DeviceFigures, lines: list[str]) -> list[str]:
    """Return the lines of a device; those after the first are indented."""
    first, *rest = lines if device.counted else [UNCOUNTED]
    return [f"{label}: {first}", *(f"    {line}" for line in rest)]


def disk_lines(disk: DiskFigures) -> list[str]:
    """Return what a disk has done, and nothing of what it has not."""
    lines = [fmt_scaled(disk.size_bytes)]
    rows = (
        ("read", disk.read_requests, disk.read_bytes, disk.read_ns),
        ("written", disk.write_requests, disk.write_bytes, disk.write_ns),
        ("flushed", disk.flush_requests, None, disk.flush_ns),
        ("discarded", disk.discard_requests, disk.discard_bytes, disk.discard_ns),
        ("zeroed", disk.zero_requests, disk.zero_bytes, disk.zero_ns),
    )
    for word, requests, length, took_ns in rows:
        if requests:
            moved = "" if length is None else f"{length} bytes, "
            lines.append(f"{word} {times(requests, 'request')}, {moved}{milliseconds(took_ns / requests)} each")
    failed = [f"{count} {word}" for count, word in ((disk.errors, "failed"), (disk.refused, "refused")) if count]
    lines.append(", ".join((f"busy {seconds(disk.busy_ns)}", f"{disk.in_flight} in flight", *failed)))
    return lines


def cdrom_words(cdrom: CdromFigures) -> str:
    """Return what a drive has done."""
    disc = fmt_scaled(cdrom.size_bytes) if cdrom.size_bytes else "no disc"
    words = [disc, times(cdrom.commands, "command"), f"{cdrom.read_bytes} bytes read", f"busy {seconds(cdrom.busy_ns)}"]
    return ", ".join([*words, f"{cdrom.errors} failed"] if cdrom.errors else words)


def entropy_words(entropy: EntropyFigures) -> str:
    """Return what the guest has asked for."""
    words = f"{times(entropy.requests, 'request')}, {entropy.bytes} bytes"
    return f"{words}, delayed {times(entropy.delayed, 'time')}" if entropy.delayed else words


def group_words(group: GroupFigures) -> str:
    """Return what is known of a control group."""
    words = []
    if group.cpu_ns is not None:
        words.append(f"processor {seconds(group.cpu_ns)}")
    if group.throttled:
        words.append(f"throttled {times(group.throttled, 'time')}, for {seconds(group.throttled_ns or 0)}")
    if group.memory_bytes is not None:
        words.append(f"memory {fmt_scaled(group.memory_bytes)}")
    if group.oom_kills:
        words.append(f"{times(group.oom_kills, 'process', 'processes')} killed for want of memory")
    if group.tasks is not None:
        words.append(times(group.tasks, "task"))
    return ", ".join(words) or "nothing is counted"


def times(count: int, word: str, plural: str = "") -> str:
    """Return a number of things."""
    return f"{count} {word if count == 1 else plural or word + 's'}"


def seconds(nanoseconds: int) -> str:
    """Return a time."""
    return f"{nanoseconds / 1e9:.2f} s"


def milliseconds(nanoseconds: float) -> str:
    """Return a short time."""
    return f"{nanoseconds / 1e6:.3f} ms"
