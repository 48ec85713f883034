"""What a controller can be asked: for each command the request, decoded strictly, and what it answers."""

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import msgspec

from kvbm_jax import logs
from kvbm_jax.errors import ConfigError
from kvbm_jax.manager import BlockManager
from kvbm_jax.protocols import BlockKey, Tier
from kvbm_jax.upkeep import Upkeep

__all__ = ["COMMANDS", "Answer", "Command", "Listing", "carry_out"]

_ROWS = 1000  # of a listing, put into JSON at once


class Listing(NamedTuple):
    """An answer of any length: some fields, and at last `blocks`, which are made row by row as they are sent."""

    fields: dict[str, Any]
    blocks: Iterable[dict[str, Any]]

    def pieces(self) -> Iterator[str]:
        """Yields the JSON of the answer."""
        separator = ", " if self.fields else ""
        yield "{" + json.dumps(self.fields)[1:-1] + f'{separator}"blocks": ['
        separator = ""
        for rows in itertools.batched(self.blocks, _ROWS):
            yield separator + json.dumps(rows)[1:-1]
            separator = ", "
        yield "]}"


type Answer = dict[str, Any] | Listing

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    wait: _Seconds = 30.0  # for the manager's call under way


class _Chosen(_Request):
    all: bool = False
    tier: str | None = None
    hashes: list[str] | None = None
    blocks: int | None = None

    def one_of(self, *names: str) -> str:
        """Returns the one field of these that is set; the others must not be."""
        values = {name: getattr(self, name) for name in ("all", "tier", "hashes", "blocks")}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if len(given) != 1 or given[0] not in names:
            raise ConfigError(f"give one of {', '.join(names)}; given: {', '.join(given) or 'none'}")
        return given[0]


class _Flush(_Request):
    seconds: _Seconds = 60.0


class _LogLevel(_Request):
    level: str
    logger: str = "kvbm_jax"


class Command[R: _Request](NamedTuple):
    """One command."""

    request: type[R]
    act: Callable[[BlockManager, R], Answer]
    is_safe: bool = False  # changes nothing: a GET will do


def carry_out(name: str, manager: BlockManager, body: bytes) -> Answer:
    """Decodes a request and carries it out.

    Raises:
      ConfigError: if it is none of this command.
      BusyError: if the manager did not come to it in time.
      BlockStateError: if the manager is closed.
    """
    command = COMMANDS[name]
    try:
        asked = msgspec.json.decode(body or b"{}", type=command.request)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{name}: {error}") from error
    return command.act(manager, asked)


def _status(manager: BlockManager, asked: _Request) -> Answer:
    def look(upkeep: Upkeep) -> dict[str, Any]:
        layout, counts = manager.layout, manager.stats()
        return {
            "worker_id": manager.config.worker_id,
            "pid": os.getpid(),
            "num_blocks": layout.num_blocks,
            "block_size": layout.block_size,
            "block_bytes": layout.block_bytes,
            "sequences": {"running": manager.num_running, "max": manager.max_sequences},
            "blocks": {**counts._asdict(), "pinned": len(upkeep.pinned)},
            "tiers": {tier.label: dataclasses.asdict(stats) for tier, stats in manager.tier_stats().items()},
        }

    return manager.command(look, asked.wait)


def _reset(manager: BlockManager, asked: _Chosen) -> Answer:
    kind = asked.one_of("all", "tier", "hashes")
    what = _tier(asked.tier) if kind == "tier" else _keys(asked.hashes) if kind == "hashes" else None
    lost = manager.command(lambda upkeep: upkeep.reset(what), asked.wait)
    return {"blocks": {tier.label: count for tier, count in lost.items()}}


def _evict(manager: BlockManager, asked: _Chosen) -> Answer:
    what = _keys(asked.hashes) if asked.one_of("blocks", "hashes") == "hashes" else asked.blocks or 0
    return {"blocks": manager.command(lambda upkeep: upkeep.evict(what), asked.wait)}


def _pin(manager: BlockManager, asked: _Chosen) -> Answer:
    asked.one_of("hashes")
    report = manager.command(lambda upkeep: upkeep.pin(_keys(asked.hashes)), asked.wait)
    return {"blocks": report.pinned, "absent": [key.sequence_hash.hex() for key in report.absent]}


def _unpin(manager: BlockManager, asked: _Chosen) -> Answer:
    keys = _keys(asked.hashes) if asked.one_of("all", "hashes") == "hashes" else None
    return {"blocks": manager.command(lambda upkeep: upkeep.unpin(keys), asked.wait)}


def _flush(manager: BlockManager, asked: _Flush) -> Answer:
    manager.command(lambda upkeep: None, asked.wait)  # a flush waits for each of its turns; here it is refused in time
    return manager.flush(asked.seconds)._asdict()


def _snapshot(manager: BlockManager, asked: _Chosen) -> Answer:
    wanted = _tier(asked.tier) if asked.one_of("all", "tier") == "tier" else None
    held = manager.command(lambda upkeep: upkeep.records(), asked.wait)
    blocks = (
        {
            "tier": tier.label,
            "block_id": block_id,
            "hash": record.key.sequence_hash.hex(),
            "group_idx": record.key.group_idx,
            "parent": None if record.parent_hash is None else record.parent_hash.hex(),
            "tokens": len(record.token_ids),
            "lora_name": record.lora_name,
        }
        for tier, records in held.items()
        if wanted in {None, tier}
        for block_id, record in records
    )
    return Listing({"worker_id": manager.config.worker_id}, blocks)


def _log_level(manager: BlockManager, asked: _LogLevel) -> Answer:
    level = logs.check_level(asked.level)
    if asked.logger.split(".")[0] != "kvbm_jax":
        raise ConfigError(f"logger = {asked.logger!r}: allowed are kvbm_jax and what is below it")
    logger = logging.getLogger(asked.logger)
    before = logging.getLevelName(logger.getEffectiveLevel()).lower()
    logger.setLevel(level.upper())
    return {"logger": asked.logger, "level": level, "before": before}


COMMANDS: dict[str, Command[Any]] = {
    "status": Command(_Request, _status, is_safe=True),
    "reset": Command(_Chosen, _reset),
    "evict": Command(_Chosen, _evict),
    "pin": Command(_Chosen, _pin),
    "unpin": Command(_Chosen, _unpin),
    "flush": Command(_Flush, _flush),
    "snapshot": Command(_Chosen, _snapshot),
    "log_level": Command(_LogLevel, _log_level),
}


def _tier(label: str | None) -> Tier:
    for tier in Tier:
        if tier.label == label:
            return tier
    raise ConfigError(f"tier = {label!r}: allowed is one of {', '.join(tier.label for tier in Tier)}")


def _keys(hashes: list[str] | None) -> list[BlockKey]:
    keys = []
    for text in hashes or ():
        try:
            words = bytes.fromhex(text)
        except ValueError:
            words = b""
        if len(words) != 16 or len(text) != 32:
            raise ConfigError(f"{text!r} is no hash of a block: allowed are 32 hexadecimal digits")
        keys.append(BlockKey(words))
    return keys
