"""Quotas in plain Python: what `kvbm_jax.quotas` must do, on top of the model of sequences."""

from collections import Counter

from policy_oracles import LruOracle
from test_sequences import MAX_BLOCKS, B, Model, T, W

from kvbm_jax.types import Status

__all__ = ["QuotaModel"]


class Order(LruOracle):
    """What tenants have beyond their limits goes first."""

    def __init__(self, model):
        self.model = model

    def order(self, pool):
        return self.model.order()


class QuotaModel(Model):
    """Tenants are numbers; `len(limits)` is nobody."""

    def __init__(self, windows, limits):
        super().__init__(windows)
        self.pool.policy = Order(self)
        self.limits = limits
        self.tenants = [len(limits)] * B  # of rows
        self.owners = [len(limits)] * self.pool.num_blocks
        self.coming = Counter()  # blocks that each tenant is about to get
        self.seized = {}  # owners of blocks that are about to be held
        self.preferred = 0  # calls in which not the least recently released blocks would go first

    # What is charged to whom.

    def settle(self):
        for block in range(self.pool.num_blocks):
            tenants = [self.tenants[b] for b in range(B) if any(block in table[b] for table in self.tables)]
            if tenants and self.owners[block] not in tenants:
                self.owners[block] = tenants[0]

    def held(self):
        return Counter(owner for owner, refs in zip(self.owners, self.pool.refs, strict=True) if refs)

    def resident(self):
        """Held and cached; blocks about to be held belong to who will hold them."""
        blocks = [b for b in range(self.pool.num_blocks) if self.pool.refs[b] or b in self.pool.inactive]
        return Counter(self.seized.get(b, self.owners[b]) for b in blocks)

    def order(self):
        resident, first = self.resident(), []
        for tenant, limit in enumerate(self.limits):
            own = [b for b in self.pool.inactive if self.seized.get(b, self.owners[b]) == tenant]
            first += own[: max(resident[tenant] + self.coming[tenant] - limit, 0)]
        order = sorted(self.pool.inactive, key=lambda block: block not in first)  # a stable sort
        self.preferred += order != list(self.pool.inactive)
        return order

    # Who is let in.

    def open(self):
        """A call begins: what each tenant may still take."""
        held = self.held()
        self.left = {tenant: limit - held[tenant] for tenant, limit in enumerate(self.limits)}

    def admit(self, tenant, wanted):
        if wanted > 0 and tenant in self.left:
            self.left[tenant] -= wanted
            return self.left[tenant] >= 0
        return True

    def ask_to_start(self, tenants, numbers, num_hashes, num_tokens):
        first, admitted = {}, []
        for i, tenant in enumerate(tenants):
            needed = -(-num_tokens[i] // T)
            prefix = self.hit(numbers[i], num_hashes[i] if needed <= W else 0)
            fresh = self.groups * (needed - len(prefix[0])) if needed <= W else 0
            idle = [b for blocks in prefix for b in blocks if b is not None and not self.pool.refs[b]]
            pays = [b for b in idle if first.setdefault(b, i) == i or tenants[first[b]] != tenant]
            admitted.append(self.admit(tenant, fresh + len(pays)))
            if admitted[i]:
                self.coming[tenant] += fresh
                for b in idle:
                    if self.seized.get(b) != self.owners[b]:
                        self.seized[b] = tenant if tenant == self.owners[b] else self.seized.get(b, tenant)
        return admitted

    def ask_to_grow(self, num_tokens, order):
        wanted = []
        for b, n in zip(order, num_tokens, strict=True):
            needed = -(-(self.lengths[b] + n) // T)
            fresh = max(needed - len(self.tables[0][b]), 0)
            possible = n >= 0 and needed <= W and fresh <= MAX_BLOCKS and not (n and self.is_shared(b))
            wanted.append(self.groups * fresh if possible else 0)
        admitted = [self.admit(self.tenants[b], n) for b, n in zip(order, wanted, strict=True)]
        coming = Counter()
        for b, n, good in zip(order, wanted, admitted, strict=True):
            coming[self.tenants[b]] += n if good else 0
        return admitted, coming

    # The verbs.

    def start_for(self, rows, tenants, numbers, num_hashes, num_tokens):
        self.open()
        admitted = self.ask_to_start(tenants, numbers, num_hashes, num_tokens)
        return self.begin(admitted, rows, tenants, numbers, num_hashes, num_tokens)

    def begin(self, admitted, rows, tenants, *columns):
        let = [i for i, good in enumerate(admitted) if good]
        started = self.start(*([column[i] for i in let] for column in (rows, *columns)))
        cached, status = [0] * len(rows), [Status.QUOTA_EXCEEDED] * len(rows)
        for i, found, code in zip(let, *started, strict=True):
            cached[i], status[i] = found, code
            if code == Status.OK:
                self.tenants[rows[i]] = tenants[i]
        self.coming, self.seized = Counter(), {}
        return cached, status

    def extend_for(self, num_tokens, order=range(B)):
        self.open()
        return self.grow(*self.ask_to_grow(num_tokens, order), num_tokens, order)

    def grow(self, admitted, coming, num_tokens, order, *, full=False):
        self.coming = coming
        let = [n if good else 0 for n, good in zip(num_tokens, admitted, strict=True)]
        status = self.extend(let, order, full=full)
        self.coming = Counter()
        return [code if good else Status.QUOTA_EXCEEDED for code, good in zip(status, admitted, strict=True)]

    def step_for(self, rows, tenants, numbers, num_hashes, num_tokens, growing, new_tokens):
        """What a step does between release and registration: both ask before either gets anything."""
        self.settle()
        self.open()
        begin = self.ask_to_start(tenants, numbers, num_hashes, num_tokens)
        grow, coming = self.ask_to_grow(new_tokens, growing)
        self.coming += coming
        cached, begun = self.begin(begin, rows, tenants, numbers, num_hashes, num_tokens)
        owners = list(self.owners)
        self.settle()  # as far as evictions are concerned: a step is charged for when it is done
        grown = self.grow(grow, coming, new_tokens, growing, full=Status.OUT_OF_BLOCKS in begun)
        self.owners = owners
        return cached, begun, grown

    def unshare_for(self, rows):
        self.open()
        admitted = set(range(B))
        for b in range(B):
            if b in rows and self.is_shared(b):
                tails = [table[b][self.lengths[b] // T] for table in self.tables]
                if not self.admit(self.tenants[b], sum(self.pool.refs[block] != 1 for block in tails)):
                    admitted.remove(b)
                else:
                    self.coming[self.tenants[b]] += self.groups
        copies, status = self.unshare([b for b in rows if b in admitted])
        self.coming = Counter()
        return copies, [code if b in admitted else Status.QUOTA_EXCEEDED for b, code in enumerate(status)]
