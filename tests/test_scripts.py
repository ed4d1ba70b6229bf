"""The example and the benchmark of rollouts run, at a size that takes seconds."""

import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script, *words):
    found = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def test_the_text_example_reports_every_baseline(tmp_path):
    rng = random.Random(0)
    rows = [{"question": f"What is {a} + {a + 1}?", "answer": f"It is {2 * a + 1}."} for a in range(80)]
    rng.shuffle(rows)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    sizes = ["--minutes", "0.03", "--vocab", "300", "--head-epochs", "1", "--threads", "1"]
    out = run("examples/train_heads_on_text.py", data, *sizes, "--output", tmp_path, "--json", tmp_path / "r.json")
    for name in ("base, T=1", "best static", "MeanShift", "learned temperature head"):
        assert name in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["documents"] == 8
    assert (tmp_path / "adapter" / "model.safetensors").exists()


def test_the_rollout_benchmark_runs(tmp_path):
    sizes = ["--shape", "tiny", "--vocab", 500, "--batch", 4, "--samples", 2, "--new-tokens", 3, "--pairs", 1]
    sizes += ["--testbed-batch", 4, "--testbed-tokens", 3, "--testbed-budget", 12, "--threads", 1]
    sizes += ["--prompts", 2, "--updates", 2, "--mixed-batch", 2, "--testbed-mixed-batch", 2, "--short-tokens", 1]
    sizes += ["--testbed-short-tokens", 1, "--batches", 2, "--mixed-rounds", 1]
    run("benchmarks/rollout.py", *sizes, "--json", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    models = [(row["part"], row["model"]) for row in results]
    assert models == [
        ("a", "tiny shape"),
        ("a", "testbed"),
        ("b", "testbed"),
        ("c", "testbed"),
        ("d", "tiny shape"),
        ("d", "testbed"),
    ]
    assert all(results.pop()["tokens a second, refilled / kept"]["median"] > 0 for _ in range(2))
    assert results.pop()["update / rollout"]["median"] > 0
    assert all({"decode, T=1 / generate, whole", "decode, actions / generate, whole"} <= set(row) for row in results)
    made = [[row[f"{name}, tokens made"] for name in ("generate", "decode, actions")] for row in results[:2]]
    assert made == [[4 * 3] * 2] * 2
