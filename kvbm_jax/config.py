"""The configuration of a block manager: one frozen record, checked when it is made.

Values come from four sources, later ones win: the defaults below, a TOML file, the environment (`KVBM_` and
the key in capitals), and arguments. Every source meets the same parser (`_parse`) and the same range check
(`_check`), and an error names the source, the key, the value and what is allowed. This module only describes
a manager; it allocates nothing, and does not ask whether a device or a transport is there.

    key in a file      variable                  argument
    block_size = 32    KVBM_BLOCK_SIZE=32        KvBlockManagerConfig.load(block_size=32)
"""

import contextlib
import dataclasses
import difflib
import enum
import functools
import os
import pathlib
import re
import tomllib
import typing
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np

from kvbm_jax import eviction, extensions
from kvbm_jax.addresses import public
from kvbm_jax.errors import ConfigError
from kvbm_jax.events import Consolidation, outlets
from kvbm_jax.hashing import HashAlgorithm
from kvbm_jax.layout import ElementFormat
from kvbm_jax.tenants import TenantQuotas

__all__ = ["CacheDtype", "EventConsolidation", "EventTransport", "KvBlockManagerConfig"]

_PREFIX = "KVBM_"
_OTHER_VARIABLES = frozenset({"KVBM_TRACES"})  # read elsewhere: the folder of traces for replay
_ADDRESSES = frozenset({"events_url", "engine_events", "controller"})
_MAX_SLOTS = 2**31 - 1  # slots and block ids are int32 on the device
_DISK_BUDGET = 10 << 30
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class CacheDtype(enum.StrEnum):
    """Element type of a cache, or of its blocks in the tiers below; those of 8 bits are quantised, and have scales."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    INT8 = "int8"
    FLOAT8_E4M3FN = "float8_e4m3fn"

    @property
    def element_format(self) -> ElementFormat:
        """What elements of this type are."""
        return ElementFormat(str(self), quantized=self in {CacheDtype.INT8, CacheDtype.FLOAT8_E4M3FN})


class TransferEngineKind(enum.StrEnum):
    """What moves blocks between workers."""

    AUTO = "auto"
    NIXL = "nixl"
    TCP = "tcp"


class EventTransport(enum.StrEnum):
    """Where a manager publishes its events."""

    INPROC = "inproc"
    NATS = "nats"
    ZMQ = "zmq"
    NONE = "none"


class EventConsolidation(enum.StrEnum):
    """What a manager's subscribers are told of its tiers, and whether an engine's blocks are told with them."""

    NONE = "none"  # every event of the manager's, as it happens
    PER_TIER = Consolidation.PER_TIER.value
    MERGED = Consolidation.MERGED.value


@dataclasses.dataclass(frozen=True)
class _Says:
    """What stands beside a key's type: a line of help, and its range."""

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None  # exclusive lower bound


