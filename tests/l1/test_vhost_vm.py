"""A VM whose frames the kernel moves.  After each operation on the VM the kernel serves its interfaces again."""

from pathlib import Path

import pytest

from tests.guest.test_net_guest import LLADDR, conf, daemon, started
from tests.support.daemon import DEADLINE_S
from tests.support.hostnet import NetDaemon, load_modules
from tests.support.netpeer import Peer
from tests.support.network import Interface
from tests.support.transfers import move

pytestmark = [pytest.mark.l1, pytest.mark.root, pytest.mark.deep, pytest.mark.timeout(900)]

FRAMES = 200


def by_kernel(vmd: NetDaemon, name: str, index: int = 0) -> bool:
    """Return whether the kernel moves the frames of an interface."""
    found = vmd.interfaces(name)[index]["counters"]
    assert isinstance(found, dict)
    return bool(found["vhost"])


def test_a_vm_whose_frames_the_kernel_moves(tmp_path: Path) -> None:
    """No frame is lost when the VM is paused and resumed, or sent, after which it uses another tap."""
    load_modules()
    text = conf().replace(f"lladdr {LLADDR}", f"lladdr {LLADDR}, vhost")
    with daemon(tmp_path, text) as vmd:
        with started(vmd, "net") as net:
            net.console.type("frames count=8000\r")
            for _ in range(3):
                vmd.must("pause", "net")
                assert not by_kernel(vmd, "net")
                vmd.must("unpause", "net")
                assert by_kernel(vmd, "net")
            assert "vhost" in vmd.must("status", "-v", "net")
            assert "frames are through" in net.console.expect("ready", DEADLINE_S)
        for here, there, options in (("net", "b", ()), ("b", "net", ("-l", "-r", "2"))):
            move(vmd, here, there, send=options)
            tap = Interface(vmd.network, vmd.interfaces(there)[0]["tap"])
            with Peer(tap), vmd.console(there) as console:
                assert "frames are through" in console.answer(f"frames count={FRAMES}", "ready", DEADLINE_S)
        assert "process moves" not in vmd.log
        vmd.must("stop", "-fw", "net")
