"""A manager whose blocks move between tiers and get lost, so that parents go before their children and come back."""

import random

from tiered import BLOCK_BYTES, SIZE, Faulty, make, settle

from kvbm_jax.hashing import hash_sequence
from kvbm_jax.offload import MemoryBlockStore
from kvbm_jax.protocols import Tier


def prompts(seed, loras):
    """Prompts that share beginnings, some of a LoRA, each of 1 to 7 blocks and a token."""
    draw = random.Random(seed)
    while True:
        blocks = [draw.randrange(2) * 100 + depth for depth in range(draw.randint(1, 7))]
        yield [block * SIZE + i for block in blocks for i in range(SIZE)] + [7], draw.choice(loras)


class Moves:
    """A manager over two tiers that refuse blocks now and then, so that parents go before their children."""

    def __init__(self, seed=0, loras=(None, None, "tuned"), **config):
        self.stores = [
            Faulty(MemoryBlockStore(BLOCK_BYTES, capacity=n, tier=t)) for t, n in ((Tier.G2, 12), (Tier.G3, 16))
        ]
        self.manager = make(9, stores=self.stores, **config)
        self.events = self.manager.subscribe_events()
        self.draw = random.Random(seed)
        self.prompts = prompts(seed, loras)
        self.count = 0  # block moves so far

    def move(self):
        """Serves one prompt and returns the batches that tell of it."""
        for store in self.stores:
            store.fail_puts = self.draw.random() < 0.3
        tokens, lora = next(self.prompts)
        with self.manager.start(tokens, lora_name=lora) as seq:
            self.manager.register(seq)
        if self.draw.random() < 0.03:
            self.manager.clear()
        settle(self.manager)
        told = self.events.drain()
        self.count += sum(map(len, told))
        return told


def held(index, tokens, lora=None):
    """How many leading blocks of a prompt our own view has, in whatever tiers."""
    found = index.find_matches(hash_sequence(tokens, SIZE, lora_name=lora))
    return max((overlap.blocks for overlap in found.values()), default=0)
