"""The output for Prometheus and OpenMetrics: it has every figure, with names that their programs accept."""

import itertools
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import parser as prometheus
from prometheus_client.openmetrics import parser as openmetrics

from vmd.exposition import FAMILIES, expose
from vmd.ipc.figures import (
    CdromFigures,
    DiskFigures,
    EntropyFigures,
    GroupFigures,
    LimitFigures,
    NicFigures,
    VcpuFigures,
)
from vmd.ipc.messages.figures import LifeEnd, VmFigures
from vmd.units import NS

# No metrics of their own: they are labels, or say whether there are numbers.
LABELS = {"index", "vmid", "uid", "pid"}
# An address stored as a number, which is no metric.
LEFT_OUT = {"lease_requested"}


class Numbers:
    """Fills the number fields of records with unique numbers."""

    def __init__(self) -> None:
        self.given: dict[float, str] = {}
        self._next = itertools.count(1_000_001)

    def fill(self, cls: "type[Any]", **known: object) -> Any:  # noqa: ANN401 - any record
        """Return a record of a class with unique numbers in its other number fields."""
        values = dict(known)
        for field, kind in cls.fields.items():
            if field not in values and kind in (int, int | None) and field not in LABELS:
                number = next(self._next)
                values[field] = number * NS if field.endswith("_ns") else number
                if field not in LEFT_OUT:
                    self.given[float(number)] = f"{cls.__name__}.{field}"
        return cls(**values)


def a_vm(numbers: Numbers, name: str = "web") -> VmFigures:
    """Return a VM with one of each counted device."""
    vm: VmFigures = numbers.fill(
        VmFigures,
        vmid=3,
        name=name,
        uid=1000,
        state="running",
        pid=77,
        ended=numbers.fill(LifeEnd, how="stopped", text=""),
        vcpus=(numbers.fill(VcpuFigures, index=0), numbers.fill(VcpuFigures, index=1)),
        disks=(numbers.fill(DiskFigures, index=0, counted=True), numbers.fill(DiskFigures, index=1, counted=True)),
        cdrom=numbers.fill(CdromFigures, index=0, counted=True),
        entropy=numbers.fill(EntropyFigures, index=0, counted=True),
        nics=(numbers.fill(NicFigures, index=0, counted=True, tap="vmd3.0", switch="lan", lladdr=b"\2\0\0\0\0\1"),),
        group=numbers.fill(GroupFigures),
        limit=numbers.fill(LimitFigures),
    )
    return vm


def samples(text: str, parser: Any = prometheus) -> "list[tuple[str, dict[str, str], float]]":  # noqa: ANN401
    """Return what Prometheus' own parser finds in a text: name, labels, value."""
    return [(each.name, each.labels, each.value) for each in found_by(parser, text)]


def found_by(parser: Any, text: str) -> Iterator[Any]:  # noqa: ANN401
    """Yield each sample that a parser finds."""
    for family in parser.text_string_to_metric_families(text):
        yield from family.samples


def test_every_figure_has_a_line() -> None:
    """A figure that is added to `vmd.ipc.figures` needs a row in `vmd.exposition`."""
    numbers = Numbers()
    text = expose([a_vm(numbers)])

    shown = {value for _name, _labels, value in samples(text)}

    assert sorted(what for number, what in numbers.given.items() if number not in shown) == []


def test_every_family_is_used() -> None:
    """Each has an explanation of one sentence."""
    text = expose([a_vm(Numbers())])

    families = {family.name: family for family in prometheus.text_string_to_metric_families(text)}

    assert set(families) == set(FAMILIES)
    for name, (kind, what) in FAMILIES.items():
        assert (families[name].type, families[name].documentation) == (kind, what)
        assert what.endswith("."), name


@pytest.mark.parametrize("openmetrics_too", [False, True])
def test_both_formats_have_the_same_values(openmetrics_too: bool) -> None:
    """OpenMetrics' own parser checks units, counters and the end."""
    vms = [a_vm(Numbers()), a_vm(Numbers(), "db").replace(group=None, cdrom=None)]

    text = expose(vms, openmetrics=openmetrics_too)

    assert samples(text, openmetrics if openmetrics_too else prometheus) == samples(expose(vms))


