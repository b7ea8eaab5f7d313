"""The part of pyroute2 that we use, without the rest of it.

`import pyroute2` imports the whole package: a database of interfaces, connection tracking, plugins.  That costs a
process 60 to 100 ms at its start and 5 to 8 MB.  So an empty package is registered here, without running its
`__init__`, and only the modules below are loaded, with what they import.
"""

import importlib.util
import sys

PACKAGE = "pyroute2"

_spec = importlib.util.find_spec(PACKAGE)
if _spec is not None:  # else the imports below raise ImportError
    sys.modules.setdefault(PACKAGE, importlib.util.module_from_spec(_spec))

from pyroute2.iproute import IPRoute  # noqa: E402
from pyroute2.netlink import NLM_F_DUMP_INTR  # noqa: E402
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError  # noqa: E402

__all__ = ["NLM_F_DUMP_INTR", "IPRoute", "NetlinkDecodeError", "NetlinkError"]
