from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import NeedleConfig
from longalign_ray.data.template import encode_prompt
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.haystack import default_haystack
from longalign_ray.evaluate.needle import DISTRACTORS, NEEDLE, TASK_TEXT, needle_cases, score_needle
from longalign_ray.evaluate.scoring import content_words, words
from longalign_ray.evaluate.task import Prediction, read_text
from tests.conftest import SHARED_DATA
from tests.unit.evaluate.tokenizers import KINDS, make_tokenizer

GRID = NeedleConfig(lengths=(700, 3_000), depths=(0, 10, 33.3, 50, 90, 100))
HAYSTACK = default_haystack(0, min_chars=60_000)
ROUND = re.compile(r"(?<=[.!?])\s+")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param in ("mistral", "qwen") and not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return make_tokenizer(request.param, scratch=tmp_path_factory.mktemp("tokenizer"), data=SHARED_DATA)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer("bytes", scratch=tmp_path_factory.mktemp("tokenizer"), data=SHARED_DATA)


def prompt_of(case: Any) -> str:
    return case.request["messages"][0]["content"]


def context_of(case: Any) -> tuple[str, str]:
    """The haystack before and after the needle."""
    body = prompt_of(case).removeprefix(TASK_TEXT)
    before, after = body.split(NEEDLE.fact)
    return before, after[: after.rindex(NEEDLE.question)]


def test_prompts_fill_their_length_and_no_more(tokenizer: Any):
    cases = needle_cases(GRID, haystack=HAYSTACK, tokenizer=tokenizer, seed=0)
    assert [(case.attributes["length"], case.attributes["depth"]) for case in cases] == [
        (length, depth) for length in GRID.lengths for depth in GRID.depths
    ]
    for case in cases:
        real = len(encode_prompt(tokenizer, case.request["messages"]))
        assert case.num_tokens == real
        assert case.attributes["length"] - 8 <= real <= case.attributes["length"]


def test_the_needle_stands_at_the_sentence_end_before_its_depth(tokenizer: Any):
    for case in needle_cases(GRID, haystack=HAYSTACK, tokenizer=tokenizer, seed=0):
        before, after = context_of(case)
        encode = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
        total = encode(before.strip()) + encode(after.strip())
        nominal = total * case.attributes["depth"] / 100
        place = encode(before.strip())
        slack = 4  # tokens that merge otherwise at the seam
        assert place <= nominal + slack
        if case.attributes["depth"] < 100:
            next_sentence = ROUND.split(after.strip())[0]
            assert place + encode(next_sentence) > nominal - slack, "a later sentence end was nearer"
            assert before.strip() == "" or before.rstrip()[-1] in ".!?", "inside a sentence"
        else:
            assert after.strip() == ""


def test_depths_differ_and_cells_of_one_length_share_their_prefix(tokenizer: Any):
    cases = needle_cases(GRID, haystack=HAYSTACK, tokenizer=tokenizer, seed=0)[len(GRID.depths) :]
    befores = [context_of(case)[0].strip() for case in cases]
    assert len(set(befores)) == len(befores)
    for shallow, deep in pairwise(befores):
        assert deep.startswith(shallow), "the haystack was changed before the needle"
    # The text is one and the same, so all of it is cut at one place.
    haystacks = {" ".join("".join(context_of(case)).split()) for case in cases}
    assert len(haystacks) == 1
    assert " ".join(HAYSTACK.split()).startswith(haystacks.pop())


def test_chinese_sentences_end_at_their_own_marks(byte_tokenizer: Any):
    haystack = "从前有一条河流。它很长，也很深！谁见过它？" * 200
    config = NeedleConfig(lengths=(2_000,), depths=(40,))
    before, _ = context_of(needle_cases(config, haystack=haystack, tokenizer=byte_tokenizer, seed=0)[0])
    assert before.strip()[-1] in "。！？"


def test_a_length_without_room_is_refused_with_the_minimum(byte_tokenizer: Any):
    with pytest.raises(EvaluationError, match=r"evaluate\.needle\.lengths holds 64, 100, .* at least (\d+)") as caught:
        needle_cases(NeedleConfig(lengths=(64, 100, 4_096)), haystack=HAYSTACK, tokenizer=byte_tokenizer, seed=0)
    minimum = int(str(caught.value).rsplit(" ", 1)[1])
    needle_cases(NeedleConfig(lengths=(minimum,)), haystack=HAYSTACK, tokenizer=byte_tokenizer, seed=0)
    with pytest.raises(EvaluationError):
        needle_cases(NeedleConfig(lengths=(minimum - 1,)), haystack=HAYSTACK, tokenizer=byte_tokenizer, seed=0)