@pytest.mark.parametrize("vms", [[], ["web"], ["web", "db"]])
def test_promtool_has_no_complaints(vms: list[str]) -> None:
    """It checks syntax and names."""
    text = expose([a_vm(Numbers(), name) for name in vms])

    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=100, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_line_is_there_twice() -> None:
    """A duplicate would make the whole text invalid."""
    text = expose([a_vm(Numbers()), a_vm(Numbers(), "db")])

    keys = [(name, tuple(sorted(labels.items()))) for name, labels, _ in samples(text)]

    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\\nb", "ü", "}", "# EOF", "a,b=\"c\""])
def test_any_name_can_be_parsed(name: str) -> None:
    """VMs, switches and states may have any names here."""
    vm = a_vm(Numbers(), name)
    vm = vm.replace(nics=(vm.nics[0].replace(switch=name),), state=name)
    for text, parser in ((expose([vm]), prometheus), (expose([vm], openmetrics=True), openmetrics)):
        found = {sample: labels for sample, labels, _ in samples(text, parser)}
        assert found["vmd_vm_info"] == {"vm": name, "id": "3", "uid": "1000"}
        assert found["vmd_vm_state"]["state"] == found["vmd_interface_info"]["switch"] == name


def of_kind(text: str, *prefixes: str) -> list[str]:
    """Return the names of samples that begin with one of these prefixes."""
    return [name for name, _, _ in samples(text) if name.startswith(prefixes)]


def test_missing_figures_have_no_line() -> None:
    """A device has no figures, the host does not report a value, or the VM does not run."""
    vm = a_vm(Numbers())
    assert of_kind(expose([vm]), "vmd_disk", "vmd_vm_group_oom", "vmd_interface_packets") != []
    none = GroupFigures(**dict.fromkeys(GroupFigures.fields))
    vm = vm.replace(
        disks=(vm.disks[0].replace(counted=False),),
        cdrom=CdromFigures(index=0),
        entropy=EntropyFigures(index=0),
        nics=(vm.nics[0].replace(counted=False),),
        group=none,
    )
    text = expose([vm])
    assert of_kind(text, "vmd_disk", "vmd_cdrom", "vmd_entropy", "vmd_vm_group") == []
    assert of_kind(text, "vmd_interface") == ["vmd_interface_info"]
    stopped = expose([a_vm(Numbers()).replace(pid=0, state="stopped", ended=None, started_s=0)])
    assert set(of_kind(stopped, "vmd_vm", "vmd_disk", "vmd_interface")) == {
        "vmd_vm_info", "vmd_vm_state", "vmd_vm_running", "vmd_vm_state_since_timestamp_seconds",
        "vmd_vm_starts_total", "vmd_vm_guest_resets_total", "vmd_vm_memory_size_bytes",
    }  # fmt: skip


def test_nanoseconds_are_seconds_to_the_last_digit() -> None:
    """For a year, a float would lose the last digits."""
    vm = a_vm(Numbers()).replace(cpu_ns=31_536_000_000_000_001)
    assert 'vmd_vm_cpu_seconds_total{vm="web"} 31536000.000000001\n' in expose([vm])


def test_information_has_the_value_1() -> None:
    """Queries multiply by it."""
    vms = [a_vm(Numbers()), a_vm(Numbers(), "db").replace(pid=0)]
    found = {(name, labels.get("vm", "")): value for name, labels, value in samples(expose(vms, "9.9"))}

    for name in ("vmd_vm_info", "vmd_vm_state"):
        assert [found[name, vm] for vm in ("web", "db")] == [1, 1]
    assert [found["vmd_vm_running", vm] for vm in ("web", "db")] == [1, 0]
    assert (found["vmd_build_info", ""], found["vmd_interface_info", "web"]) == (1, 1)


def test_families_without_values_are_not_there() -> None:
    """A daemon without VMs shows only itself."""
    text = expose([], "9.9", openmetrics=True)
    assert [line.split()[:3] for line in text.splitlines()] == [
        ["#", "HELP", "vmd_build_info"], ["#", "TYPE", "vmd_build_info"], ['vmd_build_info{version="9.9"}', "1"],
        ["#", "EOF"],
    ]  # fmt: skip
    units = [line.split()[2:] for line in expose([a_vm(Numbers())], openmetrics=True).splitlines() if "# UNIT" in line]
    assert units
    assert all(name.endswith(f"_{unit}") and unit in ("bytes", "seconds") for name, unit in units)
    assert "# UNIT" not in expose([a_vm(Numbers())])
