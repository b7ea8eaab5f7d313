"""vmctl as `make install` installs it: without site-packages, whose import takes longer than the command itself."""

import os
from importlib.util import find_spec

from tests.support.daemon import ROOT
from vmd.privsep.spawn import INTERPRETER

_MSGPACK = find_spec("msgpack")
assert _MSGPACK is not None
assert _MSGPACK.origin is not None
PATH = [str(ROOT), os.path.dirname(os.path.dirname(_MSGPACK.origin))]
LAUNCH = f"import gc, sys; gc.disable(); sys.path.extend({PATH!r}); from vmctl.__main__ import main; sys.exit(main())"
VMCTL = (INTERPRETER, "-IS", "-c", LAUNCH)
