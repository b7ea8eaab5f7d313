"""What `vmd -n` says of a host that lacks what VMs need."""

import pytest

from vmd import hostpaths
from vmd.config.model import Config, Globals, NicConfig, Prefix, SwitchConfig, VmConfig
from vmd.parent import examine
from vmd.parent.examine import Examination

NAT = f"NAT for local interfaces: {hostpaths.NO_NFT}"
PREFIX = Prefix(address=b"\xfd" + bytes(15), length=48)


def networks(nic: NicConfig | None, settings: Globals) -> list[str]:
    """Return what is said of a VM with one interface."""
    vm = VmConfig(name="a", nics=(nic,) if nic is not None else ())
    switches = (SwitchConfig(name="s", interface="br0", rdomain=3), SwitchConfig(name="plain", interface="br1"))
    return list(Examination([vm], Config(settings=settings, switches=switches), None, 0.0).of_networks(vm))


@pytest.mark.parametrize(
    ("nic", "settings", "said"),
    [
        (None, Globals(), []),
        (NicConfig(), Globals(), ["tun"]),
        (NicConfig(local=True), Globals(), ["tun", "NAT"]),
        (NicConfig(local=True), Globals(local_nat=False), ["tun"]),
        (NicConfig(local=True), Globals(local_nat=False, local_inet6=True), ["tun", "IPv6"]),
        (NicConfig(local=True), Globals(local_inet6=True, local_inet6_prefix=PREFIX), ["tun", "NAT", "IPv6"]),
        (NicConfig(switch="s"), Globals(), ["tun", "VRF"]),
        (NicConfig(switch="plain"), Globals(), ["tun"]),
        (NicConfig(rdomain=7), Globals(), ["tun", "VRF"]),
        (NicConfig(rdomain=0), Globals(), ["tun"]),
    ],
)
def test_a_host_that_lacks_everything(
    monkeypatch: pytest.MonkeyPatch, nic: NicConfig | None, settings: Globals, said: list[str]
) -> None:
    """Each VM is told what it needs, and only that; on a host that has all of it nothing is said."""
    monkeypatch.setattr(examine, "has_vrfs", lambda: False)
    monkeypatch.setattr(hostpaths, "TUN", "/nowhere/tun")
    monkeypatch.setattr(hostpaths, "NFT_PATHS", ("/nowhere/nft",))
    monkeypatch.setattr(hostpaths, "IPV6", "/nowhere/ipv6")

    words = ("tun", "NAT", "IPv6", "VRF")
    found = [next(word for word in words if word in sentence) for sentence in networks(nic, settings)]

    assert found == said

    for name, path in (("TUN", "/dev/null"), ("NFT_PATHS", ("/nowhere", "/bin/sh")), ("IPV6", "/")):
        monkeypatch.setattr(hostpaths, name, path)
    monkeypatch.setattr(examine, "has_vrfs", lambda: True)
    assert networks(nic, settings) == []
