"""Install the pinned PyTorch in the build that suits this machine, with the pip of the running Python.

On Linux `pip install torch` means a CUDA build of several gigabytes. A machine without an NVIDIA GPU gets the
CPU build instead: from wherever pip is configured to find wheels, else from PyTorch's own index.
Standard library only: it runs in a virtual environment that holds nothing yet.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def pinned_version() -> str:
    """The version that constraints.txt pins."""
    match = re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        sys.exit(f"{CONSTRAINTS}: no line torch==VERSION")
    return match[1]


def installed_version() -> str | None:
    """The installed version without its build label, such as +cpu."""
    try:
        return importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver answers."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def pip_install(*arguments: str, quiet: bool = False) -> bool:
    """Run pip install; what torch itself requires comes later, with weft's own requirements."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *arguments]
    return subprocess.run(command, capture_output=quiet, check=False).returncode == 0


def main() -> None:
    """Try the sources in turn, the cheapest first."""
    version = pinned_version()
    if installed_version() == version:
        return
    requirement = f"torch=={version}"
    if sys.platform != "linux" or has_nvidia_gpu():  # elsewhere PyPI's build is the CPU's or Apple's
        if not pip_install(requirement):
            sys.exit(f"could not install {requirement} from the package index; see pip's message above")
        return
    if pip_install("--no-index", requirement, quiet=True):
        return
    cpu = ["--index-url", CPU_INDEX, "--timeout", "15", "--retries", "1", f"{requirement}+cpu"]
    if pip_install(*cpu):
        return
    sys.exit(
        f"could not install the CPU build of {requirement}: neither pip's configured wheel folders nor "
        f"{CPU_INDEX} has it for Python {sys.version_info.major}.{sys.version_info.minor}; "
        f"put its wheel in a folder and run again with PIP_FIND_LINKS=that-folder"
    )


if __name__ == "__main__":
    main()
