"""Questions, reference answers and judge's prompts that are made up but have the form of MT-Bench's files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longalign_ray.config import MTBenchConfig

QUESTIONS = [(81, "writing"), (105, "reasoning"), (111, "math"), (141, "stem")]
PROMPTS = {
    "single-v1": "Rate. Q: {question} A: {answer} End.",
    "single-math-v1": "Compare. Q: {question} R: {ref_answer_1} A: {answer} End.",
    "single-v1-multi-turn": "1 {question_1} = {answer_1} 2 {question_2} = {answer_2} End.",
    "single-math-v1-multi-turn": (
        "R1 {question_1} = {ref_answer_1} R2 {question_2} = {ref_answer_2} "
        "A1 {question_1} = {answer_1} A2 {question_2} = {answer_2} End."
    ),
    "pair-v2": "Which? {question} {answer_a} {answer_b}",
}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_mt_bench(directory: Path) -> MTBenchConfig:
    """The settings that name the files."""
    questions = [
        {"question_id": number, "category": category, "turns": [f"First {number} {{answer}}?", f"Second {number}?"]}
        for number, category in QUESTIONS
    ]
    answers = [
        {"question_id": number, "model_id": "any", "choices": [{"index": 0, "turns": [f"r1 {number}", f"r2 {number}"]}]}
        for number in (105, 111)
    ]
    prompts = [
        {"name": name, "type": "single", "system_prompt": f"You are {name}.", "prompt_template": text}
        for name, text in PROMPTS.items()
    ]
    write_lines(directory / "question.jsonl", questions)
    write_lines(directory / "gpt-4.jsonl", answers)
    write_lines(directory / "judge_prompts.jsonl", prompts)
    return MTBenchConfig(
        questions=str(directory / "question.jsonl"),
        reference_answers=str(directory / "gpt-4.jsonl"),
        judge_prompts=str(directory / "judge_prompts.jsonl"),
    )
