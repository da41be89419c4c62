"""RULER's questions (arXiv 2404.06654, section 3.4): a question of SQuAD or HotpotQA, its documents among others."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmark_rows import read_prompt
from longalign_ray.evaluate.ruler.samples import Sample, Sampler
from longalign_ray.evaluate.ruler.words import RulerWords

SQUAD_REMEDY = "give the path of dev-v2.0.json as SQuAD 2.0 publishes it"
HOTPOTQA_REMEDY = "give the path of hotpot_dev_distractor_v1.json as HotpotQA publishes it"


@dataclass(frozen=True, slots=True)
class Question:
    """`needed` and `near` are documents by their number: those that have the answer, and others of their article."""

    text: str
    answers: Sequence[str]
    needed: Sequence[int]
    near: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class QuestionSet:
    documents: Sequence[str]
    questions: Sequence[Question]


def read_squad(path: str) -> QuestionSet:
    """The answerable questions in their order, and every paragraph once."""
    try:
        articles = [article["paragraphs"] for article in _json(path, "evaluate.ruler.squad", SQUAD_REMEDY)["data"]]
        documents = sorted({paragraph["context"] for article in articles for paragraph in article})
        number = {document: place for place, document in enumerate(documents)}
        questions = []
        for article in articles:
            of_article = [number[paragraph["context"]] for paragraph in article]
            for paragraph, own in zip(article, of_article, strict=True):
                near = tuple(dict.fromkeys(other for other in of_article if other != own))
                questions += [
                    Question(asked["question"], [answer["text"] for answer in asked["answers"]], (own,), near)
                    for asked in paragraph["qas"]
                    if asked["answers"] and not asked.get("is_impossible", False)
                ]
    except (KeyError, TypeError, AttributeError) as error:
        raise _wrong_form(path, "evaluate.ruler.squad", error, SQUAD_REMEDY) from error
    return QuestionSet(documents, questions)


def read_hotpotqa(path: str) -> QuestionSet:
    """The questions in their order, each with the ten documents that it comes with, and every document once."""
    try:
        rows = _json(path, "evaluate.ruler.hotpotqa", HOTPOTQA_REMEDY)
        of_row = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in rows]
        documents = sorted({document for own in of_row for document in own})
        number = {document: place for place, document in enumerate(documents)}
        questions = [
            Question(row["question"], [row["answer"]], tuple(dict.fromkeys(number[document] for document in own)))
            for row, own in zip(rows, of_row, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong_form(path, "evaluate.ruler.hotpotqa", error, HOTPOTQA_REMEDY) from error
    return QuestionSet(documents, questions)


def question_sampler(of: QuestionSet, words: RulerWords) -> Sampler:
    """Sizes are documents beside those that have the answer: of its article first, then any others.

    Sample n is the set's question n, which must be there.
    """

    def make(size: int, number: int, rng: random.Random) -> Sample:
        question = of.questions[number]
        near = rng.sample(question.near, len(question.near))
        chosen = dict.fromkeys((*question.needed, *near[:size]))
        whole = min(len(question.needed) + size, len(of.documents))
        while len(chosen) < whole:
            chosen[rng.randrange(len(of.documents))] = None
        order = list(chosen)
        rng.shuffle(order)
        context = "\n\n".join(f"Document {place}:\n{of.documents[one]}" for place, one in enumerate(order, start=1))
        return Sample(words.templates["qa"], {"context": context, "query": question.text}, question.answers)

    return Sampler(make, least=0, most=len(of.documents))


def _json(path: str, setting: str, remedy: str) -> Any:
    try:
        return json.loads(read_prompt(Path(path), setting=setting, remedy=remedy))
    except ValueError as error:
        raise EvaluationError(f"{setting}: {path} is not JSON ({error}); {remedy}") from error


def _wrong_form(path: str, setting: str, error: Exception, remedy: str) -> EvaluationError:
    return EvaluationError(f"{setting}: {path} has not the form of the published file ({error!r}); {remedy}")
