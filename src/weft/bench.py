"""Timing structured against dense: a whole network, one layer, or every family at one size.

Both sides of a comparison run in turns in the same process, so that what disturbs the machine disturbs them
alike, and only their ratio is worth quoting. Before a "warm" call the same one has just run some times and
left in the caches what fits there; before a "cold" one they are filled with other numbers, as they are where
a layer runs once per frame among much else.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from weft import checks
from weft.layers.linear import StructuredLinear
from weft.measure import (
    Batch,
    Timing,
    environment,
    latencies,
    threads,
    time_alternating,
)
from weft.progress import track
from weft.structures.base import Shape, Structure, StructuredMatrix

CACHES = ("warm", "cold")
BATCHES = (1, 16, 128)
# Where the system does not say how large its caches are.
_USUAL_CACHE = 64 * 2**20
# Caches give up old lines after some calls only; what takes longer than this does not fit anyway.
_WARMING_CALLS = 4
_WARMING_SECONDS = 0.005


@dataclass(frozen=True)
class Comparison:
    """Dense and structured, timed in turns.

    Attributes:
        name: what was timed.
        shape: the weight's shape; empty for a network.
        batch: input vectors, or samples, per call.
        threads: torch's number of threads.
        cache: "warm" or "cold".
        dense: seconds per call of the dense one.
        structured: seconds per call of the structured one.
        multiply_adds: the structured one's as a share of the dense one's; None where it is not known.
        bytes: those of the stored tensors, as a share of the dense one's.
    """

    name: str
    shape: Shape
    batch: int
    threads: int
    cache: str
    dense: Timing
    structured: Timing
    multiply_adds: float | None = None
    bytes: float | None = None

    @property
    def ratio(self) -> float:
        """Structured time over dense time, of the medians."""
        return self.structured.median / self.dense.median

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON-ready data, its ratio included."""
        return {**asdict(self), "shape": list(self.shape), "ratio": self.ratio}


def compare_layers(
    members: Iterable[StructuredMatrix],
    *,
    batches: Sequence[int] = BATCHES,
    thread_counts: Sequence[int] = (1,),
    caches: Sequence[str] = ("warm",),
    seconds: float = 1.0,
    shown: bool | None = None,
) -> list[Comparison]:
    """Times structured linear layers, module call and bias included, against `F.linear` of the same shape.

    Args:
        members: the matrices, two-dimensional.
        batches: input vectors per call.
        thread_counts: torch's thread counts.
        caches: "warm", "cold" or both.
        seconds: about how long to measure each combination.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        One row per combination.

    Raises:
        ValueError: a member is a convolution's, or a cache is called something else.
    """
    for cache in caches:
        checks.one_of("cache", cache, CACHES)
    members = list(members)
    for member in members:
        if len(member.shape) != 2:
            remedy = "time a network that holds the convolution instead"
            raise ValueError(checks.fault("shape", "(outputs, inputs)", member.shape, remedy))
    wanted = [
        (member, count, batch, cache)
        for member in members
        for count in thread_counts
        for batch in batches
        for cache in caches
    ]
    rows = []
    generator = torch.Generator().manual_seed(0)
    for member, count, batch, cache in track(wanted, "timing", shown=shown):
        like = next(member.parameters(), torch.empty(0))
        weight, bias, x = (
            torch.randn(shape, generator=generator).to(like)
            for shape in (member.shape, member.shape[:1], (batch, member.inputs))
        )
        layer = StructuredLinear(member, bias).eval()
        with torch.inference_mode(), threads(count):
            timed = time_alternating(
                {
                    "dense": lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias),
                    "structured": lambda x=x, layer=layer: layer(x),
                },
                seconds=seconds,
                device=like.device,
                before=_before(cache),
            )
        cost = member.cost()
        rows.append(
            Comparison(
                str(member.structure),
                member.shape,
                batch,
                count,
                cache,
                timed["dense"],
                timed["structured"],
                cost.multiply_adds / weight.numel(),
                cost.bytes / weight.nbytes,
            )
        )
    return rows


