"""Trainers of decoding adapters."""

from __future__ import annotations

from .arguments import AutoDecoTrainingArguments
from .data import DataFormatError, DecodingDataCollator
from .prompts import COT_TEMPLATES, CoTTemplate
from .reinforce import REINFORCEDecodingTrainer
from .reinforce_arguments import REINFORCEDecodingTrainingArguments
from .supervised import AutoDecoTrainer

__all__ = [
    "AutoDecoTrainer",
    "AutoDecoTrainingArguments",
    "COT_TEMPLATES",
    "CoTTemplate",
    "DataFormatError",
    "DecodingDataCollator",
    "REINFORCEDecodingTrainer",
    "REINFORCEDecodingTrainingArguments",
]
