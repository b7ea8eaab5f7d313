"""`make fuzz`: coverage-guided fuzzing of every parser of untrusted bytes, bounded in time.

    python -m fuzz [seconds [target ...]]

Each target runs in its own process.  Afterwards the lines of its parsers that its inputs have reached are counted.  An
input that fails is kept in build/fuzz/TARGET.  It should become a unit test.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_S = 30
INPUT_MAX = 1 << 16
MEMORY_MIB = 1024
LINES_S = 30  # most processor time for running the kept inputs of a target again


def main(arguments: list[str]) -> int:
    """Run the targets one after the other.  Return the number of failed ones."""
    from fuzz.seeds import refused, seeds
    from fuzz.targets import TARGETS

    seconds = int(arguments[0]) if arguments else DEFAULT_S
    failed = []
    for name in arguments[1:] or TARGETS:
        if name not in TARGETS:
            print(f"fuzz: no target is called {name}; there are {', '.join(TARGETS)}", file=sys.stderr)
            return 2
        folder = ROOT / "build" / "fuzz" / name
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate([*seeds(name), *refused(name)]):
            (folder / "corpus" / f"seed{number}").write_bytes(seed)
        command = [
            sys.executable, "-m", "fuzz", "--one", name, f"-max_total_time={seconds}", f"-max_len={INPUT_MAX}",
            f"-rss_limit_mb={MEMORY_MIB}", "-timeout=20", "-print_final_stats=1", f"-artifact_prefix={folder}/",
            str(folder / "corpus"),
        ]  # fmt: skip
        print(f"fuzz: {name}, {seconds} s", flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        (folder / "log").write_text(done.stdout + done.stderr)
        if done.returncode:
            failed.append(name)
            print(done.stdout[-2000:] + done.stderr[-4000:])
        else:
            print("      " + ", ".join(line for line in done.stderr.splitlines() if line.startswith("stat::number")))
            subprocess.run([sys.executable, "-m", "fuzz", "--lines", name], cwd=ROOT, check=False)
    print(f"fuzz: {len(failed)} of the targets failed{': ' + ', '.join(failed) if failed else ''}")
    return len(failed)


def one(name: str, options: list[str]) -> None:
    """Fuzz one target in this process.  Does not return."""
    import atheris

    with atheris.instrument_imports(include=["vmd"]):
        from fuzz.targets import TARGETS
        from vmd.log import log
    log.fd = os.open(os.devnull, os.O_WRONLY)  # a parser may log a warning about each input
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


def show_lines(name: str) -> None:
    """Print how many lines of its parsers the kept inputs of a target reach."""
    from fuzz.reach import Share, reached
    from fuzz.targets import PARSERS, TARGETS
    from vmd.log import log

    log.fd = os.open(os.devnull, os.O_WRONLY)
    found = sorted((ROOT / "build" / "fuzz" / name / "corpus").iterdir(), key=lambda path: path.stat().st_size)
    corpus = sorted(found, key=lambda path: not path.name.startswith("seed"))  # seeds first: they always have time
    lines = reached(TARGETS[name], (path.read_bytes() for path in corpus), LINES_S)
    for module in PARSERS[name]:
        print(f"      {Share(module, lines)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--lines"]:
        show_lines(sys.argv[2])
        sys.exit()
    sys.exit(main(sys.argv[1:]))