def _user_cache() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "kvbm_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KvBlockManagerConfig:
    """Everything a `BlockManager` is built from.

    Making one checks it: a wrong type, a value out of range or keys that contradict each other raise
    `ConfigError`. Sizes that are None are taken from the model or from the memory of the device.
    """

    block_size: Annotated[int, _Says("tokens per block", 1, _MAX_SLOTS)] = 64
    num_layers: Annotated[int | None, _Says("layers of the model; unset: its own", 1, _MAX_SLOTS)] = None
    num_blocks: Annotated[
        int | None,
        _Says("blocks on the device; unset: what gpu_memory_fraction leaves room for", 1, _MAX_SLOTS),
    ] = None
    num_kv_heads: Annotated[int | None, _Says("key-value heads; unset: the model's", 1, _MAX_SLOTS)] = None
    head_dim: Annotated[int | None, _Says("elements of a head; unset: the model's", 1, _MAX_SLOTS)] = None
    dtype: Annotated[CacheDtype, _Says("element type of the cache; int8 and float8_e4m3fn are quantised")] = (
        CacheDtype.BFLOAT16
    )
    hash_algorithm: Annotated[HashAlgorithm, _Says("how prefixes are hashed; xxh3_64 is Dynamo's")] = (
        HashAlgorithm.BLAKE3
    )
    gpu_memory_fraction: Annotated[
        float,
        _Says("part of the device memory that is neither in use nor the step's which the cache takes", above=0, high=1),
    ] = 0.9
    enable_offload: Annotated[bool, _Says("use tiers below the device")] = False
    offload_path: Annotated[pathlib.Path, _Says("folder of the disk tier; unset: in this user's cache folder")] = (
        dataclasses.field(default_factory=_user_cache)
    )
    offload_dtype: Annotated[
        CacheDtype | None,
        _Says("element type of blocks below the device, converted on their way; unset: that of dtype"),
    ] = None
    host_blocks: Annotated[int, _Says("blocks of the host tier, 0 for none; needs enable_offload", 0, _MAX_SLOTS)] = 0
    disk_budget: Annotated[
        int | None,
        _Says(
            "bytes of the disk tier, 0 for none; needs enable_offload; unset: 10 GiB if host_blocks = 0, else none",
            0,
            2**63 - 1,
        ),
    ] = None
    model_id: Annotated[
        str | None, _Says("names the model and its weights; the disk tier serves blocks of the same name only")
    ] = None
    eviction_policy: Annotated[
        str,
        _Says("which cached block goes first: lru, lineage, priority, tiny_lfu, or one that a package offers"),
    ] = "lru"
    quotas: Annotated[
        TenantQuotas | None,
        _Says("limits of tenants: blocks that each may hold, or its part of the device's blocks; * is all others"),
    ] = None
    host_allocator: Annotated[
        str, _Says("where the host tier's memory comes from: anonymous, huge_pages, or one that a package offers")
    ] = "anonymous"
    disk_store: Annotated[str, _Says("what the disk tier is: segments, or one that a package offers")] = "segments"
    offload_policy: Annotated[
        str, _Says("which evicted blocks are offered to the tiers below: always, or one that a package offers")
    ] = "always"
    events: Annotated[
        str, _Says("where events are published: inproc, nats, zmq, none, or a transport that a package offers")
    ] = EventTransport.INPROC
    events_url: Annotated[str | None, _Says("address of the events; needs events = nats, zmq or another transport")] = (
        None
    )
    consolidate: Annotated[
        EventConsolidation,
        _Says("what events say of tiers: none, all as it happens; per_tier, each; merged, first copy and last"),
    ] = EventConsolidation.NONE
    engine_events: Annotated[
        tuple[str, ...],
        _Says(
            "addresses of the ZeroMQ event streams of an engine beside this manager, tcp://host:port or with "
            "?replay=tcp://host:port; needs consolidate"
        ),
    ] = ()
    peers: Annotated[
        str,
        _Says(
            "whose blocks are found too: none, nats (all workers at the server of the events), or what a package offers"
        ),
    ] = "none"
    peer_address: Annotated[
        str | None,
        _Says("where peers read blocks, tcp://host:port?token_file=PATH; unset: a free port of loopback; needs peers"),
    ] = None
    transfer_engine: Annotated[
        TransferEngineKind, _Says("what moves blocks between peers: nixl, tcp, or auto, the better one that is there")
    ] = TransferEngineKind.AUTO
    transfer_backends: Annotated[
        str | None,
        _Says("of NIXL, comma-separated, with parameters: UCX?num_workers=2, MOONCAKE, ...; unset: UCX; needs peers"),
    ] = None
    prefill_tokens_per_second: Annotated[
        float | None,
        _Says(
            "how fast the model computes a prompt: what peers bring slower is computed; unset: it is pulled", above=0
        ),
    ] = None
    controller: Annotated[
        str | None,
        _Says("where a running manager is controlled: auto, unix:///path or http://host:port; unset: nowhere"),
    ] = None
    controller_token_file: Annotated[
        pathlib.Path | None, _Says("file of the bearer token that is to be shown there; needs controller")
    ] = None
    worker_id: Annotated[
        str, _Says("name of this worker in its events; differs between workers that share a transport")
    ] = "0"

    def __post_init__(self) -> None:
        for name, key in _keys().items():
            object.__setattr__(self, name, _check(name, key, getattr(self, name), "argument"))
        self._check_together()

    def _check_together(self) -> None:
        if self.num_blocks is not None and self.num_blocks * self.block_size > _MAX_SLOTS:
            raise ConfigError(
                f"num_blocks {self.num_blocks:,} times block_size {self.block_size:,} is "
                f"{self.num_blocks * self.block_size:,} slots; slots are int32, at most {_MAX_SLOTS:,}"
            )
        for name in ("host_blocks", "disk_budget"):
            if getattr(self, name) and not self.enable_offload:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} but enable_offload = false: there is no tier to size; "
                    f"set enable_offload = true, or leave {name} at 0"
                )
        if self.enable_offload and not self.host_blocks and not self.disk_bytes:
            raise ConfigError(
                "enable_offload = true with host_blocks = 0 and disk_budget = 0: there is no tier; set one of them, "
                "or enable_offload = false"
            )
        extensions.check_name(eviction.KIND, self.eviction_policy)
        extensions.check_name(extensions.HOST_ALLOCATORS, self.host_allocator)
        extensions.check_name(extensions.BLOCK_STORES, self.disk_store)
        extensions.check_name(extensions.OFFLOAD_POLICIES, self.offload_policy)
        extensions.check_name(outlets.KIND, self.events)
        if self.events_url is not None:
            if self.events in {EventTransport.INPROC, EventTransport.NONE}:
                raise ConfigError(
                    f"events_url = {public(self.events_url)!r} but events = {self.events}; an address needs a "
                    "transport, events = nats or zmq for example"
                )
            if self.events in {EventTransport.NATS, EventTransport.ZMQ} and "://" not in self.events_url:
                raise ConfigError(
                    f"events_url = {public(self.events_url)!r}: allowed is an address such as tcp://host:port"
                )
        if self.consolidate is not EventConsolidation.NONE and self.events == EventTransport.NONE:
            raise ConfigError(f"consolidate = {self.consolidate} but events = none: nobody is told")
        if self.engine_events and self.consolidate is EventConsolidation.NONE:
            raise ConfigError(
                f"engine_events = {list(self.engine_events)} but consolidate = none: an engine's events are "
                "told together with the manager's; set consolidate = per_tier or merged"
            )
        for url in self.engine_events:
            if "://" not in url or self.engine_events.count(url) > 1:
                raise ConfigError(
                    f"engine_events = {list(self.engine_events)}: allowed are addresses such as tcp://host:port, "
                    "each once"
                )
        extensions.check_name(extensions.PEER_NETWORKS, self.peers)
        if self.peers != "none":
            self._check_peers()
        elif self.peer_address is not None:
            raise ConfigError(f"peer_address = {self.peer_address!r} but peers = none: nobody comes there")
        if self.controller_token_file is not None and self.controller is None:
            raise ConfigError(
                f"controller_token_file = {self.controller_token_file} but controller is unset: nobody asks for it"
            )
        if not self.worker_id or not self.worker_id.isprintable() or " " in self.worker_id:
            raise ConfigError(f"worker_id = {self.worker_id!r}: allowed are printable characters, no spaces")

    def _check_peers(self) -> None:
        if not self.enable_offload or not self.host_blocks:
            raise ConfigError(
                f"peers = {self.peers} but there is no host tier, which is what peers read: set enable_offload = true "
                "and host_blocks"
            )
        if self.model_id is None:
            raise ConfigError(
                f"peers = {self.peers} but model_id is unset; peers must know whose keys and values they read: name "
                "the model and its weights, for example by name and revision"
            )
        if self.peers == EventTransport.NATS and self.events != EventTransport.NATS:
            raise ConfigError(
                f"peers = nats but events = {self.events}: peers learn from events what this worker holds; set "
                "events = nats"
            )

    @property
    def disk_bytes(self) -> int:
        """Bytes that the disk tier may take, 0 for none: `disk_budget`, or what it is if that is unset."""
        if self.disk_budget is None:
            return _DISK_BUDGET if self.enable_offload and not self.host_blocks else 0
        return self.disk_budget

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Self:
        """Gathers a configuration: defaults, then the file, then the environment, then `overrides`.

        Args:
          path: A TOML file of keys at its top level, or None for no file.
          env: Environment variables; None for those of this process. An unknown `KVBM_*` one is a warning.
          **overrides: Values by key.

        Returns:
          The checked configuration.

        Raises:
          ConfigError: The file cannot be read, a key of it or of `overrides` is unknown, or a value is not
            allowed.
        """
        values: dict[str, Any] = {}
        if path is not None:
            values |= _from_file(pathlib.Path(path))
        values |= _from_env(os.environ if env is None else env)
        for name, value in overrides.items():
            values[name] = _check(name, _key(name, "arguments"), value, "argument")
        return cls(**values)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({fields})"

    def as_dict(self) -> dict[str, Any]:
        """Returns the values by key, fit for JSON and, unset ones left out, for a TOML file.

        Addresses are without their credentials, so that all of it may be shown.
        """

        def plain(name: str, value: Any) -> Any:
            if isinstance(value, TenantQuotas):
                return dict(value)
            if isinstance(value, tuple):
                return [plain(name, item) for item in value]
            if isinstance(value, str | pathlib.Path):
                return public(str(value)) if name in _ADDRESSES else str(value)
            return value

        return {name: plain(name, getattr(self, name)) for name in _keys()}

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Returns the JSON Schema (draft 2020-12) of the configuration file."""
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "KvBlockManagerConfig",
            "type": "object",
            "additionalProperties": False,
            "properties": {name: _property(key) for name, key in _keys().items()},
        }


@dataclasses.dataclass(frozen=True)
class _Key:
    """One key: its type, and what is said beside it."""

    kind: type  # bool, int, float, str, tuple (of strings), pathlib.Path, a StrEnum or TenantQuotas
    optional: bool
    says: _Says
    default: object  # dataclasses.MISSING where it depends on the user

    def choices(self) -> list[str]:
        """Returns the values of an enumeration, nothing for another type."""
        return list(self.kind) if issubclass(self.kind, enum.StrEnum) else []

    def allowed(self) -> str:
        """Names the allowed values in words."""
        if choices := self.choices():
            return "one of " + ", ".join(choices)
        names = {
            bool: "true, false, 1 or 0",
            int: "an integer",
            float: "a number",
            str: "a string",
            tuple: "a list of strings",
            TenantQuotas: "a table from tenants to blocks (an integer >= 0) or parts of the pool (> 0 and <= 1)",
        }
        limits = ((">", self.says.above), (">=", self.says.low), ("<=", self.says.high))
        bounds = [f"{sign} {limit:,}" for sign, limit in limits if limit is not None]
        return " ".join([names.get(self.kind, "a path"), " and ".join(bounds)]).strip()

    def holds(self, value: Any) -> bool:
        """Returns whether a value of the right type is in the key's range."""
        low, high, above = self.says.low, self.says.high, self.says.above
        return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


