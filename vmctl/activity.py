"""The figures of a VM that `vmctl status -v` shows, except those of its network interfaces."""

from vmctl.output import clean
from vmd.ipc.figures import (
    CdromFigures,
    DeviceFigures,
    DiskFigures,
    EntropyFigures,
    GroupFigures,
    LimitFigures,
    NicFigures,
)
from vmd.ipc.messages.figures import VmFigures
from vmd.scaled import fmt_scaled

UNCOUNTED = "not counted: started by an earlier vmd"


def describe(vm: VmFigures) -> list[str]:
    """Return the lines of a VM.  One that does not run only has the line about its starts."""
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
    limits = limit_words(vm.limit)
    if limits:
        lines.append(f"{name} limits: {limits}")
    for disk in vm.disks:
        lines += device_lines(f"{name} disk {disk.index}", disk, disk_lines(disk))
    if vm.cdrom is not None:
        lines += device_lines(f"{name} cdrom", vm.cdrom, [cdrom_words(vm.cdrom)])
    if vm.entropy is not None:
        lines += device_lines(f"{name} entropy", vm.entropy, [entropy_words(vm.entropy)])
    for nic in vm.nics:
        words = nic_limit_words(nic)
        if words:
            lines.append(f"{name} interface {nic.index} limit: {words}")
    return lines


def device_lines(label: str, device: DeviceFigures, lines: list[str]) -> list[str]:
    """Return the lines of a device; those after the first are indented."""
    first, *rest = lines if device.counted else [UNCOUNTED]
    return [f"{label}: {first}", *(f"    {line}" for line in rest)]


def disk_lines(disk: DiskFigures) -> list[str]:
    """Return the figures of a disk, without those that are 0."""
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
    limits = [times(disk.iops_limit, "request")] if disk.iops_limit else []
    limits += [fmt_scaled(disk.rate_limit)] if disk.rate_limit else []
    waited = throttled_words(disk.throttled, disk.throttled_ns)
    if limits:
        lines.append(f"limited to {' and '.join(limits)} each second{f', {waited}' if waited else ''}")
    elif waited:
        lines.append(waited)
    failed = [f"{count} {word}" for count, word in ((disk.errors, "failed"), (disk.refused, "refused")) if count]
    lines.append(", ".join((f"busy {seconds(disk.busy_ns)}", f"{disk.in_flight} in flight", *failed)))
    return lines


def cdrom_words(cdrom: CdromFigures) -> str:
    """Return the figures of a CD drive."""
    disc = fmt_scaled(cdrom.size_bytes) if cdrom.size_bytes else "no disc"
    words = [disc, times(cdrom.commands, "command"), f"{cdrom.read_bytes} bytes read", f"busy {seconds(cdrom.busy_ns)}"]
    return ", ".join([*words, f"{cdrom.errors} failed"] if cdrom.errors else words)


def entropy_words(entropy: EntropyFigures) -> str:
    """Return the figures of the entropy device."""
    words = f"{times(entropy.requests, 'request')}, {entropy.bytes} bytes"
    return f"{words}, delayed {times(entropy.delayed, 'time')}" if entropy.delayed else words


def nic_limit_words(nic: NicFigures) -> str:
    """Return the limit of an interface, and how often frames have waited for it; "" without either."""
    words = [f"{fmt_scaled(nic.rate_limit)} each second"] if nic.rate_limit else []
    ways = (("received", nic.rx_throttled, nic.rx_throttled_ns), ("sent", nic.tx_throttled, nic.tx_throttled_ns))
    words += [f"{way} {throttled_words(count, waited_ns)}" for way, count, waited_ns in ways if count]
    return ", ".join(words)


def limit_words(limit: LimitFigures) -> str:
    """Return the limits of a control group."""
    words = [f"memory {fmt_scaled(limit.memory_bytes)}"] if limit.memory_bytes else []
    words += [f"processor {limit.cpu_percent}%"] if limit.cpu_percent else []
    return ", ".join([*words, f"weight {limit.weight}"] if limit.weight else words)


def throttled_words(count: int, waited_ns: int) -> str:
    """Return how often and how long something had to wait for a limit; "" if it never had to."""
    return f"throttled {times(count, 'time')}, for {seconds(waited_ns)}" if count else ""


def group_words(group: GroupFigures) -> str:
    """Return the figures of a control group."""
    words = []
    if group.cpu_ns is not None:
        words.append(f"processor {seconds(group.cpu_ns)}")
    if group.throttled:
        words.append(throttled_words(group.throttled, group.throttled_ns or 0))
    if group.memory_bytes is not None:
        words.append(f"memory {fmt_scaled(group.memory_bytes)}")
    if group.oom_kills:
        words.append(f"{times(group.oom_kills, 'process', 'processes')} killed because memory ran out")
    if group.tasks is not None:
        words.append(times(group.tasks, "task"))
    return ", ".join(words) or "nothing is counted"


def times(count: int, word: str, plural: str = "") -> str:
    """Return a count with its noun."""
    return f"{count} {word if count == 1 else plural or word + 's'}"


def seconds(nanoseconds: int) -> str:
    """Return a time."""
    return f"{nanoseconds / 1e9:.2f} s"


def milliseconds(nanoseconds: float) -> str:
    """Return a short time."""
    return f"{nanoseconds / 1e6:.3f} ms"
