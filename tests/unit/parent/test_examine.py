"""Hints of `vmd -n` about a VM that are not about errors in vm.conf."""

import os

import pytest

from vmd.config.model import NicConfig, VmConfig
from vmd.parent import examine, vhost


def test_a_host_without_vhost_is_named_for_each_interface_and_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is examined each time, because it may have changed since."""
    reasons = ["there is no /dev/vhost-net", "there is no /dev/vhost-net", ""]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(vhost, "lacking", lambda: reasons.pop(0))
    vm = VmConfig(name="a", nics=(NicConfig(vhost=True), NicConfig(), NicConfig(vhost=True)))

    said = [list(examine.of_vhost(vm)) for _ in range(3)]

    assert [len(each) for each in said] == [2, 2, 0]
    assert [line.split(":")[0] for line in said[0]] == ["interface 0", "interface 2"]
    assert all("there is no /dev/vhost-net" in line for line in said[1])
