"""A compromised VM or device process maps as much memory as it can.  There is a limit without control groups.

The processes here run a changed copy of this program that does so, with their real filters and limits.
"""

import re
from pathlib import Path

import pytest

from tests.support.bystander import DRIVE, Bystander, vm_block
from tests.support.daemon import Daemon
from tests.support.program import changed_program
from vmd.devices.process import MEMORY_BESIDES_BYTES
from vmd.vm import main as vm

pytestmark = [pytest.mark.root, pytest.mark.kvm]

GREEDY = """
def _take_all():
    import mmap
    taken = []
    try:
        while len(taken) < 1024:  # 16 GiB: shared, which is no data of the process
            taken.append(mmap.mmap(-1, 16 << 20, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
    except (OSError, MemoryError):
        pass
    log.warn(f"has taken {len(taken) * 16} MiB")
"""
DEVICE = """
import mmap
from vmd.log import log
_make = make
def make(services):
    _take_all()
    return _make(services)
"""
VM = """
_on_set_verbosity = VmProcess.HANDLERS[(Proc.VMM, SetVerbosity)]
def _taken_over(process, message, envelope, channel):
    _take_all()
    _on_set_verbosity(process, message, envelope, channel)
VmProcess.HANDLERS[(Proc.VMM, SetVerbosity)] = _taken_over
"""


@pytest.mark.deep
def test_memory_that_is_mapped(tmp_path: Path) -> None:
    """Beyond guest memory a device gets at most half a gibibyte, and a VM process one gibibyte."""
    more = {"vmd/devices/vioscsi/main.py": GREEDY + DEVICE, "vmd/vm/main.py": GREEDY + VM}
    code = changed_program(tmp_path / "code", more)
    with Daemon(tmp_path, vm_block("a") + vm_block("b", DRIVE), code=code) as vmd, Bystander(vmd, "a"):
        vmd.must("start", "b")
        vmd.must("log", "verbose")
        for title, most_bytes in (
            ("vm/b/vioscsi0", MEMORY_BESIDES_BYTES),
            ("vm/b", vm.MEMORY_BESIDES_BYTES + vm.STACK_BYTES),
        ):
            vmd.wait_log(f"{title}: has taken ")
            taken = re.search(rf"{title}: has taken (\d+) MiB", vmd.log)
            assert taken is not None
            assert 0 < int(taken[1]) << 20 <= most_bytes
