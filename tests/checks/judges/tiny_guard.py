"""Guard models made on the spot, whose next token hangs on the last one alone: they say exactly what the test wants."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTROLS = ["<|pad|>", "<|turn|>", "<|answer|>", "<|end|>", "@@ctl@@"]
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    "{% if guideline is defined %}({{ guideline }}){% endif %}<|answer|>"
)


def tokenizer_of(words: Sequence[str]) -> Any:
    """Bytes, the control tokens, and ``words`` as one token each; the last control token is found in any case."""
    vocabulary = {one: at for at, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.normalizer = normalizers.Replace("@@CTL@@", "@@ctl@@")
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(one, normalized=one == "@@ctl@@", special=True) for one in CONTROLS])
    inner.add_tokens([AddedToken(one, normalized=False) for one in words])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_guard(directory: Path, words: Sequence[str], *, after: str = "<|answer|>", sure: float = 3.0) -> Path:
    """A Llama that goes from ``after`` through ``words`` to the end; ``sure`` is how far ahead its choice is.

    Attention and the inner layer add nothing, embeddings are one-hot, and the head is the table of what follows what.
    """
    tokenizer = tokenizer_of(words)
    known = tokenizer.get_vocab()
    size = len(known)
    width = (size + 7) // 8 * 8
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            pad_token_id=known["<|pad|>"],
            eos_token_id=known["<|end|>"],
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    chain = [after, *words, "<|end|>"]
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.zero_()
        for here, there in pairwise(chain):
            # The norm makes a one-hot vector sqrt(width) long.
            model.lm_head.weight[known[there], known[here]] = sure / width**0.5
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
