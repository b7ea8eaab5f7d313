"""Signals without the module `signal`, which makes enumerations of their numbers, and so loads `enum` (`vmd.enums`).

For type checkers this is `signal`, whose numbers may be enumerations.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from signal import (
        NSIG,
        SIG_BLOCK,
        SIG_DFL,
        SIG_IGN,
        SIG_SETMASK,
        SIGCHLD,
        SIGHUP,
        SIGINT,
        SIGKILL,
        SIGPIPE,
        SIGQUIT,
        SIGSYS,
        SIGTERM,
        SIGTSTP,
        SIGUSR1,
        SIGUSR2,
        alarm,
        getsignal,
        pidfd_send_signal,
        pthread_kill,
        pthread_sigmask,
        set_wakeup_fd,
        signal,
        valid_signals,
    )
else:
    from _signal import *  # noqa: F403 - `__all__` limits what this module exports


def name_of(signum: int) -> str:
    """Return the name of a signal, for example SIGTERM."""
    known = vars(sys.modules["_signal"])
    names = sorted(name for name in known if name.startswith("SIG") and "_" not in name)
    return next((name for name in names if known[name] == signum), f"signal {signum}")


__all__ = [
    "NSIG", "SIGCHLD", "SIGHUP", "SIGINT", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSYS", "SIGTERM", "SIGTSTP", "SIGUSR1",
    "SIGUSR2", "SIG_BLOCK", "SIG_DFL", "SIG_IGN", "SIG_SETMASK", "alarm", "getsignal", "name_of", "pidfd_send_signal",
    "pthread_kill", "pthread_sigmask", "set_wakeup_fd", "signal", "valid_signals",
]  # fmt: skip
