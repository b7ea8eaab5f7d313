"""Which VM has which id and addresses, and the file that keeps them, with valid and invalid contents."""

import errno
import os
import random
import subprocess
from pathlib import Path

import pytest

from vmd.config.model import NicConfig, Owner, Prefix, VmConfig
from vmd.parent.identity import (
    ABSENT_MAX,
    DIRECTORY,
    FILE,
    Identities,
    LaterVersionError,
    StateFile,
    folded,
    state_directory,
)
from vmd.parent.vmtable import VmTable

GOLDEN = Path(__file__).parents[2] / "golden" / "identities-1"
DEFAULT4 = Prefix(address=bytes((100, 64, 0, 0)), length=10)
RECEIVED = bytes.fromhex("fee1bbd10007"), bytes.fromhex("fee1bbd20007")


def loaded(raw: bytes) -> Identities:
    """Decode the identities of a file."""
    identities = Identities()
    identities.decode(raw)
    return identities


# --- the format ----------------------------------------------------------------------------------------------


def test_a_file_of_version_1() -> None:
    """Every later version reads it.  A version with the same number writes the same bytes."""
    raw = GOLDEN.read_bytes()
    identities = loaded(raw)

    web, db1, scratch = identities.known.values()
    assert list(identities.known) == [("web", 0), ("db1", 1000), ("scratch-7", 1000)]
    assert identities.ula == Prefix(address=bytes.fromhex("fd1783a299c0") + bytes(10), length=48)
    assert (web.vmid, web.number, web.configured) == (1, 4711, True)
    assert web.lladdrs == {0: bytes.fromhex("fee1bbd15c0e"), 2: bytes.fromhex("fee1bbd3009a")}
    assert (db1.vmid, db1.number, db1.lladdrs) == (3, 0, {})
    assert (scratch.vmid, scratch.number, scratch.configured) == (2, 16383, False)
    assert identities.encode() == raw


def test_fields_are_stored_by_name() -> None:
    """A missing field has its default.  An unknown one is ignored."""
    raw = b'{"version": 1, "colour": "red", "vms": [{"name": "a", "owner": 7, "shape": []}]}'
    identities = loaded(raw)

    assert (identities.ula, list(identities.known)) == (None, [("a", 7)])
    assert identities.of(("a", 7)).vmid == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": true}',
        '{"version": 0}',
        '{"version": "1"}',
        '{"version": 1, "ula": 7}',
        '{"version": 1, "ula": "fd00::/40"}',
        '{"version": 1, "ula": "2001:db8::/48"}',
        '{"version": 1, "vms": {}}',
        '{"version": 1, "vms": [7]}',
        '{"version": 1, "vms": [{"name": "a"}]}',
        '{"version": 1, "vms": [{"name": "../a", "owner": 0}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": -1}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "id": -1}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "id": 1e3}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "number": 2147483648}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "lladdrs": {"4": "fe:e1:bb:d1:00:00"}}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "lladdrs": {"x": "fe:e1:bb:d1:00:00"}}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "lladdrs": {"0": "ff:e1:bb:d1:00:00"}}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "lladdrs": {"0": "fe:e1:bb:d1:00"}}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0}, {"name": "a", "owner": 0}]}',
        '{"version": 1, "vms": [{"name": "a", "owner": 0, "id": 5}, {"name": "b", "owner": 0, "id": 5}]}',
        "[" * 100_000,
    ],
)
def test_an_invalid_file(text: str) -> None:
    """Nothing of it is taken over."""
    identities = loaded(GOLDEN.read_bytes())
    with pytest.raises(ValueError, match=r"."):
        identities.decode(text.encode())
    assert identities.encode() == GOLDEN.read_bytes()


def test_a_truncated_or_overwritten_file() -> None:
    """It is decoded or refused.  No other exception is raised."""
    raw = GOLDEN.read_bytes()
    chance = random.Random(1)
    for length in range(len(raw) - 2):
        with pytest.raises(ValueError, match=r"."):
            loaded(raw[:length])
    for _ in range(2000):
        damaged = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            loaded(bytes(damaged))
        except (ValueError, LaterVersionError):
            continue


# --- on disk -------------------------------------------------------------------------------------------------


Captured = pytest.CaptureFixture[str]


def load_from(directory: Path) -> tuple[StateFile, Identities]:
    """Return the state file and identities of a daemon that starts with this directory."""
    state, identities = StateFile(str(directory)), Identities()
    state.load(identities)
    return state, identities


