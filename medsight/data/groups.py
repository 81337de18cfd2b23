"""Code groups (modality and body site), as a recipe names them."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase


class Groups:
    """Which code group an image belongs to, by its modality and site.

    Args:
        patterns: group name -> shell patterns of "modality/site"; the first group that matches counts, but one that
            names the pair itself goes before all.
    """

    def __init__(self, patterns: Mapping[str, Sequence[str]]) -> None:
        self.patterns = {name: list(some) for name, some in patterns.items()}
        self.names = list(self.patterns)

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[str, str]]) -> "Groups":
        """A group for each pair of modality and site, in alphabetical order."""
        return cls({f"{modality} {site}": [f"{modality}/{site}"] for modality, site in sorted(set(pairs))})

    def find(self, modality: str, site: str) -> int | None:
        """The group k of an image; None if no group has a pattern for it."""
        pair = f"{modality}/{site}"
        for matches in (str.__eq__, fnmatchcase):
            for k, some in enumerate(self.patterns.values()):
                if any(matches(pair, pattern) for pattern in some):
                    return k
        return None

    def index(self, modality: str, site: str) -> int:
        """The group k of an image.

        Raises:
            ValueError: if no group has a pattern for it.
        """
        if (k := self.find(modality, site)) is not None:
            return k
        raise ValueError(f"no code group matches '{modality}/{site}': the groups are {self.patterns}")
