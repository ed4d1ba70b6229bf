"""Trainers of decoding adapters."""

from __future__ import annotations

from .arguments import AutoDecoTrainingArguments
from .control import DIVERSITY_COMMANDS, CommandSet, with_commands
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
    "CommandSet",
    "DIVERSITY_COMMANDS",
    "DataFormatError",
    "DecodingDataCollator",
    "REINFORCEDecodingTrainer",
    "REINFORCEDecodingTrainingArguments",
    "with_commands",
]
