"""The first bytes of a machine's stream, for code that has to recognise one; `vmd/vm/stream.py` has the rest."""

MAGIC = b"vmdstate"
