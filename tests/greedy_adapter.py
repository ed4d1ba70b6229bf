"""An adapter for servers to serve: always greedy, which sampling at any temperature above 0 is not."""

from __future__ import annotations

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.testbed import load_base_model, load_tokenizer

CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"
# The base is unsure of it.
PROMPT = "coin 4 7 47 - 11 =>"


def save_greedy_adapter(folder):
    """With a tokenizer that knows how to chat; gives the folder."""
    greedy = AutoDecoConfig(policy="static", actions=[{"temperature": 0.0}])
    AutoDecoForCausalLM.from_base(load_base_model(), greedy).save_pretrained(folder)
    tokenizer = load_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder
