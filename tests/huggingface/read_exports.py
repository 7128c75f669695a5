"""What the Transformers of the Python that runs this makes of exported folders.

    python read_exports.py FOLDER ...

Each FOLDER has `request.json`, an object with `texts`, which are tokenized, and `ids`, rows of tokens, of which hidden
states and logits are computed. `load` is an expression for the decoder in `folder`. The answers are written to
`answer-VERSION.json` and `answer-VERSION.npz`, for Transformers' major version.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

VERSION = transformers.__version__.split(".")[0]


def read(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = {"ids": [tokenizer(text).input_ids for text in request["texts"]]}
    answer["decoded"] = [tokenizer.decode(ids) for ids in answer["ids"]]
    if request["ids"]:
        names = {"AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM, "folder": folder}
        decoder = eval(request["load"], names).eval()
        whole, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        answer["report"] = {key: sorted(map(str, value)) for key, value in report.items() if value}
        rows = [torch.tensor([row]) for row in request["ids"]]
        with torch.no_grad():
            states = [decoder(row).last_hidden_state[0].numpy() for row in rows]
            heads = whole.get_output_embeddings().weight.numpy()
        np.savez(folder / f"answer-{VERSION}.npz", states=np.concatenate(states), head=heads)
    (folder / f"answer-{VERSION}.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # The models are tiny.
    for argument in sys.argv[1:]:
        read(Path(argument))
