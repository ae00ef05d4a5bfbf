#!/usr/bin/env bash
# Show that AIMv2's text tower is causal or not by what other texts share its batch.
#
# The tower asks for a causal mask, and tells its attention that it is not causal. Transformers' default
# attention (sdpa) leaves a causal mask away where no token is padding, and goes by what the attention
# says: then every token sees all others. With one padded position anywhere in the batch the mask is
# made, and all texts of that batch are causal, the unpadded ones too. With `eager` it is the mask
# whenever an attention_mask is passed. So the embedding of a text changes with its neighbours' lengths.
#
# Seen 2026-11-28, Python 3.11, x86_64, transformers 5.23.0, torch 2.13.0 (a random model of width 32):
#   sdpa: the first token changes with the last by 1.948 alone, by 0.000 beside a longer text
#   eager: by 0.000 alone, by 0.000 beside a longer text
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0

cat >"$folder/tower.py" <<'PYTHON'
import sys

import torch
from transformers import Aimv2TextConfig, Aimv2TextModel

torch.manual_seed(0)
model = Aimv2TextModel(
    Aimv2TextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=99, max_position_embeddings=40, bos_token_id=97, eos_token_id=98, pad_token_id=1,
    )
).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))

text = torch.randint(3, 97, (1, 8))
other = text.clone()
other[0, -1] = 5  # the last token alone
longer = torch.randint(3, 97, (1, 10))


def first_token(ids, beside):
    """The first token's hidden state, of a text alone or padded to a longer neighbour."""
    mask = torch.ones_like(ids)
    if beside:
        ids = torch.cat([torch.nn.functional.pad(ids, (0, 2), value=1), longer])
        mask = torch.cat([torch.nn.functional.pad(mask, (0, 2)), torch.ones_like(longer)])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[0, 0]


changes = {}
for name in ("sdpa", "eager"):
    model.set_attn_implementation(name)
    for beside in (False, True):
        change = (first_token(text, beside) - first_token(other, beside)).abs().max().item()
        changes[name, beside] = change
        print(name, "beside a longer text:" if beside else "alone:", f"{change:.3f}")
expected = changes["sdpa", False] > 0.5 and max(
    changes["sdpa", True], changes["eager", False], changes["eager", True]
) == 0
sys.exit(0 if expected else "the tower no longer depends on its batch in this way")
PYTHON
"$folder/venv/bin/python" "$folder/tower.py"
