"""Text from an exported run with onnxruntime alone, beside `tokenizers` for its letters: no torch, no APT.

apt export RUN --format onnx --out model
python examples/onnx_generate.py model "To be" 100
"""

import sys

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

folder, prompt, count = sys.argv[1:]
session = InferenceSession(f"{folder}/model.onnx")
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
# The cache of no position; the two raw positions that tva_default keeps beside it are zeros.
sizes = {each.name: [{"batch": 1, "past": 0}.get(size, size) for size in each.shape] for each in session.get_inputs()}
past = {name: np.zeros(size, np.float32) for name, size in sizes.items() if name != "tokens"}
ids = new = tokenizer.encode(prompt, add_special_tokens=False).ids
for _ in range(int(count)):
    logits, *present = session.run(None, {"tokens": np.array([new]), **past})
    past = dict(zip(past, present, strict=True))
    new = [int(logits[0, -1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids))
