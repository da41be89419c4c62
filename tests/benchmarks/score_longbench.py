"""`longalign score longbench` beside a scorer in the manner of the benchmark's: one row after the other, ROUGE from the
package `rouge` with all that it computes, words from jieba.

Both score the same 4,750 published predictions, in turns, in processes of their own with cold imports; CPU seconds are
user and system time of the process. Goal: at most 60 s, and at most a third of the other's CPU time; scores equal.
Run: python -m tests.benchmarks.score_longbench [--rounds 1]
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import SHARED_DATA

PREDICTIONS = SHARED_DATA / "longbench_v1" / "pred" / "llama2-7b-chat-4k"
MAX_SECONDS, MAX_SHARE = 60, 1 / 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", choices=("own", "reference"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not PREDICTIONS.is_dir():
        print(f"left out: no predictions at {PREDICTIONS}")
        return 0
    if arguments.child:
        print(json.dumps(measured(arguments.child)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {"reference": [], "own": []}
    for _ in range(arguments.rounds):
        for name, of_name in runs.items():
            command = [sys.executable, "-m", "tests.benchmarks.score_longbench", "--child", name]
            made = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
            of_name.append(json.loads(made.stdout))
    best = {name: min(of_name, key=lambda run: run["cpu"]) for name, of_name in runs.items()}
    share = best["own"]["cpu"] / best["reference"]["cpu"]
    equal = (
        best["own"]["scores"] == best["reference"]["scores"] == json.loads((PREDICTIONS / "result.json").read_text())
    )
    print("| scorer | seconds | CPU seconds | of the reference |\n|---|---|---|---|")
    for name, run in best.items():
        print(f"| {name} | {run['seconds']:.1f} | {run['cpu']:.1f} | {run['cpu'] / best['reference']['cpu']:.2f} |")
    print(f"\nscores of the 21 sets equal to one another and to those published: {'yes' if equal else 'NO'}")
    missed = [
        what
        for what, met in (
            (f"at most {MAX_SECONDS} s", best["own"]["seconds"] <= MAX_SECONDS),
            (f"at most {MAX_SHARE:.2f} of the reference", share <= MAX_SHARE),
            ("equal scores", equal),
        )
        if not met
    ]
    print(f"goals missed: {', '.join(missed) or 'none'}")
    return bool(missed)


def measured(scorer: str) -> dict[str, Any]:
    """Scores of the sets, wall and CPU seconds of loading and scoring."""
    start = time.perf_counter()
    scores = {"own": own, "reference": reference}[scorer]()
    return {"scores": scores, "seconds": time.perf_counter() - start, "cpu": time.process_time()}


def own() -> dict[str, float]:
    from longalign_ray.evaluate.longbench_score import score_directory

    return score_directory(PREDICTIONS).scores


def reference() -> dict[str, float]:
    """Everything but ROUGE by the same functions: they are of no weight, or spend their time in jieba as well."""
    import jieba
    from rouge import Rouge

    from longalign_ray.evaluate.longbench_metrics import score_row
    from longalign_ray.evaluate.longbench_sets import LONGBENCH_SETS

    jieba.setLogLevel(logging.WARNING)
    rouge: Any = Rouge()

    def rouge_f(pred: str, answer: str) -> float:
        try:
            return rouge.get_scores([pred], [answer], avg=True)["rouge-l"]["f"]
        except ValueError:
            return 0.0

    scores = {}
    for name, of in LONGBENCH_SETS.items():
        of_rows = []
        for line in (PREDICTIONS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not of.metric.startswith("rouge"):
                score = score_row(of, row["pred"], answers=row["answers"], all_classes=row["all_classes"])
            else:
                pred = row["pred"].lstrip("\n").split("\n")[0] if of.first_line else row["pred"]
                texts = [pred, *row["answers"]]
                if of.metric.endswith("_zh"):
                    texts = [" ".join(jieba.cut(text, cut_all=False)) for text in texts]
                score = max(rouge_f(texts[0], answer) for answer in texts[1:])
            of_rows.append(score)
        scores[name] = round(100 * sum(of_rows) / len(of_rows), 2)
    return scores


if __name__ == "__main__":
    sys.exit(main())
