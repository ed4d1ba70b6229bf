"""The metric's page on a Space, with inputs as JSON; knows nothing of how the metric is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluate
import gradio  # type: ignore[import-not-found]

metric = evaluate.load(str(Path(__file__).with_name("decoding_control.py")))


def compute(predictions: str, references: str, direction: str) -> Any:
    """The metric of what was typed in."""
    rows = {"predictions": json.loads(predictions), "references": json.loads(references)}
    return metric.compute(**rows, direction=direction)


inputs = [
    gradio.Textbox('[{"temperature": 0.6, "top_p": 0.7}]', label="predictions (with the command)"),
    gradio.Textbox('[{"temperature": 0.7, "top_p": 0.8}]', label="references (without it)"),
    gradio.Radio(["low", "high"], value="low", label="direction"),
]


gradio.Interface(compute, inputs, gradio.JSON(), title="decoding control", description=metric.description).launch()
