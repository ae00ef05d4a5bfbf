#!/usr/bin/env bash
# Show in which encoders of transformers a boolean mask [batch, 1, queries, keys] hides nothing.
#
# Since masks are made in one place, BERT, RoBERTa, ELECTRA, ALBERT, DistilBERT and T5 read a boolean
# 4-D mask as "True: may be seen". MPNet, RoFormer, MegatronBERT, RemBERT, Splinter and I-BERT take any
# mask of more than two dims as made already, and add it to the scores: True adds 1, False adds 0, and
# the token that was to be hidden is seen by all others. No error, no warning, and the same tensor as
# float zeros and -inf, or as a 2-D mask, hides it.
#
# Seen 2026-11-28, Python 3.11, x86_64, transformers 5.23.0, torch 2.13.0 (random models of width 32).
# By how much the first token's output changes with a last token that the mask hides:
#   2-D / 4-D boolean: bert 0.000 / 0.000, electra 0.000 / 0.000, t5 0.000 / 0.000,
#   mpnet 0.000 / 0.717, roformer 0.000 / 0.809, megatron-bert 0.000 / 0.776, rembert 0.000 / 0.648,
#   splinter 0.000 / 0.931, ibert 0.000 / 0.179 (these six by other amounts for other weights)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0

cat >"$folder/masks.py" <<'PYTHON'
import sys

import torch
from transformers import AutoConfig, AutoModel

HIDES = ("bert", "electra", "t5")
HIDES_NOTHING = ("mpnet", "roformer", "megatron-bert", "rembert", "splinter", "ibert")
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 120, "max_position_embeddings": 64,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 120}

torch.manual_seed(0)
tokens = torch.randint(5, 90, (1, 6))
other = tokens.clone()
other[0, -1] += 7
flat = torch.tensor([[1, 1, 1, 1, 1, 0]])
pairs = torch.ones(1, 1, 6, 6, dtype=torch.bool)
pairs[..., -1] = False


def change(model, mask):
    """How far the first token's output moves with the last token, which is masked."""
    with torch.no_grad():
        one, two = (model(input_ids=ids, attention_mask=mask)[0][0, 0] for ids in (tokens, other))
    return (one - two).abs().max().item()


right = True
for kind in HIDES + HIDES_NOTHING:
    model = AutoModel.from_config(AutoConfig.for_model(kind, **(T5 if kind == "t5" else SMALL)))
    model = (model.encoder if kind == "t5" else model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    by_flat, by_pairs = change(model, flat), change(model, pairs)
    print(f"{kind}: {by_flat:.3f} / {by_pairs:.3f}")
    right &= by_flat == 0 and (by_pairs == 0 if kind in HIDES else by_pairs > 0.05)
sys.exit(0 if right else "boolean 4-D masks are read in another way now")
PYTHON
"$folder/venv/bin/python" "$folder/masks.py"