@functools.cache
def _keys() -> dict[str, _Key]:
    """Every key of the configuration, read off its annotations."""
    hints = typing.get_type_hints(KvBlockManagerConfig, include_extras=True)
    keys = {}
    for field in dataclasses.fields(KvBlockManagerConfig):
        annotated, says = typing.get_args(hints[field.name])
        kinds = (tuple,) if typing.get_origin(annotated) is tuple else typing.get_args(annotated) or (annotated,)
        keys[field.name] = _Key(kinds[0], type(None) in kinds, says, field.default)
    return keys


def _key(name: str, source: str) -> _Key:
    keys = _keys()
    if name not in keys:
        raise ConfigError(f"unknown key {name!r} in {source}{_nearest(name, keys)}")
    return keys[name]


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; the nearest is {found[0]!r}" if found else ""


def _from_file(path: pathlib.Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from error
    return {name: _check(name, _key(name, str(path)), value, str(path)) for name, value in table.items()}


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    variables = {_PREFIX + name.upper(): name for name in _keys()}
    values = {}
    for variable, text in env.items():
        if variable in variables:
            name = variables[variable]
            key = _keys()[name]
            values[name] = _check(name, key, _parse(name, key, text, variable), variable)
        elif variable.startswith(_PREFIX) and variable not in _OTHER_VARIABLES:
            message = f"unknown environment variable {variable} is ignored{_nearest(variable, variables)}"
            warnings.warn(message, stacklevel=3)
    return values


def _parse(name: str, key: _Key, text: str, source: str) -> Any:
    """Reads a value from text, the one place that does. Text that is not wholly a value is an error."""
    if key.kind is bool and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if key.kind is int and _INTEGER.fullmatch(text):
        return int(text)
    if key.kind is float and _NUMBER.fullmatch(text):
        return float(text)
    if key.kind in {TenantQuotas, tuple}:
        # As in a file: {acme = 0.5, globex = 2000}, or ["one", "another"].
        with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):
            table = tomllib.loads(f"{name} = {text}")
            if table.keys() == {name}:
                return table[name]
    elif key.kind not in {bool, int, float} and text:
        return text
    raise _refusal(name, key, text, source)


