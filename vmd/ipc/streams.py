"""How the stream of a machine begins, for those who only tell it from other bytes; `vmd/vm/stream.py` has the rest."""

MAGIC = b"vmdstate"
