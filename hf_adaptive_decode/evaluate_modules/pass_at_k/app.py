"""The metric's page on a Space, with inputs as JSON; knows nothing of how the metric is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluate
import gradio  # type: ignore[import-not-found]

metric = evaluate.load(str(Path(__file__).with_name("pass_at_k.py")))


def compute(predictions: str, k: str) -> Any:
    """The metric of what was typed in."""
    return metric.compute(predictions=json.loads(predictions), k=json.loads(k))


inputs = [gradio.Textbox("[[1, 0, 0, 1], [0, 0, 0, 1]]", label="predictions"), gradio.Textbox("[1, 4]", label="k")]


gradio.Interface(compute, inputs, gradio.JSON(), title="pass@k", description=metric.description).launch()
