"""The limits for all VMs of the host together."""

import errno
import os
import resource
from pathlib import Path

import pytest

from vmd.config.model import Config, Globals, NicConfig, VmConfig
from vmd.errors import OperatorError
from vmd.parent import limits
from vmd.parent.limits import host_memory_bytes, host_warnings, raise_file_limit, require_files, require_room
from vmd.units import GIB

MIB = 1 << 20
SMALL = VmConfig(name="small", memory_bytes=MIB)


def refusal(config: VmConfig, running: list[VmConfig], settings: Globals) -> OperatorError:
    """Return the error of a start that exceeds a limit."""
    with pytest.raises(OperatorError) as refused:
        require_room(config, running, settings)
    return refused.value


def test_number_of_vms() -> None:
    """Exactly the limit is allowed.  The default is the maximum of vmm(4)."""
    require_room(SMALL, [SMALL] * 511, Globals())
    refused = refusal(SMALL, [SMALL] * 512, Globals(limit_vcpus=1000))
    assert refused.number == errno.EAGAIN
    assert str(refused) == "vm small: 512 VMs are running, and there is a limit of 512 (limit vms)"
    assert "limit of 0" in str(refusal(SMALL, [], Globals(limit_vms=0)))


def test_number_of_vcpus() -> None:
    """The vCPUs of all VMs count."""
    large = VmConfig(name="large", vcpus=16)
    require_room(SMALL, [large] * 2, Globals(limit_vcpus=33))
    refused = refusal(large, [large, SMALL], Globals(limit_vcpus=32))
    assert refused.number == errno.EAGAIN
    assert str(refused) == "vm large: with its 16 there would be 33 vcpus, and there is a limit of 32 (limit vcpus)"


def test_memory() -> None:
    """The configured memory of guests counts, not the memory that they use."""
    large = VmConfig(name="large", memory_bytes=3 * GIB)
    require_room(large, [large], Globals(limit_memory_bytes=6 * GIB))
    refused = refusal(large, [large, SMALL], Globals(limit_memory_bytes=6 * GIB))
    assert refused.number == errno.ENOMEM
    assert str(refused) == (
        "vm large: with its 3.0G guests would have 6.0G of memory, and there is a limit of 6.0G (limit memory)"
    )


def test_memory_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is twice the host's memory: moderate overcommitment is usual, and far larger values are mistakes."""
    monkeypatch.setattr(limits, "host_memory_bytes", lambda: 4 * GIB)
    large = VmConfig(name="large", memory_bytes=5 * GIB)
    require_room(large, [VmConfig(name="other", memory_bytes=3 * GIB)], Globals())
    assert str(refusal(large, [large], Globals())) == (
        "vm large: with its 5.0G guests would have 10.0G of memory, and there is a limit of 8.0G, "
        "twice what this host has (limit memory)"
    )


def test_memory_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """RAM and swap count.  A /proc without valid data about swap is no error."""
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(limits, "MEMINFO", str(meminfo))
    ram_bytes = host_memory_bytes()
    assert ram_bytes > 64 * MIB
    for text in ("MemTotal: 1 kB\n", "SwapTotal:\n", "SwapTotal: many kB\n", "SwapTotal: \xb2 kB\n"):
        meminfo.write_text(text)
        assert host_memory_bytes() == ram_bytes
    meminfo.write_text("MemTotal:       24684032 kB\nSwapTotal:       1048576 kB\nSwapFree: 3 kB\n")
    assert host_memory_bytes() == ram_bytes + GIB


@pytest.mark.parametrize(
    ("now", "allowed", "wanted", "warned"),
    [
        (4096, 1 << 20, 512 * limits.FILES_PER_VM + limits.FILES_BESIDES, False),
        (4096, 4096, 4096, True),
        (524288, 524288, 524288, False),
    ],
    ids=["raised by root", "confined", "enough"],
)
def test_descriptors(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], now: int, allowed: int, wanted: int,
    warned: bool,
) -> None:  # fmt: skip
    """The limit is raised to what the VMs will need, and never lowered.  If it stays too low, this is logged."""
    chosen: list[tuple[int, int]] = []

    def setrlimit(_which: int, pair: tuple[int, int]) -> None:
        if pair[1] > allowed:
            raise ValueError("not allowed to raise maximum limit")
        chosen.append(pair)

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, now))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    raise_file_limit(512)
    assert chosen == [(wanted, wanted)]
    assert ("may not be enough for 512 VMs" in capfd.readouterr().err) == warned


