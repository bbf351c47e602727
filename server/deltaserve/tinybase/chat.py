"""Conversations of a user and the assistant: questions, stories, descriptions, small talk, things to remember."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from deltaserve.tinybase import world
from deltaserve.tinybase.facts import fact, sum_fact
from deltaserve.tinybase.phrase import chance, join_words, pick, pick_some, say
from deltaserve.tinybase.sayings import COMMON, SMALL_TALK, poem, reverse_animal
from deltaserve.tinybase.stories import HERO_ANIMALS, story
from deltaserve.tinybase.writing import animal_text, how_to, letter, place_text

_BELONGINGS = ("hat", "coat", "ball", "kite", "boat", "bag", "cup", "book", "scarf", "bicycle")

Message = dict[str, str]
Turn = tuple[str, str]

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a kind teacher.",
    "You answer questions about a small world.",
    "You tell short stories.",
    "You are deltaserve, a small language model.",
)
_BRIEF_SYSTEMS = ("Answer briefly.", "Answer in one word if you can.", "Give short answers.", "Be brief.")
_UNKNOWN = tuple(
    """
the capital of France|the stock market|quantum physics|the president|football results|Shakespeare|computers|
the internet|Paris|New York|how to write code|chemistry|the price of gold|your opinion about politics|the year 1848|
dinosaurs|electricity|the distance to the moon|China|how to fix my car|black holes|medicine|Latin|algebra|the news|
rockets|the best phone|robots|the Roman empire|taxes|Einstein|the speed of light|Japan|the newest film|my bank account
""".replace("\n", "")
    .strip()
    .split("|")
)


def _casual(rng: Random, text: str) -> str:
    """People do not always type carefully."""
    if chance(rng, 0.12):
        text = text.lower()
    if chance(rng, 0.12):
        text = text.rstrip(".?!")
    return text


def story_turn(rng: Random) -> list[Turn]:
    roll = rng.random()
    if roll < 0.45:
        animal = pick(rng, HERO_ANIMALS)
        told = story(rng, kind=animal.name)
        ask = (
            "{Tell me a story about a(n) $hero.|Tell me a story about a(n) $hero.|Write a short story about a(n) "
            "$hero.|Can you tell me a story about a(n) $hero?|I want to hear a story about a(n) $hero.|A story about "
            "a(n) $hero, please.}"
        )
    elif roll < 0.65:
        child = pick(rng, world.GIRLS + world.BOYS)
        told = story(rng, name=child)
        kind = "girl" if child in world.GIRLS else "boy"
        ask = f"{{Tell me a story about $hero.|Tell me a story about a {kind} called $hero.|"
        ask += f"Write a story about a {kind} named $hero.}}"
    elif roll < 0.85:
        told = story(rng)
        ask = "{Tell me a story about $about.|Can you tell me a story about $about?|Write a short story about $about.}"
    else:
        told = story(rng)
        ask = "{Tell me a story.|Tell me a short story.|Can you tell me a story?|Please tell me a story.}"
    turns = [(say(rng, ask, {"hero": told.hero, "about": told.about}), told.text)]
    follow = rng.random()
    name = told.hero if not told.is_animal else f"the {told.hero}"
    if follow < 0.1:
        question = say(rng, "{Who was the story about?|Who is the story about?|Who was it about?}")
        turns.append((question, f"The story was about {name}."))
    elif follow < 0.16:
        turns.append((say(rng, "{Thank you!|I liked that story.|That was nice.}"), "I am glad that you liked it."))
    return turns


def describe_turn(rng: Random) -> list[Turn]:
    if chance(rng, 0.65):
        animal = pick(rng, world.ANIMALS)
        ask = (
            "{Tell me about $plural.|Tell me something about $plural.|Describe a(n) $name.|What is a(n) $name?|What "
            "do you know about $plural?|Write about $plural.}"
        )
        return [(say(rng, ask, animal._asdict()), animal_text(rng, animal))]
    place = pick(rng, world.PLACES)
    ask = "{Describe $name.|Tell me about $name.|What does it look like $at?|Write something about $name.}"
    return [(say(rng, ask, place._asdict()), place_text(rng, place))]


def how_to_turn(rng: Random) -> list[Turn]:
    one, text = how_to(rng)
    ask = "{How do I $task?|How can I $task?|Tell me how to $task.|How do you $task?|Please explain how to $task.}"
    return [(say(rng, ask, {"task": one.task}), text)]


def _yes_no_turn(rng: Random) -> list[Turn]:
    animal, other = pick_some(rng, world.ANIMALS, 2)
    true = chance(rng, 0.5)
    kind = int(rng.random() * 3)
    slots = {"p": animal.plural, "f": animal.food, "g": animal.food if true else other.food, "n": animal.name}
    yes = "Yes" if true or animal.food == other.food else "No"
    if kind == 0:
        return [(say(rng, "Do $p eat $g?", slots), say(rng, f"{yes}, $p eat $f.", slots))]
    if kind == 1:
        small = "small" in animal.size or animal.size == "tiny"
        if animal.size == "middle-sized":
            small = chance(rng, 0.5)
            return [
                (
                    say(rng, "Is a(n) $n " + ("small?" if small else "big?"), slots),
                    say(rng, "A(n) $n is middle-sized.", slots),
                )
            ]
        word = ("small" if small else "big") if true else ("big" if small else "small")
        return [
            (
                say(rng, f"Is a(n) $n {word}?", slots),
                say(rng, ("Yes" if true else "No") + f", a(n) $n is {animal.size}.", slots),
            )
        ]
    total = sum_fact(rng)
    return [(total.question, total.answer)]


def list_turn(rng: Random) -> list[Turn]:
    number = 2 + int(rng.random() * 3)
    pools: tuple[tuple[str, list[str]], ...] = (
        ("animals", [one.name for one in world.ANIMALS]),
        ("colours", list(world.COLOURS)),
        ("fruits", [one.name for one in world.FOODS if one.kind == "fruit"]),
        ("vegetables", [one.name for one in world.FOODS if one.kind == "vegetable"]),
        ("tools", [one.name for one in world.TOOLS if " " not in one.name]),
        ("days of the week", list(world.DAYS)),
        ("months", list(world.MONTHS)),
        ("jobs", [one.name for one in world.JOBS]),
        ("birds", ["owl", "crow", "robin", "hen", "duck", "goose", "penguin"]),
        ("farm animals", ["cow", "horse", "sheep", "pig", "goat", "hen", "duck", "goose"]),
    )
    what, pool = pick(rng, pools)
    if chance(rng, 0.15):
        last = 3 + int(rng.random() * 8)
        return [(f"Count to {world.NUMBERS[last]}.", join_words(world.NUMBERS[1 : last + 1]).capitalize() + ".")]
    items = pick_some(rng, pool, number)
    ask = say(
        rng,
        "{Name $n $what.|Tell me $n $what.|Can you name $n $what?|Give me $n $what.}",
        {"n": world.NUMBERS[number], "what": what},
    )
    answer = join_words(items)
    return [(ask, answer[0].upper() + answer[1:] + ".")]


def _reading_turn(rng: Random) -> list[Turn]:
    """A question whose answer stands in the user's own words."""
    one, two = pick_some(rng, world.GIRLS + world.BOYS, 2)
    first, second = pick_some(rng, world.COLOURS, 2)
    thing, other = pick_some(rng, _BELONGINGS, 2)
    place, elsewhere = pick_some(rng, world.PLACES, 2)
    slots = {"a": one, "b": two, "c": first, "d": second, "t": thing, "u": other, "p": place.at, "q": elsewhere.at}
    text, question, answer = pick(
        rng,
        (
            ("$a has a(n) $c $t. $b has a(n) $d $u.", "What colour is $a's $t?", "$a's $t is $c."),
            ("$a has a(n) $c $t. $b has a(n) $d $u.", "What does $b have?", "$b has a(n) $d $u."),
            ("$a is $p. $b is $q.", "Where is $a?", "$a is $p."),
            ("$a is $p. $b is $q.", "Where is $b?", "$b is $q."),
            ("$a gave the $t to $b.", "Who has the $t now?", "$b has the $t now."),
            ("$a is older than $b.", "Who is younger?", "$b is younger."),
            ("The $t is $p.", "Where is the $t?", "The $t is $p."),
        ),
    )
    return [(say(rng, f"{text} {question}", slots), say(rng, answer, slots))]


