"""A tiny random checkpoint on disk, with a byte-level tokenizer, that both hosts load."""

from __future__ import annotations

from pathlib import Path


def save_tiny_checkpoint(folder: Path, name: str = "llama", chat: bool = True) -> Path:
    """Write the tiny model `name` of `torch_models` and a 256-token tokenizer to `folder`, as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from torch_models import tiny_model
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {c: 3 + i for i, c in enumerate(alphabet[:253])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )
    if chat:
        fast.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    fast.save_pretrained(folder)
    tiny_model(name).save_pretrained(folder)
    return folder
