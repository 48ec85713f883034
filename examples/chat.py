"""Chat with SmolLM2-135M through the paged cache of kvbm_jax.

Without arguments, a scripted session: three users ask about one long document, one after the other and then again.
Whatever a prompt shares with earlier ones is found in the pool and not computed anew. Every answer is compared, token
for token, with the same prompt answered without any reuse; the exit status is 1 if one differs.

    uv run examples/chat.py
    uv run examples/chat.py --prompt "Why is the sky blue?"
    uv run examples/chat.py --interactive
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
from smollm2 import Sampler, StreamDecoder, Tokenizer, load_model, load_tokenizer
from smollm2.engine import Completion, Engine

from kvbm_jax.errors import ConfigError, KvbmError

_HANDBOOK = Path(__file__).parent / "data" / "handbook.txt"
_SYSTEM = (
    "You are the assistant of a lighthouse station. Answer the question in one or two short sentences, using only the "
    "handbook that follows.\n\n"
)
_TURNS = (
    ("Ada", "How high is the tower?"),
    ("Ben", "What is the name of the supply boat, and how long does the crossing take?"),
    ("Cleo", "On which days is bread baked?"),
    ("Ada", "And who built it?"),
    ("Ben", "Who is her skipper?"),
    ("Cleo", "How many litres of water may each person use a day?"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status: 0 fine, 1 a check or the library failed, 2 wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.raw and args.prompt is None:
        parser.error("--raw goes with --prompt")
    try:
        sampler = Sampler(args.temperature, args.top_p)
        tokenizer = load_tokenizer()
        begun = time.perf_counter()
        model, _ = load_model(dtype=jnp.dtype(args.dtype))
        loaded = time.perf_counter()
        engine = Engine(
            model, block_size=args.block_size, num_blocks=args.num_blocks, dtype=args.dtype, sampler=sampler
        )
        _tell(args, f"loaded in {loaded - begun:.1f} s, compiled in {engine.compile_seconds:.1f} s")
        chat = _Chat(engine, tokenizer, args)
        if args.interactive:
            return chat.interactive()
        if args.prompt is not None:
            return chat.once(args.prompt)
        return chat.scripted()
    except KvbmError as error:
        print(f"chat.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


class _Chat:
    """The three ways to talk."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._args = args

    def once(self, text: str) -> int:
        """Answers one prompt."""
        if self._args.raw:
            prompt = self._tokenizer.encode(text)
        else:
            prompt = self._tokenizer.apply_chat_template([{"role": "user", "content": text}])
        answer = self._answer(prompt)
        if self._args.json:
            print(
                json.dumps(
                    {
                        "prompt_token_ids": answer.prompt,
                        "output_token_ids": answer.tokens,
                        "text": self._text(answer),
                        "hits": {"g1": answer.num_cached},
                        "ttft_s": answer.ttft_seconds,
                        "decode_tokens_per_s": answer.decode_tokens_per_second,
                    }
                )
            )
        return 0

    def interactive(self) -> int:
        """Talks until the end of input."""
        messages: list[dict[str, str]] = []
        print("Type a message; an empty line or end of input leaves.")
        for line in _lines("> "):
            messages.append({"role": "user", "content": line})
            answer = self._answer(self._tokenizer.apply_chat_template(messages))
            messages.append({"role": "assistant", "content": self._text(answer)})
        return 0

    def scripted(self) -> int:
        """Three users, two turns each; checks every answer against one without reuse."""
        document = _HANDBOOK.read_text(encoding="utf-8")
        talks = {user: [{"role": "system", "content": _SYSTEM + document}] for user, _ in _TURNS}
        rows = []
        for number, (user, question) in enumerate(_TURNS):
            talks[user].append({"role": "user", "content": question})
            prompt = self._tokenizer.apply_chat_template(talks[user])
            _tell(self._args, f"\n{user}: {question}")
            warm = self._answer(prompt)
            [cold] = self._engine.generate(
                [prompt],
                self._args.max_tokens,
                salt=f"without reuse {number}",
                seed=self._args.seed,
                ignore_eos=self._args.ignore_eos,
            )
            talks[user].append({"role": "assistant", "content": self._text(warm)})
            rows.append(_Row(user, warm, cold))
        return self._summary(rows)

    def _answer(self, prompt: list[int]) -> Completion:
        """Answers a prompt, streaming to the terminal unless JSON is asked for, with a line of figures."""
        decoder = StreamDecoder(self._tokenizer)
        shown = 0
        completion = Completion(prompt, self._args.max_tokens)
        for [completion] in self._engine.stream(
            [prompt], self._args.max_tokens, seed=self._args.seed, ignore_eos=self._args.ignore_eos
        ):
            for token in completion.tokens[shown:]:
                piece = "" if token in self._tokenizer.special_ids else decoder.push(token)
                if not self._args.json:
                    print(piece, end="", flush=True)
            shown = len(completion.tokens)
        if not self._args.json:
            print(decoder.flush())
        _tell(
            self._args,
            f"  [prompt {len(prompt)} tokens, {completion.num_cached} cached, {completion.num_prefilled} prefilled; "
            f"first token after {completion.ttft_seconds * 1e3:.0f} ms, then "
            f"{completion.decode_tokens_per_second:.1f} tokens/s]",
        )
        return completion

    def _text(self, completion: Completion) -> str:
        ids = [token for token in completion.tokens if token not in self._tokenizer.special_ids]
        return self._tokenizer.decode(ids)

    def _summary(self, rows: Sequence["_Row"]) -> int:
        """Prints the table and the check; returns the exit status."""
        equal = all(row.equal for row in rows)
        if self._args.json:
            print(json.dumps({"turns": [row.as_dict() for row in rows], "all_equal": equal}))
            return 0 if equal else 1
        print("\nTime to first token, computed without reuse (cold) and with what the pool had (warm)\n")
        print(
            f"{'turn':>4}  {'user':<5} {'prompt':>6} {'cached':>6} {'cold ms':>8} {'warm ms':>8} {'ratio':>6}  answer"
        )
        for number, row in enumerate(rows, start=1):
            cold, warm = row.cold.ttft_seconds, row.warm.ttft_seconds
            print(
                f"{number:>4}  {row.user:<5} {len(row.warm.prompt):>6} {row.warm.num_cached:>6} {cold * 1e3:>8.0f} "
                f"{warm * 1e3:>8.0f} {cold / warm:>6.1f}  {'equal' if row.equal else 'DIFFERENT'}"
            )
        print(
            "\nEvery answer is token for token the one computed without reuse."
            if equal
            else "\nAn answer differs from the one computed without reuse."
        )
        return 0 if equal else 1


