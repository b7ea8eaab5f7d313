"""VMs that clients describe: what a client may not set, and descriptions that do not fit the files that are sent."""

import errno
from typing import Any

import pytest

from vmd.config.model import (
    BootDevice,
    ConsoleLog,
    DiskConfig,
    Forward,
    NicConfig,
    Owner,
    Prefix,
    Rights,
    SeedConfig,
    VmConfig,
    VmFlag,
)
from vmd.errors import OperatorError
from vmd.ipc.messages.clients import StartRequest
from vmd.parent.requests import (
    check_paths,
    checked_request,
    described,
    one_shot_config,
    require_permitted_settings,
    require_startable,
    with_permitted_vhost,
)
from vmd.parent.vm import Vm

ROOT = Owner(uid=0, gid=0)
DISKS = (DiskConfig(path="/d0"), DiskConfig(path="/d1"))


def ask(config: VmConfig | None = None, *sent: str, **fields: Any) -> VmConfig:  # noqa: ANN401 - of a StartRequest
    """Return the VM that a client describes, with the files that it has sent."""
    message = StartRequest(name="mine", config=config, **fields)
    return described(
        message, given_boot="kernel" in sent, given_initrd="initrd" in sent, given_seed="seed" in sent
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "other"),
        ("parent", "template"),
        ("owner", Owner(uid=70, gid=70)),
        ("origin", "vm.conf:1"),
        ("plan_id", 7),
        ("plan_prefix4", (0x64400000, 10)),
        ("plan_prefix6", (1, 64)),
        ("rights", Rights(boot=ROOT, disks=ROOT, cdrom=ROOT, seed=ROOT)),
        ("fault", "no such owner"),
        ("console_log", ConsoleLog(path="/etc/cron.d/x")),
    ],
)
def test_what_no_client_gives_a_vm(field: str, value: object) -> None:
    """It is as without it: a client gets neither the rights of another user nor files that root writes."""
    assert ask(VmConfig(name="mine").replace(**{field: value})) == ask(None)


@pytest.mark.parametrize(("field", "value"), [("host_name", "x"), ("vhost", True), ("dns", ("1.1.1.1",))])
def test_what_no_client_gives_an_interface(field: str, value: object) -> None:
    """Only vm.conf does."""
    plain = NicConfig(local=True, switch="lan", rate_limit=7)
    (nic,) = ask(VmConfig(name="mine", nics=(plain.replace(**{field: value}),))).nics
    assert nic == plain


@pytest.mark.parametrize(
    ("fields", "sent", "flags"),
    [
        ({}, (), VmFlag(0)),
        ({"disks": DISKS}, (), VmFlag.DISK),
        ({"nics": (NicConfig(),)}, (), VmFlag.NETWORK),
        ({"cdrom": "/x.iso"}, (), VmFlag.CDROM),
        ({"seed": SeedConfig(user="x")}, ("seed",), VmFlag.SEED),
    ],
)
def test_what_counts_as_given_is_what_is_there(fields: dict[str, Any], sent: tuple[str, ...], flags: VmFlag) -> None:
    """A client cannot hide a disk from the check whether it may give an instance one."""
    assert ask(VmConfig(name="mine", **fields), *sent).given == flags
    assert ask(VmConfig(name="mine", given=VmFlag.SEED | VmFlag.INSTANCE, **fields), *sent).given == flags
    both = VmFlag.CPU | VmFlag.MEMORY
    assert ask(VmConfig(name="mine", given=both, **fields), *sent).given == flags | both


def test_a_vm_without_a_description_has_the_defaults() -> None:
    """The client only names it, for an instance that inherits all."""
    assert ask(None) == VmConfig(name="mine")


def test_the_secrets_of_a_seed_are_dropped() -> None:
    """They are in the file that the client has sent."""
    seed = SeedConfig(user="x", hostname="h", password="secret", ssh_keys=("/key",))
    assert ask(VmConfig(name="mine", seed=seed), "seed").seed == SeedConfig(user="x", hostname="h")


BOOTS = {"kernel": "/bsd", "given": VmFlag.KERNEL}
ON_DISK = {"kernel": "disk0:/bsd", "given": VmFlag.KERNEL, "disks": DISKS}


