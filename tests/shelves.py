"""Victim tiers below a device in plain Python: who holds what, and where a block is found."""

from collections import OrderedDict

__all__ = ["Shelves"]


class Shelves:
    """Non-exclusive least-recently-used tiers, the fastest first."""

    def __init__(self, capacities):
        self.capacities = capacities  # by tier
        self.held = {tier: OrderedDict() for tier in capacities}

    def find(self, keys):
        """The tiers of the longest prefix that is held; what is found becomes the most recent where it lies."""
        found = []
        for key in keys:
            tier = next((tier for tier in self.capacities if key in self.held[tier]), None)
            if tier is None:
                break
            self.held[tier].move_to_end(key)
            found.append(tier)
        return found

    def offer(self, key, tiers=None):
        """Puts a block that was evicted above into the first tier, and what that evicts into the next."""
        tiers = list(self.capacities) if tiers is None else tiers
        if not tiers:
            return
        tier, *below = tiers
        if self.capacities[tier] == 0:
            self.offer(key, below)
            return
        shelf = self.held[tier]
        present = key in shelf
        shelf[key] = None
        shelf.move_to_end(key)
        if not present and len(shelf) > self.capacities[tier]:
            self.offer(shelf.popitem(last=False)[0], below)
