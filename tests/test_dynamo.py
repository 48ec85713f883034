"""The real Dynamo beside our view: its tree answers from our JSON as `PrefixIndex` does from the events themselves."""

import pytest
from block_moves import Moves, held
from tiered import SIZE

from kvbm_jax.events import Consolidator, DynamoCodec, ParentGate, PrefixIndex
from kvbm_jax.hashing import block_hashes

llm = pytest.importorskip("dynamo.llm")

WORKER = 7


class Tree:
    """An event sink that tells Dynamo's tree in its own language; the tree raises at what it cannot follow."""

    def __init__(self):
        self.tree = llm.RadixTree()
        self.lines = 0

    def publish(self, batch, /):
        for line in DynamoCodec().encode(batch).splitlines():
            self.tree.apply_event(WORKER, line)
            self.lines += 1

    def close(self):
        pass

    def blocks(self, tokens, lora=None):
        """How many leading blocks of a prompt the worker has."""
        names = block_hashes(tokens, SIZE, lora_name=lora).tolist()
        return self.tree.find_matches(names).scores.get((WORKER, 0), 0)


def test_dynamos_tree_answers_as_our_index_does():
    moves, tree, index = Moves(), Tree(), PrefixIndex()
    gate = ParentGate(tree, worker_id=str(WORKER))
    consolidator = Consolidator(gate, worker_id=str(WORKER), mode="merged")
    source = consolidator.source("manager")
    cut_off, returned, answers = 0, 0, set()
    questions = [next(moves.prompts) for _ in range(60)]
    with moves.manager:
        while moves.count < 1000:
            waited = gate.waiting()
            for batch in moves.move():
                index.apply(batch)
                source.publish(batch)
            cut_off += gate.waiting() > waited
            returned += gate.waiting() < waited
            for tokens, lora in moves.draw.sample(questions, 12):
                ours = held(index, tokens, lora)
                assert tree.blocks(tokens, lora) == ours
                answers.add(ours)
    assert answers >= set(range(6))
    assert min(cut_off, returned) >= 10, "parents went before their children, and came back"
    assert index.stats().missed == index.stats().unknown_deletes == 0
    source.close()
    assert {tree.blocks(tokens, lora) for tokens, lora in questions} == {0}
    assert tree.tree.dump_tree_as_events() == []


def test_dynamos_tree_cannot_follow_what_the_gate_holds_back():
    moves, tree = Moves(), Tree()
    source = Consolidator(tree, worker_id=str(WORKER), mode="merged").source("manager")

    def tell():
        while moves.count < 1000:
            for batch in moves.move():
                source.publish(batch)

    with moves.manager, pytest.raises(RuntimeError, match="Failed to find"):
        tell()
