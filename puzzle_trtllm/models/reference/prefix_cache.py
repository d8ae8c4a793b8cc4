"""Which blocks of a pool are in use, by how many sequences, and which still hold a prefix that may be asked for again.

A full block is known by a hash of all tokens up to its end, because K and V depend on nothing else; sequences that
begin alike share it. A block that nobody uses any more is free, but keeps its content until the room is needed: the
least recently used goes first, of one sequence the last block first, since the first ones serve more prompts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

KEY_BYTES = 16
"""Wide enough that nobody meets, or makes, two prefixes with one key."""


def extend_keys(keys: list[bytes], tokens: Sequence[int], num_tokens: int, tokens_per_block: int) -> None:
    """Append the keys of the full blocks among the first `num_tokens` of `tokens` that `keys` does not hold yet."""
    for block in range(len(keys), num_tokens // tokens_per_block):
        own = array("q", tokens[block * tokens_per_block : (block + 1) * tokens_per_block]).tobytes()
        keys.append(blake2b((keys[-1] if keys else b"") + own, digest_size=KEY_BYTES).digest())


def first_visible_block(window: int | None, num_tokens: int, tokens_per_block: int) -> int:
    """The first block that the token at position `num_tokens` can see."""
    return 0 if window is None else max(0, num_tokens - window + 1) // tokens_per_block


class BlockTable:
    """The blocks `0..num_blocks` of one pool."""

    def __init__(self, num_blocks: int) -> None:
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free, content known; the least recently used first."""
        self._users = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.num_shares = 0
        """Uses beyond the first of each block: how many blocks sharing saves."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, those that remember a prefix included."""
        return len(self._empty) + len(self._cached)

    def take(self) -> int:
        """A block for new content. IndexError or KeyError when there is none: callers reserve before."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._users[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more user of each; free ones come back into use."""
        for block in blocks:
            if self._users[block]:
                self.num_shares += 1
            else:
                del self._cached[block]
            self._users[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One user of each less."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                self.num_shares -= 1
            elif block in self._key_of:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def remember(self, block: int, key: bytes) -> None:
        """The block is full, and `key` says with what. Of two blocks with one content the first is kept."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def is_in_use(self, block: int) -> bool:
        return self._users[block] > 0

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of these keys, all of which are there."""
        return [self._block_of[key] for key in keys]

    def longest_end(self, keys: Sequence[bytes], first: int, end: int) -> int:
        """`end` if `keys[first:end]` are all there; else the next smaller one that may do: it lies before the last gap,
        since whoever ends behind that sees it too, and the key before it is there."""
        gap = next((index for index in range(end - 1, first - 1, -1) if keys[index] not in self._block_of), None)
        if gap is None:
            return end
        return next((index + 1 for index in range(gap - 1, -1, -1) if keys[index] in self._block_of), 0)

    def count_leading(self, keys: Sequence[bytes]) -> int:
        """How many of `keys`, from the first on, are there without a gap."""
        return next((index for index, key in enumerate(keys) if key not in self._block_of), len(keys))
