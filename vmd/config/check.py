"""Reads a configuration: parses a file, then applies the rules that span several objects."""

import contextlib
import functools
import grp
import ipaddress
import os
import pwd
from collections.abc import Collection, Iterable, Iterator, Mapping

from vmd.config import rules
from vmd.config.grammar import Grammar, Warn
from vmd.config.lexer import Lexer
from vmd.config.model import FIXED_LENGTHS, IDS, ROOT, WHEEL, Config, Globals, NicConfig, SwitchConfig, VmConfig
from vmd.errors import VmdError, sentence
from vmd.nearest import meant
from vmd.scaled import fmt_scaled
from vmd.seed.parts import HASHED

MACRO_NAME_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")

RANGES = ("/etc/subuid", "/etc/subgid")
USERS = ("/etc/passwd", "/etc/group", *RANGES)

Claim = tuple[str, int, int]  # (protocol, port, 0), or ("in" or "is", prefix length, prefix): `claims`


class ConfigErrors(VmdError):
    """A configuration cannot be used.  `errors` has the reasons in the order of the file.

    The text has one line for each error.  Unprintable characters, such as a newline in a file name, are escaped.
    """

    def __init__(self, errors: Iterable[VmdError]) -> None:
        self.errors = tuple(errors)
        super().__init__(*self.errors)

    def __str__(self) -> str:
        return "\n".join(map(printable, self.errors))

    @property
    def summary(self) -> str:
        """The result of a reload with this file, as a sentence: the number of errors, and that nothing changed."""
        count = len(self.errors)
        return f"{count} error{'s' if count > 1 else ''}, configuration unchanged"


