"""Start of the daemon: command line, checks, configuration, processes, in an order that finds errors early."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from vmd.config import check
from vmd.config.check import ConfigErrors
from vmd.config.model import Config
from vmd.errors import HostError, VmdError, sentence
from vmd.log import JOURNAL, STDERR, log
from vmd.parent import service
from vmd.parent.children import Children
from vmd.parent.examine import check_vms
from vmd.parent.hostroutes import host_routes, prefix_warnings
from vmd.parent.identity import StateFile, state_directory
from vmd.parent.lifelock import LifeLock
from vmd.parent.limits import host_warnings, raise_file_limit
from vmd.parent.main import Parent
from vmd.parent.oom import OomScores
from vmd.parent.options import Options, Shown, UsageError, parse
from vmd.parent.program import Program
from vmd.parent.statemem import StateMemory
from vmd.parent.store import VMM, Store, inherited
from vmd.parent.truth import Truth, config_of, read, vms_of
from vmd.privsep import landlock
from vmd.privsep.cell import Cell
from vmd.privsep.confine import PARENT_CAPABILITIES, give_up_capabilities
from vmd.privsep.privplace import PrivPlace
from vmd.privsep.spawn import DEBUG
from vmd.stdio import say, show

CHILD_EXIT_TIMEOUT_S = 5.0
# Exit statuses (vmd(8), <sysexits.h>).  The unit does not restart the daemon after the last two, because a restart
# would fail in the same way.
EX_FAILED, EX_USAGE, EX_UNAVAILABLE, EX_CONFIG = 1, 2, 69, 78


def run(arguments: list[str]) -> int:
    """Run vmd(8).  Each error that prevents a start is one sentence on standard error."""
    try:
        options = parse(arguments)
    except UsageError as error:
        say(f"{error}\n")
        return EX_USAGE
    except Shown as asked:
        return shown(str(asked))
    program = Program(arguments)
    log.setup("vmd", JOURNAL if service.on_journal() and not options.debug else STDERR, options.verbosity)
    stored = inherited()
    try:
        if options.check_only:
            config = read_config(options)
            for sentence in (*prefix_warnings(config, host_routes()), *host_warnings(config)):
                log.warn(as_warning(sentence))
            check_vms(config, lambda sentence: log.warn(as_warning(sentence)))
            say("configuration OK\n")
            return 0
        if options.check_adopt:
            check_adopt(options, Store(stored))
            say("adoption OK\n")
            return 0
        return serve(options, program, stored)
    except VmdError as error:
        for line in str(error).splitlines():
            log.crit(line)
        return exit_status(error, options, stored)


def exit_status(error: VmdError, options: Options, stored: Mapping[str, int]) -> int:
    """Return the exit status for an error that prevents a start.

    If guests run, the status is one after which the unit is restarted.  Without a restart the service manager closes
    the stored descriptors, which ends the guests; after one, the next daemon may be able to adopt them.
    """
    if has_guests(stored):
        return EX_FAILED
    if isinstance(error, service.NoKvm):
        return EX_UNAVAILABLE
    return EX_CONFIG if isinstance(error, ConfigErrors) and not options.check_only else EX_FAILED


def has_guests(stored: Iterable[str]) -> bool:
    """Return whether one of these names of stored descriptors is that of a vmm."""
    return any(name.startswith(VMM) for name in stored)


def check_adopt(options: Options, store: Store) -> None:
    """Check whether this program could take the place of the daemon whose state is stored.  Raises VmdError.

    Nothing is changed.  An incomplete installation is found here, too, while the other daemon still runs.
    """
    if "state" not in store.names:
        raise VmdError("--check-adopt: no daemon has given its state to this program; vmctl upgrade -n does that")
    need_root()
    truth, _ = read_state(store)
    if len(vms_of(truth)) < len(truth.vms):
        raise VmdError("some VMs could not be adopted")
    config = read_config(options, starting=True)
    give_up_capabilities(sum(1 << capability for capability in PARENT_CAPABILITIES))
    cell = Cell.build(*service.lookup_user())
    PrivPlace(cell.root_fd, config.settings.first_id)
    cell.close()


def shown(text: str) -> int:
    """Print an answer such as the version on standard output; return the exit status."""
    try:
        show(text)
    except HostError as error:
        say(f"vmd: {error}\n")
        return 1
    return 0


def as_warning(sentence: str) -> str:
    """Return a sentence about a configuration with "warning: " before it, because the configuration is used."""
    return sentence if sentence.startswith("warning: ") else f"warning: {sentence}"


def read_config(
    options: Options,
    path: str | None = None,
    known: Config | None = None,
    warn: Callable[[str], None] = log.warn,
    *,
    starting: bool = False,
) -> Config:
    """Read the main configuration file, or another file in addition to the `known` one.  Raises ConfigErrors.

    `starting`: for a daemon that starts.  It does not need the default file to exist.
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


