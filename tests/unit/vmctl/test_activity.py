"""What `vmctl status -v` says that VMs have done, byte for byte."""

from vmctl.activity import describe
from vmd.ipc.figures import CdromFigures, DiskFigures, EntropyFigures, GroupFigures, VcpuFigures
from vmd.ipc.messages.figures import VmFigures

STOPPED = VmFigures(
    vmid=1, name="a", uid=0, state="stopped", starts=1, disks=(DiskFigures(index=0),), vcpus=(VcpuFigures(index=0),)
)
DISK = DiskFigures(
    index=0, counted=True, size_bytes=1 << 30, read_requests=2, read_bytes=1024, read_ns=3_000_000,
    flush_requests=1, flush_ns=500_000, busy_ns=1_230_000_000, in_flight=1, errors=2, refused=3,
)  # fmt: skip
RUNNING = STOPPED.replace(
    state="running", starts=2, restarts=1, pid=7, memory_bytes=1 << 30, guest_bytes=1 << 29, process_bytes=24 << 20,
    cpu_ns=2_000_000_000, vcpus=(VcpuFigures(index=0, cpu_ns=1_500_000_000), VcpuFigures(index=1)),
    disks=(DISK, DiskFigures(index=1)), cdrom=CdromFigures(index=0, counted=True, commands=1, errors=1),
    entropy=EntropyFigures(index=0, counted=True, requests=2, bytes=64, delayed=1),
    group=GroupFigures(cpu_ns=5_000_000_000, throttled=2, throttled_ns=10_000_000, memory_bytes=1 << 20, oom_kills=1),
)  # fmt: skip


def test_one_that_does_not_run() -> None:
    """There is nothing to say but how often it was started."""
    assert describe(STOPPED) == ["a life: 1 start, 0 resets by its guest"]


def test_one_that_runs() -> None:
    """What has not happened is not said; nor is what nobody has counted, but for that."""
    assert describe(RUNNING) == [
        "a life: 2 starts, 1 reset by its guest",
        "a processor: 2.00 s, of which vcpu0 1.50 s, vcpu1 0.00 s",
        "a memory: 512M of 1.0G touched, and 24.0M of its processes",
        "a control group: processor 5.00 s, throttled 2 times, for 0.01 s, memory 1.0M, "
        "1 process killed for want of memory",
        "a disk 0: 1.0G",
        "    read 2 requests, 1024 bytes, 1.500 ms each",
        "    flushed 1 request, 0.500 ms each",
        "    busy 1.23 s, 1 in flight, 2 failed, 3 refused",
        "a disk 1: not counted: an earlier vmd has started it",
        "a cdrom: no disc, 1 command, 0 bytes read, busy 0.00 s, 1 failed",
        "a entropy: 2 requests, 64 bytes, delayed 1 time",
    ]
