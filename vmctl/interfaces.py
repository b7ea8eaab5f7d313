"""The lines of `vmctl status -v` about network interfaces."""

import socket
import time

from vmctl.output import clean
from vmd.config.model import PAIR
from vmd.ipc.devmsg import COUNTER_NAMES
from vmd.ipc.messages.clients import NicInfo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import Forward

# Why frames were dropped, in words.
RECEIVE_DROPS = (
    ("rx_no_room", "larger than the guest's buffers"),
    ("rx_filtered", "not for this address"),
    ("rx_malformed", "malformed"),
    ("rx_injected_lost", "answers the guest did not take"),
)
SEND_DROPS = (
    ("tx_spoofed", "from another address"),
    ("tx_short", "too short"),
    ("tx_long", "too long"),
    ("tx_refused", "refused by the kernel"),
    ("tx_link_down", "while the link was down"),
    ("tx_busy", "the host was busy"),
)
# Why DHCP requests were not answered.
UNANSWERED = (
    ("dhcp_other_server", "for another server"),
    ("dhcp_other_address", "about another address"),
    ("dhcp_other_client", "from another Ethernet address"),
    ("dhcp_declines", "to decline the address: the guest says that another host has it"),
    ("dhcp_no_address", "without an address"),
    ("dhcp_unknown_type", "of unknown type"),
    ("dhcp_malformed", "malformed"),
    ("dhcp_relayed", "through a relay"),
    ("dhcp_wants_file", "for a boot file"),
    ("dhcp_too_long", "with too long a client identifier"),
)


def describe(vm_name: str, nic: NicInfo) -> list[str]:
    """Return the lines of one interface; those after the first are indented."""
    words = [f"{vm_name} interface {nic.index}: {nic.tap or 'no tap'}"]
    if nic.switch:
        words.append(f"switch {nic.switch}")
    if nic.local:
        words.append("local")
    words.append(f"lladdr {nic.lladdr.hex(':')}{' locked' if nic.locked else ''}")
    if nic.mtu:
        words.append(f"mtu {nic.mtu}")
    if not nic.up:
        words.append("down")
    figures = dict(zip(COUNTER_NAMES, nic.counters, strict=False))
    if nic.vhost:
        words.append("vhost" if figures.get("vhost") else "vhost not in use")
    lines = [", ".join(words)]
    addresses = address_words(nic)
    if addresses:
        lines.append(f"    {addresses}")
    lines += [f"    forward {forward_words(forward)}" for forward in nic.forwards]
    if not nic.tap:
        return lines
    if not figures:
        return [*lines, "    no counters: its process has not answered"]
    if nic.local:
        lines.append(f"    {lease_words(nic, figures)}")
        unanswered = counted_words(figures, UNANSWERED)
        if unanswered:
            lines.append(f"    DHCP requests not answered: {unanswered}")
    lines.append(f"    received {traffic_words(figures, 'rx', RECEIVE_DROPS)}")
    lines.append(f"    sent {traffic_words(figures, 'tx', SEND_DROPS)}")
    return lines


def address_words(nic: NicInfo) -> str:
    """Return the addresses of a `local` interface."""
    parts = []
    if nic.host4:
        length = f"/{nic.length4}" if nic.length4 != PAIR else ""
        parts.append(f"host {text4(nic.host4)}, guest {text4(nic.guest4)}{length}")
    if nic.prefix6:
        parts.append(f"prefix {text6(nic.prefix6)}/64")
    return ", ".join(parts)


def forward_words(forward: "Forward") -> str:
    """Return a forward as vm.conf has it."""
    return f"{forward} from {source_text(forward)}" if forward.source is not None else str(forward)


def source_text(forward: "Forward") -> str:
    """Return the addresses that may use a forward; "" if all may."""
    source = forward.source
    return f"{text4(source.address)}/{source.length}" if source is not None else ""


def lease_words(nic: NicInfo, figures: dict[str, int]) -> str:
    """Return the state of the lease in words."""
    if not figures["lease_s"]:
        return "lease released" if figures.get("dhcp_releases") else "no lease given"
    try:
        when = time.strftime(" %Y-%m-%d %H:%M:%S", time.localtime(figures["lease_s"]))
    except (OverflowError, ValueError, OSError):
        when = ""  # the number comes from the VM
    whom = f" to {clean(nic.lease_name)}" if nic.lease_name else ""
    return f"lease {text4(nic.guest4)} given{when}{whom}"


def traffic_words(figures: dict[str, int], direction: str, drops: tuple[tuple[str, str], ...]) -> str:
    """Return packets and bytes in one direction, and dropped packets."""
    words = f"{figures[direction + '_packets']} packets, {figures[direction + '_bytes']} bytes"
    dropped = counted_words(figures, drops)
    return f"{words}; dropped {dropped}" if dropped else words


def counted_words(figures: dict[str, int], reasons: tuple[tuple[str, str], ...]) -> str:
    """Return how often each reason occurred, without those that are 0."""
    return ", ".join(f"{figures[name]} {why}" for name, why in reasons if figures.get(name))


def as_json(nic: NicInfo) -> dict[str, object]:
    """Return an interface for --json; a value that does not apply is null."""
    return {
        "index": nic.index,
        "tap": clean(nic.tap) or None,
        "switch": clean(nic.switch) or None,
        "lladdr": nic.lladdr.hex(":"),
        "up": nic.up,
        "locked": nic.locked,
        "local": nic.local,
        "vhost": nic.vhost,
        "mtu": nic.mtu or None,
        "guest4": text4(nic.guest4) or None,
        "host4": text4(nic.host4) or None,
        "prefix6": f"{text6(nic.prefix6)}/64" if nic.prefix6 else None,
        "prefix4_length": nic.length4 if nic.local else None,
        "forwards": [
            {
                "protocol": forward.protocol,
                "port": forward.port,
                "count": forward.count,
                "to": forward.to,
                "from": source_text(forward) or None,
            }
            for forward in nic.forwards
        ],
        "lease": lease(nic),
        "counters": dict(zip(COUNTER_NAMES, nic.counters, strict=False)) or None,
    }


def lease(nic: NicInfo) -> dict[str, object] | None:
    """Return the lease of an interface's guest for --json; None if it has no lease."""
    since_s = dict(zip(COUNTER_NAMES, nic.counters, strict=False)).get("lease_s")
    if not nic.local or not since_s:
        return None
    return {"address": text4(nic.guest4), "hostname": clean(nic.lease_name) or None, "since": since_s}


def text4(address: bytes) -> str:
    """Return an IPv4 address in the usual notation; "" if there is none."""
    return socket.inet_ntop(socket.AF_INET, address) if len(address) == 4 else ""


def text6(address: bytes) -> str:
    """Return an IPv6 address in the usual notation; "" if there is none."""
    return socket.inet_ntop(socket.AF_INET6, address) if len(address) == 16 else ""