def printable(error: VmdError) -> str:
    """Return the text of an error as one line: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(error))


def parse_macro_definition(text: str) -> tuple[str, str]:
    """Return the name and the value of `vmd -D name=value`.  The last `=` separates them, as in vmd(8).

    Raises:
        VmdError: there is no `=`, or the name cannot be that of a macro.
    """
    name, equals, value = text.rpartition("=")
    if not equals or not name or not MACRO_NAME_CHARS.issuperset(name):
        raise VmdError(f"could not parse macro definition {text}")
    return name, value


@functools.cache
def grammar() -> Grammar:
    """Return the parser of this process.  It is kept: making its tables takes longer than parsing a file."""
    return Grammar()


def load(
    path: str,
    *,
    macros: Mapping[str, str] | None = None,
    may_be_missing: bool = False,
    starting: bool = False,
    warn: Warn,
    settings: Globals | None = None,
    known_switches: Collection[SwitchConfig] = (),
) -> Config:
    """Return the configuration that a vm.conf describes.

    `macros` take precedence over assignments in the file.  With `may_be_missing` a file that does not exist counts as
    an empty one, with a warning.  With `starting` an unknown owner or a missing included file is a warning, not an
    error: the daemon starts without what depends on it.  `settings` and `known_switches` are those that the daemon has
    when `vmctl load` adds a file: global statements change the settings, interfaces may name the switches.

    Raises:
        ConfigErrors: the file cannot be read, or has errors.  It lists all errors, up to a limit.
    """
    lexer = Lexer(macros or {})
    settings = settings or Globals()
    try:
        lexer.open(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and may_be_missing:
            warn(f"warning: {path} does not exist, going on without it")
            require_ids(settings)
            return Config(settings=settings)
        raise ConfigErrors([VmdError(f"{path}: {sentence(error)}")]) from error
    except VmdError as error:
        raise ConfigErrors([VmdError(f"{path}: {error}")]) from error
    config = grammar().parse(lexer, warn, settings, starting=starting)
    for name in lexer.unused:
        warn(f"warning: macro '{name}' not used")
    if lexer.errors:
        raise ConfigErrors(lexer.errors)
    require_ids(config.settings)
    return check(config, warn, known_switches)


def check(config: Config, warn: Warn, known_switches: Collection[SwitchConfig] = ()) -> Config:
    """Warn of statements that cannot work.  Return the configuration, with only the first switch of each name.

    Upstream keeps a second switch of the same name.  It sets up the bridge of that switch, but no interface can use it.
    """
    switches: dict[str, SwitchConfig] = {}
    for switch in config.switches:
        if switches.setdefault(switch.name, switch) is not switch:
            warn(f'{switch.origin}: switch "{switch.name}" skipped (already exists)')
    check_bridges(switches.values(), warn)
    check_prefixes(config.settings, warn)
    usable = {switch.name: switch for switch in (*switches.values(), *known_switches) if switch.enabled}
    taps: dict[str, str] = {}
    lladdrs: dict[str, str] = {}
    logs: dict[str, str] = {}
    for vm in config.vms:
        check_boot(vm, warn)
        check_name(vm, warn)
        check_allow(vm, warn)
        check_limit(vm, config.settings, warn)
        check_secret(vm, warn)
        if vm.console_log is not None:
            check_unique(vm, f"console log {vm.console_log.path_of(vm.name)}", logs, warn)
        for index, nic in enumerate(vm.nics):
            check_connection(vm, index, usable, switches, warn)
            if nic.tap not in ("", "tap"):
                check_unique(vm, f"interface {nic.tap}", taps, warn)
            if nic.lladdr:
                check_unique(vm, f"lladdr {nic.lladdr.hex(':')}", lladdrs, warn)
            if nic.forwards and not config.settings.local_nat:
                warn(f'{vm.origin}: vm "{vm.name}": interface {index}: forward: not without NAT (local nat disable)')
    check_locals(config.vms, warn)
    return config.replace(switches=tuple(switches.values()))


def check_bridges(switches: Iterable[SwitchConfig], warn: Warn) -> None:
    """Warn of switches that set up the same bridge in different ways.  The last of them takes effect."""
    users: dict[str, SwitchConfig] = {}
    for switch in switches:
        if not switch.enabled:
            continue
        other = users.setdefault(switch.interface, switch)
        if (other.rdomain or 0, other.up) != (switch.rdomain or 0, switch.up):
            bridge = f"bridge {switch.interface}"
            warn(f'{switch.origin}: switch "{switch.name}": {bridge} is set up differently by switch "{other.name}"')


def check_prefixes(settings: Globals, warn: Warn) -> None:
    """Warn of a `local` prefix with addresses that no interface can have.  Only its first address is tested."""
    ranges = (
        ("prefix", settings.local_prefix, settings.local_prefix_origin),
        ("inet6 prefix", settings.local_inet6_prefix, settings.local_inet6_prefix_origin),
    )
    for what, prefix, origin in ranges:
        if prefix is None:
            continue
        start = ipaddress.ip_address(prefix.address)
        first = start + (1 << 8 if start.version == 4 else 1 << 66)
        nowhere = first.is_reserved or (first.version == 4 and first.packed[0] == 0)
        if first.is_loopback or first.is_multicast or first.is_link_local or nowhere:
            where = f"{origin}: " if origin else ""
            warn(f"{where}local {what} {start}/{prefix.length}: guests cannot have addresses such as {first}")


def check_boot(vm: VmConfig, warn: Warn) -> None:
    """Warn of an initrd or a command line without a kernel.  An instance may inherit the kernel from its template."""
    if vm.kernel or vm.parent:
        return
    for field in ("initrd", "cmdline"):
        if getattr(vm, field):
            warn(f'{vm.origin}: vm "{vm.name}": {field} is of no use without boot')


def check_connection(
    vm: VmConfig, index: int, usable: Mapping[str, SwitchConfig], named: Collection[str], warn: Warn
) -> None:
    """Warn of an interface whose switch is unknown, disabled or in another routing domain."""
    nic = vm.nics[index]
    switch = usable.get(nic.switch)
    what = f'{vm.origin}: vm "{vm.name}": interface {index}'
    if nic.switch and switch is None:
        state = "is disabled" if nic.switch in named else "not found"
        close = "" if nic.switch in named else meant(nic.switch, named)
        warn(f'{what}: switch "{nic.switch}" {state}: the interface is connected to nothing{close}')
    if switch is not None and nic.rdomain not in (None, switch.rdomain or 0):
        warn(
            f"{what}: rdomain {nic.rdomain} differs from rdomain {switch.rdomain or 0} of its switch: "
            "this vm cannot start"
        )


def check_name(vm: VmConfig, warn: Warn) -> None:
    """Warn of a name that looks like an id."""
    if vm.name.isdigit():
        warn(f'{vm.origin}: vm "{vm.name}": the name is a number: in vmctl it means this vm, not the vm with that id')


def check_allow(vm: VmConfig, warn: Warn) -> None:
    """Warn of an `allow instance` without effect: root needs none, and it allows nobody else."""
    if vm.allow is None or vm.allow.owner != WHEEL or has_members(ROOT):
        return
    warn(
        f'{vm.origin}: vm "{vm.name}": allow instance has no owner: it is for group 0, in which only root is; '
        "add `owner`"
    )


def has_members(gid: int) -> bool:
    """Return whether a group has a member other than root."""
    try:
        members = set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        members = set()
    members.update(user.pw_name for user in pwd.getpwall() if user.pw_gid == gid)
    return bool(members - {pwd.getpwuid(ROOT).pw_name})


def require_ids(settings: Globals) -> None:
    """Raise ConfigErrors if a user, a group or a range of subordinate ids (subuid(5)) has one of the ids of VMs.

    Only files of this host are read.  Listing the users of a directory server takes long, and most servers refuse it.
    """
    ours = range(settings.first_id, settings.first_id + IDS + 1)
    for path in USERS:
        for name, taken in ids_in(path):
            if taken.start < ours.stop and ours.start < taken.stop:
                where = settings.first_id_origin and f"{settings.first_id_origin}: "
                first = max(ours.start, taken.start)
                raise ConfigErrors([VmdError(f"{where}ids {settings.first_id}: {first} belongs to {name} in {path}")])


def ids_in(path: str) -> Iterator[tuple[str, range]]:
    """Yield (name, ids) for each line of a file of users, groups or subordinate ids (subuid(5))."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.rstrip("\n").split(":") for line in file]
    except OSError:
        return
    for row in rows:
        with contextlib.suppress(ValueError, IndexError):  # a malformed line, which other programs ignore, too
            first, count = (int(row[1]), int(row[2])) if path in RANGES else (int(row[2]), 1)
            yield printable(VmdError(row[0])), range(first, first + count)


