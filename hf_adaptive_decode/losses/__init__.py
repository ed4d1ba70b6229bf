"""Losses over decoding parameters, the readable and the chunked; nothing here knows a model or a trainer."""

from __future__ import annotations

from .chunked import CHUNK_BYTES, DecodingLossOutput, chunked_decoding_loss
from .config import IGNORE_INDEX, DecodingLossConfig
from .control import RankingLossConfig, ranking_loss
from .joint import joint_decoding_loss
from .kinds import LOSS_TYPES
from .masking import is_easy_token, stable_mask_uniform
from .reference import decoding_loss_reference, soft_top_p_probs
from .rows import RowDerivatives, soft_top_p_nll
from .sketch import SKETCH_FIELDS, SKETCH_VERSION, Sketch, concatenated, sketch_rows
from .sketched import sketched_decoding_loss, sketched_nll

__all__ = [
    "CHUNK_BYTES",
    "IGNORE_INDEX",
    "LOSS_TYPES",
    "SKETCH_FIELDS",
    "SKETCH_VERSION",
    "DecodingLossConfig",
    "DecodingLossOutput",
    "RankingLossConfig",
    "RowDerivatives",
    "Sketch",
    "chunked_decoding_loss",
    "concatenated",
    "decoding_loss_reference",
    "is_easy_token",
    "joint_decoding_loss",
    "ranking_loss",
    "sketch_rows",
    "sketched_decoding_loss",
    "sketched_nll",
    "soft_top_p_nll",
    "soft_top_p_probs",
    "stable_mask_uniform",
]
