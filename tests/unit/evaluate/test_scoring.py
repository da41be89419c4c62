from __future__ import annotations

import pytest

from longalign_ray.evaluate.scoring import contains_phrase, content_recall, content_words, words
from longalign_ray.evaluate.task import EvalCase, mean_score


def test_words_are_case_folded_and_free_of_punctuation():
    assert words("Straße, 42 «Bees»!") == ["strasse", "42", "bees"]
    assert content_words("The pie and the Pie of a mill") == ["pie", "mill"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red mill by the river", 1.0),
        ("RIVER. Mill? red...", 1.0),
        ("the mill", 1 / 3),
        ("windmills, rivers, reddish", 0.0),  # parts of other words do not count
        ("", 0.0),
    ],
)
def test_content_recall(text: str, expected: float):
    assert content_recall(text, reference="The red mill by the river") == pytest.approx(expected)


def test_recall_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no content words"):
        content_recall("x", reference="of the")


def test_contains_phrase():
    assert contains_phrase("It is: a RED mill, there.", phrase="red mill")
    assert not contains_phrase("a red old mill", phrase="red mill")
    assert not contains_phrase("a red millstone", phrase="red mill")


def test_mean_score():
    cases = [EvalCase(name, "t", "/x", {}, None, "d", 9) for name in "123"]
    score = mean_score("t", "m", [1.0, 0.0, 0.5], ["x", "y", "x"], cases=cases)
    assert score.by_case == {"all": {"1": 1.0, "2": 0.0, "3": 0.5}}
    assert (score.value, score.num_cases, score.by_group) == (0.5, 3, {"x": 0.75, "y": 0.0})