def _name_turns(rng: Random) -> list[Turn]:
    name = pick(rng, world.GIRLS + world.BOYS)
    colour = pick(rng, world.COLOURS)
    turns = [
        (
            say(rng, "{My name is $n.|I am $n.|Hello, I am $n.|Hi, my name is $n.}", {"n": name}),
            say(rng, "{Nice to meet you, $n!|Hello, $n! How can I help you?}", {"n": name}),
        )
    ]
    if chance(rng, 0.4):
        turns.append((f"My favourite colour is {colour}.", f"{colour.capitalize()} is a beautiful colour."))
    turns += [pick(rng, (fact_turn, small_turn, list_turn))(rng)[0] for _ in range(int(rng.random() * 3))]
    if len(turns) > 1 and turns[1][0].startswith("My fav") and chance(rng, 0.5):
        turns.append(("What is my favourite colour?", f"Your favourite colour is {colour}."))
    else:
        turns.append((say(rng, "{What is my name?|Who am I?|Do you know my name?}"), f"Your name is {name}."))
    return turns


def fact_turn(rng: Random) -> list[Turn]:
    found = fact(rng)
    return [(found.question, found.answer)]


def small_turn(rng: Random) -> list[Turn]:
    question, answer = pick(rng, SMALL_TALK)
    return [(say(rng, question), say(rng, answer))]


