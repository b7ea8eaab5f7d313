"""vmctl metrics: the figures of VMs in the format of Prometheus."""

from vmctl.errors import refused
from vmctl.options import Given
from vmctl.output import put, put_json
from vmctl.session import Session
from vmctl.vmref import VmRef, parse_vmref
from vmd.client import Refused


def run(session: Session, given: Given) -> int:
    """Print the figures of one VM, or of all."""
    ref = parse_vmref(given.operand) if given.operand else VmRef()
    try:
        vms = session.client.figures(ref)
    except Refused as error:
        raise refused("metrics", error) from None
    if session.json:
        from vmctl.figures import as_json

        put_json({"vms": [as_json(vm) for vm in vms]})
        return 0
    from vmd.exposition import expose

    daemon = session.client.daemon
    release = daemon.program if daemon is not None else ""
    put(expose(vms, release, openmetrics=given.has("-o")).encode("utf-8", "replace"))
    return 0