def check_limit(vm: VmConfig, settings: Globals, warn: Warn) -> None:
    """Warn of a VM that exceeds a limit of all VMs together by itself."""
    limit_bytes = settings.limit_memory_bytes
    if limit_bytes is not None and vm.memory_bytes > limit_bytes:
        sizes = fmt_scaled(vm.memory_bytes), fmt_scaled(limit_bytes)
        warn(f'{vm.origin}: vm "{vm.name}": memory {sizes[0]} is more than limit memory {sizes[1]}')
    if vm.vcpus > settings.limit_vcpus:
        warn(f'{vm.origin}: vm "{vm.name}": vcpus {vm.vcpus} are more than limit vcpus {settings.limit_vcpus}')


def check_locals(vms: Iterable[VmConfig], warn: Warn) -> None:
    """Warn of two VMs that forward the same port of the host, or have fixed addresses in overlapping networks."""
    seen: list[tuple[VmConfig, NicConfig]] = []
    claimed_by: dict[Claim, list[int]] = {}  # indices into `seen`
    for vm in vms:
        for nic in vm.nics:
            own, conflicting = claims(nic)
            for index in sorted({index for claim in conflicting for index in claimed_by.get(claim, ())}):
                other, theirs = seen[index]
                if other is vm:
                    continue
                for forward, taken in ((ours, each) for ours in nic.forwards for each in theirs.forwards):
                    if forward.overlaps(taken):
                        what = f'forward {forward}: vm "{other.name}" has {taken}'
                        warn(f'{vm.origin}: vm "{vm.name}": {what}: only one of them can run')
                ours, fixed = nic.address, theirs.address
                if ours is not None and fixed is not None and rules.same_network(ours, fixed):
                    what = f'address {rules.shown_prefix(ours)}: vm "{other.name}" has {rules.shown_prefix(fixed)}'
                    warn(f'{vm.origin}: vm "{vm.name}": {what}: only one of them can run')
            for claim in own:
                claimed_by.setdefault(claim, []).append(len(seen))
            if own:
                seen.append((vm, nic))


def claims(nic: NicConfig) -> tuple[list[Claim], list[Claim]]:
    """Return the claims of an interface, and the claims of another interface that conflict with it.

    A claim is a key for a dictionary, so that not every interface has to be compared with every other one.  A port of
    the host conflicts with the same port.  A network claims ("in", ...) for itself and each network around it, and
    ("is", ...) for itself.  It conflicts with each network inside it, which claims "in" for it.  It also conflicts with
    each network around it, which claims "is" for itself.
    """
    own: list[Claim] = [(forward.protocol, port, 0) for forward in nic.forwards for port in forward.ports]
    conflicting = list(own)
    if nic.address is not None:
        number, length = int.from_bytes(nic.address.address, "big"), nic.address.length
        networks = [(each, number >> 32 - each) for each in range(FIXED_LENGTHS.start, length + 1)]
        own += [("in", *each) for each in networks]
        own.append(("is", *networks[-1]))
        conflicting.append(("in", *networks[-1]))
        conflicting += [("is", *each) for each in networks[:-1]]
    return own, conflicting


def check_secret(vm: VmConfig, warn: Warn) -> None:
    """Warn of a password hash in a file that every user may read."""
    path = vm.origin.rpartition(":")[0]
    if vm.seed is not None and vm.seed.password.startswith(HASHED) and path:
        with contextlib.suppress(OSError):  # the file has been removed since
            if os.stat(path).st_mode & 0o004:
                what = f"every user may read the password-hash: make {path} readable by root only, or name a file"
                warn(f'{vm.origin}: vm "{vm.name}": {what}')


def check_unique(vm: VmConfig, what: str, users: dict[str, str], warn: Warn) -> None:
    """Warn if `what`, such as a tap or a log file, is used a second time, by the same VM or another."""
    if what in users:
        warn(f'{vm.origin}: vm "{vm.name}": {what} is used by vm "{users[what]}" already')
    else:
        users[what] = vm.name