@pytest.mark.parametrize(
    ("fields", "sent", "text"),
    [
        (BOOTS, (), "the boot images that are configured and sent do not match"),
        ({"kernel": "/bsd"}, ("kernel",), "the boot images that are configured and sent do not match"),
        ({"given": VmFlag.KERNEL}, ("kernel",), "the boot images that are configured and sent do not match"),
        ({}, ("kernel",), "the boot images that are configured and sent do not match"),
        (ON_DISK, ("kernel",), "the boot images that are configured and sent do not match"),
        ({"cmdline": "quiet"}, (), "a command line needs a boot image of its own"),
        ({"initrd": "/i"}, ("initrd",), "an initrd needs a boot image of its own"),
        ({}, ("initrd",), "an initrd needs a boot image of its own"),
        (BOOTS, ("kernel", "initrd"), "the initrds that are configured and sent do not match"),
        ({**BOOTS, "initrd": "/i"}, ("kernel",), "the initrds that are configured and sent do not match"),
        ({**ON_DISK, "initrd": "disk0:/i"}, ("initrd",), "the initrds that are configured and sent do not match"),
        ({"seed": SeedConfig()}, (), "the seeds that are configured and sent do not match"),
        ({}, ("seed",), "the seeds that are configured and sent do not match"),
        ({**ON_DISK, "kernel": "disk99999999999:/bsd"}, (), "disk"),
        ({"disks": (DiskConfig(path="d0"),)}, (), "disk: not an absolute path: d0"),
        ({"disks": (DiskConfig(path=""),)}, (), "disk: not an absolute path: "),
        ({"cdrom": "./x.iso"}, (), "cdrom: not an absolute path: ./x.iso"),
        ({**BOOTS, "kernel": "bsd"}, ("kernel",), "boot image: not an absolute path: bsd"),
        ({**BOOTS, "initrd": "i"}, ("kernel", "initrd"), "initrd: not an absolute path: i"),
    ],
)
def test_a_description_that_does_not_fit_its_files(fields: dict[str, Any], sent: tuple[str, ...], text: str) -> None:
    """Nothing of it is started."""
    with pytest.raises(OperatorError) as refused:
        ask(VmConfig(name="mine", **fields), *sent)
    assert refused.value.number == errno.EINVAL
    assert text in str(refused.value)
    assert "mine" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        (BOOTS, ("kernel",)),
        ({**BOOTS, "cmdline": "quiet", "initrd": "/i"}, ("kernel", "initrd")),
        ({**ON_DISK, "initrd": "disk1p2:/i", "cmdline": "quiet"}, ()),
    ],
)
def test_a_description_that_fits_its_files(fields: dict[str, Any], sent: tuple[str, ...]) -> None:
    """What it boots is kept."""
    made = ask(VmConfig(name="mine", **fields), *sent)
    for field in ("kernel", "initrd", "cmdline"):
        assert getattr(made, field) == fields.get(field, "")
    check_paths(made)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"cmdline": ""}, "the command line is given twice"),
        ({"kernel": "disk0:/bsd"}, "the boot image is given twice"),
        ({"initrd": "disk0:/i"}, "the boot image is given twice"),
    ],
)
def test_settings_for_one_start_are_not_for_a_new_vm(fields: dict[str, str], text: str) -> None:
    """It has its own."""
    with pytest.raises(OperatorError, match=f"vm mine: {text}"):
        ask(VmConfig(name="mine"), **fields)


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "x" * 65])
def test_a_name_that_no_vm_has(name: str) -> None:
    """A client may send any."""
    with pytest.raises(OperatorError) as refused:
        described(StartRequest(name=name), given_boot=False, given_initrd=False, given_seed=False)
    assert refused.value.number == errno.EINVAL


# --- one start --------------------------------------------------------------------------------------------------

KNOWN = VmConfig(name="known", disks=DISKS, kernel="/bsd", initrd="/i", cmdline="quiet")


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"cmdline": ""}, {"cmdline": ""}),
        ({"cmdline": "single"}, {"cmdline": "single"}),
        ({"boot_device": BootDevice.CDROM}, {"boot_device": BootDevice.CDROM}),
        ({"kernel": "disk0:/k"}, {"kernel": "disk0:/k", "initrd": ""}),
        ({"kernel": "disk0:/k", "initrd": "disk1:/j"}, {"kernel": "disk0:/k", "initrd": "disk1:/j"}),
    ],
)
def test_what_a_start_may_change(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """For that start.  A kernel does not get the initrd of another one."""
    assert one_shot_config(KNOWN, StartRequest(name="known", **fields)) == KNOWN.replace(**changes)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kernel": "/k"}, "neither on a disk of the vm nor sent as an open file"),
        ({"initrd": "/k"}, "neither on a disk of the vm nor sent as an open file"),
        ({"kernel": "disk0:/k", "files": ("kernel",)}, "must both be on disks of the vm"),
        ({"kernel": "disk0:/k", "initrd": "disk0:/i", "files": ("initrd",)}, "must both be on disks of the vm"),
        ({"initrd": "disk0:/i", "files": ("initrd",)}, "must both be on disks of the vm"),
        ({"cmdline": "x" * 100_000}, ""),
    ],
)
def test_a_start_that_cannot_be_as_wanted(fields: dict[str, Any], text: str) -> None:
    """The client is told why."""
    with pytest.raises(OperatorError, match="vm known: ") as refused:
        one_shot_config(KNOWN, StartRequest(name="known", **fields))
    assert (refused.value.number, text in str(refused.value)) == (errno.EINVAL, True)


