"""KV blocks: who holds which, which are free, and which free ones still hold a prefix worth reusing.

A block is 16 positions. A full block whose tokens are computed gets a key (``block_key.py``); a sequence whose next
block has the same key takes that block instead of computing it. A block without holders is free, but keeps its
contents and key until it is handed out again; the one freed longest ago is handed out first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from deltaserve.engine.block_key import ROOT_KEY, block_key, cache_context, delta_key
from deltaserve.engine.sequence import Sequence

BLOCK_SIZE = 16


class BlockManager:
    """Knows token ids and block ids, never tensors.

    ``base_fingerprint`` enters every key. ``num_free`` counts cached but unheld blocks too.
    """

    def __init__(self, num_blocks: int, base_fingerprint: str) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; at least 1 is needed")
        self.num_blocks = num_blocks
        self.base_fingerprint = base_fingerprint
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @staticmethod
    def blocks_for(num_tokens: int) -> int:
        return -(-num_tokens // BLOCK_SIZE)

    def begin(self, *seqs: Sequence, reserve: int = 0) -> bool:
        """Give sequences without blocks, each of them or none, the cached prefix and new blocks for all their tokens.

        False, and nothing changed, when fewer than ``reserve`` blocks would stay free. At least the last token is left
        to compute, since its logits are needed.
        """
        found = [self._cached_prefix(seq) for seq in seqs]
        num_new = sum(self.blocks_for(seq.num_positions) - len(hits) for seq, hits in zip(seqs, found, strict=True))
        num_revived = sum(1 for block in {block for hits in found for block in hits} if self._ref_counts[block] == 0)
        if num_new + num_revived + reserve > self.num_free:
            return False
        for hits in found:  # all before a new block is taken, which might be one of them
            for block in hits:
                if self._ref_counts[block] == 0:
                    del self._free[block]
                self._ref_counts[block] += 1
        for seq, hits in zip(seqs, found, strict=True):
            seq.block_table = hits
            num_ready = len(hits) * BLOCK_SIZE
            seq.num_computed_tokens = max(0, num_ready - seq.num_prefix_tokens)
            seq.first_prefix_block = len(hits) if num_ready < seq.num_prefix_tokens else -1
            for _ in range(self.blocks_for(seq.num_positions) - len(hits)):
                seq.block_table.append(self._take())
        return True

    def extend(self, seq: Sequence) -> bool:
        """Make the block table cover all tokens of a running sequence; False when no block is free."""
        missing = -(-(len(seq.token_ids) + seq.num_prefix_tokens) // BLOCK_SIZE) - len(seq.block_table)
        if missing <= 0:  # fifteen times in sixteen
            return True
        if missing > self.num_free:
            return False
        for _ in range(missing):
            seq.block_table.append(self._take())
        return True

    def commit(self, seq: Sequence) -> None:
        """Register the full blocks computed so far, so that others may reuse them.

        A block whose key another block already has stays private to its holders.
        """
        num_full = (seq.num_prefix_tokens + seq.num_computed_tokens) // BLOCK_SIZE
        if num_full <= seq.num_committed_blocks or seq.is_probe:
            return
        for index in range(len(seq.block_keys), num_full):
            seq.block_keys.append(self._key(seq, index))
        for index in range(seq.num_committed_blocks, num_full):
            block, key = seq.block_table[index], seq.block_keys[index]
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key
        seq.num_committed_blocks = num_full

    def release(self, seq: Sequence) -> None:
        """Take all blocks back. The last ones become free first: a shorter prefix is worth more."""
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
        seq.block_table = []
        seq.num_computed_tokens = 0
        seq.num_committed_blocks = 0
        seq.first_prefix_block = -1

    def _cached_prefix(self, seq: Sequence) -> list[int]:
        # Rows of cached positions are not computed; sequences that want every row can share a prefix at most.
        num_shareable = seq.num_prefix_tokens if seq.wants_all_rows else seq.num_positions - 1
        hits: list[int] = []
        for index in range(num_shareable // BLOCK_SIZE):
            if index == len(seq.block_keys):
                seq.block_keys.append(self._key(seq, index))
            block = self._block_of.get(seq.block_keys[index])
            if block is None:
                break
            hits.append(block)
        return hits

    def _key(self, seq: Sequence, index: int) -> bytes:
        if seq.cache_context is None or index == 0:
            seq.cache_context = cache_context(self.base_fingerprint, seq.tenant, seq.cache_salt, seq.kv_regime)
        parent = seq.block_keys[index - 1] if index else ROOT_KEY
        start, stop = index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE
        delta = delta_key(seq.binding, start, stop)
        skipped = seq.num_prefix_tokens  # positions without a token: what they hold is told by the delta key
        tokens = seq.token_ids[max(0, start - skipped) : max(0, stop - skipped)]
        return block_key(parent, tokens, delta, seq.cache_context)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
        self._ref_counts[block] = 1
        return block

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise ``RuntimeError`` unless the tables of ``sequences``, the counts and the free list agree."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            if len(set(seq.block_table)) != len(seq.block_table):
                raise RuntimeError(f"sequence {seq.seq_id} holds a block twice")
            if seq.num_prefix_tokens + seq.num_computed_tokens > len(seq.block_table) * BLOCK_SIZE:
                raise RuntimeError(f"sequence {seq.seq_id} has computed more positions than its blocks hold")
            for block in seq.block_table:
                counts[block] += 1
        if counts != self._ref_counts:
            raise RuntimeError("block reference counts and block tables disagree")
        if {block for block, count in enumerate(counts) if count == 0} != set(self._free):
            raise RuntimeError("the free list and the unheld blocks disagree")
        if {key: block for block, key in self._key_of.items()} != self._block_of:
            raise RuntimeError("the prefix cache's two tables disagree")
