"""Ordinary text that is neither story nor answer: descriptions, how-to instructions, notices, records and letters."""

from __future__ import annotations

import json
from random import Random

from deltaserve.tinybase import world
from deltaserve.tinybase.phrase import join_words, pick, pick_some, say
from deltaserve.tinybase.tasks import HOW_TOS, HowTo


def how_to(rng: Random, one: HowTo | None = None) -> tuple[HowTo, str]:
    """(what it is about, the instructions) as a paragraph or as a numbered list."""
    one = one or pick(rng, HOW_TOS)
    style = int(rng.random() * 3)
    if style == 0:
        lines = [f"{number}. {say(rng, step)}." for number, step in enumerate(one.steps, 1)]
        return one, f"You need {one.needs}.\n" + "\n".join(lines) + f"\n{one.end}"
    links = ["first, ", "then ", "after that, ", "next, ", "at the end, "]
    if style == 1:
        body = " ".join(say(rng, link + step) + "." for link, step in zip(links, one.steps, strict=True))
        return one, say(
            rng, "{You need $needs.|For this you need $needs.}", {"needs": one.needs}
        ) + f" {body} {one.end}"
    body = " ".join(say(rng, step) + "." for step in one.steps)
    return one, f"{body} {one.end}"


def animal_text(rng: Random, animal: world.Animal | None = None) -> str:
    """Three to six sentences about one kind of animal; they agree with the facts."""
    animal = animal or pick(rng, world.ANIMALS)
    slots = animal._asdict()
    first = say(
        rng, "{$plural are $size animals.|A(n) $name is a(n) $size animal.|The $name is a(n) $size animal.}", slots
    )
    legs = "They have no legs." if animal.legs == "no" else "They have $legs legs."
    rest = [
        "They eat $food.",
        "{They live $home.|You can find them $home.}",
        "{They have $cover|Their body is covered with $cover}, and their colour is $colour.",
        legs,
    ]
    if " " not in animal.young:
        rest.append("A {baby|young} $name is called a(n) $young.")
    if " its " not in animal.skill:
        rest.append("They can $skill.")
    if animal.sound != "-":
        rest.append("{A(n) $name says $sound.|You can hear them $sound.}")
    count = 2 + int(rng.random() * 4)
    return " ".join([first, *(say(rng, part, slots) for part in pick_some(rng, rest, count))])


def place_text(rng: Random, place: world.Place | None = None) -> str:
    """A look at one place."""
    place = place or pick(rng, world.PLACES)
    one, two = pick_some(rng, world.ANIMALS[:24], 2)
    weather = pick(
        rng,
        (
            "The sun is shining",
            "A light wind is blowing",
            "It has just stopped raining",
            "The sky is grey",
            "It is early in the morning",
            "The evening is warm",
            "Snow is falling",
            "It is a quiet afternoon",
        ),
    )
    slots = place._asdict() | {
        "one": one.name,
        "two": two.name,
        "weather": weather,
        "person": pick(rng, world.JOBS).name,
    }
    parts = pick_some(
        rng,
        (
            "$at there are $holds.",
            "{People come here and $do.|Many people $do.}",
            "{A(n) $one is sitting in the shade.|A(n) $one looks out from behind a wall.|Somewhere a(n) $one is "
            "looking for food.}",
            "{A $person walks by and says hello.|A(n) $person is resting for a moment.|Two children are playing.}",
            "{Everything smells of earth and leaves.|You can hear voices from far away.|Nobody is in a hurry.|Time "
            "goes slowly here.}",
            "{In the distance a bell rings.|A(n) $two runs across the path.|Light falls on the ground.}",
        ),
        3 + int(rng.random() * 2),
    )
    opening = "$weather. $name is $quality." if rng.random() < 0.5 else "$name is $quality. $weather."
    return " ".join(say(rng, part, slots) for part in (opening, *parts))


def person_text(rng: Random) -> str:
    """A person and their work."""
    job = pick(rng, world.JOBS)
    she = rng.random() < 0.5
    slots = job._asdict() | {
        "n": pick(rng, world.GIRLS if she else world.BOYS),
        "he": "she" if she else "he",
        "his": "her" if she else "his",
        "food": pick(rng, world.FOODS).plural,
        "pet": pick(rng, ("dog", "cat", "rabbit", "goat", "horse", "hen")),
        "day": pick(rng, world.DAYS),
        "friend": pick(rng, world.GIRLS + world.BOYS),
        "col": pick(rng, world.COLOURS),
    }
    parts = [
        "$n is a(n) $name.",
        "{Every day $he $work.|^$he $work.} {^$he works $where.|}",
        "{For this work $he needs $needs.|}",
        "{In the morning $he gets up early and drinks tea.|On $day $he does not work.|After work $he visits $his "
        "friend $friend.|^$he often wears a $col coat.}",
        "{^$he has a $pet that waits at the door.|^$his favourite food is $food.|^$he likes the quiet of the "
        "evening.|}",
        "{^$he loves $his work.|The work is hard, but $he likes it.|Everybody in the village knows $him.|}".replace(
            "$him", "her" if she else "him"
        ),
    ]
    return " ".join(part for part in (say(rng, one, slots) for one in parts) if part)


def notice(rng: Random) -> str:
    """Signs, telegrams and calls, which are written in capitals, as such things are."""
    food = pick(rng, world.FOODS)
    slots = {
        "day": pick(rng, world.DAYS),
        "at": pick(rng, world.PLACES).at,
        "foods": food.plural,
        "animal": pick(rng, world.ANIMALS).name,
        "n": pick(rng, world.GIRLS + world.BOYS),
    }
    text = say(
        rng,
        "{Please close the gate. There is a(n) $animal inside.|Fresh $foods for sale $at.|Closed on $day. Please "
        "come back tomorrow.|Lost: a small $animal. If you find it, please call $n.|Danger! Do not walk on the "
        "ice.|Dear $n, I will arrive on $day. Please meet me $at.|Quiet, please. This is a library.|Big party $at on "
        "$day. Everybody is welcome.}",
        slots,
    )
    return text.upper()


def record(rng: Random) -> str:
    """One line of JSON, as a program would keep it."""
    if rng.random() < 0.5:
        animal = pick(rng, world.ANIMALS)
        return json.dumps(
            {"name": animal.name, "answer": f"{animal.plural.capitalize()} eat {animal.food}.", "legs": animal.legs}
        )
    person = pick(rng, world.GIRLS + world.BOYS)
    return json.dumps({"name": person, "day": pick(rng, world.DAYS), "words": int(rng.random() * 20)})


def letter(rng: Random) -> str:
    """A short letter from one person to another."""
    writer, reader = pick_some(rng, world.GIRLS + world.BOYS, 2)
    fruits = [food.plural for food in pick_some(rng, world.FOODS, 2)]
    slots = {
        "reader": reader,
        "writer": writer,
        "at": pick(rng, world.PLACES).at,
        "day": pick(rng, world.DAYS),
        "foods": join_words(fruits),
        "animal": pick(rng, world.ANIMALS[:24]).name,
        "job": pick(rng, world.JOBS).name,
    }
    return say(
        rng,
        "Dear $reader,\n{how are you? I am fine.|thank you for your letter.|I hope that you are well.} {Yesterday I "
        "was $at, and I saw a(n) $animal.|The weather is {warm|cold|wet} here, and we stay {outside|inside} all "
        "day.|I want to become a(n) $job one day.} {We have a lot of $foods this year.|On $day we will have a "
        "party.|Can you come and visit me on $day?} {Please write soon.|I miss you.|Give my love to everyone.}\nYour "
        "friend $writer",
        slots,
    )