# --- a description that is complete -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"vcpus": 0}, errno.EINVAL, "vm mine: "),
        ({"cdrom": "/" + "x" * 5000}, errno.EINVAL, "vm mine: "),
        ({"seed": SeedConfig(hostname="-x")}, errno.EINVAL, "vm mine: "),
        ({"name": "a/b"}, errno.EINVAL, ""),
        ({"disks": ()}, errno.EINVAL, "vm mine: no kernel, disk or cdrom to boot from"),
        ({"disks": DISKS * 2}, errno.EBUSY, "vm mine: disk /d0 is given twice"),
        ({"fault": "no such owner"}, errno.EINVAL, "vm mine: no such owner"),
    ],
)
def test_a_description_has_to_follow_the_rules_of_vm_conf(fields: dict[str, Any], code: int, text: str) -> None:
    """Whoever sends it.  The first error is the answer."""
    whole = VmConfig(name="mine", disks=DISKS, seed=SeedConfig(hostname="web"))
    with pytest.raises(OperatorError) as refused:
        checked_request(whole.replace(**fields), bootable=False)
    assert refused.value.number == code
    assert str(refused.value).startswith(text)
    assert str(refused.value).count("vm mine") <= 1


def test_a_description_that_follows_all_rules() -> None:
    """It has neither a template nor a line in vm.conf.  A boot image that is sent is enough to start it."""
    whole = VmConfig(name="mine", disks=DISKS, seed=SeedConfig(hostname="web"))
    found = checked_request(whole.replace(parent="template", origin="vm.conf:3"), bootable=False)
    assert (found, found.parent, found.origin) == (whole, "", "")
    bare = VmConfig(name="mine")
    assert checked_request(bare, bootable=True) == bare
    require_startable(bare, bootable=True)
    with pytest.raises(OperatorError, match="vm mine: no kernel, disk or cdrom to boot from"):
        require_startable(bare, bootable=False)


# --- a stream ---------------------------------------------------------------------------------------------------

FORWARD = Forward(port=80, to=80)


@pytest.mark.parametrize(("uid", "from_config"), [(0, False), (0, True), (70, False), (70, True)])
def test_what_only_vm_conf_or_root_gives_a_vm_from_a_stream(uid: int, from_config: bool) -> None:
    """Forwards and fixed addresses are refused, unless vm.conf has the same; vhost is dropped."""
    plain = NicConfig(local=True)
    own = plain.replace(forwards=(FORWARD,))
    vm = Vm(1, VmConfig(name="mine", nics=(own,)), from_config=from_config)
    vm.uid = uid
    fixed = plain.replace(address=Prefix(address=bytes((10, 0, 0, 2)), length=31))
    other = plain.replace(forwards=(FORWARD, FORWARD.replace(port=81)))
    for nics, what in (
        ((plain,), ""),
        ((own,), "" if from_config else "interface 0: forward tcp port 80 to port 80"),
        ((plain, fixed), "interface 1: a fixed address"),
        ((other, fixed), "interface 0: forward tcp port 80 to port 80"),
    ):
        config = VmConfig(name="mine", nics=nics)
        if not what or uid == 0:
            require_permitted_settings(vm, config)
            continue
        with pytest.raises(OperatorError, match=f"vm mine: {what}: only vm.conf, or root, gives it") as refused:
            require_permitted_settings(vm, config)
        assert refused.value.number == errno.EPERM
    wanted = VmConfig(name="mine", nics=(plain.replace(vhost=True), plain))
    kept = uid == 0 or from_config
    assert [nic.vhost for nic in with_permitted_vhost(vm, wanted).nics] == [kept, False]
