"""The ledger: how many bytes this rank sent, by purpose and collective.

Bytes are those of the algorithm with the least traffic, as this rank's sends: an all-gather of n equal shards sends
each shard to n - 1 others, and so on. They are counted when a collective is launched, so that bytes measured on a
wire can be held against bytes predicted, exactly.
"""

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Entry:
    """Calls and bytes of one kind."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Ledger:
    """Counts of what moved, keyed by (purpose, collective)."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=lambda: defaultdict(Entry))

    def record(self, purpose: str, collective: str, num_bytes: int) -> None:
        """Adds one collective that makes this rank send `num_bytes`."""
        entry = self.entries[purpose, collective]
        entry.calls += 1
        entry.bytes += num_bytes

    def bytes(self, purpose: str | None = None) -> int:
        """Bytes sent for one purpose, or for all."""
        return sum(entry.bytes for (name, _), entry in self.entries.items() if purpose in (None, name))

    def by_purpose(self) -> dict[str, int]:
        """Bytes sent, purpose by purpose, in alphabetical order."""
        return {purpose: self.bytes(purpose) for purpose in sorted({name for name, _ in self.entries})}

    def clear(self) -> None:
        self.entries.clear()