@dataclasses.dataclass(frozen=True)
class _Row:
    """One turn of the scripted session."""

    user: str
    warm: Completion
    cold: Completion

    @property
    def equal(self) -> bool:
        return self.warm.tokens == self.cold.tokens

    def as_dict(self) -> dict[str, object]:
        return {
            "user": self.user,
            "prompt_tokens": len(self.warm.prompt),
            "hits": {"g1": self.warm.num_cached},
            "prefilled": self.warm.num_prefilled,
            "ttft_cold_s": self.cold.ttft_seconds,
            "ttft_warm_s": self.warm.ttft_seconds,
            "decode_tokens_per_s": self.warm.decode_tokens_per_second,
            "output_token_ids": self.warm.tokens,
            "equal": self.equal,
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--prompt", metavar="TEXT", help="answer one prompt")
    mode.add_argument("--interactive", action="store_true", help="talk on the terminal")
    parser.add_argument("--raw", action="store_true", help="with --prompt: no chat template around the text")
    parser.add_argument("--max-tokens", type=_positive, default=48, metavar="N", help="bound of an answer (default 48)")
    parser.add_argument("--ignore-eos", action="store_true", help="generate exactly --max-tokens")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 = greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus to sample from (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampler (default 0)")
    parser.add_argument("--block-size", type=_positive, default=16, metavar="N", help="tokens a block (default 16)")
    parser.add_argument("--num-blocks", type=_positive, default=512, metavar="N", help="size of the pool (default 512)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and cache"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    return parser


def _positive(text: str) -> int:
    """An option that is a number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _lines(prompt: str) -> Iterator[str]:
    """Lines typed by the user, until an empty one or the end of input."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _tell(args: argparse.Namespace, line: str) -> None:
    """Prints for people: on stdout, or on stderr where stdout carries JSON."""
    print(line, file=sys.stderr if args.json else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