def compare_networks(
    dense: nn.Module,
    structured: nn.Module,
    sample: Batch,
    *,
    name: str = "network",
    batches: Sequence[int] = BATCHES,
    thread_counts: Sequence[int] = (1,),
    caches: Sequence[str] = ("warm",),
    seconds: float = 1.0,
    shown: bool | None = None,
) -> list[Comparison]:
    """Times two networks in turns.

    Args:
        dense: the dense network.
        structured: the structured one.
        sample: inputs that are repeated or cut to each batch size.
        name: what the rows are called.
        batches: samples per call.
        thread_counts: torch's thread counts.
        caches: "warm", "cold" or both; anything else is a ValueError.
        seconds: about how long to measure each combination.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        One row per combination.
    """
    for cache in caches:
        checks.one_of("cache", cache, CACHES)
    wanted = [(count, batch, cache) for count in thread_counts for batch in batches for cache in caches]
    rows = []
    for count, batch, cache in track(wanted, "timing", shown=shown):
        (row,) = latencies(
            dense,
            structured,
            sample,
            batches=[batch],
            thread_counts=[count],
            seconds=seconds,
            before=_before(cache),
            shown=False,
        )
        rows.append(Comparison(name, (), batch, count, cache, row.dense, row.compressed))
    return rows


def members_of_size(
    families: Iterable[type[Structure]], shape: Shape, share: float
) -> tuple[list[StructuredMatrix], list[str]]:
    """A random member of every family, of the candidate whose bytes come nearest to a share.

    Args:
        families: the families.
        shape: (outputs, inputs).
        share: of the dense weight's bytes, up to 1.

    Returns:
        The members, and the names of the families whose sizes are known only after a fit.
    """
    element = torch.get_default_dtype().itemsize
    wanted = checks.share("share", share) * shape[0] * shape[1] * element
    members, left_out = [], []
    for family in families:
        known = []
        for candidate in family.candidates(shape):
            with suppress(ValueError):  # of a size that depends on the weight
                known.append((abs(candidate.predicted_cost(shape, element).bytes - wanted), candidate))
        if not known:
            left_out.append(family.__name__)
            continue
        members.append(min(known, key=lambda pair: pair[0])[1].initialise(shape))
    return members, left_out


def record(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Measurements as they are written to a file: with machine, versions and commit.

    Args:
        rows: what was measured.

    Returns:
        JSON-ready data.
    """
    return {
        "weft_bench": 2,
        "environment": surroundings(),
        "rows": [row.to_json() for row in rows],
    }


def surroundings(*packages: str) -> dict[str, Any]:
    """All that bears on a measurement: machine, versions, commit and load.

    Args:
        *packages: further packages whose versions belong to it, None where they are not installed.

    Returns:
        JSON-ready data.
    """
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    return {**environment(), **versions, "commit": commit(), "load_average": load}


def commit() -> str | None:
    """The git commit that the package runs from, with "+" where files differ from it; None elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # else a repository that only happens to be around
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _before(cache: str) -> Callable[[Callable[[], object]], object]:
    """What to do before a call: the same one untimed, or to fill the caches with other numbers."""
    if cache == "warm":
        return _warm
    filler = torch.zeros(2 * cache_bytes() // 4)
    return lambda run: filler.add_(1.0)


def _warm(run: Callable[[], object]) -> None:
    """Runs a short call often enough for the last cache to give up what the other side left in it."""
    start = time.perf_counter()
    for _ in range(_WARMING_CALLS):
        run()
        if time.perf_counter() - start > _WARMING_SECONDS:
            break


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the processor's largest cache.

    Args:
        folder: where Linux describes the caches.

    Returns:
        What the system says, or 64 MiB where it says nothing.

    Examples:
        >>> cache_bytes(Path("no/such/folder")) == 64 * 2**20
        True
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for file in folder.glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=_USUAL_CACHE)
