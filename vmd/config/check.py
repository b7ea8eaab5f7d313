"""Reads a configuration: parses a file, then applies the rules that span its objects."""

import ipaddress
from collections.abc import Callable, Collection, Iterable, Mapping

from vmd.config.grammar import Grammar
from vmd.config.lexer import Lexer
from vmd.config.model import Config, Globals, SwitchConfig, VmConfig
from vmd.errors import VmdError, sentence
from vmd.scaled import fmt_scaled

MACRO_NAME_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")

Warn = Callable[[str], None]


class ConfigErrors(VmdError):
    """A configuration cannot be used; `errors` says why, in the order of the file."""

    def __init__(self, errors: Iterable[VmdError]) -> None:
        self.errors = tuple(errors)
        super().__init__(*self.errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def parse_macro_definition(text: str) -> tuple[str, str]:
    """Return name and value of `vmd -D name=value`; the last `=` separates them, as in vmd(8).

    Raises:
        VmdError: there is no `=`, or no file could name such a macro.
    """
    name, equals, value = text.rpartition("=")
    if not equals or not name or not MACRO_NAME_CHARS.issuperset(name):
        raise VmdError(f"could not parse macro definition {text}")
    return name, value


def load(
    path: str,
    *,
    macros: Mapping[str, str] | None = None,
    explicit: bool,
    warn: Warn,
    settings: Globals | None = None,
    known_switches: Collection[str] = (),
) -> Config:
    """Return what a vm.conf says.

    `macros` win over assignments in the file.  A file that does not exist is an empty one, with a warning
    if it was asked for by name (`explicit`).  `settings` and `known_switches` are what the daemon has
    already when a further file is loaded: global statements change them, interfaces may name them.

    Raises:
        ConfigErrors: the file cannot be read, or has errors; all of them, up to a limit.
    """
    lexer = Lexer(macros or {})
    settings = settings or Globals()
    try:
        lexer.open(path)
    except FileNotFoundError:
        if explicit:
            warn(f"warning: {path} does not exist, going on without it")
        return Config(settings=settings)
    except OSError as error:
        raise ConfigErrors([VmdError(f"{path}: {sentence(error)}")]) from error
    except VmdError as error:
        raise ConfigErrors([VmdError(f"{path}: {error}")]) from error
    config = Grammar().parse(lexer, warn, settings)
    for name in lexer.unused:
        warn(f"warning: macro '{name}' not used")
    if lexer.errors:
        raise ConfigErrors(lexer.errors)
    return check(config, warn, known_switches)


def check(config: Config, warn: Warn, known_switches: Collection[str] = ()) -> Config:
    """Warn of what cannot work as written; return the configuration without second switches of a name.

    Upstream keeps those and finds the first, so that the second gets a bridge nobody can use.
    """
    switches = {}
    for switch in config.switches:
        if switch.name in switches:
            warn(f'{switch.origin}: switch "{switch.name}" skipped (already exists)')
        else:
            switches[switch.name] = switch
    check_bridges(switches.values(), warn)
    check_prefixes(config.settings, warn)
    usable = {name for name, switch in switches.items() if switch.enabled}.union(known_switches)
    taps: dict[str, str] = {}
    lladdrs: dict[str, str] = {}
    for vm in config.vms:
        check_boot(vm, warn)
        check_limit(vm, config.settings, warn)
        for nic in vm.nics:
            if nic.switch and nic.switch not in usable:
                state = "is disabled" if nic.switch in switches else "not found"
                warn(f'{vm.origin}: vm "{vm.name}": switch "{nic.switch}" {state}')
            if nic.tap not in ("", "tap"):
                check_unique(vm, f"interface {nic.tap}", taps, warn)
            if nic.lladdr:
                check_unique(vm, f"lladdr {nic.lladdr.hex(':')}", lladdrs, warn)
            if nic.lladdr and nic.lladdr[0] & 1:
                warn(f'{vm.origin}: vm "{vm.name}": lladdr {nic.lladdr.hex(":")} is a multicast address')
    return config.replace(switches=tuple(switches.values()))


def check_bridges(switches: Iterable[SwitchConfig], warn: Warn) -> None:
    """Warn of switches that want one bridge to be two things at a time: the last one has its way."""
    users: dict[str, SwitchConfig] = {}
    for switch in switches:
        if not switch.enabled:
            continue
        other = users.setdefault(switch.interface, switch)
        if (other.rdomain or 0, other.up) != (switch.rdomain or 0, switch.up):
            bridge = f"bridge {switch.interface}"
            warn(f'{switch.origin}: switch "{switch.name}": {bridge} is set up for switch "{other.name}"')


def check_prefixes(settings: Globals, warn: Warn) -> None:
    """Warn of addresses that no interface can have, by the example of the first one."""
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
    """Warn of what only a kernel can use; an instance may yet get one from its parent."""
    if vm.kernel or vm.parent:
        return
    for field in ("initrd", "cmdline"):
        if getattr(vm, field):
            warn(f'{vm.origin}: vm "{vm.name}": {field} is of no use without boot')


def check_limit(vm: VmConfig, settings: Globals, warn: Warn) -> None:
    """Warn of a VM that could not even run alone."""
    limit_bytes = settings.limit_memory_bytes
    if limit_bytes is not None and vm.memory_bytes > limit_bytes:
        sizes = fmt_scaled(vm.memory_bytes), fmt_scaled(limit_bytes)
        warn(f'{vm.origin}: vm "{vm.name}": memory {sizes[0]} is more than limit memory {sizes[1]}')
    if vm.vcpus > settings.limit_vcpus:
        warn(f'{vm.origin}: vm "{vm.name}": vcpus {vm.vcpus} are more than limit vcpus {settings.limit_vcpus}')


def check_unique(vm: VmConfig, what: str, users: dict[str, str], warn: Warn) -> None:
    """Warn if a second interface, of the same VM or another, wants what only one can have."""
    if what in users:
        warn(f'{vm.origin}: vm "{vm.name}": {what} is used by vm "{users[what]}" already')
    else:
        users[what] = vm.name
