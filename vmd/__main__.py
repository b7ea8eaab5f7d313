"""First code of every process: picks a process main, nothing else."""

import gc
import sys

from vmd import stdio
from vmd.errors import HostError
from vmd.log import log

PROCESSES = ("agentx", "consolelog", "control", "imgwriter", "log", "metrics", "opener", "priv", "vmm", "vm")


def main() -> int:
    """Run vmd(8); or one of its processes, whose arguments are `NAME LOG-FORM VERBOSITY` and some of its own."""
    stdio.fill()
    arguments = sys.argv[1:]
    if len(arguments) >= 3 and arguments[0] in PROCESSES:
        name, form, verbosity = arguments[:3]
        log.setup(name, form, int(verbosity))
        return run_process(name)
    from vmd.parent.startup import run

    gc.freeze()
    gc.enable()
    return run(arguments)


def run_process(name: str) -> int:
    """Import and run one process.  Only its own code is imported, so an intruder finds no other."""
    gc.disable()  # imports make no garbage; `freeze` then keeps their objects out of all collections
    match name:
        case "agentx":
            from vmd.agentx.main import main as process_main
        case "consolelog":
            from vmd.consolelog.main import main as process_main
        case "control":
            from vmd.control.main import main as process_main
        case "imgwriter":
            from vmd.imgwriter.main import main as process_main
        case "log":
            from vmd.logger.main import main as process_main
        case "metrics":
            from vmd.metrics.main import main as process_main
        case "opener":
            from vmd.opener.main import main as process_main
        case "priv":
            from vmd.priv.main import main as process_main
        case "vmm":
            from vmd.vmm.main import main as process_main
        case _:
            from vmd.vm.main import main as process_main
    gc.freeze()
    gc.enable()
    try:
        return process_main()
    except HostError as error:  # during the start, before the process can answer its parent
        log.crit(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
