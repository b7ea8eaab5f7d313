"""The activity of VMs in `vmctl status -v`, byte for byte."""

from vmctl.activity import describe
from vmd.ipc.figures import (
    CdromFigures,
    DiskFigures,
    EntropyFigures,
    GroupFigures,
    LimitFigures,
    NicFigures,
    VcpuFigures,
)
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


LIMITED = STOPPED.replace(
    disks=(DiskFigures(index=0, counted=True, iops_limit=500, rate_limit=20 << 20, throttled=1, throttled_ns=10**9),),
    nics=(
        NicFigures(index=0), NicFigures(index=1, rate_limit=10 << 20, tx_throttled=2, tx_throttled_ns=5 * 10**8),
        NicFigures(index=2, rx_throttled=1, rx_throttled_ns=10**7),
    ),
    limit=LimitFigures(memory_bytes=3 << 30, cpu_percent=150, weight=200),
    pid=7,
)  # fmt: skip


def test_limits_and_their_delays() -> None:
    """Delays are shown even if the limit was removed since."""
    assert describe(LIMITED)[3:] == [
        "a limits: memory 3.0G, processor 150%, weight 200",
        "a disk 0: 0B",
        "    limited to 500 requests and 20.0M each second, throttled 1 time, for 1.00 s",
        "    busy 0.00 s, 0 in flight",
        "a interface 1 limit: 10.0M each second, sent throttled 2 times, for 0.50 s",
        "a interface 2 limit: received throttled 1 time, for 0.01 s",
    ]
    assert describe(STOPPED.replace(limit=LimitFigures(weight=7)))[1:] == []
    (disk,) = LIMITED.disks
    assert describe(LIMITED.replace(disks=(disk.replace(iops_limit=0, rate_limit=0),)))[4:7] == [
        "a disk 0: 0B", "    throttled 1 time, for 1.00 s", "    busy 0.00 s, 0 in flight",
    ]  # fmt: skip


def test_a_stopped_vm() -> None:
    """Only its starts and resets are shown."""
    assert describe(STOPPED) == ["a life: 1 start, 0 resets by its guest"]


def test_a_running_vm() -> None:
    """Zero counts are left out.  A device without counters is reported as not counted."""
    assert describe(RUNNING) == [
        "a life: 2 starts, 1 reset by its guest",
        "a processor: 2.00 s, of which vcpu0 1.50 s, vcpu1 0.00 s",
        "a memory: 512M of 1.0G touched, and 24.0M of its processes",
        "a control group: processor 5.00 s, throttled 2 times, for 0.01 s, memory 1.0M, "
        "1 process killed because memory ran out",
        "a disk 0: 1.0G",
        "    read 2 requests, 1024 bytes, 1.500 ms each",
        "    flushed 1 request, 0.500 ms each",
        "    busy 1.23 s, 1 in flight, 2 failed, 3 refused",
        "a disk 1: not counted: started by an earlier vmd",
        "a cdrom: no disc, 1 command, 0 bytes read, busy 0.00 s, 1 failed",
        "a entropy: 2 requests, 64 bytes, delayed 1 time",
    ]


def test_a_control_group_that_counts_little() -> None:
    """Not every kernel counts everything."""
    for group, words in (
        (GroupFigures(), "nothing is counted"),
        (GroupFigures(throttled=1), "throttled 1 time, for 0.00 s"),
        (GroupFigures(tasks=1), "1 task"),
        (GroupFigures(cpu_ns=0, tasks=2, oom_kills=2), "processor 0.00 s, 2 processes killed because memory ran out, "
         "2 tasks"),
    ):  # fmt: skip
        assert f"a control group: {words}" in describe(RUNNING.replace(group=group))
