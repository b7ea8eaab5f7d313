"""The part of pyroute2 that we use, without the rest of it.

`import pyroute2` imports all of it: a database of interfaces, connection tracking, plugins.  A process that does so
starts 60 to 100 ms later and is 5 to 8 MB larger.  So the package is put in place here without its own code, and only
the modules that are named below are loaded, with what they need.
"""

import importlib.util
import sys

PACKAGE = "pyroute2"

_spec = importlib.util.find_spec(PACKAGE)
if _spec is not None:  # else the imports below say that it is missing
    sys.modules.setdefault(PACKAGE, importlib.util.module_from_spec(_spec))

from pyroute2.iproute import IPRoute  # noqa: E402
from pyroute2.netlink import NLM_F_DUMP_INTR  # noqa: E402
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError  # noqa: E402

__all__ = ["NLM_F_DUMP_INTR", "IPRoute", "NetlinkDecodeError", "NetlinkError"]
