"""Builds a wheel into dist/ and proves that it runs the native kernels without a compiler.

    python tools/build_wheel.py             # build, install beside, check
    python tools/build_wheel.py --check     # check the weft that this Python has installed

The check unpacks the wheel into an empty folder and starts a Python whose PATH is empty, so that no compiler
and no CMake can be found.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import shutil, sys
if len(sys.argv) > 1:
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
    sys.path.insert(0, sys.argv[1])
    assert not any(shutil.which(name) for name in ("cc", "c++", "gcc", "g++", "clang", "cl", "cmake"))
import torch, weft
from weft.kernels import dispatch
from weft.structures.low_rank import LowRank
from weft.structures.sparse_product import SparseProduct
assert len(sys.argv) == 1 or weft.__file__.startswith(sys.argv[1]), weft.__file__
assert dispatch.route().startswith("native"), dispatch.route()
x = torch.randn(3, 40)
for structure in (LowRank(5), SparseProduct(2, 4, "random")):
    member = structure.initialise((30, 40)).requires_grad_(False)
    expected = member.to_dense().double() @ x.double().T
    assert torch.allclose(member(x).double(), expected.T, atol=1e-4), structure
print(f"{weft.__file__}: {dispatch.route()}")
"""


def main() -> None:
    """Builds and checks, or checks only."""
    if "--check" in sys.argv[1:]:
        subprocess.run([sys.executable, "-c", CHECK], check=True, cwd=tempfile.gettempdir())
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built"
        subprocess.run(
            [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), "."],
            check=True,
            cwd=ROOT,
        )
        (wheel,) = built.glob("*.whl")
        site = Path(folder) / "site"
        subprocess.run(
            [*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
        )
        without_tools = {"PATH": folder, "HOME": folder}
        subprocess.run([sys.executable, "-c", CHECK, str(site)], check=True, cwd=folder, env=without_tools)
        (ROOT / "dist").mkdir(exist_ok=True)
        wheel.replace(ROOT / "dist" / wheel.name)
    print(f"wrote dist/{wheel.name}")


if __name__ == "__main__":
    main()
