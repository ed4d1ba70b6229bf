"""
Runs the benchmarks one after another, each in a process of its own, and renders what they found.

    python benchmarks/run.py [--quick] [--device cpu] [--only decoding warping] [--output FOLDER]

Each writes NAME.json to benchmarks/results, or with a GPU to benchmarks/results/NAME-OF-THE-GPU; RESULTS.md and
RESULTS.png are then made of all the files there. With --quick everything is tiny, goes to a temporary folder unless
--output names one, and shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

_MIXED_SIZE = ["--mixed-layers", "4", "--batches", "4", "--short-tokens", "4"]
# Part to what it is given at full size on a CPU, on a GPU (None: not run there), and tiny.
FULL: dict[str, list[str]] = {
    "startup": [],
    "warping": [],
    "decoding": ["--compile", "tiny:1:64"],
    "training_step": ["--step-tokens", "512"],
    "profile_steps": [],
    "rollout": ["--parts", "c", "d", *_MIXED_SIZE],
    "epoch_cache": ["--tokens", "1024", "--rounds", "7"],
    "serving": [],
}
_GPU_CELLS = [f"{shape}:1:{prompt}" for shape in ("0.6B", "8B") for prompt in (64, 1024, 4096, 8192, 16384, 24576)]
_GPU_CELLS += [f"{shape}:{batch}:64" for shape in ("0.6B", "4B", "8B") for batch in (8, 32)]
GPU: dict[str, list[str] | None] = {
    "startup": None,
    "warping": ["--rounds", "15"],
    "decoding": ["--rounds", "200", "--cells", *_GPU_CELLS, "--compile", "0.6B:1:64", "8B:1:64"],
    "training_step": ["--tokens", "8192", "--plain-tokens", "2048"],
    "profile_steps": ["--shape", "8B"],
    "rollout": None,
    "epoch_cache": None,
    "serving": None,
}
_ONE = "--threads 1"
_TINY = f"{_ONE} --rounds 2"
QUICK: dict[str, list[str] | None] = {
    "startup": f"{_TINY} --cells help".split(),
    "warping": f"{_TINY} --rows 1 4 --vocab 2000 --growth 1024 4096 --no-compile --dtypes float32 --shortest 0".split(),
    "decoding": f"{_TINY} --cells tiny:1:16 tiny:2:40 --vocab 1000".split(),
    "training_step": (
        f"{_TINY} --tokens 64 --vocab 2000 --hidden 64 --layers 2 --growth-tokens 32 64 --growth-vocab 1000 2000 "
        "--growth-rows 32"
    ).split(),
    "profile_steps": f"{_TINY} --shape tiny --vocab 1000 --tokens 64 --hidden 64 --layers 2".split(),
    "rollout": (
        f"{_ONE} --shape tiny --vocab 500 --batch 4 --samples 2 --new-tokens 3 --pairs 1 --testbed-batch 4 "
        "--testbed-tokens 3 --testbed-budget 12 --prompts 2 --updates 2 --mixed-batch 4 --testbed-mixed-batch 4 "
        "--short-tokens 2 --testbed-short-tokens 2 --batches 2 --mixed-rounds 1"
    ).split(),
    "epoch_cache": f"{_TINY} --shape tiny --vocab 1000 --tokens 64".split(),
    "serving": f"{_TINY} --shape tiny --layers 0 --vocab 1000 --batch 1 --prompt 4 --new-tokens 3".split(),
}
# vLLM has an environment of its own, which `make test-vllm` and `make bench` make.
VLLM_PYTHON = HERE.parent / ".venv-vllm" / "bin" / "python"


def folder_for(device: str) -> Path:
    """Where results of the device go."""
    if device.partition(":")[0] != "cuda":
        return RESULTS
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here.")
    return RESULTS / torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")


def run_part(name: str, words: list[str], target: Path) -> bool:
    """One benchmark; whether it succeeded."""
    python = VLLM_PYTHON if name == "serving" else sys.executable
    command = [str(python), str(HERE / f"{name}.py"), "--json", str(target / f"{name}.json"), *words]
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    start = time.perf_counter()
    # A thread that waits for its next turn must not take a core from the one whose turn it is.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    quiet |= {"OMP_WAIT_POLICY": "passive"} if name == "decoding" else {}
    code = subprocess.run(command, env=os.environ | quiet, check=False).returncode
    print(f"== {name}: {'done' if code == 0 else f'failed ({code})'}, {time.perf_counter() - start:.0f} s", flush=True)
    return code == 0


def main() -> int:
    """Runs and renders; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(FULL), default=list(FULL), metavar="PART")
    parser.add_argument("--output", type=Path, help="folder for the results; default: benchmarks/results")
    args = parser.parse_args()
    on_gpu = args.device.partition(":")[0] == "cuda"
    output = args.output or (Path(tempfile.mkdtemp(prefix="benchmarks-")) if args.quick else folder_for(args.device))
    output.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if args.quick else GPU if on_gpu else FULL
    failed = []
    for name in args.only:
        words = sizes[name]
        if words is None or (name == "serving" and not VLLM_PYTHON.exists()):
            print(f"== {name}: left out", flush=True)
            continue
        words = [*words, "--device", args.device] if on_gpu else words
        failed += [] if run_part(name, words, output) else [name]
    from report import write_report

    in_place = RESULTS in (output, output.parent)
    for path in write_report(RESULTS if in_place else output, HERE if in_place else output):
        print(f"wrote {path}")
    print(f"failed: {', '.join(failed)}" if failed else "all parts ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
