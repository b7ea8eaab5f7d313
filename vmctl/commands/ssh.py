"""vmctl ssh: log in to a guest.  We find its address and wait until it answers; then ssh(1) replaces us.

A guest's host keys are kept under the name of its VM, in a file of their own.  They are not kept under its address: an
address may later belong to another VM, and a VM that moves to another host may get another address, with the same keys.
"""

import errno
import os
import pwd
import socket
import subprocess
import time

from vmctl.errors import ArgumentError, CommandError, NoSuchVm
from vmctl.interfaces import lease, text4
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import VmRef, parse_vmref
from vmd import signals as signal
from vmd.errors import sentence
from vmd.record import Record

PORT = 22
PORTS = range(1, 1 << 16)
WAIT_S = 180  # a first start makes host keys, grows a file system, and may install packages
WAITS_S = range(86401)
QUIET_S = 2.0  # a shorter wait is not reported
AGAIN_S = 0.5
ANSWER_S = 10.0  # for the greeting, after the guest has accepted a connection
COMING = ("waiting", "starting", "receiving")  # states in which a VM does not run yet
THERE = ("running", "sending", "saving")
KNOWN_HOSTS = "known_hosts.vmd"  # in ~/.ssh
GREETING = b"\nSSH-"  # RFC 4253, 4.2; lines may come before it
GREETING_MAX = 8192


class Place(Record):
    """The address and user of a guest."""

    vmid: int
    name: str
    address: str
    port: int
    user: str = ""  # "": ssh decides
    host: str = ""  # our address at its interface; without it we might reach another guest with the same address

    @property
    def alias(self) -> str:
        """The name under which its host keys are kept."""
        return f"{self.name}.vmd"


class Later(Exception):
    """The guest cannot be reached yet; the text says why."""


def run(session: Session, given: Given) -> int:
    """Wait for the guest and become ssh, or only print where the guest is."""
    ref = parse_vmref(given.operand)
    port = number(given, "-p", "port", PORTS, PORT)
    wait_s = number(given, "-w", "number of seconds", WAITS_S, WAIT_S)
    if session.json:
        try:
            place = find(session, ref, port, given.value("-l"))
        except Later as reason:
            raise CommandError(str(reason), errno.EAGAIN) from None
        tell(place)
        return 0
    known_hosts = os.path.join(home(), ".ssh", KNOWN_HOSTS)
    place = await_place(session, ref, port, given.value("-l"), wait_s)
    session.close()
    check_host_key(place, known_hosts, forget=given.has("-n"))
    become(ssh_words(place, known_hosts, given))
    return 0


