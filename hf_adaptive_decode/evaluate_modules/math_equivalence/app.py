"""The metric's page on a Space, with inputs as JSON; knows nothing of how the metric is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluate
import gradio  # type: ignore[import-not-found]

metric = evaluate.load(str(Path(__file__).with_name("math_equivalence.py")))


def compute(predictions: str, references: str) -> Any:
    """The metric of what was typed in."""
    return metric.compute(predictions=json.loads(predictions), references=json.loads(references))


inputs = [gradio.Textbox('["0.5", "3"]', label="predictions"), gradio.Textbox('["1/2", "2"]', label="references")]


gradio.Interface(compute, inputs, gradio.JSON(), title="math equivalence", description=metric.description).launch()
