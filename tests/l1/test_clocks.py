"""The TSC stops in a pause, like the other clocks, if KVM can offset a guest's TSC.  A KVM without hardware cannot.

`tests/guest/test_clocks.py` compares the other clocks, as exactly as they can be read.  The emulated machine's own TSC
is not stable, and KVM then lets a guest's TSC be some milliseconds late.  So a tenth of each pause is tolerated.
"""

from pathlib import Path

import pytest

from tests.support.clocks import PM_HERTZ, Clocks, Session, daemon

pytestmark = [pytest.mark.l1, pytest.mark.root, pytest.mark.deep, pytest.mark.timeout(400)]


def test_the_tsc_stops_too(tmp_path: Path) -> None:
    """In pauses shorter and longer than a second: KVM adjusts TSC writes that differ by less than a second."""
    with daemon(tmp_path) as vmd:
        session = Session(vmd)
        host = session.watch.host
        assert host.sets_tsc
        for step, seconds in (
            (session.pause, 0.2), (session.pause, 2.0), (session.pause_and_move, 1.0), (session.move_and_unpause, 1.0),
        ):  # fmt: skip
            with vmd.console(session.name) as console:
                before = Clocks.ask(console)
            session.paused_s = 0.0
            step(seconds)
            with vmd.console(session.name) as console:
                now = Clocks.ask(console)
            ran_s = (now.kvmclock - before.kvmclock) / 1e9
            tsc_s = (now.tsc - before.tsc) / host.tsc_khz / 1000
            timer_s = (now.timer - before.timer) % (1 << 32) / PM_HERTZ
            print(f"{step.__name__} {session.paused_s:.3f} s: kvmclock {ran_s:.6f} tsc {tsc_s:.6f} timer {timer_s:.6f}")
            assert abs(tsc_s - ran_s) < session.paused_s / 10
            assert abs(timer_s - ran_s) < session.paused_s / 10