def home() -> str:
    """Return the home directory as ssh(1) finds it: from the user database, not from $HOME.  Raises CommandError."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise CommandError(f"ssh: uid {os.getuid()} is not in the user database", errno.ENOENT) from None


def number(given: Given, option: str, what: str, allowed: range, default: int) -> int:
    """Return the value of an option.  Raises ArgumentError."""
    text = given.value(option)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) in allowed):
        raise ArgumentError(f"invalid {what}: {text}")
    return int(text)


def tell(place: Place) -> None:
    """Print where the guest is, even if it does not answer.  Raises CommandError."""
    put_json({
        "id": place.vmid,
        "name": clean(place.name),
        "address": place.address,
        "port": place.port,
        "user": clean(place.user) or None,
        "host_key_alias": clean(place.alias),
    })  # fmt: skip


# --- the address ----------------------------------------------------------------------------------------------------


def find(session: Session, ref: VmRef, port: int, user: str | None) -> Place:
    """Return where a guest can be reached.

    Raises Later if waiting may help, otherwise CommandError.
    """
    vm = ref.find(session.client.list_vms())
    if vm is None:
        raise NoSuchVm(f"ssh: vm {ref} not found")
    if vm.state in COMING:
        raise Later(f"vm {vm.name} is {vm.state}")
    if vm.state not in THERE:
        state = "not running" if vm.state == "stopped" else vm.state
        hint = ": vmctl unpause lets it continue" if vm.state == "paused" else ""
        raise CommandError(f"ssh: vm {vm.name} is {state}{hint}", errno.ESRCH)
    local = [nic for nic in vm.nics if nic.local]
    if not local:
        text = f"ssh: vm {vm.name} has no local interface, so vmd does not know its address; use its console"
        raise CommandError(f"{text}: vmctl console {vm.name}", errno.EADDRNOTAVAIL)
    nic = next((nic for nic in local if nic.guest4), None)
    if nic is None:
        raise Later(f"vm {vm.name} has no interface yet")
    return Place(
        vmid=vm.vmid, name=vm.name, address=text4(nic.guest4), port=port, user=user or vm.login,
        host=text4(nic.host4),
    )  # fmt: skip


def await_place(session: Session, ref: VmRef, port: int, user: str | None, wait_s: int) -> Place:
    """Wait until a guest answers, and return its place.  Raises CommandError, also at the deadline, with the reason."""
    begin_s = time.monotonic()
    said = ""
    while True:
        try:
            place = find(session, ref, port, user)
            greeted(session, place, max(1.0, begin_s + wait_s - time.monotonic()))
        except Later as reason:
            waited_s = time.monotonic() - begin_s
            if waited_s >= wait_s:
                raise CommandError(f"ssh: {reason}; waited {wait_s} s", errno.ETIMEDOUT) from None
            if waited_s > QUIET_S and said != str(reason):
                said = str(reason)
                warn(f"waiting: {said}")
        else:
            return place
        time.sleep(AGAIN_S)


def greeted(session: Session, place: Place, within_s: float) -> None:
    """Wait for the greeting of the ssh server.  Raises Later, and CommandError if it is another kind of server."""
    where = f"port {place.port} of {place.address}"
    due_s = time.monotonic() + min(ANSWER_S, within_s)
    ours = (place.host, 0) if place.host else None
    try:
        with socket.create_connection((place.address, place.port), due_s - time.monotonic(), ours) as connection:
            said = b"\n"
            while b"\n" not in said.partition(GREETING)[2]:
                connection.settimeout(max(0.001, due_s - time.monotonic()))
                data = connection.recv(256)
                if not data:
                    raise Later(f"{where} closes the connection at once")
                said += data
                if len(said) > GREETING_MAX:
                    raise CommandError(f"ssh: {where} is not served by ssh", errno.EPROTO)
    except ConnectionRefusedError:
        raise Later(f"{where} is closed: no ssh server runs in the guest") from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and place.host:
            what = f"ssh: vm {place.name} cannot be reached from here: {place.host} is not an address of this host"
            hint = "if the interface is in an rdomain, use `ip vrf exec`"
            raise CommandError(f"{what}; {hint}", error.errno) from None
        if not has_lease(session, place):
            raise Later(f"the guest of vm {place.name} has not asked for its address, {place.address}") from None
        how = "does not answer" if isinstance(error, TimeoutError) else f"cannot be reached: {sentence(error)}"
        raise Later(f"{where} {how}") from None


def has_lease(session: Session, place: Place) -> bool:
    """Return whether the guest has a lease of this address."""
    nics, _ = session.client.list_devices(place.vmid)
    return any(lease(nic) is not None for nic in nics if text4(nic.guest4) == place.address)


# --- the host key -----------------------------------------------------------------------------------------------------


def check_host_key(place: Place, path: str, *, forget: bool) -> None:
    """Raise CommandError, with one sentence, if the guest has another host key than before.

    ssh also checks the key afterwards, but refuses such a guest with a page of warnings.
    """
    known = known_keys(place, path)
    if not known:
        return
    if forget:
        forget_keys(place, path)
        return
    kind = next(iter(known))
    shown = shown_key(place, kind)
    if shown and shown not in known[kind]:
        raise CommandError(
            f"ssh: vm {place.name} has another host key than at your last login: if it was installed again, "
            f"vmctl ssh -n {place.name} forgets the old one",
            errno.EKEYREJECTED,
        )


def known_keys(place: Place, path: str) -> dict[str, list[str]]:
    """Return the known host keys of a VM, by kind.  Raises CommandError."""
    known: dict[str, list[str]] = {}
    for line in lines_of(path):
        words = line.split()
        if len(words) > 2 and words[0] == place.alias:
            known.setdefault(words[1], []).append(words[2])
    return known


def lines_of(path: str) -> list[str]:
    """Return the lines of a file; none if it does not exist.  Raises CommandError."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.readlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CommandError(f"ssh: {path}: {sentence(error)}", error.errno) from None


def forget_keys(place: Place, path: str) -> None:
    """Remove a VM from the file of host keys, which another login may be reading.  Raises CommandError."""
    kept = [line for line in lines_of(path) if line.split()[:1] != [place.alias]]
    fresh = f"{path}.{os.getpid()}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", errors="surrogateescape") as file:
            file.writelines(kept)
        os.rename(fresh, path)
    except OSError as error:
        raise CommandError(f"ssh: {path}: {sentence(error)}", error.errno) from None


def shown_key(place: Place, kind: str) -> str:
    """Return the guest's host key of a kind; "" if it has none."""
    command = ["ssh-keyscan", "-T", str(int(ANSWER_S)), "-t", kind, "-p", str(place.port), "--", place.address]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return ""
    words = done.stdout.decode(errors="replace").split()
    return words[2] if len(words) > 2 and words[1] == kind else ""


# --- ssh ------------------------------------------------------------------------------------------------------------


def ssh_words(place: Place, known_hosts: str, given: Given) -> list[str]:
    """Return the command that logs in.  ssh uses the first value of an option, so the user's options come first."""
    typed = [word for option, value in given.options if option in ("-i", "-o") for word in (option, value)]
    ours = {
        "HostKeyAlias": place.alias,
        "UserKnownHostsFile": quoted(known_hosts),
        "GlobalKnownHostsFile": "none",
        "HashKnownHosts": "no",
        "CheckHostIP": "no",
        **({"BindAddress": place.host} if place.host else {}),
        # Only the guest is at the other end of its tap, so the first key is that of the guest.
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",
    }
    words = ["ssh", *typed, *(word for name, value in ours.items() for word in ("-o", f"{name}={value}"))]
    words += ["-p", str(place.port), *(["-l", place.user] if place.user else []), "--", place.address]
    return words + given.behind


def quoted(path: str) -> str:
    """Return a path for ssh_config(5), in which blanks separate paths and % begins a token."""
    return f'"{path.replace("%", "%%")}"'


def become(words: list[str]) -> None:
    """Replace ourselves by a program.  Raises CommandError."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec keeps ignored signals
    try:
        os.execvp(words[0], words)  # noqa: S606 - no shell
    except OSError as error:
        hint = " (package openssh-client)" if error.errno == errno.ENOENT else ""
        raise CommandError(f"{words[0]}: {sentence(error)}{hint}", error.errno) from None
