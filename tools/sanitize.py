"""Runs the kernels' tests on native code built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py                # all of them
    python tools/sanitize.py -k sparse      # arguments go to pytest

The build goes into build/sanitize and leaves the installed one alone. The sanitizer's library has to be the
first that a process loads, so the tests run in a process of their own; all memory, torch's included, then
comes from its allocator, and an access one byte outside of a tensor ends the run.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "sanitize"
# A report of the sanitizers goes to the file descriptor, which pytest would keep to itself.
CAPTURE = ["--capture=sys"]
TESTS = ["tests/test_kernels.py", "tests/kernels"]
# An editable install finds its own build before any path does; the tests must not silently run on that one.
RUN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, sys.argv[1])
import weft.kernels._native as native
assert native.__file__.startswith(sys.argv[1]), f"not the build under test: {native.__file__}"
import pytest
raise SystemExit(pytest.main(sys.argv[2:]))
"""


def main() -> None:
    """Builds, finds the compiler's sanitizer library, runs pytest and exits with its status."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    options = [
        "-Ccmake.define.WEFT_SANITIZE=ON",
        "-Cbuild-dir=build/sanitize-objects",
        "-Cinstall.strip=false",
    ]
    target = ["--no-build-isolation", "--upgrade", "--target", str(SITE)]
    subprocess.run([*pip, *target, *options, str(ROOT)], check=True, cwd=ROOT)
    if not list((SITE / "weft" / "kernels").glob("_native*")):
        sys.exit("the native code did not build; see above, or run: pip install . -v")
    compiler = os.environ.get("CXX", "c++")
    libraries = [_library(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        # The sanitizer looks for C++'s exceptions as it starts, before Python has loaded what has them.
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch keep memory until the process ends, which is no fault of the kernels.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    command = [
        sys.executable,
        "-c",
        RUN,
        str(SITE),
        "-p",
        "no:cacheprovider",
        "-q",
        *CAPTURE,
        *TESTS,
        *sys.argv[1:],
    ]
    sys.exit(subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode)


def _library(compiler: str, name: str) -> str:
    """Where a compiler keeps a library of its own."""
    command = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"{compiler} has no {name}; install its sanitizers, e.g. libasan8, or set CXX=g++")
    return found


if __name__ == "__main__":
    main()
