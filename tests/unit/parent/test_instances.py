"""What an instance inherits from its template, what it has of its own, and what is refused (*cat. 2.6*)."""

import ast
import inspect
from pathlib import Path

import pytest

from vmd.config.check import load
from vmd.config.model import (
    AllowInstance,
    BootDevice,
    ConsoleLog,
    DiskConfig,
    Forward,
    NicConfig,
    Owner,
    Prefix,
    Rights,
    SeedConfig,
    VirtioMode,
    VmConfig,
    VmFlag,
    VmLimits,
)
from vmd.errors import OperatorError
from vmd.ipc.messages.clients import Caller, StartRequest
from vmd.parent.instances import derive, require_free, resolve
from vmd.parent.requests import described
from vmd.parent.vmtable import VmTable

MIB = 1 << 20
USER = Caller(uid=4711, gid=4711, pid=1)
OTHER = Caller(uid=4712, gid=4712, pid=1)
EVERYTHING = VmFlag.CPU | VmFlag.KERNEL | VmFlag.MEMORY | VmFlag.NETWORK | VmFlag.DISK | VmFlag.CDROM

TEMPLATE = VmConfig(
    name="tmpl",
    memory_bytes=64 * MIB,
    vcpus=2,
    kernel="/boot/k",
    initrd="/boot/i",
    cmdline="quiet",
    cdrom="/iso",
    disks=(DiskConfig(path="/tmpl.img"),),
    nics=(NicConfig(tap="tap3", switch="lan", lladdr=bytes(6)), NicConfig(local=True, lladdr=b"\2" * 6)),
    virtio=VirtioMode.MODERN,
    allow=AllowInstance(flags=EVERYTHING, owner=Owner(uid=USER.uid)),
)


def test_values_that_are_not_given_are_inherited_except_disks() -> None:
    """The template's further interfaces are inherited without their taps and addresses."""
    made = derive(TEMPLATE, VmConfig(name="i"), USER)

    assert (made.memory_bytes, made.vcpus, made.cdrom) == (64 * MIB, 2, "/iso")
    assert (made.kernel, made.initrd, made.cmdline) == ("/boot/k", "/boot/i", "quiet")
    assert made.disks == ()
    assert made.nics == (NicConfig(switch="lan"), NicConfig(local=True))
    assert (made.parent, made.virtio) == ("tmpl", VirtioMode.MODERN)
    assert made.owner.uid == USER.uid
    assert made.allow is None


def test_a_console_log_is_inherited_under_the_name_of_the_instance() -> None:
    """Only vm.conf can give one.  A client's value is ignored."""
    template = TEMPLATE.replace(console_log=ConsoleLog(path="/v/%n.log", keep=1))
    asked = VmConfig(name="i", console_log=ConsoleLog(path="/etc/passwd"))
    wanted = described(StartRequest(name="i", config=asked), given_boot=False, given_initrd=False, given_seed=False)

    made = derive(template, wanted, USER)

    assert made.console_log == template.console_log
    assert made.console_log is not None
    assert made.console_log.path_of(made.name) == "/v/i.log"
    assert derive(template, asked, None).console_log == asked.console_log


LIMITED = TEMPLATE.replace(
    limit=VmLimits(memory_bytes=1 << 30, cpu_percent=50),
    disks=(DiskConfig(path="/tmpl.img", iops_limit=100, rate_limit=1 << 20),),
    nics=(NicConfig(rate_limit=1 << 20), NicConfig(local=True, rate_limit=2 << 20)),
)
WANTED = VmConfig(
    name="i",
    given=EVERYTHING,
    limit=VmLimits(cpu_percent=400, weight=7),
    disks=(DiskConfig(path="/a", iops_limit=5000), DiskConfig(path="/b", iops_limit=6)),
    nics=(NicConfig(rate_limit=9 << 20),),
)


