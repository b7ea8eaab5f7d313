"""From a command line to a running daemon: checks, configuration, processes, in an order that fails early."""

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial

from vmd.config import check
from vmd.config.check import ConfigErrors
from vmd.config.model import Config
from vmd.errors import HostError, VmdError
from vmd.log import JOURNAL, STDERR, log
from vmd.parent import service
from vmd.parent.children import Children
from vmd.parent.examine import check_vms
from vmd.parent.hostroutes import host_routes, prefix_warnings
from vmd.parent.identity import StateFile, state_directory
from vmd.parent.lifelock import LifeLock
from vmd.parent.limits import raise_file_limit
from vmd.parent.main import Parent
from vmd.parent.oom import OomScores
from vmd.parent.options import Options, Shown, UsageError, parse
from vmd.parent.store import Store, inherited
from vmd.privsep import landlock
from vmd.privsep.confine import PARENT_CAPABILITIES, give_up_capabilities
from vmd.stdio import say, show

CHILD_EXIT_TIMEOUT_S = 5.0
# Exit statuses (vmd(8), <sysexits.h>).  The unit does not start the daemon again after the last two: a new start
# would end in the same way.
EX_FAILED, EX_USAGE, EX_UNAVAILABLE, EX_CONFIG = 1, 2, 69, 78


def run(arguments: list[str]) -> int:
    """Run vmd(8); every reason not to start is one sentence on standard error."""
    try:
        options = parse(arguments)
    except UsageError as error:
        say(f"{error}\n")
        return EX_USAGE
    except Shown as asked:
        return shown(str(asked))
    log.setup("vmd", JOURNAL if service.on_journal() and not options.debug else STDERR, options.verbosity)
    stored = inherited()
    try:
        if options.check_only:
            config = read_config(options)
            for sentence in prefix_warnings(config, host_routes()):
                log.warn(as_warning(sentence))
            check_vms(config, lambda sentence: log.warn(as_warning(sentence)))
            say("configuration OK\n")
            return 0
        return serve(options, stored)
    except VmdError as error:
        for line in str(error).splitlines():
            log.crit(line)
        return exit_status(error, options, stored)


def exit_status(error: VmdError, options: Options, stored: Mapping[str, int]) -> int:
    """Return the exit status that belongs to a reason not to start.

    A unit that is not started again loses what is stored, and with it its guests: what this daemon cannot adopt, the
    next one can perhaps.
    """
    if stored:
        return EX_FAILED
    if isinstance(error, service.NoKvm):
        return EX_UNAVAILABLE
    return EX_CONFIG if isinstance(error, ConfigErrors) and not options.check_only else EX_FAILED


def shown(text: str) -> int:
    """Show on standard output what was asked for; return the exit status."""
    try:
        show(text)
    except HostError as error:
        say(f"vmd: {error}\n")
        return 1
    return 0


def as_warning(sentence: str) -> str:
    """Return a sentence about a configuration that is used, so that nobody takes it for an error of the file."""
    return sentence if sentence.startswith("warning: ") else f"warning: {sentence}"


def read_config(
    options: Options,
    path: str | None = None,
    known: Config | None = None,
    warn: Callable[[str], None] = log.warn,
    *,
    starting: bool = False,
) -> Config:
    """Read the main configuration file or, on top of what is `known`, an additional one.  Raises ConfigErrors.

    `starting`: this is for a daemon that begins, which needs no file where none was given to it.
    """
    return check.load(
        path or options.conf_path,
        macros=dict(options.macros),
        may_be_missing=starting and not options.conf_given,
        starting=starting,
        warn=lambda sentence: warn(as_warning(sentence)),
        settings=known.settings if known else None,
        known_switches=known.switches if known else (),
    )


def serve(options: Options, stored: Mapping[str, int]) -> int:
    """Start the daemon and serve until it is told to stop.  Raises VmdError if it cannot start.

    `stored` is what earlier daemons have stored.
    """
    if os.geteuid() != 0:
        raise VmdError("need root privileges: run vmd as root")
    give_up_capabilities(sum(1 << capability for capability in PARENT_CAPABILITIES))
    uid, gid = service.lookup_user()
    config = read_config(options, starting=True)  # first: a mistake is to be heard of at once
    kvm_fd = service.wait_for_kvm(0 if options.debug else service.KVM_WAIT_S)
    raise_file_limit(config.settings.limit_vms)
    service.make_run_directory()
    lock = LifeLock(options.socket_path)
    lock.wait()
    listener = service.listen(options.socket_path, config.settings.socket_owner)
    with contextlib.ExitStack() as end:
        end.callback(lock.remove)
        end.callback(service.remove_socket, options.socket_path)
        ready = announce(options, stored)
        form = service.choose_log(options.debug)
        log.setup("vmd", form, options.verbosity)
        for line in landlock.limits(landlock.abi()):
            log.debug(line)  # once, and not by each process
        scores = OomScores()
        children = Children(uid, gid, config.settings.first_id, lock)
        state = StateFile(state_directory())
        parent = Parent(options, config, partial(read_config, options), state, Store(stored))
        parent.on_ready = ready
        parent.life.scores = scores
        end.callback(parent.logs.end)
        service.keep_alive(parent.loop)
        parent.start(children, listener, kvm_fd)
        parent.loop.run()
        if parent.handed_over:
            parent.save_now()
            end.pop_all()  # all of that is the next daemon's
            return 0
        parent.finish()
        children.reap(CHILD_EXIT_TIMEOUT_S)
        parent.clean_up()
        children.reap(CHILD_EXIT_TIMEOUT_S)
        log.info("terminating")
    return parent.exit_status


def announce(options: Options, stored: Mapping[str, int]) -> Callable[[], None]:
    """Return what tells our starter that the daemon serves, after going to the background if we should.

    A daemon that takes the place of another one is where that was.
    """
    if options.debug or stored or os.environ.get("NOTIFY_SOCKET"):
        return service.notify_ready
    return service.daemonize()
