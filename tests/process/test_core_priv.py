"""priv is taken over, ended or stopped, and what it made is damaged: what comes of it, and who must not notice."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, setting
from tests.support.network import Network
from tests.support.privdriver import Priv, nic
from vmd.priv.sysctl import state_path
from vmd.privsep.cell import PRIV_ID

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "
SWITCH = 'switch "lan" {\n    interface br7\n}\n'


def block(name: str, *lines: str) -> str:
    """Return a vm block of the demonstration guest."""
    options = ["disable", "memory 32M", f'boot "{guest("demo")}"', *lines]
    return f'vm "{name}" {{\n' + "".join(f"    {line}\n" for line in options) + "}\n"


@contextlib.contextmanager
def bystander(vmd: NetDaemon, name: str) -> Iterator[Console]:
    """Start a guest that must not notice what happens meanwhile: it answers before and after."""
    vmd.must("start", name)
    pid = vmd.status(name)["pid"]
    with vmd.console(name) as console:
        console.expect(PROMPT, DEADLINE_S)
        yield console
        console.answer("", PROMPT)
    assert vmd.status(name)["pid"] == pid


# --- taken over ------------------------------------------------------------------------------------------------

INTRUDER = '''
import ctypes, socket
def _tries(where):
    """What somebody who has taken priv over does first: ask the daemon for a VM, as root."""
    def connect(family_call):
        with family_call() as sock:
            sock.connect("{path}")
            sock.send(b"x")
    for what, call in (
        ("socket", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)),
        ("pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]),
    ):
        try:
            connect(call)
        except OSError as error:
            log.warn(f"{{where}}: {{what}} is refused: {{error.errno}}")
        else:
            log.warn(f"{{where}}: {{what}} has connected")
_confine, _make_nics = confine, Network.make_nics
def confine(*arguments):
    _tries("before its filter")
    return _confine(*arguments)
def _made(self, *arguments):
    _tries("in its filter")
    return _make_nics(self, *arguments)
Network.make_nics = _made
'''


def test_a_taken_over_priv_is_not_root_to_the_daemon(network: Network, tmp_path: Path) -> None:
    """It does not reach the control socket: not with its filter, and not with its user alone."""
    code = tmp_path / "code"
    for package in ("vmd", "vmctl"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    conf = SWITCH + block("a", 'interface switch "lan"') + block("b")
    vmd = NetDaemon(tmp_path, network, conf)
    vmd.code = code
    vmd.directory.chmod(0o755)
    with (code / "vmd/priv/main.py").open("a") as file:
        file.write(INTRUDER.format(path=vmd.socket))
    with vmd, bystander(vmd, "b"):
        vmd.must("start", "a")
        log = vmd.log

    assert "has connected" not in log
    assert log.count("before its filter: socket is refused: 13") == 1
    assert log.count("in its filter: socket is refused: 1\n") == 1
    assert log.count("in its filter: pair is refused: 1\n") == 1


def test_priv_is_no_root_and_has_a_filter(network: Network, tmp_path: Path) -> None:
    """Its user is its own, no VM's and nobody's on the host."""
    with NetDaemon(tmp_path, network, block("b")) as vmd, bystander(vmd, "b"):
        people = {title: Path(f"/proc/{pid}/status").read_text() for title, pid in vmd.processes().items()}
    status = {
        title: dict(line.partition(":\t")[::2] for line in text.splitlines()) for title, text in people.items()
    }
    own = set(status["vmd: priv"]["Uid"].split())

    assert len(own) == 1
    assert all(own.isdisjoint(lines["Uid"].split()) for title, lines in status.items() if title != "vmd: priv")
    assert (status["vmd: priv"]["Seccomp"], status["vmd: priv"]["Groups"].strip()) == ("2", "")
    assert int(status["vmd: priv"]["CapEff"], 16) == int(status["vmd: priv"]["CapBnd"], 16) == 1 << 12 | 1 << 13


def test_what_an_earlier_version_has_to_put_back_is_put_back(network: Network) -> None:
    """Its file was beside the directory that priv has now."""
    with network.inside():
        new = Path(state_path())
    old = new.parents[1] / new.name
    network.write("/proc/sys/net/ipv4/ip_forward", "1")
    old.parent.mkdir(exist_ok=True)
    old.write_text(json.dumps(["ipv4/ip_forward", "0", "1"]) + "\n")
    with Priv(network) as priv:
        assert setting(network, "ipv4/ip_forward") == "0"
        assert not old.exists()
        with priv.make(nic()):
            assert new.stat().st_uid == PRIV_ID
    assert not new.exists()
