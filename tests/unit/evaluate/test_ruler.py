"""RULER: prompts fill their length to the unit, and a reader that knows the tasks finds every answer in the text."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import RulerConfig
from longalign_ray.data.template import encode_prompt
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.haystack import default_haystack
from longalign_ray.evaluate.ruler.longest_fit import longest_fit
from longalign_ray.evaluate.ruler.needles import Essay
from longalign_ray.evaluate.ruler.prompts import longest_prompt
from longalign_ray.evaluate.ruler.questions import question_sampler, read_squad
from longalign_ray.evaluate.ruler.tasks import RULER_TASKS, RulerParts, ruler_cases, score_ruler
from longalign_ray.evaluate.ruler.word_lists import compound_words, plain_words
from longalign_ray.evaluate.ruler.words import OWN_WORDS, read_words
from longalign_ray.evaluate.scoring import string_match_all, string_match_part
from longalign_ray.evaluate.task import EvalCase, Prediction
from tests.conftest import SHARED_DATA
from tests.unit.evaluate.tokenizers import KINDS, make_tokenizer

HAYSTACK = default_haystack(0, min_chars=60_000)
SYNTHETIC = tuple(name for name in RULER_TASKS if not name.startswith("qa"))
LENGTHS = {"bytes": 12_000, "unigram": 8_000, "mistral": 4_096, "qwen": 4_096}
NEEDLE = re.compile(r"One of the secret (?:number|uuid)s of (\S+) is: (\S+)\.")
MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


@pytest.fixture(scope="module", params=KINDS)
def kind_and_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    if request.param in ("mistral", "qwen") and not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    scratch = tmp_path_factory.mktemp("tokenizer")
    return request.param, make_tokenizer(request.param, scratch=scratch, data=SHARED_DATA)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer("bytes", scratch=tmp_path_factory.mktemp("tokenizer"), data=SHARED_DATA)


def cases_of(tokenizer: Any, *, seed: int = 0, haystack: str = HAYSTACK, **settings: Any) -> list[EvalCase]:
    return ruler_cases(RulerConfig(**settings), haystack=haystack, tokenizer=tokenizer, seed=seed)


def test_longest_fit_against_trying_every_size():
    rng = random.Random(0)
    for _ in range(300):
        steps = [rng.choice((0, 1, 1, 5, 40)) for _ in range(rng.randint(1, 60))]
        counts = [sum(steps[: n + 1]) for n in range(len(steps))]
        least = rng.randrange(len(counts))
        limit = rng.randrange(max(counts) + 20)
        fitting = [size for size in range(least, len(counts)) if counts[size] <= limit]
        found = longest_fit(
            counts.__getitem__, limit=limit, least=least, most=len(counts) - 1, guess=rng.randrange(len(counts))
        )
        assert found == max(fitting, default=None), (counts, least, limit)


def test_longest_fit_looks_seldom_and_never_stalls():
    for count, most in ((lambda n: 37 + 26 * n, 10**8), (lambda n: n * n, 10**8), (lambda n: int(n**0.5), 10**6)):
        asked: list[int] = []

        def counted(size: int, count: Any = count, asked: list[int] = asked) -> int:
            asked.append(size)
            return count(size)

        size = longest_fit(counted, limit=1_000 if most == 10**6 else 130_000, least=1, most=most, guess=33)
        assert size is not None
        assert count(size + 1) > (1_000 if most == 10**6 else 130_000) or size == most
        assert len(asked) == len(set(asked)) <= (5 if count(1) == 63 else 40)


def test_no_plain_word_stands_in_another():
    text = " ".join(plain_words())
    assert all(text.count(word) == 1 for word in plain_words())
    assert len(plain_words()) > 300


def test_compounds_are_many_and_none_stands_in_another():
    words = set(compound_words())
    assert len(words) == len(compound_words()) > 15_000
    shortest = min(map(len, words))
    for word in words:
        starts = range(len(word) - shortest + 1)
        inner = {word[start:end] for start in starts for end in range(start + shortest, len(word) + 1)} - {word}
        assert not inner & words, word


def test_prompts_fill_their_length_and_one_unit_more_would_not_fit(kind_and_tokenizer: tuple[str, Any]):
    kind, tokenizer = kind_and_tokenizer
    length = LENGTHS[kind]
    for case in cases_of(tokenizer, lengths=(length,), tasks=SYNTHETIC, samples=1):
        name = case.reference["task"]
        real = len(tokenizer(case.request["prompt"])["input_ids"])
        most = length - MAX_NEW_TOKENS[name.split("_")[0]]
        assert case.request["max_tokens"] == length - most
        assert case.num_tokens == real <= most, name
        assert most - real < 5 * len(tokenizer(OWN_WORDS.noise)["input_ids"]), name
        assert 0 <= case.shared_tokens < real
        assert case.document == (f"{name}-{length}" if case.shared_tokens else case.case_id)
    parts = RulerParts(OWN_WORDS, Essay(HAYSTACK), {})
    for name in SYNTHETIC:
        sampler = RULER_TASKS[name].sampler(parts, length)
        fit = {"number": 0, "seed": "0", "guess": 50, "tokenizer": tokenizer, "prefix_of": "assistant"}
        made = longest_prompt(sampler, limit=length - 128, **fit)
        assert made is not None
        question, prefix = sampler.make(made.size + 1, 0, random.Random("0")).texts()
        one_more = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{prefix}"
        assert len(tokenizer(one_more)["input_ids"]) > length - 128, name


def read_answers(name: str, prompt: str) -> list[str]:
    """The answers as a patient reader finds them in the prompt."""
    if name.startswith("niah"):
        found: dict[str, list[str]] = {}
        for key, value in NEEDLE.findall(prompt):
            found.setdefault(key, []).append(value)
        asked = re.findall(r"(?<=of )(\S+(?:, \S+)*(?:, and \S+)?) noted in the text\?", prompt)[-1]
        return [value for key in re.split(r", (?:and )?", asked) for value in found[key]]
    question = prompt.rsplit("<|im_end|>", 1)[0]
    if name == "vt":
        value, text = question.rsplit("hold the value ", 1)[1][:5], question.rsplit("Follow the assignments", 1)[1]
        holders = re.findall(rf"VAR ([A-Z]+) = {value}\b", text)
        for _ in range(5):
            holders += [name for name, of in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)", text) if of in holders]
        return list(dict.fromkeys(holders))
    if name == "cwe":
        times = Counter(re.findall(r"\d+\. ([a-z]+)", question.rsplit("In the numbered list", 1)[1]))
        return [word for word, _ in times.most_common(10)]
    times = Counter(re.findall(r"[a-z]{6}|\.\.\.", question.split("stands there. ")[1].split("\nQuestion")[0]))
    assert times.most_common(1)[0][0] == "..."
    return [word for word, _ in times.most_common(4)[1:]]


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("length", [4_000, 14_000])
def test_a_patient_reader_finds_every_answer(byte_tokenizer: Any, name: str, length: int):
    cases = cases_of(byte_tokenizer, lengths=(length,), tasks=(name,), samples=2)
    for case in cases:
        read = read_answers(name, case.request["prompt"])
        wanted = case.reference["answers"]
        assert sorted(read) == sorted(wanted)
        number = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(name, 1)
        assert len(set(wanted)) == number
    score, _ = score_ruler(
        cases, {case.case_id: Prediction(case.case_id, " ".join(case.reference["answers"]), "stop") for case in cases}
    )
    assert score.value == 1.0
    assert len({case.request["prompt"] for case in cases}) == 2


def test_the_tasks_are_the_benchmarks(byte_tokenizer: Any):
    def one(name: str, length: int = 14_000) -> str:
        return cases_of(byte_tokenizer, lengths=(length,), tasks=(name,), samples=1)[0].request["prompt"]

    for name in ("niah_single_1", "vt"):
        assert one(name).count(OWN_WORDS.noise) > 100
    for name, needles in (("niah_single_2", 1), ("niah_multikey_1", 4), ("niah_multivalue", 4), ("niah_multiquery", 4)):
        text = one(name)
        assert len(NEEDLE.findall(text)) == needles
        essay = text.split(".\n", 1)[1].rsplit("\nWhat", 1)[0]
        bare = " ".join(NEEDLE.sub("", essay).split())
        assert " ".join(HAYSTACK.split()).startswith(bare), name
        for match in NEEDLE.finditer(essay):
            before = essay[: match.start()].rstrip()
            assert before == "" or before[-1] in ".!?"
    for name, pattern in (
        ("niah_multikey_2", r"[a-z]+-[a-z]+ \d{7}"),
        ("niah_multikey_3", r"[0-9a-f-]{36} [0-9a-f-]{36}"),
    ):
        pairs = NEEDLE.findall(one(name))
        assert len({key for key, _ in pairs}) == len(pairs) > 80
        assert all(re.fullmatch(pattern, " ".join(pair)) for pair in pairs)
    assert "A secret number is noted" in one("niah_single_1")
    assert one("niah_single_1").endswith("noted in the text is")
    assert "What is the secret uuid of" in one("niah_single_3")
    assert "Some secret numbers are noted" in one("niah_multivalue")
    assert one("niah_multiquery").endswith("noted in the text are")
    for length, often, seldom in ((14_000, 30, 3), (4_000, 6, 1)):
        listed = one("cwe", length).rsplit("In the numbered list", 1)[1]
        times = Counter(Counter(re.findall(r"\d+\. ([a-z]+)", listed)).values())
        assert times[often] == 10
        assert set(times) == {often, seldom}
    frequent = one("fwe").split("stands there. ")[1].split("\nQuestion")[0].split()
    counts = [number for _, number in Counter(frequent).most_common()]
    # Zeta with exponent 2: word k stands there 1 / k^2 times as often as the first, less what rounding down takes.
    for rank, count in enumerate(counts[:6], start=1):
        assert counts[0] / rank**2 - 1 < count < (counts[0] + 1) / rank**2


def test_needles_stand_at_their_depths():
    essay = Essay("One is.  Two are\nhere. Three? Four.")
    assert essay.sentence_starts == [0, 2, 5, 6, 7]

    class Fixed(random.Random):
        def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:  # pyright: ignore
            assert 0 in population
            assert 100 in population
            assert len(population) == 40
            return [51, 0][:k]

    assert essay.with_needles(7, ["X.", "Y."], Fixed()) == ("X. One is. Two are here. Y. Three? Four.", 0)
    # Of three and a half sentences the number is four; 51 per cent of it are two.
    assert essay.with_needles(6, ["X."], Fixed()) == ("One is. X. Two are here. Three?", 7)


def test_the_seed_makes_the_samples(byte_tokenizer: Any):
    def made(seed: int) -> list[EvalCase]:
        return cases_of(byte_tokenizer, seed=seed, lengths=(5_000,), tasks=("niah_single_2", "vt", "fwe"), samples=2)

    assert made(0) == made(0)
    assert not {case.request["prompt"] for case in made(0)} & {case.request["prompt"] for case in made(1)}


def test_the_prefix_is_the_assistants_or_the_users(byte_tokenizer: Any, tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    fit = {"lengths": (3_000,), "tasks": ("niah_single_1",), "samples": 1}
    (chat,) = cases_of(byte_tokenizer, **fit, answer_prefix="user")
    assert chat.path == "/chat/completions"
    assert chat.request["messages"][0]["content"].endswith("noted in the text? The secret number of "
        + chat.request["messages"][0]["content"].rsplit("number of ", 1)[1])  # fmt: skip
    assert chat.num_tokens == len(encode_prompt(byte_tokenizer, chat.request["messages"])) <= 3_000 - 128
    # A server puts BOS before a text by itself, so the template's own is not sent.
    with_bos = make_tokenizer("bytes", scratch=tmp_path, data=SHARED_DATA)
    bos = with_bos.convert_tokens_to_ids("<|endoftext|>")
    with_bos._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    with_bos.chat_template = "<|endoftext|>" + with_bos.chat_template
    (case,) = cases_of(with_bos, **fit)
    assert case.path == "/completions"
    assert case.request["prompt"].startswith("<|im_start|>user\nA secret")
    assert case.request["prompt"].rsplit("<|im_start|>assistant\n", 1)[1].startswith(" The secret number of ")
    ids = with_bos(case.request["prompt"])["input_ids"]
    assert (ids.count(bos), len(ids)) == (1, case.num_tokens)


def squad_file(tmp_path: Path) -> str:
    def paragraph(number: int, *asked: dict[str, Any]) -> dict[str, Any]:
        return {"context": f"Paragraph {number}. {'So it goes. ' * 20}", "qas": list(asked)}

    first = {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann Bo"}], "is_impossible": False}
    never = {"question": "Why?", "answers": [], "is_impossible": True}
    other = {"question": "Where?", "answers": [{"text": "Rome"}], "is_impossible": False}
    articles = [
        {"paragraphs": [paragraph(0, never, first), paragraph(1), paragraph(2)]},
        {"paragraphs": [paragraph(3, other), *(paragraph(number) for number in range(4, 40))]},
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    return str(tmp_path / "squad.json")


def test_questions_stand_among_documents(byte_tokenizer: Any, tmp_path: Path):
    cases = cases_of(byte_tokenizer, lengths=(2_000, 5_000), tasks=("qa_1",), samples=2, squad=squad_file(tmp_path))
    short, _, first, second = cases
    assert first.reference == {"task": "qa_1", "answers": ["Ann", "Ann Bo"]}
    assert second.reference["answers"] == ["Rome"]
    assert "Question: Who?<|im_end|>" in first.request["prompt"]
    seen = [[int(n) for n in re.findall(r"Paragraph (\d+)\.", case.request["prompt"])] for case in cases]
    assert {0, 1, 2} <= set(seen[2])
    assert 3 in seen[3]
    assert all(len(of) == len(set(of)) for of in seen)
    assert len(seen[0]) < len(seen[2])
    # Documents of the question's own article come before any others.
    few = question_sampler(read_squad(squad_file(tmp_path)), OWN_WORDS).make(2, 0, random.Random(0))
    assert sorted(re.findall(r"Paragraph (\d+)\.", few.values["context"])) == ["0", "1", "2"]
    assert re.findall(r"Document (\d+):", short.request["prompt"]) == [f"{n + 1}" for n in range(len(seen[0]))]

    rows = [
        {"question": "Both?", "answer": "yes", "context": [[f"T{row}{n}", ["a. ", "b."]] for n in range(3)]}
        for row in range(60)
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(rows))
    (case,) = cases_of(
        byte_tokenizer, lengths=(2_000,), tasks=("qa_2",), samples=1, hotpotqa=str(tmp_path / "hotpot.json")
    )
    assert all(f":\nT0{n}\na. b." in case.request["prompt"] for n in range(3))
    assert case.reference["answers"] == ["yes"]
    for text, message in (("{", "is not JSON"), ('{"data": [{}]}', "has not the form"), ("[]", "has not the form")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(EvaluationError, match=rf"evaluate\.ruler\.squad: .*bad.json {message}.*dev-v2.0.json"):
            cases_of(byte_tokenizer, lengths=(2_000,), tasks=("qa_1",), samples=1, squad=str(tmp_path / "bad.json"))
    with pytest.raises(EvaluationError, match=r"hotpotqa: .*gone.json cannot be read .*; give the path of hotpot_dev"):
        cases_of(byte_tokenizer, lengths=(2_000,), samples=1, hotpotqa=str(tmp_path / "gone.json"))
    with pytest.raises(EvaluationError, match=r"evaluate\.ruler\.squad has 2 questions, and .*samples asks for 3"):
        cases_of(byte_tokenizer, lengths=(2_000,), tasks=("qa_1",), samples=3, squad=squad_file(tmp_path))


def test_what_cannot_be_made_is_told(byte_tokenizer: Any, caplog: pytest.LogCaptureFixture):
    with pytest.raises(EvaluationError, match=r"evaluate\.ruler\.tasks names niah, and RULER has niah_single_1, "):
        cases_of(byte_tokenizer, tasks=("niah",))
    with pytest.raises(EvaluationError, match=r"names qa_2, and evaluate\.ruler\.hotpotqa is not set"):
        cases_of(byte_tokenizer, tasks=("vt", "qa_2"))
    with pytest.raises(EvaluationError, match=r"lengths holds 300 for niah_single_1, which is too short"):
        cases_of(byte_tokenizer, lengths=(300,), tasks=("niah_single_1",), samples=1)
    with pytest.raises(EvaluationError, match=r"holds 9000 for niah_single_2, and there is no more material than for"):
        cases_of(byte_tokenizer, lengths=(9_000,), tasks=("niah_single_2",), samples=1, haystack=HAYSTACK[:5_000])
    cases = cases_of(byte_tokenizer, lengths=(14_000,), samples=1)
    assert [case.reference["task"] for case in cases] == list(SYNTHETIC)
    assert "left out for want of evaluate.ruler.squad, evaluate.ruler.hotpotqa: qa_1, qa_2" in caplog.text


def test_the_benchmarks_own_wording_is_read_and_never_run(byte_tokenizer: Any, tmp_path: Path):
    kinds = list(OWN_WORDS.templates)
    tasks = {
        kind: {"tokens_to_generate": 1, "template": f"{kind}: {{context}} ? {{query}}", "answer_prefix": " So:"}
        for kind in kinds
    }
    tasks["niah"]["template"] = "Some {type_needle_v} are in {context}. What are all of {query}?"
    (tmp_path / "constants.py").write_text(f"raise SystemExit('run')\nTASKS = {tasks!r}\n")
    (tmp_path / "niah.py").write_text(
        "import nothing_like_it\nneedle = 'The {type_needle_v} of {key}: {value}.'\n"
        "if essay:\n    haystack = read()\nelif noise:\n    haystack = 'Hum. '\nelse:\n    haystack = needle\n"
    )
    words = read_words(str(tmp_path))
    assert (words.needle, words.noise) == ("The {type_needle_v} of {key}: {value}.", "Hum.")
    (case,) = cases_of(
        byte_tokenizer,
        lengths=(1_000,),
        tasks=("niah_single_1",),
        samples=1,
        prompts=str(tmp_path),
        answer_prefix="user",
    )
    text = case.request["messages"][0]["content"]
    assert re.fullmatch(
        r"A number is in (Hum\.\n)+The numbers of (\S+): \d{7}\.\n(Hum\.\n)*Hum\.\. What is of \2\? So:", text
    )

    (tmp_path / "constants.py").write_text("TASKS = {'niah': {}}")
    with pytest.raises(EvaluationError, match=r"evaluate\.ruler\.prompts: .* does not set TASKS, .*NVIDIA/RULER"):
        read_words(str(tmp_path))
    (tmp_path / "constants.py").write_text("TASKS = {")
    with pytest.raises(EvaluationError, match=r"constants\.py is not Python"):
        read_words(str(tmp_path))
    with pytest.raises(EvaluationError, match=r"evaluate\.ruler\.prompts: .*constants\.py cannot be read"):
        read_words(str(tmp_path / "nowhere"))


def test_string_matches_by_hand():
    assert string_match_all("The words are APPLE, pear.", ["apple", "Pear", "plum", "fig"]) == 0.5
    assert string_match_all("", ["apple"]) == 0.0
    assert string_match_part("It was Ann Bo.", ["Cy", "ann"]) == 1.0
    assert string_match_part("It was Bo.", ["Cy", "ann"]) == 0.0


def test_scores_and_the_effective_length_by_hand():
    answers: dict[tuple[str, int], list[list[str] | None]] = {
        # Right answers are a and b; of qa_1 one is enough. None: no answer came.
        ("vt", 4_096): [["a", "b"], ["a", "b"]],
        ("vt", 8_192): [["a"], ["a", "b"]],
        ("vt", 16_384): [["b", "a"], None],
        ("qa_1", 4_096): [["a"], ["b"]],
        ("qa_1", 8_192): [["a"], []],
        ("qa_1", 16_384): [None, ["b"]],
    }
    cases, predictions = [], {}
    for (task, length), given in answers.items():
        for number, words in enumerate(given):
            name = f"{task}-{length}-{number}"
            reference = {"task": task, "answers": ["a", "b"]}
            cases.append(EvalCase(name, "ruler", "/completions", {}, reference, name, 9, {"length": length}))
            if words is not None:
                predictions[name] = Prediction(name, f" {' '.join(words)}.", "stop")
    score, details = score_ruler(cases, predictions)
    assert details["grid"] == [[1.0, 0.75, 1.0], [1.0, 0.5, 1.0]]
    assert (details["tasks"], details["lengths"]) == (["vt", "qa_1"], [4_096, 8_192, 16_384])
    assert details["averages"] == [1.0, 0.625, 1.0]
    assert (details["effective_length"], details["num_tasks"]) == (16_384, 2)
    assert score.value == pytest.approx((1 + 0.75 + 1 + 1 + 0.5 + 1) / 6)
    assert score.num_cases == 10
    assert score.by_group == {
        "4,096 tokens": 1.0,
        "8,192 tokens": 0.625,
        "16,384 tokens": 1.0,
        "vt": pytest.approx(2.75 / 3),
        "qa_1": pytest.approx(2.5 / 3),
    }
    assert score.by_case["vt-8192"] == {"vt-8192-0": 0.5, "vt-8192-1": 1.0}
    # Nothing reaches the threshold: 0. At the threshold itself it is reached.
    _, details = score_ruler(cases[2:4], predictions)
    assert (details["averages"], details["effective_length"]) == ([0.75], 0)
    # No answer to a whole length, and none to a task at another.
    some = [*cases[0:2], *cases[4:6], *cases[6:8], *cases[10:12]]
    score, details = score_ruler(some, {"vt-16384-0": predictions["vt-16384-0"]})
    assert details["grid"] == [[None, 1.0], [None, None]]
    assert details["averages"] == [None, 1.0]
    assert (details["effective_length"], score.value, score.num_cases) == (16_384, 1.0, 1)
    assert score.by_group == {"16,384 tokens": 1.0, "vt": 1.0}
