"""
Every table and figure of both papers as an experiment on the embedded testbed, within about an hour of two CPU cores.

    python examples/experiments/run_all.py --output experiments_output
    python examples/experiments/run_all.py --only autodeco_table1 adaptive_table5

Writes OUTPUT/RESULTS.md, OUTPUT/results/*.jsonl and OUTPUT/pictures/*.png. A run that was killed goes on where it was:
adapters are kept, and so is every completion.
"""

from __future__ import annotations

import importlib
import json
import time
import traceback
from pathlib import Path

from lab import Experiment, Lab, arguments, lab_from, record, section

from hf_adaptive_decode.evaluation.provenance import provenance
from hf_adaptive_decode.evaluation.table import markdown_table

# In the order in which they are cheapest: what one trains, the next ones load.
NAMES = (
    "autodeco_table1",
    "autodeco_table2",
    "autodeco_table3",
    "autodeco_table4",
    "autodeco_tables5to7",
    "autodeco_figure3",
    "autodeco_figure4",
    "autodeco_figure6",
    "adaptive_table1",
    "adaptive_table2",
    "adaptive_table3",
    "adaptive_table4",
    "adaptive_table5",
    "adaptive_tables6to8",
    "adaptive_table9",
    "adaptive_figures2_7_8",
    "adaptive_figures3_4_5",
    "adaptive_figure6",
)
_HEAD = """# The papers' tables and figures, on the embedded testbed

Written by `python examples/experiments/run_all.py`; each section is a script of its name beside it, and takes `--base`
and `--dataset` to run on a real model. The testbed was built so that adapting pays, and it is tiny: signs can be
compared with the papers', sizes cannot. Rates are in per cent with 95 % bootstrap intervals over problems, gains are
paired by problem, and statics are chosen on validation problems. *Same* means that ours goes the papers' way beyond its
interval.
"""


def main() -> None:
    """Runs the experiments one after the other and writes RESULTS.md."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    options = parser.parse_args()
    lab = lab_from(options)
    for name in options.only:
        path = lab.output / "sections" / f"{name}.json"
        if path.exists():
            print(f"{name}: there already")
            continue
        started = time.perf_counter()
        module = importlib.import_module(name)
        try:
            outcome = record(lab, module.EXPERIMENT, module.run(lab))
        except Exception:
            # The others do not depend on it, and their hour is not to be lost.
            print(f"{name} failed:\n{traceback.format_exc()}")
            continue
        seconds = time.perf_counter() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"text": section(module.EXPERIMENT, outcome), "sign": outcome.sign, "seconds": seconds}
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{name}: {outcome.sign} ({seconds:.0f} s)")
    write_results(lab)


def write_results(lab: Lab) -> Path:
    """Puts the sections together, with a table of signs in front."""
    rows, texts, total = [], [], 0.0
    for name in NAMES:
        path = lab.output / "sections" / f"{name}.json"
        experiment: Experiment = importlib.import_module(name).EXPERIMENT
        if not path.exists():
            rows.append([experiment.what, "not run", ""])
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        total += found["seconds"]
        rows.append([experiment.what, found["sign"], f"{found['seconds']:.0f}"])
        texts.append(found["text"])
    facts = provenance(model=lab.base_name or "the embedded base model", sizes=vars(lab.sizes), seed=lab.seed)
    size = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(lab.sizes).items())
    where = f"{facts['hardware']['machine']}, torch {facts['versions']['torch']}, one training seed ({lab.seed})"
    logs = [json.loads(path.read_text(encoding="utf-8")) for path in lab.output.glob("**/adapters/*/log.json")]
    training = sum(log["seconds"] for log in logs)
    spent = (
        f"The scripts took {total / 60:.0f} minutes in all when last run; they load adapters that were trained "
        f"before, and to train those {len(logs)} took {training / 60:.0f} minutes"
    )
    head = f"{_HEAD}\nSizes: {size}. {where}. {spent}.\n"
    table = markdown_table(["", "sign", "seconds"], rows)
    path = lab.output / "RESULTS.md"
    path.write_text("\n\n".join([head.rstrip(), table, *texts]) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
