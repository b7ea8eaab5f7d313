"""Fences: they limit the damage of an unexpected exception in a core process (parent, control, vmm, priv).

All guests depend on these processes.  An unexpected exception is a bug of ours.  Its traceback goes to the log, the
action for one client or VM ends, and the loop goes on.  That client or VM is the source of the exception.  A source of
several exceptions within a short time is cut off.  A channel to one of our own processes is never a source: cutting it
off would cut off everybody.
"""

import os
import time

from vmd.log import RateLimit, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.routes import Proc

    Source = tuple[Proc, int]  # (Proc.CLIENT, its number) or (Proc.VM, its vmid)

STRIKES, STRIKES_S = 3, 60.0  # a source is cut off after STRIKES exceptions within STRIKES_S
SOURCES_MAX = 1024  # the most sources that are remembered
OUR_FAULT = "internal error of vmd; its log has more"  # the answer to a client


class Fence:
    """Catches unexpected exceptions.  `cut_off(source)` ends a client's connection, or a VM."""

    def __init__(self, cut_off: "Callable[[Source], None]") -> None:
        self._cut_off = cut_off
        self._strikes: dict[Source, list[float]] = {}  # times of the latest exceptions; the latest source is last
        self._told = RateLimit(burst=10)

    def run(self, doing: str, call: "Callable[[], object]", source: "Source | None" = None) -> bool:
        """Call `call`; return whether it returned without an exception."""
        try:
            call()
        except Exception as error:
            self.report(doing, error)
            self.strike(source)
            return False
        return True

    def report(self, doing: str, error: Exception) -> None:
        """Write a traceback to the log, at a limited rate."""
        if not self._told.allow():
            return
        log.error(f"unexpected error in {doing}: {described(error)}")
        for line in traceback(error):
            log.error(f"  {line}")
        if self._told.suppressed:
            log.error(f"  ({self._told.suppressed} more not shown)")
            self._told.suppressed = 0

    def strike(self, source: "Source | None") -> None:
        """Count an exception against its source, and cut the source off if it has too many."""
        if source is None:
            return
        now_s = time.monotonic()
        recent = [at_s for at_s in self._strikes.pop(source, ()) if at_s > now_s - STRIKES_S]
        recent.append(now_s)
        if len(recent) < STRIKES:
            self._strikes[source] = recent
            if len(self._strikes) > SOURCES_MAX:
                del self._strikes[next(iter(self._strikes))]
            return
        name = f"{source[0].name.lower()} {source[1]}"
        log.error(f"{name} is cut off after {STRIKES} unexpected errors within {STRIKES_S:.0f} s")
        self.run(f"cutting off {name}", lambda: self._cut_off(source))


def described(error: BaseException) -> str:
    """Return an exception's type and sentence."""
    return f"{type(error).__name__}: {error}"


def traceback(error: BaseException) -> list[str]:
    """Return the places in the code that an exception passed, the innermost last.  The places of its causes come first.

    The source lines are left out: a confined process cannot open the files.  Needs no import.
    """
    lines: list[str] = []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        lines += [*traceback(before), f"{described(before)}; then"]
    entry = error.__traceback__
    while entry is not None:
        code = entry.tb_frame.f_code
        folder, name = os.path.split(code.co_filename)
        lines.append(f"{os.path.basename(folder)}/{name}:{entry.tb_lineno} in {code.co_qualname}")
        entry = entry.tb_next
    return lines
