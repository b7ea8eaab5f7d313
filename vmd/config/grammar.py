"""The productions of vm.conf.  Each action builds a part of the configuration (*cat. 2.2 - 2.5*).

The docstring of an action is its production.  After a semantic error parsing continues, so that one run finds all
errors.  A syntax error skips the rest of its line: `Lexer.skip_line`, and `error NL` below, which is accepted only at
the start of a line.  `check.py` has the rules that span several objects.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from vmd.config import lexer, rules, values, yacc
from vmd.config.lexer import Lexer, Token
from vmd.config.model import (
    COUNT_MAX,
    DEFAULT_LOG_BYTES,
    MIN_MEMORY_BYTES,
    ROOT,
    SOCKET_PATH_MAX,
    WHEEL,
    AgentxConfig,
    AllowInstance,
    BootDevice,
    Config,
    ConsoleLog,
    DiskConfig,
    Globals,
    NicConfig,
    Owner,
    SeedConfig,
    SwitchConfig,
    VirtioMode,
    VmConfig,
    VmFlag,
    VmLimits,
)
from vmd.config.rules import shown
from vmd.config.yacc import Production
from vmd.ipc.foreign import typed_format
from vmd.log import log
from vmd.nearest import nearest
from vmd.seed import rules as seed_rules
from vmd.seed.parts import HASHED
from vmd.units import MIB

# Options of a VM that are also options of a disk, an interface or `boot`.  On the first line of a block, two options of
# a VM may follow each other.  There each of these belongs to the disk, interface or `boot` before it.
GOES_ON = frozenset({"CMDLINE", "INITRD", "LIMIT"})
KEYWORDS = frozenset(lexer.TOKENS) - {"NL", "NUMBER", "STRING"}
AGENTX_CONTEXT_MAX = 32
# Ends of the sentence for a wrong token after `limit`: limits of a VM, a disk and an interface differ in their form.
LIMIT_BRACES = {
    "{": ": the limits of a disk or an interface need no braces",
    **dict.fromkeys(("MEMORY", "CPU", "WEIGHT"), ": the limits of a vm need braces, limit { ... }"),
}

T = TypeVar("T")
Warn = Callable[[str], None]


FLAGS = {
    "boot": VmFlag.KERNEL,
    "cdrom": VmFlag.CDROM,
    "disk": VmFlag.DISK,
    "instance": VmFlag.INSTANCE,
    "interface": VmFlag.NETWORK,
    "memory": VmFlag.MEMORY,
    "seed": VmFlag.SEED,
    "vcpus": VmFlag.CPU,
}


class Draft:
    """A `vm` or `switch` block of which only a part has been read."""

    def __init__(self, name: str, parent: str, source: Lexer) -> None:
        self.name = name
        self.line = source.line
        self.errors = len(source.errors)  # number of errors before this block
        self.where = source.where
        self.fields: dict[str, Any] = {"name": name, "origin": self.where}
        if parent:
            self.fields["parent"] = parent
        self.given = VmFlag.INSTANCE if parent else VmFlag(0)
        self.disks: list[DiskConfig] = []
        self.nics: list[NicConfig] = []
        self.nics_min: int | None = None
        self.faults: list[str] = []  # why this VM cannot start; other VMs can


class Grammar:
    """The parser.  It can be used for several files, one after the other."""

    def __init__(self) -> None:
        tables = yacc.Tables(yacc.rules_of(self), {*lexer.TOKENS, *lexer.LITERALS}, "file", GOES_ON)
        self.parser = yacc.Parser(tables, self.syntax_error)
        # By default the parser reads a token of lookahead even in a state where it can only reduce.  Then the first
        # token of a line would be read before the statement of the line before it, such as an include or a macro,
        # takes effect.  A defaulted state reduces without lookahead.  States that reduce an empty production keep the
        # lookahead: error recovery would return to them and reduce for ever.  State 0 is safe, because recovery never
        # returns to it, and it must be defaulted: so recovery works for an error on the first line, too.
        self.parser.defaulted = {
            state: action
            for state, actions in enumerate(tables.action)
            for action in set(actions.values())
            if len(set(actions.values())) == 1 and action < 0
            if tables.rules[-action].length or state == 0
        }

    def begin(self, source: Lexer, warn: Warn, settings: Globals, *, starting: bool) -> None:
        """Prepare for a new file: forget everything from the previous one."""
        self.starting = starting
        self.lexer = source
        self.lexer.on_missing = warn if starting else None
        self.warn = warn
        self.settings = settings
        self.switches: list[SwitchConfig] = []
        self.vms: dict[str, VmConfig] = {}
        self.draft = Draft("", "", source)
        self.nic: dict[str, Any] = {}
        self.allow = VmFlag(0)
        self.allow_owner: Owner | None = None

    def parse(self, source: Lexer, warn: Warn, settings: Globals, *, starting: bool = False) -> Config:
        """Return the configuration in an open file, with `settings` changed by it.  Invalid if `source` has errors.

        `starting`: an unknown owner or a missing include file is a warning, not an error.
        """
        self.begin(source, warn, settings, starting=starting)
        self.parser.parse(source)
        return Config(settings=self.settings, switches=tuple(self.switches), vms=tuple(self.vms.values()))

    def error(self, what: str, line: int | None = None) -> None:
        """Report a semantic error in the current statement, or at another line."""
        self.lexer.error(what, line)

    def syntax_error(self, token: Token | None) -> None:
        if self.lexer.spread is not None:
            first, last = self.lexer.spread
            self.error(f"a quoted string begins here and ends on line {last}: is a quote missing?", first)
            self.lexer.spread = None
        if token is None:
            self.error("syntax error at end of file")
            return
        if token.type != "ERROR":
            quoted = token.text if token.type == "NL" else f'"{shown(token.text)}"'
            self.error(f"syntax error at {quoted}{self.meant(token)}")
        self.lexer.skip_line(token)

    def meant(self, token: Token) -> str:
        """Return the end of the sentence for a syntax error: a hint, such as the keyword that was probably meant."""
        state = self.parser.states[-1]
        last = self.parser.symbols[-1]
        if last.type == "LIMIT" and token.type in LIMIT_BRACES:
            return LIMIT_BRACES[token.type]
        if last.type == "strings" and last.value[0] == "forward":  # parsed as the name of a tap until the port number
            return ": the forward of an interface needs braces: interface { forward ... }"
        if last.type == "SEED" and token.type != ",":
            return ": the options of a seed need braces, seed { ... }"
        if last.type == "macro_name":  # a word at the start of a line without `=`: perhaps a misspelt keyword
            found = nearest(last.value, self.keywords(self.parser.states[-2]))
            if found:
                return f': did you mean "{found}" instead of "{shown(last.value)}"?'
            if token.type != "NL":
                return f': "{shown(last.value)}" is not a statement, and no "=" follows it as in a macro'
            return ""
        found = nearest(token.text, self.keywords(state)) if token.type == "STRING" else ""
        return f': did you mean "{found}"?' if found else ""

    def keywords(self, state: int) -> list[str]:
        """Return the keywords that the parser accepts in a state."""
        return [lexer.keyword_of(kind) for kind in self.parser.action[state] if kind in KEYWORDS]

    # Lines

    def p_file(self, p: Production) -> None:
        """file : lines"""

    def p_lines(self, p: Production) -> None:
        """lines :
                 | lines NL
                 | lines statement NL"""

    def p_lines_error(self, p: Production) -> None:
        """lines : lines error NL"""
        p.parser.errok()

    def p_statement(self, p: Production) -> None:
        """statement : include
                     | macro
                     | local
                     | socket
                     | agentx
                     | ids
                     | limit
                     | metrics
                     | staggered
                     | switch
                     | vm"""

    def p_newlines(self, p: Production) -> None:
        """newlines : NL
                    | newlines NL"""

    def p_strings(self, p: Production) -> None:
        """strings : STRING"""
        p[0] = [p[1]]

    def p_strings_more(self, p: Production) -> None:
        """strings : strings STRING"""
        p[1].append(p[2])
        p[0] = p[1]

    def p_string(self, p: Production) -> None:
        """string : strings"""
        p[0] = "".join(p[1])

    def p_enabled(self, p: Production) -> None:
        """enabled : ENABLE
                   | DISABLE"""
        p[0] = p[1] == "enable"

    def p_updown(self, p: Production) -> None:
        """updown : UP
                  | DOWN"""
        p[0] = p[1] == "up"

    # Statements outside blocks

    def p_include(self, p: Production) -> None:
        """include : INCLUDE string"""
        self.lexer.include(p[2])

    def p_macro(self, p: Production) -> None:
        """macro : macro_name '=' string"""
        self.lexer.define(p[1], p[3])

    def p_macro_number(self, p: Production) -> None:
        """macro : macro_name '=' NUMBER"""
        self.lexer.define(p[1], str(p[3]))

    def p_macro_name(self, p: Production) -> None:
        """macro_name : STRING
                      | IDS
                      | LIMIT
                      | METRICS"""
        p[0] = p[1]

    def p_local_prefix(self, p: Production) -> None:
        """local : LOCAL PREFIX range"""
        prefix = self.value(values.prefix4, p[3], self.settings.local_prefix)
        self.settings = self.settings.replace(local_prefix=prefix, local_prefix_origin=self.lexer.where)

    def p_local_inet6(self, p: Production) -> None:
        """local : LOCAL INET6"""
        self.settings = self.settings.replace(local_inet6=True)

    def p_local_inet6_prefix(self, p: Production) -> None:
        """local : LOCAL INET6 PREFIX range"""
        prefix = self.value(values.prefix6, p[4], None)
        self.settings = self.settings.replace(
            local_inet6=True, local_inet6_prefix=prefix, local_inet6_prefix_origin=self.lexer.where
        )

    def p_local_nat(self, p: Production) -> None:
        """local : LOCAL NAT enabled"""
        self.settings = self.settings.replace(local_nat=p[3])

    def p_local_dns(self, p: Production) -> None:
        """local : LOCAL DNS strings"""
        kept = self.settings.local_dns
        self.settings = self.settings.replace(local_dns=self.value(values.name_servers, p[3], kept))

    def p_range(self, p: Production) -> None:
        """range : string
                 | NUMBER
                 | NUMBER string"""
        # `10/8` is a NUMBER and a STRING, because a slash ends a number
        p[0] = "".join(str(part) for part in p[1:])

    def p_socket(self, p: Production) -> None:
        """socket : SOCKET OWNER owner"""
        where = self.lexer.where
        owner = self.owner(p[3], lambda what: self.warn(f"{where}: {what}: only root may use the control socket"))
        self.settings = self.settings.replace(socket_owner=owner.replace(gid=owner.gid or ROOT))

    def p_agentx(self, p: Production) -> None:
        """agentx : AGENTX agentx_options"""
        self.settings = self.settings.replace(agentx=AgentxConfig(**p[2]))

    def p_agentx_options(self, p: Production) -> None:
        """agentx_options :
                          | agentx_options CONTEXT string
                          | agentx_options PATH string"""
        p[0] = p[1] if len(p) > 1 else {}
        if len(p) == 1:
            return
        if p[2] == "context" and rules.too_long(p[3], AGENTX_CONTEXT_MAX):
            self.error("agentx context too large")
        elif p[2] == "path" and not p[3].startswith("/"):
            self.error("agentx path is not absolute")
        elif p[2] == "path" and rules.too_long(p[3], SOCKET_PATH_MAX):
            self.error("agentx path too large")
        else:
            p[0][p[2]] = p[3]

    def p_metrics(self, p: Production) -> None:
        """metrics : METRICS LISTEN string"""
        place = self.value(values.listen, p[3], None)
        if place is not None and place not in self.settings.metrics:
            self.settings = self.settings.replace(metrics=(*self.settings.metrics, place))

    def p_staggered(self, p: Production) -> None:
        """staggered : STAGGERED START PARALLEL NUMBER DELAY NUMBER"""
        if not 1 <= p[4] <= COUNT_MAX:
            self.error(f"invalid parallel value: {p[4]}")
        elif not 0 <= p[6] <= COUNT_MAX:
            self.error(f"invalid delay: {p[6]}")
        else:
            self.settings = self.settings.replace(start_parallel=p[4], start_delay_s=p[6])

    def p_ids(self, p: Production) -> None:
        """ids : IDS NUMBER"""
        first = self.value(values.first_id, p[2], self.settings.first_id)
        self.settings = self.settings.replace(first_id=first, first_id_origin=self.lexer.where)

    def p_limit_memory(self, p: Production) -> None:
        """limit : LIMIT MEMORY NUMBER
                 | LIMIT MEMORY string"""
        self.settings = self.settings.replace(limit_memory_bytes=self.value(values.memory_limit, p[3], None))

    def p_limit_number(self, p: Production) -> None:
        """limit : LIMIT VMS NUMBER
                 | LIMIT VCPUS NUMBER"""
        if not 0 <= p[3] <= COUNT_MAX:
            self.error(f"invalid limit: {p[3]}")
        else:
            self.settings = self.settings.replace(**{f"limit_{p[2]}": p[3]})

    # switch blocks

    def p_switch(self, p: Production) -> None:
        """switch : switch_name '{' switch_body '}'"""
        draft = self.draft
        if "interface" not in draft.fields and len(self.lexer.errors) > draft.errors:
            return  # the line with the error may have been the interface
        if "interface" not in draft.fields:
            self.error(f'switch "{shown(draft.name)}" is missing interface name', draft.line)
            return
        self.switches.append(SwitchConfig(**draft.fields))

    def p_switch_name(self, p: Production) -> None:
        """switch_name : SWITCH string"""
        self.draft = Draft(self.value(rules.switch_name, p[2], ""), "", self.lexer)

    def p_switch_body(self, p: Production) -> None:
        """switch_body : switch_option
                       | newlines switch_option
                       | switch_lines
                       | switch_lines switch_option"""

    def p_switch_lines(self, p: Production) -> None:
        """switch_lines : switch_first NL
                        | newlines switch_first NL
                        | switch_lines NL
                        | switch_lines switch_option NL"""

    def p_switch_lines_error(self, p: Production) -> None:
        """switch_lines : newlines error NL
                        | switch_lines error NL"""
        p.parser.errok()

    def p_switch_first(self, p: Production) -> None:
        """switch_first : switch_option
                        | switch_option switch_option"""

    def p_switch_enabled(self, p: Production) -> None:
        """switch_option : enabled"""
        self.draft.fields["enabled"] = p[1]

    def p_switch_group(self, p: Production) -> None:
        """switch_option : GROUP string"""
        self.draft.fields["group"] = self.value(rules.group_name, p[2], "")

    def p_switch_interface(self, p: Production) -> None:
        """switch_option : INTERFACE string"""
        self.draft.fields["interface"] = self.value(rules.bridge_name, p[2], "")

    def p_switch_locked(self, p: Production) -> None:
        """switch_option : LOCKED LLADDR"""
        self.draft.fields["locked"] = True

    def p_switch_rdomain(self, p: Production) -> None:
        """switch_option : RDOMAIN NUMBER"""
        self.draft.fields["rdomain"] = self.value(rules.rdomain, p[2], 0)

    def p_switch_updown(self, p: Production) -> None:
        """switch_option : updown"""
        self.draft.fields["up"] = p[1]

    # vm blocks

    def p_vm(self, p: Production) -> None:
        """vm : vm_name '{' vm_body '}'"""
        draft = self.draft
        if draft.name in self.vms:
            # As upstream, a second VM of the same name is not an error: `vmctl load` may read a file twice.
            self.warn(f'{draft.where}: vm "{shown(draft.name)}" skipped (already exists)')
            return
        if draft.faults:
            draft.fields["fault"] = draft.faults[0]
            self.warn(f'{draft.where}: vm "{shown(draft.name)}": {draft.faults[0]}: this vm cannot start')
        missing = max(0, (draft.nics_min or 0) - len(draft.nics))
        self.vms[draft.name] = VmConfig(
            **draft.fields,
            given=draft.given,
            disks=tuple(draft.disks),
            nics=(*draft.nics, *(NicConfig() for _ in range(missing))),
        )

    def p_vm_name(self, p: Production) -> None:
        """vm_name : VM string
                   | VM string INSTANCE string"""
        parent = self.value(values.parent_name, p[2], "") if len(p) > 3 else ""
        name = self.value(rules.vm_name, p[len(p) - 1], "")
        self.draft = Draft(name, parent, self.lexer)

    def p_vm_body(self, p: Production) -> None:
        """vm_body : vm_option
                   | newlines vm_option
                   | vm_lines
                   | vm_lines vm_option"""

    def p_vm_lines(self, p: Production) -> None:
        """vm_lines : vm_first NL
                    | newlines vm_first NL
                    | vm_lines NL
                    | vm_lines vm_option NL"""

    def p_vm_lines_error(self, p: Production) -> None:
        """vm_lines : newlines error NL
                    | vm_lines error NL"""
        p.parser.errok()

    def p_vm_first(self, p: Production) -> None:
        """vm_first : vm_option
                    | vm_option vm_option"""

    def p_vm_enabled(self, p: Production) -> None:
        """vm_option : enabled"""
        self.draft.fields["enabled"] = p[1]

    def p_vm_disk(self, p: Production) -> None:
        """vm_option : DISK string disk_options"""
        self.draft.given |= VmFlag.DISK
        options = dict(reversed(p[3]))
        if len(options) != len(p[3]):
            self.error("an option of the disk is given twice")
        serial = options.get("serial", "")
        if serial and serial in [disk.serial for disk in self.draft.disks]:
            self.error(f"serial {shown(serial)} is used by another disk of this vm")
        if self.value(rules.disk_count, len(self.draft.disks) + 1, 0):
            path = self.value(values.disk_path, self.lexer.beside(p[2]), "")
            form, limit = options.get("format") or typed_format(p[2], path), options.get("limit", {})
            iops, rate = limit.get("iops", 0), limit.get("rate", 0)
            self.draft.disks.append(
                DiskConfig(path=path, format=form, serial=serial, iops_limit=iops, rate_limit=rate)
            )

    def p_disk_options(self, p: Production) -> None:
        """disk_options :
                        | disk_options disk_option"""
        p[0] = [*p[1], p[2]] if len(p) > 1 else []

    def p_disk_format(self, p: Production) -> None:
        """disk_option : FORMAT string"""
        p[0] = "format", self.value(rules.disk_format, p[2], "")

    def p_disk_serial(self, p: Production) -> None:
        """disk_option : SERIAL string"""
        p[0] = "serial", self.value(rules.disk_serial, p[2], "")

    def p_disk_limit(self, p: Production) -> None:
        """disk_option : LIMIT disk_limits"""
        p[0] = "limit", self.limits_by_name(p[2])

    def p_disk_limits(self, p: Production) -> None:
        """disk_limits : disk_limit
                       | disk_limits disk_limit"""
        p[0] = [p[1]] if len(p) == 2 else [*p[1], p[2]]

    def p_disk_iops(self, p: Production) -> None:
        """disk_limit : IOPS NUMBER"""
        p[0] = "iops", self.value(rules.iops, p[2], 0)

    def p_disk_rate(self, p: Production) -> None:
        """disk_limit : rate"""
        p[0] = "rate", p[1]

    def p_rate(self, p: Production) -> None:
        """rate : RATE NUMBER
                | RATE string"""
        p[0] = self.value(values.rate, p[2], 0)

    def limits_by_name(self, limits: list[tuple[str, int]]) -> dict[str, int]:
        """Return limits as a dictionary; report a limit that is given twice."""
        found = dict(reversed(limits))
        if len(found) != len(limits):
            self.error("a limit is given twice")
        return found

    # limits of a whole VM

    def p_vm_limit(self, p: Production) -> None:
        """vm_option : LIMIT '{' limit_body '}'"""
        if self.once("limit"):
            limits = self.limits_by_name(p[3])
            self.draft.fields["limit"] = VmLimits(
                memory_bytes=limits.get("memory", 0), cpu_percent=limits.get("cpu", 0), weight=limits.get("weight", 0)
            )

    def p_limit_body(self, p: Production) -> None:
        """limit_body : limit_row
                      | newlines limit_row
                      | limit_lines
                      | limit_lines limit_row"""
        p[0] = [each for part in p[1:] if part is not None for each in part]

    def p_limit_lines(self, p: Production) -> None:
        """limit_lines : limit_row NL
                       | newlines limit_row NL
                       | limit_lines NL
                       | limit_lines limit_row NL"""
        p[0] = [each for part in p[1:] if isinstance(part, list) for each in part]

    def p_limit_lines_error(self, p: Production) -> None:
        """limit_lines : newlines error NL
                       | limit_lines error NL"""
        p[0] = p[1] or []
        p.parser.errok()

    def p_limit_row(self, p: Production) -> None:
        """limit_row : limit_item
                     | limit_row limit_item"""
        p[0] = [p[1]] if len(p) == 2 else [*p[1], p[2]]

    def p_limit_item(self, p: Production) -> None:
        """limit_item : limit_option
                      | limit_option ','"""
        p[0] = p[1]

    def p_limit_option(self, p: Production) -> None:
        """limit_option : MEMORY NUMBER
                        | MEMORY string"""
        p[0] = "memory", self.value(values.memory_limit, p[2], 0)

    def p_limit_cpu(self, p: Production) -> None:
        """limit_option : CPU NUMBER
                        | CPU string"""
        p[0] = "cpu", self.value(values.cpu_percent, str(p[2]), 0)

    def p_limit_weight(self, p: Production) -> None:
        """limit_option : WEIGHT NUMBER"""
        p[0] = "weight", self.value(rules.weight, p[2], 0)

    # the seed for cloud-init

    def p_vm_seed(self, p: Production) -> None:
        """vm_option : SEED
                     | SEED '{' seed_body '}'"""
        self.draft.given |= VmFlag.SEED
        if self.once("seed"):
            items = p[3] if len(p) > 2 else []
            options = dict(item for item in reversed(items) if item[0] != "ssh_keys")
            keys = tuple(value for name, value in items if name == "ssh_keys")
            for name in [name for name in options if sum(item[0] == name for item in items) > 1]:
                word = "password-hash" if name == "password" else name.replace("_", "-")
                self.error(f"{word} of the seed is given twice")
            if options.get("network_config", "") is None:
                options |= {"network_config": "", "network": False}
            seed = SeedConfig(**options, ssh_keys=keys)
            self.value(seed_rules.check, seed, None)
            self.draft.fields["seed"] = seed

    def p_seed_body(self, p: Production) -> None:
        """seed_body : seed_row
                     | newlines seed_row
                     | seed_lines
                     | seed_lines seed_row"""
        p[0] = [each for part in p[1:] if part is not None for each in part]

    def p_seed_lines(self, p: Production) -> None:
        """seed_lines : seed_row NL
                      | newlines seed_row NL
                      | seed_lines NL
                      | seed_lines seed_row NL"""
        p[0] = [each for part in p[1:] if isinstance(part, list) for each in part]

    def p_seed_lines_error(self, p: Production) -> None:
        """seed_lines : newlines error NL
                      | seed_lines error NL"""
        p[0] = p[1] or []
        p.parser.errok()

    def p_seed_row(self, p: Production) -> None:
        """seed_row : seed_item
                    | seed_row seed_item"""
        p[0] = [p[1]] if len(p) == 2 else [*p[1], p[2]]

    def p_seed_item(self, p: Production) -> None:
        """seed_item : seed_option
                     | seed_option ','"""
        p[0] = p[1]

    def p_seed_name(self, p: Production) -> None:
        """seed_option : HOSTNAME string
                       | USER string
                       | INSTANCE_ID string"""
        rule = {
            "hostname": seed_rules.hostname, "user": seed_rules.user, "instance-id": seed_rules.instance_id
        }[p[1]]  # fmt: skip
        p[0] = p[1].replace("-", "_"), self.value(rule, p[2], "")

    def p_seed_password(self, p: Production) -> None:
        """seed_option : PASSWORD_HASH string"""
        if p[2].startswith(HASHED):
            p[0] = "password", self.value(seed_rules.password_hash, p[2], "")
        else:
            p[0] = "password", self.seed_path(p[1], p[2])

    def p_seed_file(self, p: Production) -> None:
        """seed_option : SSH_KEY string
                       | USER_DATA string
                       | VENDOR_DATA string"""
        name = "ssh_keys" if p[1] == "ssh-key" else p[1].replace("-", "_")
        p[0] = name, self.seed_path(p[1], p[2])

    def p_seed_network(self, p: Production) -> None:
        """seed_option : NETWORK_CONFIG string"""
        # A file with the name `no` can be given as `./no`.
        p[0] = "network_config", None if p[2] == "no" else self.seed_path(p[1], p[2])

    def seed_path(self, what: str, name: str) -> str:
        """Return the path of a file for the seed; `what` is its keyword."""
        return self.value(lambda path: values.boot_path(what, path), self.lexer.beside(name), "")

    def p_vm_boot(self, p: Production) -> None:
        """vm_option : BOOT string boot_options"""
        self.draft.given |= VmFlag.KERNEL
        if self.once("kernel"):
            self.draft.fields["kernel"] = self.value(values.kernel_path, self.boot_path(p[2]), "")

    def p_vm_boot_device(self, p: Production) -> None:
        """vm_option : BOOT DEVICE CDROM
                     | BOOT DEVICE DISK
                     | BOOT DEVICE NET"""
        self.draft.fields["boot_device"] = BootDevice[p[3].upper()]

    def p_boot_options(self, p: Production) -> None:
        """boot_options :
                        | boot_options boot_option"""

    def p_vm_boot_option(self, p: Production) -> None:
        """vm_option : boot_option"""

    def p_boot_initrd(self, p: Production) -> None:
        """boot_option : INITRD string"""
        if self.once("initrd"):
            self.draft.fields["initrd"] = self.value(values.initrd_path, self.boot_path(p[2]), "")

    def p_boot_cmdline(self, p: Production) -> None:
        """boot_option : CMDLINE string"""
        if self.once("cmdline"):
            self.draft.fields["cmdline"] = self.value(rules.cmdline, p[2], "")

    def boot_path(self, name: str) -> str:
        """Return the path of a boot file, relative to this file; unchanged if it is on a disk of the VM itself."""
        try:
            return self.lexer.beside(name) if rules.disk_file(name) is None else name
        except ValueError:  # the reader of the value reports the same error
            return name

    def p_vm_cdrom(self, p: Production) -> None:
        """vm_option : CDROM string"""
        self.draft.given |= VmFlag.CDROM
        if self.once("cdrom"):
            self.draft.fields["cdrom"] = self.value(values.cdrom_path, self.lexer.beside(p[2]), "")

    def p_vm_console_log(self, p: Production) -> None:
        """vm_option : CONSOLE LOG string log_options"""
        options = dict(reversed(p[4]))
        if len(options) != len(p[4]):
            self.error("an option of the console log is given twice")
        path = self.value(rules.console_log_path, self.lexer.beside(p[3]), "")
        if self.once("console_log", "console log"):
            self.draft.fields["console_log"] = ConsoleLog(path=path, **options)

    def p_log_options(self, p: Production) -> None:
        """log_options :
                       | log_options log_option"""
        p[0] = [*p[1], p[2]] if len(p) > 1 else []

    def p_log_size(self, p: Production) -> None:
        """log_option : SIZE NUMBER
                      | SIZE string"""
        p[0] = "size_bytes", self.value(values.console_log_size, p[2], DEFAULT_LOG_BYTES)

    def p_log_keep(self, p: Production) -> None:
        """log_option : KEEP NUMBER"""
        p[0] = "keep", self.value(rules.console_logs_kept, p[2], 0)

    def p_vm_interfaces(self, p: Production) -> None:
        """vm_option : INTERFACES NUMBER"""
        self.draft.given |= VmFlag.NETWORK
        if self.draft.nics_min is not None:
            self.error("interfaces specified more than once")
        else:
            self.draft.nics_min = self.value(rules.nic_count, p[2], 0)

    def p_vm_memory(self, p: Production) -> None:
        """vm_option : MEMORY NUMBER
                     | MEMORY string"""
        self.draft.given |= VmFlag.MEMORY
        if self.once("memory_bytes", "memory"):
            wanted = self.value(values.memory, p[2], MIN_MEMORY_BYTES)
            if wanted % MIB:
                log.debug(f"{self.lexer.where}: memory size rounded to {wanted // MIB} megabytes")
            self.draft.fields["memory_bytes"] = wanted - wanted % MIB

    def p_vm_owner(self, p: Production) -> None:
        """vm_option : OWNER owner"""
        self.draft.fields["owner"] = self.owner(p[2], self.draft.faults.append)

    def p_vm_sev(self, p: Production) -> None:
        """vm_option : SEV"""
        self.draft.fields["sev"] = True

    def p_vm_seves(self, p: Production) -> None:
        """vm_option : SEVES"""
        self.draft.fields["sev"] = self.draft.fields["sev_es"] = True

    def p_vm_vcpus(self, p: Production) -> None:
        """vm_option : VCPUS NUMBER"""
        self.draft.given |= VmFlag.CPU
        if self.once("vcpus"):
            self.draft.fields["vcpus"] = self.value(rules.vcpus, p[2], 1)

    def p_vm_virtio(self, p: Production) -> None:
        """vm_option : VIRTIO string
                     | VIRTIO MEMORY"""
        self.draft.fields["virtio"] = self.value(values.virtio_mode, p[2], VirtioMode.TRANSITIONAL)

    # interfaces of a VM

    def p_vm_interface(self, p: Production) -> None:
        """vm_option : nic_name
                     | nic_name nic_row
                     | nic_name '{' nic_body '}'"""
        nic = NicConfig(**self.nic)
        self.value(rules.local_options, nic, nic)
        self.value(rules.without_conflicts, (*self.draft.nics, nic), tuple(self.draft.nics))
        if self.value(rules.nic_count, len(self.draft.nics) + 1, 0):
            self.draft.nics.append(nic)

    def p_nic_name(self, p: Production) -> None:
        """nic_name : INTERFACE optional_string
                    | LOCAL INTERFACE optional_string"""
        self.draft.given |= VmFlag.NETWORK
        tap = self.value(values.tap, p[len(p) - 1], "")
        self.nic = {"tap": tap, "local": p[1] == "local"}

    def p_optional_string(self, p: Production) -> None:
        """optional_string :
                           | string"""
        p[0] = p[1] if len(p) > 1 else ""

    def p_nic_body(self, p: Production) -> None:
        """nic_body : nic_row
                    | newlines nic_row
                    | nic_lines
                    | nic_lines nic_row"""

    def p_nic_lines(self, p: Production) -> None:
        """nic_lines : nic_row NL
                     | newlines nic_row NL
                     | nic_lines NL
                     | nic_lines nic_row NL"""

    def p_nic_lines_error(self, p: Production) -> None:
        """nic_lines : newlines error NL
                     | nic_lines error NL"""
        p.parser.errok()

    def p_nic_row(self, p: Production) -> None:
        """nic_row : nic_item
                   | nic_row nic_item"""

    def p_nic_item(self, p: Production) -> None:
        """nic_item : nic_option
                    | nic_option ','"""

    def p_nic_switch(self, p: Production) -> None:
        """nic_option : SWITCH string"""
        self.nic["switch"] = self.value(rules.switch_name, p[2], "")

    def p_nic_group(self, p: Production) -> None:
        """nic_option : GROUP string"""
        self.nic["group"] = self.value(rules.group_name, p[2], "")

    def p_nic_lladdr(self, p: Production) -> None:
        """nic_option : LLADDR optional_string
                      | LOCKED LLADDR optional_string"""
        if p[1] == "locked":
            self.nic["locked"] = True
        if text := p[len(p) - 1]:
            self.nic["lladdr"] = self.value(values.lladdr, text, b"")

    def p_nic_rdomain(self, p: Production) -> None:
        """nic_option : RDOMAIN NUMBER"""
        self.nic["rdomain"] = self.value(rules.rdomain, p[2], 0)

    def p_nic_updown(self, p: Production) -> None:
        """nic_option : updown"""
        self.nic["up"] = p[1]

    def p_nic_limit(self, p: Production) -> None:
        """nic_option : LIMIT rate"""
        self.nic["rate_limit"] = p[2]

    def p_nic_vhost(self, p: Production) -> None:
        """nic_option : VHOST"""
        self.nic["vhost"] = True

    def p_nic_address(self, p: Production) -> None:
        """nic_option : ADDRESS string"""
        if self.first_of_nic("address"):
            self.nic["address"] = self.value(values.nic_address, p[2], None)

    def p_nic_forward(self, p: Production) -> None:
        """nic_option : FORWARD forward_words"""
        forward = self.value(values.forward, p[2], None)
        if forward is not None:
            self.nic["forwards"] = (*self.nic.get("forwards", ()), forward)

    def p_forward_words(self, p: Production) -> None:
        """forward_words : forward_word
                         | forward_words forward_word"""
        p[0] = [p[1]] if len(p) == 2 else [*p[1], p[2]]

    def p_forward_word(self, p: Production) -> None:
        """forward_word : NUMBER
                        | STRING"""
        p[0] = str(p[1])

    def p_nic_dns(self, p: Production) -> None:
        """nic_option : DNS strings"""
        if self.first_of_nic("dns"):
            self.nic["dns"] = self.value(values.name_servers, p[2], NicConfig().dns)

    def p_nic_host_name(self, p: Production) -> None:
        """nic_option : HOSTNAME string"""
        if self.first_of_nic("host_name", "hostname"):
            self.nic["host_name"] = self.value(rules.host_name, p[2], "")

    # permission to make instances of a VM

    def p_vm_allow(self, p: Production) -> None:
        """vm_option : ALLOW INSTANCE flag
                     | ALLOW INSTANCE '{' flag_body '}'"""
        allow = self.draft.fields.get("allow", AllowInstance())
        self.draft.fields["allow"] = AllowInstance(
            flags=allow.flags | self.allow, owner=self.allow_owner or allow.owner or WHEEL
        )
        self.allow, self.allow_owner = VmFlag(0), None

    def p_flag_body(self, p: Production) -> None:
        """flag_body : flag_row
                     | newlines flag_row
                     | flag_lines
                     | flag_lines flag_row"""

    def p_flag_lines(self, p: Production) -> None:
        """flag_lines : flag_row NL
                      | newlines flag_row NL
                      | flag_lines NL
                      | flag_lines flag_row NL"""

    def p_flag_lines_error(self, p: Production) -> None:
        """flag_lines : newlines error NL
                      | flag_lines error NL"""
        p.parser.errok()

    def p_flag_row(self, p: Production) -> None:
        """flag_row : flag_item
                    | flag_row flag_item"""

    def p_flag_item(self, p: Production) -> None:
        """flag_item : flag
                     | flag ','"""

    def p_flag(self, p: Production) -> None:
        """flag : BOOT
                | CDROM
                | DISK
                | INSTANCE
                | INTERFACE
                | MEMORY
                | SEED
                | VCPUS"""
        self.allow |= FLAGS[p[1]]

    def p_flag_owner(self, p: Production) -> None:
        """flag : OWNER owner"""
        self.allow_owner = self.owner(p[2], self.draft.faults.append)

    # values

    def p_owner(self, p: Production) -> None:
        """owner : NUMBER
                 | string"""
        p[0] = str(p[1])

    def owner(self, text: str, unknown: Callable[[str], None]) -> Owner:
        """Return a user and group.

        An unknown user or group is an error when a file is checked or reloaded.  At the start of the daemon it is not,
        because all other VMs have to run: `unknown` is called with the sentence instead.
        """
        try:
            return values.owner(text)
        except values.UnknownError as error:
            (unknown if self.starting else self.error)(str(error))
            return Owner()

    def once(self, field: str, what: str = "") -> bool:
        """Return whether a field of the VM is given for the first time; if not, report it."""
        if field in self.draft.fields:
            self.error(f"{what or field} specified more than once")
            return False
        return True

    def first_of_nic(self, field: str, what: str = "") -> bool:
        """Return whether a field of the interface is given for the first time; if not, report it."""
        if field in self.nic:
            self.error(f"{what or field} specified more than once")
            return False
        return True

    def value(self, read: Callable[[Any], T], text: object, default: T) -> T:
        """Return `read(text)`.  If it raises ValueError, report that and return `default`: parsing continues."""
        try:
            return read(text)
        except ValueError as error:
            self.error(str(error))
            return default
