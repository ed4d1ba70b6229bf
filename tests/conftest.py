"""One thread, no network, and no state that one test could leave to the next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import torch
from hypothesis import settings
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()
# The same examples on every run, and no folder of them left in the checkout.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def base():
    return tiny.build_base()


@pytest.fixture
def model(base):
    """A tiny Qwen3 whose adapter's temperature and top-p change strongly from token to token."""
    return tiny.randomise_heads(tiny.wrap(base))


@pytest.fixture
def identity(base):
    return tiny.make_heads_identity(tiny.wrap(base))


@pytest.fixture
def folder(model, tmp_path):
    """An adapter on disk, with its base beside it."""
    base_folder = tmp_path / "base"
    tiny.build_base().save_pretrained(base_folder)
    model.decoding_config.base_model_name_or_path = str(base_folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
