"""Open a quantized model with stock transformers, plquant not imported, and let it write.

python bench/sample.py out/demo
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="output folder of plquant calibrate")
    parser.add_argument("--prompt", default="Why is the sky blue? Answer in two sentences.")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    options = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.folder)
    chat = [{"role": "user", "content": options.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(f"> {options.prompt}")
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
