"""The metrics of LongBench v1, with the benchmark's own peculiarities: published scores are reproduced row by row."""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.longbench_sets import LongBenchSet
from longalign_ray.evaluate.rouge_l import rouge_l

ARTICLE = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"\d+")
PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")
# Code points, both ends included, of the Chinese and full-width punctuation that the benchmark removes, with gaps where
# it leaves a mark in place: U+FF0E and U+300A, for instance.
CHINESE_PUNCTUATION = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
WITHOUT_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
WITHOUT_CHINESE = WITHOUT_PUNCTUATION | {
    code: None for first, last in CHINESE_PUNCTUATION for code in range(first, last + 1)
}
# A line of an answer with one of these is a fence, a comment or a heading, and no code.
NOT_CODE = ("`", "#", "//")


def score_row(of: LongBenchSet, pred: str, *, answers: Sequence[str], all_classes: Sequence[str] | None) -> float:
    """The best score of an answer against any of the reference answers, 0 to 1.

    Raises ValueError where a reference answer or the classes are not what the metric needs.
    """
    if of.first_line:
        pred = _first_line(pred)
    metric = METRICS[of.metric]
    return max((metric(pred, answer, all_classes or ()) for answer in answers), default=0.0)


def qa_f1(pred: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, as multisets, in lower case and without punctuation and articles."""
    return _f1(_english_words(pred), _english_words(answer))


def qa_f1_zh(pred: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words that jieba finds, as multisets, in lower case and without punctuation."""
    return _f1(_chinese_words(pred), _chinese_words(answer))


def summary_f1(pred: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L."""
    return rouge_l(pred, reference=answer)


def summary_f1_zh(pred: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of the words that jieba finds."""
    return rouge_l(" ".join(_cut(pred)), reference=" ".join(_cut(answer)))


def classification(pred: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them.

    Names that are part of the right one's do not count. As in the benchmark, the one after such a name is passed over.
    """
    if not classes:
        raise ValueError("all_classes is empty, and the metric needs the names of the classes")
    named = [name for name in classes if name in pred]
    for name in named:  # removing while iterating is what passes over the next: published scores have it so
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def retrieval(pred: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the paragraph's."""
    paragraph = PARAGRAPH.search(answer)
    if paragraph is None:
        raise ValueError(f"the reference answer {answer!r} names no paragraph, as in 'Paragraph 7'")
    return count(pred, paragraph[1])


def count(pred: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the right one; 0 without a number."""
    numbers = NUMBER.findall(pred)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_similarity(pred: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that is code to the right one, in whole per cent (Ratcliff-Obershelp).

    The published scores come from this ratio; one from the edit distance is two points higher.
    """
    lines = pred.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in NOT_CODE)), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": summary_f1,
    "rouge_l_zh": summary_f1_zh,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    """Lower case first, then punctuation, then articles: the order matters to "A.B." and "the-end"."""
    return ARTICLE.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(WITHOUT_CHINESE).split()) for word in _cut(text))
    return [word for word in words if word]


def _cut(text: str) -> list[str]:
    return list(_jieba().cut(text, cut_all=False))


@cache
def _jieba() -> Any:
    """jieba with its dictionary, which takes a second to load. Raises EvaluationError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its regular expressions, written for an older Python
            import jieba
    except ImportError as error:
        raise EvaluationError(
            "Chinese sets are scored by words, and the package `jieba` that finds them is not installed: "
            "pip install 'longalign_ray[eval]'"
        ) from error
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    return jieba
