"""Needle in a haystack (LongAlign, arXiv 2401.18058, App. C.3): one fact at a given depth of a long text, asked for.

One cell of the grid, prompt tokens from left to right:

    | template, task | haystack to the depth | needle | haystack, cut at its end | question, template |
    |<------------------------------------- at most `length` ----------------------------------->|

The haystack is cut at its end alone, so that the cells of a length share their prefix up to the needle. The deepest is
asked first: it leaves the prefix of all others in the engine's cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longalign_ray.config import NeedleConfig
from longalign_ray.data.template import Tokenizer, encode_prompt
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.haystack import SENTENCE_END
from longalign_ray.evaluate.scoring import contains_phrase, content_recall
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskScore, mean_score

TASK = "needle"
TASK_TEXT = "Read the text below and answer the question after it in a few words.\n\n"
# Shorter haystacks hold no sentence, and depth would mean nothing.
MIN_HAYSTACK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Needle:
    """The fact to hide, the question that it answers, and the words that an answer must have."""

    fact: str
    question: str
    answer: str


NEEDLE = Needle(
    fact="The best thing to do in Marlow Bay is to eat a warm apricot pie beside the striped lighthouse at dusk.",
    question="What is the best thing to do in Marlow Bay? Begin with the sentence of the text that says it.",
    answer="eat a warm apricot pie beside the striped lighthouse at dusk",
)
# Facts of the same form about other places, with no content word of the needle's answer.
DISTRACTORS = (
    "The best thing to do in Corran Sound is to race paper boats under the stone arch before breakfast.",
    "The best thing to do in Tilsbury is to hear the brass band rehearse in the glass pavilion on Fridays.",
    "The best thing to do in Port Ansel is to feed the grey geese along the harbour wall in the rain.",
    "The best thing to do in Wexcombe is to climb the clock tower with a lantern after midnight.",
    "The best thing to do in Hollin Sands is to dig for blue shells between the wrecks at low tide.",
    "The best thing to do in Marsh End is to ride the narrow railway through the poplars in October.",
    "The best thing to do in Orrin Bay is to swim out to the raft while the bells are ringing.",
    "The best thing to do in Saint Odile is to copy the old frescoes in charcoal during the market.",
)


def needle_cases(
    config: NeedleConfig, *, haystack: str, tokenizer: Tokenizer, seed: int, needle: Needle = NEEDLE
) -> list[EvalCase]:
    """A case for every length x depth of the grid, lengths outermost.

    Lengths count the tokens of the whole prompt, chat template included; depths are per cent of the haystack's tokens,
    moved back to the end of the sentence before. `config.distractors` facts of the same form about other places are
    spread evenly over the haystack, in the same places for all cells of a length. Raises EvaluationError where a
    length leaves no room for a haystack, or the haystack is too short for it.
    """
    distractors = DISTRACTORS[: config.distractors]
    minimum = _prompt_length(tokenizer, _prompt(" ".join(distractors), 0, needle)) + MIN_HAYSTACK_TOKENS
    too_short = [length for length in config.lengths if length < minimum]
    if too_short:
        raise EvaluationError(
            f"evaluate.needle.lengths holds {', '.join(map(str, too_short))}, and needle, question and chat template "
            f"need {minimum} tokens with this tokenizer: set lengths of at least {minimum}"
        )
    cases = []
    for length in config.lengths:
        text = _woven(haystack, distractors, token_ends=_token_ends(tokenizer, haystack, length))
        for depth, (prompt, num_tokens) in zip(
            config.depths, _prompts(length, config.depths, text, tokenizer, needle), strict=True
        ):
            request = {
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": config.max_new_tokens,
                "temperature": 0.0,
                "seed": seed,
            }
            cases.append(
                EvalCase(
                    case_id=f"needle-{length}-{depth:g}",
                    task=TASK,
                    path="/chat/completions",
                    request=request,
                    reference=needle.answer,
                    document=f"haystack-{length}",
                    num_tokens=num_tokens,
                    attributes={"length": length, "depth": depth},
                    shared_tokens=int(num_tokens * depth / 100),
                )
            )
    return cases


def score_needle(cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]) -> tuple[TaskScore, dict[str, Any]]:
    """The mean over the answered cells, and the grid: rows are depths, columns lengths, None where no answer came.

    A cell's accuracy is the share of the answer's content words that the model gave; `exact` counts the cells that
    quote the answer word by word. At least one cell must be answered.
    """
    answered = [case for case in cases if case.case_id in predictions]
    recall = {
        case.case_id: content_recall(predictions[case.case_id].text, reference=case.reference) for case in answered
    }
    exact = [contains_phrase(predictions[case.case_id].text, phrase=case.reference) for case in answered]
    by_length = [f"{case.attributes['length']:g}" for case in answered]
    lengths = list(dict.fromkeys(case.attributes["length"] for case in cases))
    depths = list(dict.fromkeys(case.attributes["depth"] for case in cases))
    cell = {(case.attributes["depth"], case.attributes["length"]): recall.get(case.case_id) for case in cases}
    details = {
        "lengths": lengths,
        "depths": depths,
        "grid": [[cell[depth, length] for length in lengths] for depth in depths],
        "exact": sum(exact) / len(exact),
    }
    values = [recall[case.case_id] for case in answered]
    return mean_score(TASK, "needle_accuracy", values, by_length, cases=answered), details


def _prompts(
    length: int, depths: Sequence[float], haystack: str, tokenizer: Tokenizer, needle: Needle
) -> list[tuple[str, int]]:
    """Prompt and its number of tokens for each depth; one cut of the haystack for all, the longest that fits."""
    token_ends = _token_ends(tokenizer, haystack, length)
    sentence_ends = [match.end() for match in SENTENCE_END.finditer(haystack[: token_ends[-1]])]
    room = length - _prompt_length(tokenizer, _prompt("", 0, needle))
    while True:
        text = haystack[: token_ends[room - 1]]
        prompts = [_prompt(text, _place(depth, room, token_ends, sentence_ends), needle) for depth in depths]
        num_tokens = [_prompt_length(tokenizer, prompt) for prompt in prompts]
        # Tokens merge otherwise at the seams than in the parts, so the sum of the parts may be off by a few.
        if max(num_tokens) <= length:
            return list(zip(prompts, num_tokens, strict=True))
        room -= max(num_tokens) - length


def _woven(haystack: str, distractors: Sequence[str], *, token_ends: Sequence[int]) -> str:
    """The haystack with the distractors at ends of sentences, spread evenly over the text of the given tokens."""
    sentence_ends = [match.end() for match in SENTENCE_END.finditer(haystack[: token_ends[-1]])]
    pieces, last = [], 0
    for number, distractor in enumerate(distractors):
        # Distractors make the text longer, and the rest is cut off: the middle of each share of 0.8 still lies inside.
        depth = 80 * (number + 0.5) / len(distractors)
        place = _place(depth, len(token_ends), token_ends, sentence_ends)
        pieces += [haystack[last:place], f"\n{distractor}\n"]
        last = place
    return "".join([*pieces, haystack[last:].lstrip() if pieces else haystack])


def _token_ends(tokenizer: Tokenizer, haystack: str, num_tokens: int) -> list[int]:
    """Character at which each of the haystack's first `num_tokens` tokens ends; reads no more text than it must."""
    num_chars = 8 * num_tokens
    while True:
        encoded = tokenizer(
            haystack[:num_chars], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )  # `verbose` off: the haystack is longer than some models' limit, and that is meant
        ends = [end for _, end in encoded["offset_mapping"][:num_tokens]]
        if len(ends) == num_tokens:
            return ends
        if num_chars >= len(haystack):
            raise EvaluationError(
                f"the haystack has {len(ends)} tokens and evaluate.needle.lengths asks for {num_tokens}: "
                f"lower the lengths or give a longer haystack"
            )
        num_chars *= 2


def _place(depth: float, room: int, token_ends: Sequence[int], sentence_ends: Sequence[int]) -> int:
    """Character at which the needle goes in: token int(room * depth / 100), moved back to the end of a sentence."""
    if depth >= 100:
        return token_ends[room - 1]
    token = int(room * depth / 100)
    nominal = token_ends[token - 1] if token else 0
    before = bisect_right(sentence_ends, nominal)
    return sentence_ends[before - 1] if before else 0


def _prompt(haystack: str, place: int, needle: Needle) -> str:
    context = f"{haystack[:place]}\n{needle.fact}\n{haystack[place:].lstrip()}"
    return f"{TASK_TEXT}{context.strip()}\n\n{needle.question}"


def _prompt_length(tokenizer: Tokenizer, prompt: str) -> int:
    return len(encode_prompt(tokenizer, [{"role": "user", "content": prompt}]))