def test_a_short_haystack_is_refused(byte_tokenizer: Any):
    with pytest.raises(EvaluationError, match=r"the haystack has 500 tokens .* asks for 2000"):
        needle_cases(NeedleConfig(lengths=(2_000,)), haystack="x" * 500, tokenizer=byte_tokenizer, seed=0)


def test_the_haystack_is_reproducible_prose_without_repeats_or_the_answer():
    text = default_haystack(3, min_chars=600_000)
    assert len(text) >= 600_000
    assert text.startswith(default_haystack(3, min_chars=10_000))
    assert text != default_haystack(4, min_chars=600_000)
    sentences = ROUND.split(text)
    assert len(sentences) == len(set(sentences)) > 5_000
    assert not set(words(text)) & set(content_words(NEEDLE.answer))
    assert "{" not in text
    assert all(sentence[0].isupper() for sentence in sentences)


def test_scores_by_hand(byte_tokenizer: Any):
    config = NeedleConfig(lengths=(500, 600), depths=(0, 100))
    cases = needle_cases(config, haystack=HAYSTACK, tokenizer=byte_tokenizer, seed=0)
    # Content words: eat, warm, apricot, pie, striped, lighthouse, dusk.
    texts = {
        "needle-500-0": "To Eat a WARM apricot pie, beside the striped lighthouse at dusk!",  # 7 of 7, word by word
        "needle-500-100": "Eat pie at the lighthouse.",  # 3 of 7
        "needle-600-0": "The best thing to do in Marlow Bay is fishing.",  # the question's words do not count
    }
    predictions = {name: Prediction(name, text, "stop") for name, text in texts.items()}
    score, details = score_needle(cases, predictions)
    assert details["grid"] == [[1.0, 0.0], [pytest.approx(3 / 7), None]]
    assert details["lengths"] == [500, 600]
    assert details["depths"] == [0, 100]
    assert score.value == pytest.approx((1 + 3 / 7) / 3)
    assert details["exact"] == pytest.approx(1 / 3)
    assert score.num_cases == 3
    assert score.by_group == {"500": pytest.approx((1 + 3 / 7) / 2), "600": 0.0}


def test_an_answer_without_text_is_read_as_an_empty_one(byte_tokenizer: Any, tmp_path: Path):
    case = needle_cases(NeedleConfig(lengths=(500,), depths=(0,)), haystack=HAYSTACK, tokenizer=byte_tokenizer, seed=0)[
        0
    ]
    answer = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    assert read_text(case, answer) == Prediction("needle-500-0", "", "length")
    with pytest.raises((KeyError, IndexError, TypeError)):
        read_text(case, {"choices": []})


@pytest.mark.parametrize("number", [1, 4, 8])
def test_distractors_stand_in_the_text_once_and_in_the_same_places(byte_tokenizer: Any, number: int) -> None:
    config = NeedleConfig(lengths=(6_000,), depths=(10, 50, 90), distractors=number)
    cases = needle_cases(config, haystack=HAYSTACK, tokenizer=byte_tokenizer, seed=0)
    texts = [case.request["messages"][0]["content"] for case in cases]
    for text in texts:
        found = [text.count(distractor) for distractor in DISTRACTORS]
        assert found == [1] * number + [0] * (8 - number)
        assert text.count(NEEDLE.fact) == 1
    bare = [text.replace(f"{NEEDLE.fact}\n", "").split() for text in texts]
    places = {tuple(words.index(d.split()[7]) for d in DISTRACTORS[:number]) for words in bare}
    assert len(places) == 1
    spread = [texts[0].index(distractor) / len(texts[0]) for distractor in DISTRACTORS[:number]]
    assert spread == sorted(spread)
    assert number == 1 or spread[-1] - spread[0] > 0.3


def test_no_distractor_has_a_word_of_the_answer() -> None:
    words = content_words(NEEDLE.answer)
    assert words
    for distractor in DISTRACTORS:
        assert not set(words) & set(content_words(distractor))