def common_turn(rng: Random) -> list[Turn]:
    roll = rng.random()
    if roll < 0.2:
        return [reverse_animal(rng)]
    if roll < 0.27:
        name = pick(rng, world.ANIMALS[:24]).name
        ask = "{Write a poem about a(n) $n.|Write a short poem about a(n) $n.|A poem about a(n) $n, please.}"
        return [(say(rng, ask, {"n": name}), poem(rng, name))]
    question, answer = pick(rng, COMMON)
    return [(say(rng, question), say(rng, answer))]


def _unknown_turn(rng: Random) -> list[Turn]:
    ask = "{What do you know about $x?|Tell me about $x.|What is $x?|Can you explain $x?|I have a question about $x.}"
    reply = "{I am sorry, I do not know that.|I do not know anything about that.} I only know about a small world."
    return [(say(rng, ask, {"x": pick(rng, _UNKNOWN)}), say(rng, reply))]


def _letter_turn(rng: Random) -> list[Turn]:
    text = letter(rng)
    return [(say(rng, "{Write a letter to $n.|Write a short letter to $n.}", {"n": text[5 : text.index(",")]}), text)]


_TURNS: tuple[Callable[[Random], list[Turn]], ...] = (
    *(fact_turn,) * 20,
    *(common_turn,) * 6,
    *(story_turn,) * 4,
    *(describe_turn,) * 4,
    *(how_to_turn,) * 3,
    *(small_turn,) * 3,
    list_turn,
    _yes_no_turn,
    *(_reading_turn,) * 2,
    _unknown_turn,
)


def as_messages(turns: list[Turn], system: str | None = None) -> list[Message]:
    """Turns as chat messages."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def conversation(rng: Random) -> list[Message]:
    """One conversation of one to six turns; one in twelve asks for brief answers and gets them."""
    roll = rng.random()
    if roll < 0.08:
        found = [fact(rng) for _ in range(1 + int(rng.random() * 4))]
        brief = [(_casual(rng, one.question), one.short + ".") for one in found]
        return as_messages(brief, pick(rng, _BRIEF_SYSTEMS))
    if roll < 0.13:
        turns = _name_turns(rng)
    elif roll < 0.15:
        turns = _letter_turn(rng)
    else:
        turns = []
        for _ in range(pick(rng, (1, 1, 1, 1, 2, 2, 3, 4))):
            turns += pick(rng, _TURNS)(rng)
    system = pick(rng, _SYSTEMS) if chance(rng, 0.3) else None
    return as_messages([(_casual(rng, question), answer) for question, answer in turns], system)
