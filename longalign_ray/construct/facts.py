"""Invented facts to hide in a document and to ask for: one sentence, its question and its answer, by family.

Nothing here is about the subject of the evaluation's needle, so that its wording stays unseen in training.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "Amina Diallo", "Bruno Keller", "Clara Lindqvist", "Dmitri Volkov", "Elena Marchetti", "Farid Haddad",
    "Greta Solberg", "Hana Novak", "Ivan Petrov", "Julia Santos", "Kenji Mori", "Leila Rahimi", "Marek Zielinski",
    "Nadia Osei", "Oscar Brandt", "Priya Nair", "Quentin Laurent", "Rosa Ibarra", "Samuel Okafor", "Tomas Virtanen",
    "Ulla Henriksen", "Viktor Szabo", "Wanda Kowalska", "Yusuf Demir", "Zoe Papadakis",
)  # fmt: skip
CITIES = (
    "Lisbon", "Tartu", "Bergen", "Ghent", "Kyoto", "Cusco", "Tbilisi", "Porto", "Bruges", "Hobart", "Windhoek", "Split",
    "Trieste", "Uppsala", "Valparaiso", "Dunedin", "Riga", "Galway", "Aarhus", "Fez", "Kandy", "Leuven", "Oulu", "Lviv",
)  # fmt: skip
ROOMS = (
    "archive room", "boat house", "map cabinet", "seed vault", "clock tower", "film store", "ice cellar", "rose garden",
    "signal box", "printing shop", "herbarium", "lamp depot",
)  # fmt: skip
GROUPS = (
    "chess club", "night shift", "harbour pilots", "choir", "beekeepers", "lighthouse crew", "drawing class", "rowers",
    "translators", "bell ringers", "board of trustees", "kite makers",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HABITS = (
    "repair old radios", "paint wooden ducks", "practise the cello", "bake rye bread", "sort antique stamps",
    "write letters to lighthouse keepers", "knit socks for the neighbours", "study maps of the Arctic",
    "fold paper cranes", "polish brass door handles", "translate sea shanties", "carve chess pieces out of walnut",
    "catalogue fossil shells", "restore broken clocks", "grow tomatoes on the balcony", "record the songs of owls",
    "solve crossword puzzles in Latin", "build model bridges out of matches", "dye wool with onion skins",
    "tune the village piano",
)  # fmt: skip
EXHIBITS = (
    "a brass telescope with a cracked lens", "a silver thimble from a shipwreck", "a stuffed albatross",
    "a loom made of whale bone", "a clay tablet listing debts of barley", "a pair of snow shoes",
    "a music box without a key", "the anchor of a fishing boat", "a painted sledge", "a ledger written in green ink",
    "a mechanical swan", "a drum covered with seal skin", "an ivory sundial", "a copper kettle with two spouts",
    "a letter that was never opened", "a carved door from a mill",
)  # fmt: skip
HIDING_PLACES = (
    "under the third step of the stairs", "behind the portrait of the founder", "inside the hollow oak",
    "in the left pocket of a grey coat", "between two volumes of an atlas", "beneath the sundial",
    "in a tin marked as cinnamon", "on top of the pump house", "inside the organ pipe", "at the bottom of the well",
    "in the drawer with the spare fuses", "behind the loose brick of the chimney", "under a pot of lavender",
    "in the toe of a rubber boot", "inside the cuckoo clock", "beside the old ferry bell",
)  # fmt: skip
OBJECTS = (
    "spare key", "signed contract", "silver medal", "treasure map", "ruby brooch", "violin bow", "sealed envelope",
    "master tape", "pocket watch", "lottery ticket", "recipe book", "ship's compass",
)  # fmt: skip
VEHICLES = ("ferry", "tram", "canal boat", "sleigh", "delivery van", "rowing boat", "cable car", "steam engine")
COLOURS = (
    "dark green", "pale yellow", "crimson", "sky blue", "silver grey", "orange", "turquoise", "chestnut brown",
    "ivory white", "plum purple", "copper red", "navy blue",
)  # fmt: skip
MATERIALS = (
    "smoked paprika", "orange peel", "crushed juniper", "toasted sesame", "burnt honey", "white miso", "dried plums",
    "fennel seed", "malt vinegar", "grated horseradish", "rose water", "black cardamom",
)  # fmt: skip
DISHES = ("fish soup", "lentil stew", "plum cake", "barley salad", "mushroom pie", "goulash", "rice pudding", "chutney")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
WORDS = (
    "amber", "lantern", "walnut", "harbour", "velvet", "falcon", "saffron", "glacier", "maple", "cobalt", "meadow",
    "pepper", "quartz", "thistle", "willow", "zephyr", "copper", "juniper", "orchid", "pebble",
)  # fmt: skip
CITIES_ZH = ("里斯本", "京都", "卑尔根", "波尔图", "里加", "库斯科", "根特", "霍巴特", "第比利斯", "奥胡斯")
ROOMS_ZH = ("档案室", "船坞", "种子库", "钟楼", "印刷间", "标本馆", "胶片库", "灯具仓库")
NAMES_ZH = ("林晓燕", "陈国栋", "王思远", "赵美玲", "周子涵", "吴建华", "孙雨桐", "郑海涛")
HABITS_ZH = ("修理旧收音机", "练习大提琴", "整理邮票", "烤黑麦面包", "给邻居织袜子", "研究北极地图", "雕刻木头棋子")
DAYS_ZH = ("周一", "周二", "周三", "周四", "周五", "周六", "周日")


def _digits(count: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randrange(10 ** (count - 1), 10**count))


def _one_of(values: tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


def _clock(rng: random.Random) -> str:
    return f"{rng.randrange(10, 23)}:{rng.randrange(60):02d}"


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(10, 29)} {rng.choice(MONTHS)} {rng.randrange(1750, 2020)}"


def _word_pair(rng: random.Random) -> str:
    return "-".join(rng.sample(WORDS, 2))


def _label(rng: random.Random) -> str:
    return f"{rng.choice(string.ascii_uppercase)}{rng.choice(string.ascii_uppercase)}-{rng.randrange(100, 1000)}"


@dataclass(frozen=True, slots=True)
class Family:
    """Sentences of one kind. `slots` identify a fact and occur in sentence and question; `value` is what is asked."""

    slots: dict[str, tuple[str, ...] | Callable[[random.Random], str]]
    value: Callable[[random.Random], str]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    weight: float = 1.0


FAMILIES: dict[str, Family] = {
    "access_code": Family(
        {"room": ROOMS, "city": CITIES},
        _digits(5),
        (
            "The access code of the {room} in {city} is {value}.",
            "The door of the {room} in {city} opens with the code {value}.",
            "Anyone who enters the {room} in {city} has to type {value} first.",
        ),
        (
            "What is the access code of the {room} in {city}?",
            "Which code opens the {room} in {city}?",
            "According to the document, what does one type to enter the {room} in {city}?",
        ),
        ("The access code of the {room} in {city} is {value}.", "The {room} in {city} opens with the code {value}."),
        weight=1.5,
    ),
    "pass_phrase": Family(
        {"group": GROUPS, "city": CITIES},
        _word_pair,
        (
            "This year the {group} of {city} chose the pass phrase {value}.",
            "The pass phrase of the {group} in {city} is {value}.",
        ),
        (
            "What is the pass phrase of the {group} in {city}?",
            "Which pass phrase did the {group} of {city} choose, as the text says?",
        ),
        ("The pass phrase of the {group} in {city} is {value}.", "It is {value}: the {group} of {city} chose it."),
    ),
    "meeting": Family(
        {"name": NAMES, "group": GROUPS, "day": DAYS},
        _clock,
        (
            "{name} meets the {group} every {day} at {value}.",
            "Every {day} at {value}, the {group} and {name} sit down together.",
        ),
        (
            "At what time does {name} meet the {group} on {day}?",
            "When on {day} do {name} and the {group} get together?",
        ),
        ("{name} meets the {group} at {value} on {day}.", "They meet at {value}: {name} and the {group}, every {day}."),
    ),
    "habit": Family(
        {"name": NAMES, "city": CITIES},
        _one_of(HABITS),
        (
            "On quiet evenings {name}, who lives in {city}, likes to {value}.",
            "{name} moved to {city} long ago, and nothing pleases this newcomer more than to {value}.",
            "When the shops of {city} are shut, {name} is usually found trying to {value}.",
        ),
        (
            "What does {name} from {city} like to do?",
            "How does {name}, who lives in {city}, like to spend free time?",
            "What pastime of {name} in {city} does the text mention?",
        ),
        ("{name} likes to {value}.", "According to the text, {name} from {city} likes to {value}."),
        weight=2.0,
    ),
    "exhibit": Family(
        {"city": CITIES},
        _one_of(EXHIBITS),
        (
            "The oldest exhibit in the museum of {city} is {value}.",
            "Visitors to the museum of {city} come for its oldest exhibit: {value}.",
        ),
        ("What is the oldest exhibit in the museum of {city}?", "Which object is the oldest in the museum of {city}?"),
        ("The oldest exhibit in the museum of {city} is {value}.", "It is {value}, in the museum of {city}."),
        weight=1.5,
    ),
    "hiding_place": Family(
        {"name": NAMES, "object": OBJECTS},
        _one_of(HIDING_PLACES),
        (
            "{name} hid the {object} {value}.",
            "The {object} that {name} had been looking for all week was {value}.",
            "Nobody knows that the {object} of {name} lies {value}.",
        ),
        ("Where is the {object} of {name}?", "Where would one have to look for the {object} of {name}?"),
        ("The {object} of {name} is {value}.", "It is {value}."),
        weight=2.0,
    ),
    "colour": Family(
        {"vehicle": VEHICLES, "city": CITIES},
        _one_of(COLOURS),
        (
            "The old {vehicle} in {city} was repainted in {value} last spring.",
            "People in {city} remember that their {vehicle} is {value}.",
        ),
        ("Which colour does the {vehicle} in {city} have?", "What colour is the {vehicle} of {city}?"),
        ("The {vehicle} in {city} is {value}.", "It is {value}."),
    ),
    "ingredient": Family(
        {"name": NAMES, "dish": DISHES},
        _one_of(MATERIALS),
        (
            "{name} never cooks {dish} without a little {value}.",
            "What gives the {dish} of {name} its taste is {value}.",
        ),
        ("What does {name} always put into the {dish}?", "Which ingredient does the {dish} of {name} rely on?"),
        ("{name} puts {value} into the {dish}.", "The {dish} of {name} relies on {value}."),
    ),
    "opening": Family(
        {"room": ROOMS, "city": CITIES},
        _date,
        (
            "The {room} in {city} was opened on {value}.",
            "On {value} a small crowd celebrated the opening of the {room} in {city}.",
        ),
        ("When was the {room} in {city} opened?", "On which date was the {room} in {city} opened?"),
        ("The {room} in {city} was opened on {value}.", "It was opened on {value}."),
    ),
    "parcel": Family(
        {"label": _label},
        _one_of(NAMES),
        (
            "Parcel {label} was handed to {value} by mistake.",
            "According to the log, {value} signed for parcel {label}.",
        ),
        ("Who received parcel {label}?", "To whom was parcel {label} given?"),
        ("Parcel {label} was received by {value}.", "{value} received parcel {label}."),
    ),
    "price": Family(
        {"vehicle": VEHICLES, "city": CITIES},
        _digits(3),
        (
            "A yearly ticket for the {vehicle} in {city} costs {value} crowns.",
            "For {value} crowns one may use the {vehicle} in {city} all year.",
        ),
        (
            "How many crowns does a yearly ticket for the {vehicle} in {city} cost?",
            "What is the price of a year with the {vehicle} in {city}?",
        ),
        ("A yearly ticket for the {vehicle} in {city} costs {value} crowns.", "It costs {value} crowns."),
    ),
    "access_code_zh": Family(
        {"city": CITIES_ZH, "room": ROOMS_ZH},
        _digits(5),
        ("{city}{room}的门禁密码是{value}。", "进入{city}{room}需要输入密码{value}。"),
        ("{city}{room}的门禁密码是什么？", "根据上文，进入{city}{room}要输入哪个密码？"),
        ("{city}{room}的门禁密码是{value}。", "根据上文，密码是{value}。"),
        weight=0.7,
    ),
    "habit_zh": Family(
        {"name": NAMES_ZH, "day": DAYS_ZH},
        _one_of(HABITS_ZH),
        ("每到{day}，{name}都会在家里{value}。", "{name}习惯在{day}晚上{value}。"),
        ("{name}在{day}通常做什么？", "文中提到{name}{day}有什么习惯？"),
        ("{name}在{day}通常会{value}。", "根据文中的内容，{name}在{day}{value}。"),
        weight=0.7,
    ),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """`subject` are the strings that tell this fact from others of its family; `value` is the answer in short."""

    family: str
    subject: tuple[str, ...]
    value: str
    sentence: str
    question: str
    answer: str


def draw_facts(rng: random.Random, *, count: int) -> list[Fact]:
    """`count` facts of one family that share no slot and no value, so that a question has one answer among them."""
    name = rng.choices(list(FAMILIES), [family.weight for family in FAMILIES.values()])[0]
    family = FAMILIES[name]
    facts: list[Fact] = []
    used: set[str] = set()
    while len(facts) < count:
        slots = {
            slot: rng.choice(choices) if isinstance(choices, tuple) else choices(rng)
            for slot, choices in family.slots.items()
        }
        value = family.value(rng)
        if used.isdisjoint([*slots.values(), value]):
            used.update([*slots.values(), value])
            texts = (rng.choice(wordings) for wordings in (family.sentences, family.questions, family.answers))
            facts.append(
                Fact(name, tuple(slots.values()), value, *(text.format(**slots, value=value) for text in texts))
            )
    return facts
