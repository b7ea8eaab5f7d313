"""From a command line to a running daemon: checks, configuration, processes, in an order that fails early."""

import os
import sys
from collections.abc import Callable

from vmd.config import check, grammar
from vmd.config.model import Config
from vmd.errors import VmdError
from vmd.log import STDERR, log
from vmd.parent import service
from vmd.parent.children import Children
from vmd.parent.main import Parent
from vmd.parent.options import Options, UsageError, parse


def run(arguments: list[str]) -> int:
    """Run vmd(8); every reason not to start is one sentence on standard error."""
    try:
        options = parse(arguments)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    log.setup("vmd", STDERR, options.verbosity)
    try:
        if options.check_only:
            read_config(options)
            print("configuration OK", file=sys.stderr)
            return 0
        return serve(options)
    except VmdError as error:
        for line in str(error).splitlines():
            log.crit(line)
        return 1


def read_config(options: Options, path: str | None = None) -> Config:
    """Read and check the main configuration file, or an additional one.  Raises ConfigErrors."""
    macros = dict(grammar.parse_macro_definition(text) for text in options.macros)
    config = grammar.load(
        path or options.conf_path,
        macros=macros,
        explicit=path is not None or options.conf_given,
        warn=log.warn,
    )
    for warning in check.check(config):
        log.warn(warning)
    return config


def serve(options: Options) -> int:
    """Start the daemon and serve until it is told to stop.  Raises VmdError if it cannot start."""
    if os.geteuid() != 0:
        raise VmdError("need root privileges: run vmd as root")
    uid, gid = service.lookup_user()
    kvm_fd = service.open_kvm()
    config = read_config(options)
    listener = service.listen(options.socket_path, config.settings.socket_owner)
    try:
        ready = announce(options)
        form = service.choose_log(options.debug)
        log.setup("vmd", form, options.verbosity)
        parent = Parent(options, config, lambda path: read_config(options, path))
        parent.on_ready = ready
        parent.start(Children(uid, gid, form, options.verbosity), listener, kvm_fd)
        parent.loop.run()
        parent.finish()
    finally:
        service.remove_socket(options.socket_path)
    log.info("terminating")
    return parent.exit_status


def announce(options: Options) -> Callable[[], None]:
    """Return what tells our starter that the daemon serves, after going to the background if we should."""
    if options.debug or os.environ.get("NOTIFY_SOCKET"):
        return lambda: service.notify("READY=1")
    return service.daemonize()