def test_an_instance_of_a_user_has_the_limits_of_the_template() -> None:
    """This holds for each device.  Devices that the template does not have are not limited."""
    made = derive(LIMITED, WANTED, USER)

    assert made.limit == LIMITED.limit
    assert [(disk.iops_limit, disk.rate_limit) for disk in made.disks] == [(100, 1 << 20), (0, 0)]
    assert [nic.rate_limit for nic in made.nics] == [1 << 20, 2 << 20]


@pytest.mark.parametrize("caller", [None, Caller(uid=0, gid=0, pid=1)], ids=["vm.conf", "root"])
def test_vm_conf_and_root_give_an_instance_limits_of_its_own(caller: Caller | None) -> None:
    """Limits that they do not give are inherited one by one."""
    made = derive(LIMITED, WANTED, caller)

    assert made.limit == VmLimits(memory_bytes=1 << 30, cpu_percent=400, weight=7)
    assert [(disk.iops_limit, disk.rate_limit) for disk in made.disks] == [(5000, 1 << 20), (6, 0)]
    assert [nic.rate_limit for nic in made.nics] == [9 << 20, 2 << 20]


# Fields that are never inherited: the name, the line in vm.conf, the addresses, and those that follow from others.
OF_ITS_OWN = {"drive", "enabled", "given", "name", "origin", "plan_id", "plan_prefix4", "plan_prefix6"}


def test_each_field_is_decided_in_derive_or_never_inherited() -> None:
    """A new field of a VM is handled in `derive`, or named above."""
    source = ast.parse(inspect.getsource(derive))
    words = {node.value for node in ast.walk(source) if isinstance(node, ast.Constant)}
    decided = words | {node.arg for node in ast.walk(source) if isinstance(node, ast.keyword)}

    assert set(VmConfig.fields) - decided == OF_ITS_OWN


@pytest.mark.parametrize(
    ("field", "value", "own"),
    [
        ("boot_device", BootDevice.CDROM, BootDevice.DISK),
        ("virtio", VirtioMode.MODERN, VirtioMode.LEGACY),
        ("sev", True, None),
        ("sev_es", True, None),
        ("fault", "no such owner", "no such group"),
        ("console_log", ConsoleLog(path="/v/t"), ConsoleLog(path="/v/i")),
    ],
)
def test_settings_that_an_instance_has_only_if_it_or_its_template_has_them(
    field: str, value: object, own: object
) -> None:
    """A value of the instance has precedence."""
    template = TEMPLATE.replace(virtio=VmConfig.virtio).replace(**{field: value})

    assert getattr(derive(template, VmConfig(name="i"), None), field) == value
    assert getattr(derive(TEMPLATE, VmConfig(name="i").replace(**{field: value}), None), field) == value
    if own is not None:
        assert getattr(derive(template, VmConfig(name="i").replace(**{field: own}), None), field) == own


def test_given_values_replace_those_of_the_template() -> None:
    """This is decided field by field."""
    own = VmConfig(
        name="i",
        given=EVERYTHING,
        memory_bytes=32 * MIB,
        vcpus=1,
        kernel="/own",
        disks=(DiskConfig(path="/own.img"),),
        nics=(NicConfig(switch="other"),),
        cdrom="",
    )

    made = derive(TEMPLATE, own, USER)

    assert (made.memory_bytes, made.vcpus, made.kernel, made.initrd, made.cdrom) == (32 * MIB, 1, "/own", "", "")
    assert made.disks == own.disks
    assert made.nics == (NicConfig(switch="other"), NicConfig(local=True))


