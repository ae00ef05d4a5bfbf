#!/usr/bin/env bash
# Show that the first use of a pipeline or a model class puts another module in place of `transformers`.
#
# What is decorated by auto_docstring makes transformers execute its own __init__.py again, which writes
# a new module to sys.modules["transformers"]. Who has imported transformers before keeps the old one. A
# patch of an attribute, by unittest.mock or monkeypatch say, then holds for one half of a program: files
# imported later, and functions that import when they run, do not see it. Classes are the same in both.
#
# Seen 2026-11-29, Python 3.11, x86_64, transformers 5.23.0 (without torch; with it, BertModel does so):
#   the module is another one: True
#   version here patched, after another import 5.23.0
#   classes are the same: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0

cat >"$folder/patched.py" <<'PYTHON'
import sys
from unittest import mock

import transformers

before = sys.modules["transformers"]
assert before is transformers
with mock.patch.object(transformers, "__version__", "patched"):
    transformers.AutoConfig
    kept = sys.modules["transformers"] is before  # configurations and tokenizers change nothing
    transformers.pipeline
    after = sys.modules["transformers"]
    import transformers as again

    print(f"the module is another one: {after is not before}")
    print(f"version here {transformers.__version__}, after another import {again.__version__}")
    lost = transformers.__version__ == "patched" and again.__version__ == "5.23.0"
expected = kept and after is not before and again is after and lost
same = transformers.BertConfig is again.BertConfig
print(f"classes are the same: {same}")
sys.exit(0 if expected and same else "the module stays, or the patch is seen by all")
PYTHON
"$folder/venv/bin/python" "$folder/patched.py"
