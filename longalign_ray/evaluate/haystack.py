"""A generated English text of any length in which no sentence occurs twice: the chronicle of an invented valley."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

# A sentence ends with its mark and closing quotes; Latin marks count before white space alone ("3.5" is no end).
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)|[。！？][”’」』）]*")
SYLLABLES = """
Al|Bren|Cor|Dun|Elm|Far|Gar|Hol|Ives|Kel|Lor|Mar|Nor|Oak|Pen|Quen|Ros|Sel|Tor|Ul|Ver|Wes|Yar|Zel
bury|combe|dale|den|field|ford|ham|hurst|leigh|mere|mouth|ney|shaw|stead|stoke|ton|wick|worth
"""
NAMES = """
Ada|Amos|Beatrix|Clement|Dora|Edwin|Flora|Gideon|Hester|Ivo|Jemima|Konrad|Lavinia|Magnus|Nora|Osric|Petra|Quentin|Una
Ashdown|Birkett|Calloway|Dunmore|Ellery|Fenwick|Greaves|Hartnell|Ingram|Jessop|Kestle|Lockyer|Merriman|Nettleton|Tindale
"""
# A line a slot: its name, then what may fill it.
WORDS = """
trade|bell founder|bookbinder|bridge keeper|carpenter|clockmaker|cooper|ferryman|glazier|map maker|midwife|miller
trade|fiddler|potter|rope maker|saddler|schoolteacher|shepherd|stonemason|surveyor|weaver
building|almshouse|bell tower|boat yard|corn exchange|customs house|dairy|forge|granary|guild hall|infirmary|library
building|market hall|pump house|reading room|school|signal box|tannery|toll house|water mill|weigh house
material|grey slate|red brick|river stone|oak and clay|limestone|tarred timber|yellow sandstone|flint|chalk blocks
material|larch planks|blue granite|rammed earth
weather|a week of fog|a late frost|heavy rain from the west|a long drought|the spring floods|an early snow|hail
weather|a month of easterly wind|three nights of thunder|a mild and cloudy autumn|a dry and dusty summer|a hard winter
goods|barley|beeswax|candles|cider|copper wire|flax|glass jars|hemp rope|honey|iron nails|lamp oil|linen|oats|onions
goods|paper|pears|pickled herring|rye|salt|seed potatoes|timber|turnips|walnuts|wool
landmark|north bridge|stone ford|chalk quarry|alder wood|upper lock|common pasture|mill race|canal basin|gravel pit
landmark|drovers' road|reed bed|beacon hill|long meadow|old orchard wall|sheep wash|holly lane
colour|amber|black|blue|brown|crimson|cream|green|grey|rust-red|silver|violet|white|yellow
habit|counted the swallows under the eaves|wrote down the height of the river|mended nets for the neighbours
habit|taught children to read a compass|kept bees behind the yard|lent tools to anyone who asked
habit|played the fiddle at weddings|collected fossils from the quarry|copied letters for the parish
habit|walked the bounds of the parish|repaired clocks without charge|planted willows along the ditch
habit|carved spoons from pear wood|drew every barge that passed|sorted seed by lamplight|kept a diary of the wind
reason|because the road was too steep for carts|since the barges drew less water than before
reason|after the council had quarrelled over the cost|so that the upper farms could be reached in winter
reason|although nobody had asked for it|while the harvest was still in the fields
reason|before the railway surveyors came through|as the last of the elms were being felled
reason|once the debts of the parish were settled|until the new warden put a stop to it
reason|even though the foundations were damp|when the price of wool had fallen again
"""
SENTENCES = """
In {year} {person}, a {trade} from {other}, took over the {building} at {place}, {reason}.
The {building} of {place} was built of {material} in {year} and had {number} {colour} window frames.
{person} {habit} for {number} years, {reason}.
After {weather} the people of {place} carried {goods} across the {landmark} to {other}, {reason}.
Each spring {number} carts of {goods} left {place} by the {landmark}, and {person} kept the tally in a {colour} book.
From the {landmark} one could see the {colour} roof of the {building} and, farther off, the chimneys of {other}.
The {trade} {person} paid {number} shillings for a load of {goods}, which was thought too much in {place}.
It was said in {other} that {person} {habit}, but the records of {place} for {year} do not mention it.
When {weather} came in {year}, the {landmark} was closed and {goods} had to be brought from {other}.
A path of {material} led from the {building} to the {landmark}, {number} paces in all, {reason}.
{person} left {number} sacks of {goods} to the {building}, together with a {colour} coat and a letter from {other}.
The council of {place} met {number} times in {year} to talk about the {landmark}, {reason}.
Between {place} and {other} the river bends twice, and there {person} {habit}.
Of the {number} houses near the {landmark}, most were of {material}, and only one had a {colour} door.
A {trade} named {person} exchanged {goods} for {number} pounds of {other_goods} in the {building}, {reason}.
In the year {year} {weather} spoiled the {goods}, and the {trade} of {place} moved to {other}, {reason}.
"""


def default_haystack(seed: int, *, min_chars: int = 1_000_000) -> str:
    """Paragraphs of prose with at least `min_chars` characters; the same seed gives the same text.

    A longer text begins with the shorter one. Each paragraph tells of one place, and no two sentences are equal.
    """
    rng = random.Random(seed)
    slots = _slots(WORDS)
    seen: set[str] = set()
    paragraphs: list[str] = []
    num_chars = 0
    while num_chars < min_chars:
        paragraph = _paragraph(rng, slots, seen)
        paragraphs.append(paragraph)
        num_chars += len(paragraph) + 2
    return "\n\n".join(paragraphs)


def _paragraph(rng: random.Random, slots: dict[str, list[str]], seen: set[str]) -> str:
    """Five to eight sentences about one place, its neighbour, a building, a landmark and three people."""
    towns, names, templates = _rows(SYLLABLES), _rows(NAMES), SENTENCES.strip().split("\n")
    fixed = {
        "place": "".join(map(rng.choice, towns)),
        "other": "".join(map(rng.choice, towns)),
        "building": rng.choice(slots["building"]),
        "landmark": rng.choice(slots["landmark"]),
    }
    people = [" ".join(map(rng.choice, names)) for _ in range(3)]
    year = rng.randrange(1640, 1900)
    sentences = []
    for template in rng.sample(templates, rng.randint(5, 8)):
        year += rng.randint(0, 4)
        chosen = {name: rng.choice(fillings) for name, fillings in slots.items()} | fixed
        chosen["other_goods"] = rng.choice([goods for goods in slots["goods"] if goods != chosen["goods"]])
        sentence = template.format(person=rng.choice(people), year=year, number=rng.randint(3, 97), **chosen)
        if sentence not in seen:
            seen.add(sentence)
            sentences.append(sentence)
    return " ".join(sentences)


def _rows(text: str) -> list[Sequence[str]]:
    return [line.split("|") for line in text.strip().split("\n")]


def _slots(text: str) -> dict[str, list[str]]:
    slots: dict[str, list[str]] = {}
    for name, *fillings in _rows(text):
        slots.setdefault(name, []).extend(fillings)
    return slots
