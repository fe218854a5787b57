"""A small CLIP: its text half conditions the U-Net, the whole of it scores text alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.recipe.config import Recipe
from tests.recipe.dataset import MAX_TOKENS, Pictures
from tests.recipe.drawing import SIZE
from tests.recipe.training import bfloat16, train

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

BATCH = 192
WIDTH = 128
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def train_clip(pictures: Pictures, tokenizer: CLIPTokenizer, recipe: Recipe) -> CLIPModel:
    """Contrastive training on captions and pictures."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "hidden_act": "quick_gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": SIZE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=WIDTH))
    clip.config._attn_implementation = "eager"  # on CPU its backward is faster than the fused one's
    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    rng = np.random.default_rng(recipe.seed + 1)

    def loss_of_step() -> Tensor:
        x, ids = pictures.batch(BATCH, rng)
        length = int((ids != tokenizer.eos_token_id).sum(1).max()) + 1  # a causal encoder needs nothing after
        with bfloat16():
            texts = clip.text_projection(clip.text_model(input_ids=ids[:, :length]).pooler_output)
            seen = clip.vision_model(pixel_values=((x + 1) / 2 - MEAN) / STD)
            images = clip.visual_projection(seen.pooler_output)
            cosine = F.normalize(texts, dim=-1).float() @ F.normalize(images, dim=-1).float().T
            logits = cosine * clip.logit_scale.exp().clamp(max=100)
            target = torch.arange(len(x))
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    train("clip", optimizer, loss_of_step, recipe.clip_seconds)
    return clip.eval().requires_grad_(False)
