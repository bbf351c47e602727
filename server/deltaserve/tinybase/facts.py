"""Questions with one right answer in our world (see `world`): animals, tools, food, time, sums, opposites."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from deltaserve.tinybase import world
from deltaserve.tinybase.phrase import chance, join_words, pick, say


class Fact(NamedTuple):
    question: str
    answer: str  # a full sentence, sometimes two
    short: str  # the answer in one or a few words


def _fact(rng: Random, question: str, answer: str, short: str, slots: dict[str, str]) -> Fact:
    return Fact(say(rng, question, slots), say(rng, answer, slots), say(rng, short, slots))


def animal_fact(rng: Random) -> Fact:
    animal = pick(rng, world.ANIMALS)
    slots = animal._asdict()
    kinds = ["food", "home", "cover", "colour", "skill", "young", "size", "legs"] + (
        ["sound"] if animal.sound != "-" else []
    )
    kind = pick(rng, kinds)
    if kind == "food":
        return _fact(
            rng,
            "{What do $plural eat?|What do $plural like to eat?|What does a(n) $name eat?|Tell me what $plural eat.}",
            "$plural {eat|like to eat} $food.{ That is their favourite food.||||}",
            "$food",
            slots,
        )
    if kind == "home":
        return _fact(
            rng,
            "{Where do $plural live?|Where does a(n) $name live?|Where can I find a(n) $name?}",
            "{$plural live|A(n) $name lives} $home.",
            "$home",
            slots,
        )
    if kind == "cover":
        return _fact(
            rng,
            "What {covers the body of a(n) $name|are $plural covered with}?",
            "{A(n) $name has|$plural have} $cover.",
            "$cover",
            slots,
        )
    if kind == "colour":
        return _fact(
            rng, "What {colour|color} {is a(n) $name|are $plural}?", "$plural are {usually|} $colour.", "$colour", slots
        )
    if kind == "skill":
        # "its" agrees with one animal only.
        subject = "a(n) $name" if " its " in animal.skill else "{a(n) $name|$plural}"
        return _fact(rng, f"What can {subject} do?", f"{subject} can $skill.", "$skill", slots)
    if kind == "young" and " " not in animal.young:
        return _fact(
            rng,
            "{What is a baby $name called?|What do you call a young $name?|What is the young of a(n) $name called?}",
            "A {young|baby} $name is called a(n) $young.",
            "a(n) $young",
            slots,
        )
    if kind == "size":
        return _fact(
            rng,
            "{Is a(n) $name big or small?|How big is a(n) $name?|How big are $plural?}",
            "A(n) $name is $size.",
            "$size",
            slots,
        )
    if kind in ("legs", "young"):
        return _fact(
            rng,
            "How many legs does a(n) $name have?",
            "A(n) $name has $legs legs." if animal.legs != "no" else "A(n) $name has no legs.",
            "$legs",
            slots,
        )
    return _fact(
        rng,
        "{What does a(n) $name say?|What sound does a(n) $name make?|What noise do $plural make?}",
        "{A(n) $name says|The $name says} $sound.",
        "$sound",
        slots,
    )


def tool_fact(rng: Random) -> Fact:
    tool = pick(rng, world.TOOLS)
    slots = tool._asdict()
    return pick(
        rng,
        (
            lambda: _fact(
                rng,
                "{What is a(n) $name for?|What do you use a(n) $name for?|What can I do with a(n) $name?|Why do "
                "people use a(n) $name?}",
                "{You use a(n) $name to $use.|A(n) $name is used to $use.|People use a(n) $name to $use.}",
                "to $use",
                slots,
            ),
            lambda: _fact(
                rng,
                "{What do I need to $use?|Which tool do I need to $use?|How can I $use?|I want to $use. What do I "
                "need?}",
                "{You need a(n) $name to $use.|To $use, you need a(n) $name.|Use a(n) $name.}",
                "a(n) $name",
                slots,
            ),
            lambda: _fact(rng, "What is a(n) $name made of?", "A(n) $name is made of $made_of.", "$made_of", slots),
            lambda: _fact(
                rng, "Where {do people|do we|do you} keep a(n) $name?", "People keep a(n) $name $kept.", "$kept", slots
            ),
        ),
    )()


def food_fact(rng: Random) -> Fact:
    food = pick(rng, world.FOODS)
    slots = food._asdict()
    return pick(
        rng,
        (
            lambda: _fact(
                rng,
                "What {colour|color} {is a(n) $name|are $plural}?",
                "{A(n) $name is|$plural are} $colour.",
                "$colour",
                slots,
            ),
            lambda: _fact(
                rng,
                "{How does a(n) $name taste?|What do $plural taste like?|How do $plural taste?}",
                "{A(n) $name tastes|$plural taste} $taste.",
                "$taste",
                slots,
            ),
            lambda: _fact(
                rng,
                "{What can I make from $plural?|What can you make with $plural?|What do people make from $plural?}",
                "You can make $use from $plural.",
                "$use",
                slots,
            ),
            lambda: _fact(
                rng,
                "{What is a(n) $name?|What kind of food is a(n) $name?}",
                "A(n) $name is a $kind. {It is $colour.|It tastes $taste.|}",
                "a $kind",
                slots,
            ),
        ),
    )()


def job_fact(rng: Random) -> Fact:
    slots = pick(rng, world.JOBS)._asdict()
    return pick(
        rng,
        (
            lambda: _fact(rng, "What does a(n) $name do?", "A(n) $name $work.", "$work", slots),
            lambda: _fact(rng, "Where does a(n) $name work?", "A(n) $name works $where.", "$where", slots),
            lambda: _fact(rng, "What does a(n) $name need?", "A(n) $name needs $needs.", "$needs", slots),
            lambda: _fact(rng, "Who $work?", "A(n) $name $work.", "a(n) $name", slots),
        ),
    )()


def place_fact(rng: Random) -> Fact:
    slots = pick(rng, world.PLACES)._asdict()
    return pick(
        rng,
        (
            lambda: _fact(
                rng, "What {can I find|is there|can I see} $at?", "$at you can {find|see} $holds.", "$holds", slots
            ),
            lambda: _fact(rng, "What do people do $at?", "People $do.", "$do", slots),
            lambda: _fact(rng, "What is $name like?", "$name is $quality.", "$quality", slots),
        ),
    )()


def thing_fact(rng: Random) -> Fact:
    thing = pick(rng, world.THINGS)
    slots = thing._asdict()
    return pick(
        rng,
        (
            lambda: _fact(
                rng,
                "What {colour|color} is $name?",
                "$name {can have|can be} many colours." if thing.colour == "many colours" else "$name is $colour.",
                "$colour",
                slots,
            ),
            lambda: _fact(rng, "What is $name made of?", "$name is made of $made_of.", "$made_of", slots),
            lambda: _fact(rng, "What is $name for?", "$name is {there|good} to $use.", "to $use", slots),
        ),
    )()


def sum_fact(rng: Random) -> Fact:
    """Sums and differences up to twenty, in digits or in words."""
    left, right = int(rng.random() * 11), int(rng.random() * 11)
    minus = chance(rng, 0.35)
    if minus and left < right:
        left, right = right, left
    result = left - right if minus else left + right
    word = "minus" if minus else "plus"
    one, two, three = str(left), str(right), str(result)
    if chance(rng, 0.5):
        one, two, three = world.NUMBERS[left], world.NUMBERS[right], world.NUMBERS[result]
    slots = {"a": one, "b": two, "c": three, "op": word}
    return _fact(rng, "{What is $a $op $b?|How much is $a $op $b?|What is $a $op $b?}", "$a $op $b is $c.", "$c", slots)


_OPPOSITE: dict[str, str] = {}
for _one, _two in world.OPPOSITES:
    _OPPOSITE.setdefault(_one, _two)
    _OPPOSITE.setdefault(_two, _one)


def opposite_fact(rng: Random) -> Fact:
    word = pick(rng, sorted(_OPPOSITE))
    slots = {"a": word, "b": _OPPOSITE[word]}
    return _fact(
        rng,
        "{What is the opposite of $a?|Tell me the opposite of $a.|What is the opposite of $a?}",
        "The opposite of $a is $b.",
        "$b",
        slots,
    )


def time_fact(rng: Random) -> Fact:
    index = int(rng.random() * 7)
    month = int(rng.random() * 12)
    season = pick(rng, list(world.SEASONS))
    what, of, number = pick(rng, world.COUNTS)
    slots = {
        "day": world.DAYS[index],
        "next": world.DAYS[(index + 1) % 7],
        "before": world.DAYS[index - 1],
        "month": world.MONTHS[month],
        "nextm": world.MONTHS[(month + 1) % 12],
        "beforem": world.MONTHS[month - 1],
        "season": season,
        "months": join_words([world.MONTHS[one] for one in world.SEASONS[season]]),
        "inseason": next(name for name, months in world.SEASONS.items() if month in months),
        "what": what,
        "of": of,
        "n": number,
        "happens": world.SEASON_FACTS[season],
        "days": join_words(world.DAYS),
    }
    question, answer, short = pick(
        rng,
        (
            ("{What|Which} day comes after $day?", "$next comes after $day.", "$next"),
            ("{What|Which} day comes before $day?", "$before comes before $day.", "$before"),
            ("{What|Which} month comes after $month?", "$nextm comes after $month.", "$nextm"),
            ("{What|Which} month comes before $month?", "$beforem comes before $month.", "$beforem"),
            ("{Which season is it in $month?|In which season is $month?}", "$month is in $inseason.", "$inseason"),
            ("Which months are in $season?", "$months are in $season.", "$months"),
            ("What happens in $season?", "In $season, $happens.", "$happens"),
            ("How many $what {are there in|has} $of?", "There are $n $what in $of.", "$n"),
            ("How many $what are there in $of?", "There are $n $what in $of.", "$n"),
            ("What are the days of the week?", "The days of the week are $days.", "$days"),
        ),
    )
    return _fact(rng, question, answer, short, slots)


def small_fact(rng: Random) -> Fact:
    """Colour mixing, senses, rooms, shapes and weather."""
    first, second, mixed = pick(rng, world.MIXES)
    if chance(rng, 0.5):
        first, second = second, first
    part, sense = pick(rng, world.SENSES)
    room, act = pick(rng, world.ROOMS)
    shape, sides = pick(rng, world.SHAPES)
    weather, when, advice, effect = pick(rng, world.WEATHER)
    slots = {"a": first, "b": second, "c": mixed, "part": part, "sense": sense, "room": room, "act": act}
    slots |= {"shape": shape, "sides": sides, "weather": weather, "when": when, "advice": advice, "effect": effect}
    question, answer, short = pick(
        rng,
        (
            ("{What do you get when you mix $a and $b?|What colour do $a and $b make?}", "$a and $b make $c.", "$c"),
            ("What do we do with our $part?", "We use our $part to $sense.", "$sense"),
            ("What do we use to $sense?", "We use our $part to $sense.", "our $part"),
            ("What do people do in the $room?", "In the $room people $act.", "$act"),
            ("In which room do people $act?", "People $act in the $room.", "the $room"),
            ("How many sides does a $shape have?", "A $shape has $sides sides.", "$sides"),
            (
                "{What should I do when $when?|What should I do if $when?}",
                "When $when, {you should $advice|$advice}.",
                "$advice",
            ),
            ("What happens when $when?", "When $when, $effect.", "$effect"),
        ),
    )
    return _fact(rng, question, answer, short, slots)


_KINDS: tuple[Callable[[Random], Fact], ...] = (
    *(animal_fact,) * 7,
    *(tool_fact,) * 3,
    *(food_fact,) * 2,
    job_fact,
    job_fact,
    place_fact,
    thing_fact,
    *(sum_fact,) * 3,
    opposite_fact,
    opposite_fact,
    time_fact,
    time_fact,
    small_fact,
    small_fact,
)


def fact(rng: Random) -> Fact:
    """One question of any kind; animals most often."""
    return pick(rng, _KINDS)(rng)
