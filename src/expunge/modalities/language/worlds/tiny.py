"""Small language models from configurations, and a tokenizer trained on the data at hand: for tests, demo and worlds, without any download."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from expunge.core.machine.devices import reseeded

EOS, PAD = "<|end|>", "<|pad|>"

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}System: {{ m['content'] }}\n{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n"
    "{% else %}Assistant: {{ m['content'] }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""A chat template with a real end-of-turn token, which is the end-of-text token too."""


def strings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All texts of records, answers after a space as they stand behind a prompt."""
    out = []
    for row in rows:
        for value in row.values():
            out += [v if k == 0 else f" {v}" for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, str) for k in (0, 1)]
    return out


def tokenizer(rows: Sequence[Mapping[str, Any]], size: int = 2000) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on the records; same records, same tokenizer. It has an end token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if size >= 512 else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["Question: \nAnswer: User: Assistant: System:", *strings(rows)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=PAD)
    made.chat_template = CHAT
    return made


def llama(vocabulary: int, *, width: int = 128, layers: int = 4, heads: int = 4, seed: int = 0, context: int = 512, tied: bool = True) -> nn.Module:
    """An untrained Llama of transformers: `width` features, feed-forward 2.5 times as wide, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=context, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return _drawn(LlamaForCausalLM, config, seed)


def mixtral(vocabulary: int, *, width: int = 128, layers: int = 4, heads: int = 4, experts: int = 8, seed: int = 0, context: int = 512) -> nn.Module:
    """An untrained mixture-of-experts twin: every block has `experts` feed-forward networks as wide as the model, two of which each token takes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, num_local_experts=experts, num_experts_per_tok=2, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=1, **{"experts_implementation": "eager"},
    )  # fmt: skip
    return _drawn(MixtralForCausalLM, config, seed)


def _drawn(kind: Any, config: Any, seed: int) -> nn.Module:
    with reseeded(seed):
        return kind(config).eval()