@pytest.mark.parametrize(
    ("flag", "what"),
    [
        (VmFlag.CPU, "cpus"),
        (VmFlag.MEMORY, "memory"),
        (VmFlag.DISK, "disks"),
        (VmFlag.NETWORK, "interfaces"),
        (VmFlag.KERNEL, "boot image"),
        (VmFlag.CDROM, "cdrom"),
    ],
)
def test_each_aspect_needs_its_flag(flag: VmFlag, what: str) -> None:
    """This holds for users.  Root and vm.conf need no flags."""
    template = TEMPLATE.replace(allow=AllowInstance(flags=EVERYTHING & ~flag, owner=Owner(uid=USER.uid)))
    wanted = VmConfig(name="i", given=flag)

    with pytest.raises(OperatorError, match=f"no permission to set {what}"):
        derive(template, wanted, USER)
    derive(template, wanted, None)
    derive(template, wanted, Caller(uid=0, gid=0, pid=1))


def test_only_the_instance_owner_makes_instances() -> None:
    """The owner is a user or a group.  Without `owner` only root may make them."""
    with pytest.raises(OperatorError, match="uid 4712 has no permission to create instances of vm tmpl"):
        derive(TEMPLATE, VmConfig(name="i"), OTHER)
    with pytest.raises(OperatorError, match="no permission"):
        derive(TEMPLATE.replace(allow=AllowInstance(flags=EVERYTHING)), VmConfig(name="i"), USER)
    with pytest.raises(OperatorError, match="no permission"):
        derive(TEMPLATE.replace(allow=None), VmConfig(name="i"), USER)


def test_group_0_makes_instances_if_no_owner_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is upstream's rule for `allow instance` without `owner`.  For others the error says how to allow it."""
    path = tmp_path / "vm.conf"
    path.write_text("vm tmpl {\n allow instance { boot, disk, memory }\n}\n")
    (template,) = load(str(path), warn=lambda _text: None).vms
    monkeypatch.setattr("vmd.parent.access.in_group", lambda uid, gid: (uid, gid) == (USER.uid, 0))

    assert derive(template, VmConfig(name="i"), USER).parent == "tmpl"
    with pytest.raises(
        OperatorError, match=r"of vm tmpl: `allow instance \{ owner \.\.\. \}` in its vm block gives it$"
    ):
        derive(template, VmConfig(name="i"), OTHER)


@pytest.mark.parametrize(
    "wanted",
    [
        VmConfig(name="i", disks=(DiskConfig(path="/tmpl.img"),)),
        VmConfig(name="i", nics=(NicConfig(tap="tap3"),)),
        VmConfig(name="i", nics=(NicConfig(lladdr=b"\2" * 6),)),
    ],
    ids=["disk", "tap", "lladdr"],
)
def test_unique_resources_stay_with_the_template(wanted: VmConfig) -> None:
    """They are refused even for root."""
    with pytest.raises(OperatorError, match="cannot be reused"):
        derive(TEMPLATE, wanted, None)


def test_permissions_are_inherited_only_if_the_template_allows_it() -> None:
    """The template needs `allow instance { instance }`."""
    allow = AllowInstance(flags=EVERYTHING | VmFlag.INSTANCE, owner=Owner(uid=USER.uid))
    template = TEMPLATE.replace(allow=allow)

    assert derive(template, VmConfig(name="i"), USER).allow == allow
    assert derive(TEMPLATE, VmConfig(name="i"), USER).allow is None
    with pytest.raises(OperatorError, match="cannot change instance permissions"):
        derive(template, VmConfig(name="i", allow=allow), USER)


def test_files_keep_the_rights_of_the_user_who_named_them() -> None:
    """This holds through any number of instances.  Files named by root or vm.conf have root's rights."""
    owner, other = Owner(uid=USER.uid, gid=USER.gid), Owner(uid=OTHER.uid, gid=OTHER.gid)
    allow = AllowInstance(flags=EVERYTHING | VmFlag.INSTANCE, owner=Owner(uid=OTHER.uid, gid=USER.gid))
    plain = derive(TEMPLATE, VmConfig(name="i", given=VmFlag.DISK, disks=(DiskConfig(path="/i.img"),)), USER)
    named = VmFlag.CDROM | VmFlag.KERNEL
    mine = VmConfig(name="i", given=named, cdrom="/root/secret", kernel="/etc/shadow", allow=allow)
    middle = derive(TEMPLATE, mine, None).replace(rights=derive(TEMPLATE, mine.replace(allow=None), USER).rights)

    assert plain.rights == Rights(disks=owner)
    assert middle.rights == Rights(boot=owner, disks=owner, cdrom=owner)
    assert derive(middle, VmConfig(name="j"), OTHER).rights == Rights(boot=owner, disks=other, cdrom=owner)
    assert derive(middle, VmConfig(name="j"), None).rights == Rights(boot=owner, cdrom=owner)
    assert derive(TEMPLATE, mine, Caller(uid=0, gid=0, pid=1)).rights == Rights()