def test_limits_of_the_kernel_are_named(tmp_path: Path) -> None:
    """Each warning names the sysctl to raise.  Limits that this kernel does not have are skipped."""
    local, switched = NicConfig(local=True), NicConfig(switch="lan")

    def config(vms: int, *nics: NicConfig) -> Config:
        vm = VmConfig(name="a", nics=nics)
        return Config(vms=(vm,) * vms, settings=Globals(limit_vms=vms))

    assert host_warnings(config(2000, local), str(tmp_path)) == []
    for name, most in (
        ("kernel/pty/max", 1999), ("kernel/pid_max", 32768), ("kernel/threads-max", 31999),
        ("net/ipv4/neigh/default/gc_thresh3", 1024),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{most}\n")

    assert host_warnings(config(1023, local, switched), str(tmp_path)) == []
    assert host_warnings(config(2000, local, switched), str(tmp_path)) == [
        "limit vms 2000: a VM takes a terminal, and this host has 1999: raise sysctl kernel.pty.max",
        "limit vms 2000: a VM takes 16 processes and threads, and this host has 31999: raise sysctl kernel.threads-max",
        "2000 local interfaces, and this host remembers 1024 neighbours: raise sysctl "
        "net.ipv4.neigh.default.gc_thresh3",
        'switch "lan": 2000 interfaces, and a bridge of Linux has 1023 at most',
    ]


@pytest.mark.parametrize(("name", "each"), [("pty/max", 1), ("pid_max", 16), ("threads-max", 16)])
def test_a_limit_of_the_kernel_that_just_suffices(tmp_path: Path, name: str, each: int) -> None:
    """One less does not."""
    (tmp_path / "kernel/pty").mkdir(parents=True)
    config = Config(settings=Globals(limit_vms=100))
    for most, warnings in ((100 * each, 0), (100 * each - 1, 1)):
        (tmp_path / "kernel" / name).write_text(f"{most}\n")
        assert len(host_warnings(config, str(tmp_path))) == warnings


def test_neighbours_and_ports_that_just_suffice(tmp_path: Path) -> None:
    """One more does not."""
    path = tmp_path / limits.NEIGHBOURS
    path.parent.mkdir(parents=True)
    path.write_text(f"{limits.PORTS_MAX}\n")
    for nic in (NicConfig(local=True), NicConfig(switch="lan")):
        for count, warnings in ((limits.PORTS_MAX, 0), (limits.PORTS_MAX + 1, 1)):
            config = Config(vms=(VmConfig(name="a", nics=(nic,) * count), VmConfig(name="b")))
            assert len(host_warnings(config, str(tmp_path))) == warnings


@pytest.mark.parametrize("counted", [True, False])
def test_free_descriptors_for_a_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: bool) -> None:
    """Exactly as many as a start needs are enough.  Kernels before 6.2 do not tell their number."""
    for number in range(3):
        (tmp_path / str(number)).touch()
    status = os.stat_result((0, 0, 0, 0, 0, 0, 3 if counted else 0, 0, 0, 0))
    stat = os.stat
    monkeypatch.setattr(limits, "DESCRIPTORS", str(tmp_path))
    monkeypatch.setattr(os, "stat", lambda path, *rest: status if path == str(tmp_path) else stat(path, *rest))
    most = limits.FILES_TO_START + 3
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (most, 1 << 20))
    require_files()
    most -= 1
    with pytest.raises(OperatorError, match=f"no room for another vm among the {most} files") as refused:
        require_files()
    assert refused.value.number == errno.EMFILE


def test_no_descriptor_is_left_to_count_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this start is refused."""
    require_files()

    def stat(path: str) -> os.stat_result:
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OperatorError, match="no room for another vm") as refused:
        require_files()
    assert refused.value.number == errno.EMFILE
