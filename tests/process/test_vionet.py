"""scratch."""
import itertools, os, random
import pytest
from collections.abc import Iterator
from tests.support.fakedriver import *
from tests.support.netdriver import *
from tests.support.netdriver import ALL
from tests.support.network import Host, Network, TapInterface

pytestmark = pytest.mark.root

@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as n: yield n

@pytest.fixture
def tap(network):
    with TapInterface(network) as t: yield t

def eth(n, seed=0, dst=b"\xff"*6):
    return dst + LLADDR + b"\x88\xb5" + random.Random(seed).randbytes(n-14)

COMBOS=[sum(c) for c in itertools.product((0,MODERN),(0,MRG),(0,OFFLOADS),(0,EVENT_IDX),(0,INDIRECT_DESC))]
@pytest.mark.parametrize("features",COMBOS,ids=hex)
def test_combo(tap,features):
    d=NetDriver(tap,features=features)
    with Host(tap) as host:
        print(d.device.ready_ms, d.device.pss_kib())
        for n in (14,60,1514):
            d.send(eth(n,n)); assert host.receive()==eth(n,n)
        d.post(3)
        for n in (60,1514,60,300,61,62,63):
            host.send(eth(n,n)); r=d.receive(); assert r.frame==eth(n,n), (r.header,len(r.frame))
        print(d.counters())
    d.close()