def serve(options: Options, program: Program, stored: Mapping[str, int]) -> int:
    """Start the daemon and serve until it is told to stop.  Raises VmdError if it cannot start.

    `stored` has the descriptors that earlier daemons have stored.  A daemon that takes the place of an earlier one uses
    the earlier one's configuration: guests run, and vm.conf may have errors by now.
    """
    need_root()
    debug_filters(options)
    give_up_capabilities(sum(1 << capability for capability in PARENT_CAPABILITIES))
    uid, gid = service.lookup_user()
    store = Store(stored)
    truth, config = former(store)
    if config is None:
        config = read_config(options, starting=True)  # before anything else, so that an error is reported at once
    kvm_fd = open_kvm(options, adopts=truth is not None)
    raise_file_limit(config.settings.limit_vms)
    for warning in host_warnings(config):
        log.warn(as_warning(warning))
    service.make_run_directory()
    lock = LifeLock(options.socket_path)
    if truth is None:
        lock.wait()
    listener = control_socket(options, config, store)
    with contextlib.ExitStack() as end:
        end.callback(lock.remove)
        end.callback(service.remove_socket, options.socket_path)
        ready = announce(options, stored)
        form = service.choose_log(options.debug)
        log.setup("vmd", form, options.verbosity)
        for line in landlock.limits(landlock.abi()):
            log.debug(line)  # here once, instead of in each process
        scores = OomScores()
        children = Children(uid, gid, config.settings.first_id, lock)
        state = StateFile(state_directory())
        parent = Parent(options, config, partial(read_config, options), state, store, truth)
        parent.on_ready = ready
        parent.life.scores = scores
        parent.upgrade.program = program
        end.callback(parent.logs.end)
        service.keep_alive(parent.loop)
        parent.start(children, listener, kvm_fd)
        parent.loop.run()
        if parent.handed_over:
            parent.lasting.save_now()
            end.pop_all()  # lock and socket now belong to the next daemon
            return parent.exit_status
        parent.finish()
        children.reap(CHILD_EXIT_TIMEOUT_S)
        parent.clean_up()
        children.reap(CHILD_EXIT_TIMEOUT_S)
        log.info("terminating")
    return parent.exit_status


def debug_filters(options: Options) -> None:
    """Allow that refused system calls are named before they kill, with -d only."""
    if DEBUG in os.environ:
        if options.debug:
            log.warn(f"{DEBUG}: refused system calls are named; the confinement is weaker, so use no guests of others")
            return
        log.warn(f"{DEBUG} in the environment has no effect without -d")
        del os.environ[DEBUG]


def need_root() -> None:
    """Raise VmdError unless this process runs as root."""
    if os.geteuid() != 0:
        raise VmdError("need root privileges: run vmd as root")


def former(store: Store) -> tuple[Truth | None, Config | None]:
    """Return the state of an earlier daemon and its configuration; None and None if there is no usable state.

    If a stored state is not usable, all stored descriptors are closed.  The vmms of the earlier daemon then ask their
    guests to shut down.  If no vmm is left, there are no guests, and this daemon starts like the first one.
    """
    if "state" in store.names and not has_guests(store.names):
        log.error("every vmm of the vmd before this one has ended, and its VMs with it: VMs of vm.conf start again")
    elif "state" in store.names:
        try:
            return read_state(store)
        except (VmdError, OSError) as error:
            log.crit(f"{sentence(error)}: its guests are shut down")
    for name in store.names:
        store.remove(name)
    return None, None


def read_state(store: Store) -> tuple[Truth, Config]:
    """Return the state of an earlier daemon and its configuration.  Raises VmdError or OSError."""
    memory = StateMemory(store.duplicate("state"))
    try:
        truth = read(memory)
        return truth, config_of(truth)
    finally:
        memory.close()


def open_kvm(options: Options, *, adopts: bool) -> int:
    """Return a descriptor of /dev/kvm.  Raises NoKvm if there is none.

    A daemon that adopts VMs gets -1 instead, because VMs that run do not need it.
    """
    try:
        return service.wait_for_kvm(0 if options.debug or adopts else service.KVM_WAIT_S)
    except service.NoKvm as error:
        if not adopts:
            raise
        log.error(f"{error}: a start of a VM may fail")
        return -1


def control_socket(options: Options, config: Config, store: Store) -> socket.socket:
    """Return the control socket: the stored one, or a new one.  Raises OperatorError or HostError."""
    if "listener" in store.names and os.path.exists(options.socket_path):
        try:
            return socket.socket(fileno=store.duplicate("listener"))
        except OSError as error:
            log.error(f"the control socket of the vmd before this one cannot be used: {sentence(error)}")
            service.remove_socket(options.socket_path)
    store.remove("listener")
    return service.listen(options.socket_path, config.settings.socket_owner)


def announce(options: Options, stored: Mapping[str, int]) -> Callable[[], None]:
    """Go to the background, if needed; return a function that reports that the daemon serves clients.

    A daemon that takes the place of an earlier one is already in the background, or is to stay in the foreground.
    """
    if options.debug or stored or os.environ.get("NOTIFY_SOCKET"):
        return service.notify_ready
    return service.daemonize()
