"""A small byte-level BPE tokenizer that CLIP's own tokenizer class reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.recipe.dataset import MAX_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_tokenizer(captions: list[str], folder: Path, size: int = 1500) -> CLIPTokenizer:
    """Learn merges from captions and save the tokenizer (vocab.json, merges.txt, tokenizer.json) in `folder`.

    Args:
        size: of the vocabulary while merges are learnt; CLIP's layout (every byte twice, start, end) comes on top.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=size, end_of_word_suffix=WORD_END, initial_alphabet=alphabet)
    )
    learnt = json.loads(bpe.to_str())["model"]["merges"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in learnt]

    pieces = alphabet + [letter + WORD_END for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = [*dict.fromkeys(pieces), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    merges_file.write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    # by position: transformers 5 renamed the two parameters
    tokenizer = CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer
