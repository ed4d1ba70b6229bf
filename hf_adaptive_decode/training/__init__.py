"""Trainers of decoding adapters."""

from __future__ import annotations

from .arguments import AutoDecoTrainingArguments
from .data import DataFormatError, DecodingDataCollator
from .supervised import AutoDecoTrainer

__all__ = ["AutoDecoTrainer", "AutoDecoTrainingArguments", "DataFormatError", "DecodingDataCollator"]