def test_a_user_takes_no_interface_and_no_address_of_another_vm() -> None:
    """The other VM may be stopped or received, or may get the address only at its next start."""
    table = VmTable()
    vm = table.add(VmConfig(name="a", nics=(NicConfig(tap="tap7", lladdr=b"\2\2\2\2\2\2"),)), from_config=True)
    vm.running_config = VmConfig(name="a", nics=(NicConfig(tap="tap9", lladdr=b"\4" * 6),))
    vm.next_config = VmConfig(name="a", nics=(NicConfig(lladdr=b"\6" * 6),))
    require_free(table, VmConfig(name="i", nics=(NicConfig(tap="tap"), NicConfig(tap="tap8"))))
    taken = [NicConfig(lladdr=bytes([byte] * 6)) for byte in (2, 4, 6)]
    for nic in (NicConfig(tap="tap7"), NicConfig(tap="tap9"), *taken):
        with pytest.raises(OperatorError, match="is that of another vm"):
            require_free(table, VmConfig(name="i", nics=(nic,)))


def test_the_configuration_may_name_another_owner() -> None:
    """Without `owner` the instance has the template's."""
    template = TEMPLATE.replace(owner=Owner(uid=7, gid=8))

    assert derive(template, VmConfig(name="i"), None).owner == Owner(uid=7, gid=8)
    assert derive(template, VmConfig(name="i", owner=Owner(uid=9)), None).owner == Owner(uid=9)
    assert derive(template, VmConfig(name="i"), USER).owner == Owner(uid=USER.uid, gid=8)


def test_unique_settings_of_a_local_interface_are_not_inherited() -> None:
    """Address, ports of the host and host name are unique.  Name servers and `vhost` are inherited."""
    told = NicConfig(
        local=True, address=Prefix(address=bytes((10, 9, 0, 2)), length=31), forwards=(Forward(port=8022, to=22),),
        host_name="www", dns=(bytes((9, 9, 9, 9)),), vhost=True,
    )  # fmt: skip
    template = TEMPLATE.replace(nics=(told,))

    (nic,) = derive(template, VmConfig(name="i"), None).nics
    assert nic == NicConfig(local=True, dns=told.dns, vhost=True)


def test_settings_that_only_vm_conf_gives_a_local_interface() -> None:
    """They are removed from the description of every client."""
    told = NicConfig(
        local=True, address=Prefix(address=bytes((10, 9, 0, 2)), length=31), forwards=(Forward(port=8022, to=22),),
        host_name="www", dns=(bytes((9, 9, 9, 9)),), rate_limit=1 << 20, vhost=True,
    )  # fmt: skip
    request = StartRequest(name="i", config=VmConfig(name="i", nics=(told,)))

    (nic,) = described(request, given_boot=False, given_initrd=False, given_seed=False).nics
    assert nic == NicConfig(local=True, rate_limit=1 << 20)


