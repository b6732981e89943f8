"""Constraints on a plan: what stays dense, and which families a layer may have."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from weft import checks
from weft.structures import select
from weft.structures.base import Structure


@dataclass(frozen=True, init=False)
class Constraints:
    """What a plan may do to layers, by patterns of their names.

    Patterns are those of shells: `*` stands for any text, dots included. Of several patterns in `families`
    that match a layer, the first counts. Layers that share a weight have one structure in any case.

    Args:
        keep_dense: patterns of layers that stay as they are.
        families: pattern -> families that its layers may have.

    Examples:
        >>> rules = Constraints(keep_dense=["head"], families={"encoder.*": "LowRank,Dense"})
        >>> rules.allowed(("encoder.0.up",), [])
        [<class 'weft.structures.low_rank.LowRank'>, <class 'weft.structures.dense.Dense'>]
        >>> rules.allowed(("head",), select("LowRank"))
        []
    """

    keep_dense: tuple[str, ...]
    families: tuple[tuple[str, tuple[type[Structure], ...]], ...]

    def __init__(
        self,
        keep_dense: Iterable[str] = (),
        families: Mapping[str, str | Iterable[str | type[Structure]]] | None = None,
    ) -> None:
        if isinstance(keep_dense, str):
            keep_dense = [part.strip() for part in keep_dense.split(",") if part.strip()]
        chosen = tuple((pattern, tuple(select(wanted))) for pattern, wanted in (families or {}).items())
        object.__setattr__(self, "keep_dense", tuple(keep_dense))
        object.__setattr__(self, "families", chosen)

    def allowed(self, names: Sequence[str], families: Sequence[type[Structure]]) -> list[type[Structure]]:
        """The families that a weight may have.

        Args:
            names: the layers that share it.
            families: those of the whole plan, for layers that no pattern names.

        Returns:
            The families; none where it stays dense.
        """
        if any(fnmatchcase(name, pattern) for name in names for pattern in self.keep_dense):
            return []
        for pattern, chosen in self.families:
            if any(fnmatchcase(name, pattern) for name in names):
                return list(chosen)
        return list(families)

    def check(self, names: Iterable[Sequence[str]]) -> None:
        """Checks that every pattern means a layer, so that a misspelt one is not passed over.

        Args:
            names: the names of every weight's layers.

        Raises:
            ValueError: a pattern matches no layer.
        """
        known = [name for group in names for name in group]
        for pattern in (*self.keep_dense, *(pattern for pattern, _ in self.families)):
            if not any(fnmatchcase(name, pattern) for name in known):
                got = f"{pattern!r}, which matches none of {', '.join(known[:5])}" + (
                    ", ..." if len(known) > 5 else ""
                )
                remedy = "write a layer's name, with * for any part of it"
                raise ValueError(checks.fault("constraints", "patterns of layer names", got, remedy))
