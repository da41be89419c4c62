from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longalign_ray.evaluate import longbench_metrics as metrics
from longalign_ray.evaluate.longbench_metrics import METRICS, score_row
from longalign_ray.evaluate.longbench_sets import LANGUAGES, LONGBENCH_SETS, bucket_of
from longalign_ray.evaluate.rouge_l import rouge_l

SENTENCES = st.text(alphabet="ab c.\n", max_size=40)


@pytest.mark.parametrize(
    ("pred", "answer", "expected"),
    [
        ("the cat sat", "cat sat down", 0.8),  # precision 2/2, recall 2/3
        ("The CAT, sat!", "cat sat down", 0.8),
        ("cat cat", "cat", 2 / 3),  # a word counts as often as it stands there: precision 1/2, recall 1
        ("an a the", "the", 0.0),  # articles alone are nothing
        ("The-end", "theend", 1.0),  # punctuation goes before articles do, so this "the" is none
        ("", "cat", 0.0),
        ("cat", "", 0.0),
    ],
)
def test_f1(pred: str, answer: str, expected: float) -> None:
    assert metrics.qa_f1(pred, answer) == pytest.approx(expected)


def test_chinese_f1_and_rouge_count_the_words_of_jieba() -> None:
    pytest.importorskip("jieba", reason="the package jieba is not installed")
    # 我 / 来到 / 北京 / 清华大学 against 我 / 来到 / 北京: precision 3/4, recall 1; full stops are no words.
    assert metrics.qa_f1_zh("我来到北京清华大学。", "我来到北京") == pytest.approx(6 / 7)
    assert metrics.qa_f1_zh("北 京，Ｂ", "北京") == pytest.approx(0)  # cut before white space goes: 北 / 京
    # Here the full stop 。 is a word: precision 3/5, recall 3/3.
    assert metrics.summary_f1_zh("我来到北京清华大学。", "我来到北京") == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("pred", "answer", "expected"),
    [
        ("the cat sat", "the cat sat down", 6 / 7),  # precision 1, recall 3/4
        ("a b x. a c y e.", "a b c d e.", 8 / 11),  # {a, b} and {a, c, e} united: recall 4/5, precision 4/6
        ("a a a", "a", 1.0),  # distinct words
        ("a. ", "a", 2 / 3),  # white space after the last stop is a sentence of one empty word
        ("b a. a", "a b", 1.0),  # {b}, of two of one length, and {a}; the other way would give {a} and {a}: 1/2
        ("c d", "a b", 0.0),
        ("...", "a", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l(pred: str, answer: str, expected: float) -> None:
    assert rouge_l(pred, reference=answer) == pytest.approx(expected, abs=1e-7)


@given(SENTENCES, SENTENCES)
def test_rouge_l_is_that_of_the_package(pred: str, answer: str) -> None:
    rouge = pytest.importorskip("rouge", reason="the package rouge is not installed")
    try:
        expected = rouge.Rouge(metrics=["rouge-l"]).get_scores([pred], [answer])[0]["rouge-l"]["f"]
    except ValueError:  # empty, which LongBench counts as 0
        expected = 0.0
    assert rouge_l(pred, reference=answer) == expected


def test_sentences_of_more_than_a_thousand_words_are_scored() -> None:
    words = [f"w{number}" for number in range(1_500)]
    kept = random.Random(0).sample(range(1_500), 750)
    assert rouge_l(" ".join(words), reference=" ".join(words[number] for number in sorted(kept))) == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(
    ("pred", "answer", "classes", "expected"),
    [
        ("A b", "A b", ["A b", "A"], 1.0),  # "A" is part of the right name
        ("It is B or C.", "B", ["A", "B", "C"], 0.5),
        ("It is C.", "B", ["A", "B", "C"], 0.0),
        ("none", "B", ["A", "B"], 0.0),
        # "x" and "y" are both part of "x y", and one is passed over as the other is removed.
        ("x y", "x y", ["x", "y", "x y"], 0.5),
    ],
)
def test_classification(pred: str, answer: str, classes: list[str], expected: float) -> None:
    assert metrics.classification(pred, answer, classes) == expected


@pytest.mark.parametrize(
    ("pred", "answer", "expected"),
    [
        ("Paragraph 3 or 4", "Paragraph 3", 0.5),
        ("paragraph 3, I say 3", "Paragraph 3", 1.0),
        ("段落13", "段落3", 0.0),
        ("none", "Paragraph 3", 0.0),
    ],
)
def test_retrieval(pred: str, answer: str, expected: float) -> None:
    assert metrics.retrieval(pred, answer) == expected


def test_count() -> None:
    assert metrics.count("there are 12", "12") == 1
    assert metrics.count("12 of 30, so 12", "12") == pytest.approx(2 / 3)
    assert metrics.count("twelve", "12") == 0


@pytest.mark.parametrize(
    ("pred", "answer", "expected"),
    [
        ("\n\nabcd\nrest", "bcde", 0.75),  # 2 * 3 / 8
        ("```python\n# why\nx = 1  // note\nabcd", "abcd", 1.0),
        ("# first\n\nabcd", "abcd", 0.0),  # the empty line is the first without a mark
        ("`a`", "abcd", 0.0),
        ("abc", "abcdef", 0.67),  # whole per cent: 2 * 3 / 9 = 0.667
        ("xaby", "abxy", 0.75),  # "ab" is the longest block and "y" follows it: 2 * 3 / 8
    ],
)
def test_code_similarity(pred: str, answer: str, expected: float) -> None:
    assert metrics.code_similarity(pred, answer) == expected


def test_the_best_answer_counts_and_of_few_shot_sets_the_first_line() -> None:
    def score(name: str, pred: str) -> float:
        return score_row(LONGBENCH_SETS[name], pred, answers=["blue sky", "red"], all_classes=["red", "green"])

    assert score("hotpotqa", "red") == 1
    assert score("hotpotqa", "\nred\nQuestion: why?") == pytest.approx(0.5)
    assert score("triviaqa", "\nred\nQuestion: why?") == 1
    assert score("samsum", "\n\nred\nQuestion: why?") == pytest.approx(1)
    assert score("trec", "green\nred") == 0
    assert score_row(LONGBENCH_SETS["trec"], "red", answers=[], all_classes=["red"]) == 0


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_an_answer_is_as_good_as_itself(metric: str) -> None:
    if metric.endswith("_zh"):
        pytest.importorskip("jieba", reason="the package jieba is not installed")
    answer = {"retrieval": "Paragraph 17", "count": "17"}.get(metric, "eighteen 红色 sparrows")
    pred = "17" if metric == "retrieval" else answer
    assert METRICS[metric](pred, answer, [answer, "red"]) == pytest.approx(1)


@pytest.mark.parametrize(("metric", "missing"), [("classification", "all_classes"), ("retrieval", "paragraph")])
def test_what_a_metric_needs_is_named(metric: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        METRICS[metric]("17", "seventeen", [])


def test_the_table_of_sets() -> None:
    sets = LONGBENCH_SETS.values()
    assert (len(sets), sum(of.num_rows for of in sets), sum(of.in_e for of in sets)) == (21, 4_750, 13)
    assert {of.metric for of in sets} == set(METRICS)
    assert [of.name for of in sets if not of.chat] == ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]
    assert [of.name for of in sets if of.first_line] == ["trec", "triviaqa", "samsum", "lsht"]
    assert [sum(language in of.averaged_in for of in sets) for language in LANGUAGES] == [16, 7]
    assert [bucket_of(length) for length in (0, 3_999, 4_000, 7_999, 8_000)] == ["0-4k"] * 2 + ["4-8k"] * 2 + ["8k+"]