def _check(name: str, key: _Key, value: Any, source: str) -> Any:
    """Checks type and range of a typed value and brings it to the key's own type."""
    if value is None and key.optional:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    typed: Any = None
    if key.kind is bool or isinstance(value, bool):
        typed = value if key.kind is bool and isinstance(value, bool) else None
    elif key.kind is float:
        typed = value if isinstance(value, int | float) else None
    elif key.kind is TenantQuotas:
        typed = TenantQuotas.of(value) if isinstance(value, Mapping) else None
    elif key.kind is tuple:
        listed = isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)
        typed = tuple(value) if listed else None
    elif key.kind is pathlib.Path:
        typed = pathlib.Path(value) if isinstance(value, str | os.PathLike) and os.fspath(value) else None
    elif issubclass(key.kind, enum.StrEnum):
        typed = key.kind(value) if value in key.choices() else None
    elif isinstance(value, key.kind):
        typed = value
    if typed is None or not key.holds(typed):
        raise _refusal(name, key, value, source)
    return float(typed) if key.kind is float else typed


def _refusal(name: str, key: _Key, value: object, source: str) -> ConfigError:
    return ConfigError(f"{name} = {value!r} (from {source}): allowed is {key.allowed()}")


def _property(key: _Key) -> dict[str, Any]:
    kinds = {bool: "boolean", int: "integer", float: "number", tuple: "array", TenantQuotas: "object"}
    kind = kinds.get(key.kind, "string")
    schema: dict[str, Any] = {"description": key.says.help, "type": kind}
    if key.kind is TenantQuotas:
        parts = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        schema["additionalProperties"] = {"anyOf": [{"type": "integer", "minimum": 0}, parts]}
    if key.kind is tuple:
        schema |= {"items": {"type": "string"}, "uniqueItems": True}
    if choices := key.choices():
        schema["enum"] = [str(choice) for choice in choices]
    limits = {"minimum": key.says.low, "maximum": key.says.high, "exclusiveMinimum": key.says.above}
    schema |= {word: limit for word, limit in limits.items() if limit is not None}
    if key.default is not None and key.default is not dataclasses.MISSING:
        schema["default"] = str(key.default) if isinstance(key.default, str) else key.default
        if isinstance(key.default, tuple):
            schema["default"] = list(key.default)
    return schema
