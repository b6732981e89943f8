"""Runs the ARM copy of the kernels in an emulator: every product against the portable copy.

    apt-get install g++-aarch64-linux-gnu qemu-user
    python tools/check_neon.py

Builds the native code without Python into build/neon and runs tests/kernels/copies.cpp; a minute or two.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE, WORK = ROOT / "native", ROOT / "build" / "neon"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{NATIVE}", "-DWEFT_HAS_portable", "-DWEFT_HAS_neon"]
# As CMakeLists.txt has it.
LEAVES = ["columns_product", "quantized_leaf", "rows_product", "sparse_rows", "table_sums"]
UNFUSED = ["-ffp-contract=off"]


def compile_(source: Path, variant: str = "") -> Path:
    """One object file, of one copy where a variant is named."""
    target = WORK / f"{source.stem}{variant}.o"
    flags = [*FLAGS, *([f"-DWEFT_VARIANT={variant}"] if variant else [])]
    flags += UNFUSED if source.stem == "quantized_leaf" else []
    subprocess.run([COMPILER, *flags, "-c", str(source), "-o", str(target)], check=True)
    return target


def main() -> None:
    """Builds, runs, and exits with the program's status."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        sys.exit(
            f"{' and '.join(missing)} must be installed: apt-get install g++-aarch64-linux-gnu qemu-user"
        )
    WORK.mkdir(parents=True, exist_ok=True)
    common = [path for path in NATIVE.glob("*.cpp") if path.stem not in {*LEAVES, "bindings"}]
    jobs = [(path, "") for path in [*common, ROOT / "tests" / "kernels" / "copies.cpp"]]
    jobs += [(NATIVE / f"{leaf}.cpp", variant) for leaf in LEAVES for variant in ("portable", "neon")]
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        objects = list(executor.map(lambda job: compile_(*job), jobs))
    program = WORK / "copies"
    subprocess.run([COMPILER, *map(str, objects), "-static", "-pthread", "-o", str(program)], check=True)
    sys.exit(subprocess.run([EMULATOR, str(program), "NEON"], check=False).returncode)


if __name__ == "__main__":
    main()