def test_an_instance_inherits_the_seed_with_its_own_name() -> None:
    """Files are read with the rights of the user who named them.  A seed of its own replaces the whole seed."""
    seed = SeedConfig(hostname="t", user="alice", user_data="/root/data", instance_id="x")
    template = TEMPLATE.replace(seed=seed, rights=Rights(seed=Owner(uid=7)))
    plain = derive(template, VmConfig(name="i"), USER)
    given = VmConfig(name="i", seed=SeedConfig(user="bob"), given=VmFlag.SEED)
    own = derive(template.replace(allow=AllowInstance(flags=VmFlag.SEED, owner=Owner(uid=USER.uid))), given, USER)

    assert (plain.seed, plain.rights.seed) == (SeedConfig(user="alice", user_data="/root/data"), Owner(uid=7))
    assert own.seed == given.seed
    assert own.rights.seed is not None
    assert own.rights.seed.uid == USER.uid
    asked = VmConfig(name="i", seed=SeedConfig(user="a", user_data="/etc/shadow", password="/etc/shadow"))
    taken = described(StartRequest(name="i", config=asked), given_boot=False, given_initrd=False, given_seed=True)
    assert taken.seed == SeedConfig(user="a")
    with pytest.raises(OperatorError, match="the seeds that are configured"):
        described(StartRequest(name="i", config=asked), given_boot=False, given_initrd=False, given_seed=False)


# --- instances in vm.conf ---------------------------------------------------------------------------------------


def conf(name: str, parent: str = "", **fields: object) -> VmConfig:
    """Return a VM of vm.conf."""
    return VmConfig(name=name, parent=parent, origin=f"vm.conf:{name}").replace(**fields)


def test_instances_of_instances_are_resolved_in_any_order() -> None:
    """Templates may come later in the file, or be VMs that are known already.  The order of the file is kept."""
    known = {"old": conf("old", memory_bytes=3 * MIB), "b": conf("b", memory_bytes=99 * MIB)}
    vms = [conf("c", "b"), conf("b", "a"), conf("a", memory_bytes=7 * MIB), conf("d", "old")]
    found, problems = resolve(vms, known.get)

    assert [(vm.name, vm.memory_bytes // MIB) for vm in found] == [("c", 7), ("b", 7), ("a", 7), ("d", 3)]
    assert problems == []


def test_of_two_vms_with_one_name_the_first_is_the_template() -> None:
    """As it is the one that is started."""
    vms = [conf("a", vcpus=2), conf("a", vcpus=3), conf("b", "a")]
    assert resolve(vms, lambda _name: None)[0][-1].vcpus == 2


@pytest.mark.parametrize(
    ("vms", "left", "problems"),
    [
        ([conf("b", "a"), conf("c")], ["c"], ["vm.conf:b: vm b: template a not found"]),
        ([conf("a", "a")], [], ["vm.conf:a: vm a is an instance of itself"]),
        ([conf("a", "b"), conf("b", "a"), conf("c")], ["c"],
         ["vm.conf:a: vm a is an instance of itself", "vm.conf:b: vm b is an instance of itself"]),
        ([conf("web1"), conf("c", "web")], ["web1"], ["vm.conf:c: vm c: template web not found: web1 is meant?"]),
    ],
)  # fmt: skip
def test_an_instance_that_cannot_exist_is_left_out(vms: list[VmConfig], left: list[str], problems: list[str]) -> None:
    """The others are used.  The sentence names the line."""
    found, said = resolve(vms, lambda _name: None)
    assert [vm.name for vm in found] == left
    assert [line.split(" not found")[0] for line in said] == [line.split(" not found")[0] for line in problems]


def test_a_disk_has_its_own_limits_before_those_of_the_template() -> None:
    """Each device gets the limits of the template's device of the same number."""
    template = conf("t", disks=(DiskConfig(path="/t0", iops_limit=100), DiskConfig(path="/t1", iops_limit=200)))
    disks = (DiskConfig(path="/a0"), DiskConfig(path="/a1", iops_limit=5), DiskConfig(path="/a2"))
    (made,), _ = resolve([conf("a", "t", disks=disks)], {"t": template}.get)
    assert [disk.iops_limit for disk in made.disks] == [100, 5, 0]