def test_identities_outlive_a_daemon(tmp_path: Path, capfd: Captured) -> None:
    """The directory is created.  Only root may read the file."""
    state, identities = load_from(tmp_path / "vmd")
    identities.of(("a", 7)).lladdrs[0] = RECEIVED[0]
    state.save(identities)
    state.close()

    state, again = load_from(tmp_path / "vmd")
    state.close()
    assert again.encode() == identities.encode()
    assert [path.name for path in (tmp_path / "vmd").iterdir()] == [FILE]
    assert (tmp_path / "vmd" / FILE).stat().st_mode & 0o777 == 0o600
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("raw", [b"", b"{", GOLDEN.read_bytes()[:200], bytes(100)], ids=len)
def test_a_damaged_file_is_renamed(tmp_path: Path, capfd: Captured, raw: bytes) -> None:
    """A message names it, and the next file gets its name."""
    (tmp_path / FILE).write_bytes(raw)
    state, identities = load_from(tmp_path)
    assert f"{tmp_path}/{FILE} is damaged (" in capfd.readouterr().err
    assert identities.known == {}

    identities.of(("a", 0))
    state.save(identities)
    state.close()
    assert (tmp_path / f"{FILE}.damaged").read_bytes() == raw
    assert loaded((tmp_path / FILE).read_bytes()).of(("a", 0)).vmid == 1


def test_the_file_of_a_later_version_is_left_alone(tmp_path: Path, capfd: Captured) -> None:
    """Operators who go back to an older vmd find their file again when they return to the later one."""
    (tmp_path / FILE).write_text('{"version": 2, "vms": "in a form of its own"}')
    state, identities = load_from(tmp_path)
    assert "was written by a later vmd (version 2) and is left alone" in capfd.readouterr().err
    identities.of(("a", 0))
    state.save(identities)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert "in a form" in (tmp_path / FILE).read_text()


def test_two_daemons_do_not_share_a_file(tmp_path: Path, capfd: Captured) -> None:
    """The second daemon continues without a file."""
    first, identities = load_from(tmp_path)
    second, others = load_from(tmp_path)
    assert f"{tmp_path} is used by another vmd" in capfd.readouterr().err
    for name in ("a", "b"):
        others.of((name, 0))
    second.save(others)
    assert list(tmp_path.iterdir()) == []
    identities.of(("c", 0))
    first.save(identities)
    first.close()
    third, again = load_from(tmp_path)
    third.close()
    assert list(again.known) == [("c", 0)]


def test_only_root_may_enter_a_new_directory(tmp_path: Path) -> None:
    """The file says which users have VMs."""
    state, _ = load_from(tmp_path / "a" / "vmd")
    state.close()
    assert (tmp_path / "a" / "vmd").stat().st_mode & 0o777 == 0o700


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service manager may say so."""
    for text, directory in (("/s/vmd", "/s/vmd"), ("/s/vmd:/s/more", "/s/vmd"), ("", DIRECTORY)):
        monkeypatch.setenv("STATE_DIRECTORY", text)
        assert state_directory() == directory
    monkeypatch.delenv("STATE_DIRECTORY")
    assert state_directory() == DIRECTORY


def test_a_file_system_without_locks(tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is used without one."""

    def none(_fd: int, _how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("vmd.parent.identity.fcntl.flock", none)
    state, identities = load_from(tmp_path)
    identities.of(("a", 0))
    state.save(identities)
    state.close()
    assert (tmp_path / FILE).exists()
    assert capfd.readouterr().err == ""


def test_a_damaged_file_that_cannot_be_renamed(tmp_path: Path, capfd: Captured) -> None:
    """The log says so, and why."""
    (tmp_path / FILE).write_bytes(b"{")
    (tmp_path / f"{FILE}.damaged").mkdir()
    state, _ = load_from(tmp_path)
    state.close()
    said = capfd.readouterr().err
    assert f"rename {tmp_path}/{FILE}: Is a directory" in said
    assert "is damaged" in said


def test_a_directory_that_cannot_be_created(tmp_path: Path, capfd: Captured) -> None:
    """The message has the reason.  VMs still get ids and addresses."""
    (tmp_path / "file").touch()
    state, identities = load_from(tmp_path / "file" / "vmd")
    assert f"{tmp_path}/file/vmd/{FILE}: Not a directory" in capfd.readouterr().err
    assert identities.of(("a", 0)).vmid == 1
    state.save(identities)


@pytest.mark.root
def test_a_full_disk(tmp_path: Path, capfd: Captured) -> None:
    """The old file stays.  The failure is logged once, and so is the first success after it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], check=True)
    try:
        state, identities = load_from(tmp_path)
        identities.of(("a", 0))
        state.save(identities)
        before = (tmp_path / FILE).read_bytes()
        with (tmp_path / "full").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(tmp_path).f_bfree * 4096)
        for name in ("b", "c"):
            identities.of((name, 0))
            state.save(identities)
        said = capfd.readouterr().err
        assert said.count("No space left on device: ids and addresses of VMs are not kept") == 1
        assert (tmp_path / FILE).read_bytes() == before

        (tmp_path / "full").unlink()
        state.save(identities)
        state.close()
        assert "are kept again" in capfd.readouterr().err
        assert len(loaded((tmp_path / FILE).read_bytes()).known) == 3
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# --- ids and addresses ---------------------------------------------------------------------------------------


def test_a_free_number_is_chosen() -> None:
    """The VM's present number is kept if it is free and in the range.  Otherwise any free number is chosen."""
    identities = Identities()
    keys = [(name, 0) for name in "abc"]
    for key, number in zip(keys, (1, 2, 300), strict=True):
        identities.of(key).number = number

    anything = lambda _number: True  # noqa: E731
    assert identities.choose_number(keys[0], 4, anything, lambda: keys) == 1
    assert identities.choose_number(keys[2], 4, anything, lambda: keys) == 3
    assert identities.choose_number(keys[0], 4, lambda number: number != 1, lambda: keys) == 3
    assert identities.choose_number(("d", 0), 3, anything, lambda: keys) == 0
    assert identities.choose_number(("d", 0), 3, anything, lambda: keys[1:]) == 1
    assert identities.of(keys[0]).number == 0


def test_two_hosts_seldom_choose_the_same_number() -> None:
    """With the same number, their VMs could not be sent to one another."""
    numbers = [Identities().choose_number(("a", 0), 16384, lambda _number: True, set) for _ in range(50)]
    assert len(set(numbers)) > 40


def test_the_number_of_remembered_names_is_limited() -> None:
    """Names of instances replace neither those of vm.conf nor that of a present VM."""
    table = VmTable()
    table.remove(table.add(VmConfig(name="configured"), from_config=True))
    there = table.add(VmConfig(name="there"), from_config=False)
    for number in range(ABSENT_MAX[False] + 5):
        table.remove(table.add(VmConfig(name=f"vm{number}", owner=Owner(uid=7)), from_config=False))

    names = [name for name, _ in table.identities.known]
    assert names[:3] == ["configured", "there", "vm5"]
    assert len(names) == 2 + ABSENT_MAX[False]
    assert table.identities.of(there.key).vmid == there.vmid == 2
    assert table.add(VmConfig(name="configured"), from_config=True).vmid == 1


def test_addresses_stay_when_ids_start_again_from_1() -> None:
    """`vmctl reset` changes only ids, because guests and their neighbours know the addresses."""
    table = VmTable()
    table.add(VmConfig(name="a"), from_config=True)
    config = table.add(VmConfig(name="b", nics=(NicConfig(),)), from_config=True).config
    for vm in list(table):
        table.remove(vm)
    table.forget_ids()

    again = table.add(VmConfig(name="b", nics=(NicConfig(),)), from_config=True)
    assert (again.vmid, again.config) == (1, config)


@pytest.mark.parametrize("end", [2, 3])
def test_number_0_is_never_chosen(end: int) -> None:
    """It stands for none.  The smallest range has one number."""
    for _ in range(100):
        assert 0 < Identities().choose_number(("a", 0), end, lambda _number: True, set) < end


def test_a_number_outside_of_the_range_is_replaced() -> None:
    """So is one that is not free.  The ends of the range are 1 and the last number before its end."""
    identities = Identities()
    for own, kept in ((1, True), (3, True), (4, False), (0, False)):
        identities.of(("a", 0)).number = own
        chosen = identities.choose_number(("a", 0), 4, lambda _number: True, set)
        assert chosen == own if kept else chosen in (1, 2, 3)
    assert identities.choose_number(("a", 0), 4, lambda number: number == 2, set) == 2
    assert identities.choose_number(("a", 0), 4, lambda _number: False, set) == 0


def test_ids_of_forgotten_names_are_free() -> None:
    """The lowest free id is the next one.  Names without an id free none."""
    table = VmTable()
    for number in range(ABSENT_MAX[False] + 9):
        table.remove(table.add(VmConfig(name=f"vm{number}"), from_config=False))
    ids = {identity.vmid for identity in table.identities.known.values()}
    assert (len(ids), max(ids)) == (ABSENT_MAX[False], ABSENT_MAX[False] + 1)
    table.forget_ids()
    for number in range(ABSENT_MAX[False] + 9):
        table.remove(table.add(VmConfig(name=f"other{number}"), from_config=False))
    assert all(identity.vmid >= 0 for identity in table.identities.known.values())
    table.forget_ids()
    table.identities.leave(("other20", 0), set)
    assert table.identities.of(("last", 0)).vmid == 1


def test_ids_of_a_file_are_taken() -> None:
    """Any number of VMs may have none yet.  They get those that are free, the lowest first."""
    rows = [f'{{"name": "vm{number}", "owner": 0, "id": {vmid}}}' for number, vmid in enumerate((1, 0, 3, 0))]
    identities = loaded(f'{{"version": 1, "vms": [{", ".join(rows)}]}}'.encode())
    assert [identities.of((f"vm{number}", 0)).vmid for number in range(4)] == [1, 2, 3, 4]
    assert identities.of(("new", 0)).vmid == 5


def test_what_the_next_parent_is_told_about_identities() -> None:
    """The changes, applied to what it knows, give the present state; the latest used name is the last."""
    table = VmTable()
    identities = table.identities
    for name in ("a", "b", "c"):
        table.remove(table.add(VmConfig(name=name), from_config=False))
    before = identities.encode()
    identities.touched.clear()
    identities.ula = Prefix(address=b"\xfd" + bytes(15), length=48)
    table.remove(table.add(VmConfig(name="b"), from_config=False))
    one = identities.encode_touched()
    for number in range(ABSENT_MAX[False] + 1):
        table.remove(table.add(VmConfig(name=f"vm{number}"), from_config=False))
    two = identities.encode_touched()
    after = loaded(folded(before, [one, two]))

    assert "a" not in {name for name, _ in after.known}
    assert after.encode() == identities.encode()
    assert [name for name, _ in loaded(folded(before, [one])).known] == ["a", "c", "b"]
    with pytest.raises(ValueError, match="KeyError"):
        folded(before, [b"{}"])


# --- VMs that come from elsewhere ----------------------------------------------------------------------------


def received_config(nics: tuple[NicConfig, ...], plan_id: int = 77) -> VmConfig:
    """Return the configuration in the stream of a received VM, which has two interfaces."""
    nics = tuple(nic.replace(lladdr=nic.lladdr or lladdr) for nic, lladdr in zip(nics, RECEIVED, strict=True))
    return VmConfig(name="db1", nics=nics, plan_id=plan_id, plan_prefix4=DEFAULT4)


def test_a_received_vm_keeps_its_addresses() -> None:
    """It also keeps them at its next start from this host's vm.conf.  Addresses that vm.conf gives explicitly count."""
    given = bytes.fromhex("020000000001")
    conf = VmConfig(name="db1", nics=(NicConfig(local=True), NicConfig(lladdr=given)))
    table = VmTable()
    vm = table.add(conf, from_config=True)
    vm.next_config = table.with_all_lladdrs(conf.replace(memory_bytes=1 << 28))
    table.adopt(vm, received_config(conf.nics), DEFAULT4)

    assert [nic.lladdr for nic in vm.config.nics] == [RECEIVED[0], given]
    assert vm.next_config.nics == vm.config.nics
    assert table.identities.of(vm.key).number == 77
    assert table.with_all_lladdrs(conf) == vm.config


def test_a_received_vm_that_is_not_in_vm_conf_keeps_its_addresses() -> None:
    """They replace addresses that were remembered for its name before."""
    table = VmTable()
    nics = NicConfig(), NicConfig()
    table.remove(table.add(VmConfig(name="db1", nics=nics), from_config=False))
    vm = table.add(VmConfig(name="db1"), from_config=False)
    table.adopt(vm, received_config(nics), DEFAULT4)
    table.remove(vm)

    again = table.add(VmConfig(name="db1", nics=nics), from_config=False)
    assert tuple(nic.lladdr for nic in again.config.nics) == RECEIVED


def test_addresses_in_use_are_not_taken_over() -> None:
    """Neither an Ethernet address nor a number that another VM has is taken over, nor a number of another range."""
    table = VmTable()
    other = table.add(VmConfig(name="other", nics=(NicConfig(lladdr=RECEIVED[0]),)), from_config=True)
    table.identities.of(other.key).number = 77
    conf = VmConfig(name="db1", nics=(NicConfig(), NicConfig()))
    vm = table.add(conf, from_config=True)
    before = vm.config.nics[0].lladdr
    table.adopt(vm, received_config(conf.nics), DEFAULT4)
    table.adopt(vm, received_config(conf.nics, 78), DEFAULT4.replace(length=16))

    assert [nic.lladdr for nic in vm.config.nics] == [before, RECEIVED[1]]
    assert table.identities.of(vm.key).number == 0
