"""The model card of an adapter folder; knows configs and files, nothing of models or training."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData

from ..configuration import AutoDecoConfig
from ..errors import AdapterConfigError

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PAPERS = {
    "heads": "[The End of Manual Decoding](https://huggingface.co/papers/2510.26697)",
    "token_actions": "*Learning Adaptive LLM Decoding*",
    "sequence_actions": "*Learning Adaptive LLM Decoding*",
}
_KINDS = {
    "heads": "heads that predict temperature and top-p for every token",
    "token_actions": "a policy that chooses one of a few sampling configurations for every token",
    "sequence_actions": "a policy that chooses one of a few sampling configurations for every prompt",
    "static": "fixed sampling parameters (a baseline)",
}
_BODY = """# A decoding adapter for {base}

{kind_sentence}: {kind}. The base model's weights are untouched.

## How to use

```python
from transformers import AutoTokenizer
from hf_adaptive_decode import AutoDecoForCausalLM

adapter = "{adapter}"
model = AutoDecoForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
inputs = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, budget=256)[0]))
```

## Results

None recorded. Before use, compare with greedy decoding, default sampling, the best static setting chosen on validation
data, and MeanShift (the adapter's own mean as a static setting).

## Limits

Trained for this base model alone. What it learned reflects its training data; on other domains, measure first.
"""


def make_card(folder: str | os.PathLike[str], config: AutoDecoConfig) -> ModelCard:
    """
    The card for an adapter folder; an existing one keeps its text and has its metadata brought up to date.

    Raises:
        [`AdapterConfigError`]: If the folder's README.md has metadata that cannot be read.
    """
    path = Path(folder, CARD_FILE)
    if path.exists():
        try:
            card: ModelCard = ModelCard.load(path)
        except (ValueError, yaml.YAMLError) as error:
            raise AdapterConfigError(
                f"the metadata of {path} cannot be read; mend or remove the file: {error}"
            ) from error
        card.data = _metadata(card.data, config)
        return card
    data = _metadata(ModelCardData(), config)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(Path(folder).name, config)}")


def _metadata(data: CardData, config: AutoDecoConfig) -> ModelCardData:
    tags = {*(data.to_dict().get("tags") or []), "adaptive-decoding", f"adaptive-decoding-{config.policy}"}
    ours = {"library_name": "hf_adaptive_decode", "pipeline_tag": "text-generation", "tags": sorted(tags)}
    base = config.base_model_name_or_path
    if base is not None and _HUB_ID.fullmatch(base):
        ours |= {"base_model": base, "base_model_relation": "adapter"}
    return ModelCardData(**{**data.to_dict(), **ours})


def _body(name: str, config: AutoDecoConfig) -> str:
    base = config.base_model_name_or_path or "a model built in code"
    paper = _PAPERS.get(config.policy)
    return _BODY.format(
        base=base,
        kind=_KINDS[config.policy],
        kind_sentence=f"After {paper}" if paper else "For comparison",
        adapter=name,
    )
