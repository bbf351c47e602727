"""Short stories: a cast is drawn once, and every beat of the plot speaks about that cast."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from deltaserve.tinybase import world
from deltaserve.tinybase.phrase import chance, expand, pick, pick_some, say, tidy
from deltaserve.tinybase.plots import PLOTS, Plot
from deltaserve.tinybase.plots_more import MORE_PLOTS

ALL_PLOTS = PLOTS + MORE_PLOTS
_OBJECTS = tuple(
    """
key hat ball ring scarf book bell map cup kite whistle button lantern shell drum spoon mirror flute
""".strip().split()
)
_FIXABLE = (
    "chair",
    "cart",
    "table",
    "gate",
    "toy boat",
    "shelf",
    "wooden horse",
    "bird house",
    "stool",
    "fence",
    "door",
)
_FIX_TOOLS = ("hammer", "saw", "rope", "brush")
_TRAITS = tuple(
    """
curious clever shy brave cheerful quiet stubborn kind careful dreamy small old young lazy busy proud friendly
""".strip().split()
)
_ELDERS = ("grandmother", "grandfather", "the old miller", "the baker", "the teacher", "the old owl", "the shepherd")
_NOT_HEROES = {"whale", "elephant", "lion", "monkey", "bee", "ant", "spider", "fish", "butterfly", "penguin"}
HERO_ANIMALS = tuple(animal for animal in world.ANIMALS if animal.name not in _NOT_HEROES)
_PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}


class Story(NamedTuple):
    text: str
    hero: str  # "Mia", or the kind of animal: "fox"
    about: str  # a phrase for "a story about ..."
    is_animal: bool


def _pronouns(slots: dict[str, str], prefix: str, gender: str) -> None:
    for key, word in zip(("he", "him", "his", "himself"), _PRONOUNS[gender], strict=True):
        slots[prefix + key] = word


def _cast(rng: Random, plot: Plot, kind: str | None, name: str | None) -> tuple[dict[str, str], str, bool]:
    """Draw hero, friend, elder, thing and place. Returns (slots, hero as asked for, hero is an animal)."""
    slots: dict[str, str] = {}
    is_animal = kind is not None or (name is None and plot.who != "person" and chance(rng, 0.5))
    gender = "she" if chance(rng, 0.5) else "he"
    elders = [elder for elder in _ELDERS if is_animal or elder != "the old owl"]
    elder = pick(rng, ["the old owl", "the old turtle", "grandmother", "the wise crow"] if is_animal else elders)
    if is_animal:
        animal = next((one for one in HERO_ANIMALS if one.name == kind), None) or pick(rng, HERO_ANIMALS)
        other = pick(rng, [one for one in HERO_ANIMALS if one.name != animal.name and one.name not in elder])
        named = chance(rng, 0.35)
        pet, second = pick_some(rng, world.PETS, 2)
        slots |= {"H": pet if named else f"the {animal.name}", "kind": animal.name, "home": animal.home}
        slots |= {"F": second if named and chance(rng, 0.5) else f"the {other.name}", "fkind": other.name}
        slots["at"] = next((place.at for place in world.PLACES if place.name.endswith(animal.place)), "in the forest")
        hero = animal.name
    else:
        if name is not None:
            gender = "she" if name in world.GIRLS else "he"
        girl, second_girl = pick_some(rng, world.GIRLS, 2)
        boy, second_boy = pick_some(rng, world.BOYS, 2)
        hero = name or (girl if gender == "she" else boy)
        other_gender = "she" if chance(rng, 0.5) else "he"
        candidates = (second_girl, girl) if other_gender == "she" else (second_boy, boy)
        slots |= {"H": hero, "F": next(one for one in candidates if one != hero)}
        slots["home"] = pick(rng, ("in a small house", "in a village", "near the mill", "on a farm", "by the sea"))
        slots["at"] = pick(rng, world.PLACES[:14]).at
        _pronouns(slots, "f", other_gender)
    if is_animal:
        _pronouns(slots, "f", "she" if chance(rng, 0.5) else "he")
    _pronouns(slots, "", gender)
    tool = pick(rng, [one for one in world.TOOLS if one.name in _FIX_TOOLS])
    food, other_food = pick_some(rng, world.FOODS, 2)
    slots["call"] = slots["F"].removeprefix("the ").capitalize()
    slots |= {"E": elder, "obj": pick(rng, _OBJECTS), "col": pick(rng, world.COLOURS), "tool": tool.name}
    slots |= {"use": tool.use, "food": food.name, "foods": food.plural, "otherfoods": other_food.plural}
    slots |= {"day": pick(rng, world.DAYS), "fix": pick(rng, _FIXABLE)}
    young = [
        one.young for one in world.ANIMALS if " " not in one.young and one.name != hero and one.name not in _NOT_HEROES
    ]
    slots["young"] = pick(rng, young)
    return slots, hero, is_animal


def _opening(rng: Random, slots: dict[str, str], hero: str, is_animal: bool) -> str:
    first, second = pick_some(rng, _TRAITS, 2)
    slots = slots | {"one": first, "two": second, "child": "girl" if slots["he"] == "she" else "boy"}
    if is_animal and slots["H"] != f"the {hero}":
        return expand(
            rng,
            "{Once there was a(n) $one $kind called $H, who lived $home.|A(n) $one $kind named $H lived $home.|$H "
            "was a(n) $one $kind. ^$he lived $home.}",
            slots,
        )
    if is_animal:
        return expand(
            rng,
            "{Once upon a time there was a(n) $one $kind.|A(n) $one $kind lived $home.|There once was a(n) $one "
            "$kind who lived $home.|Once a(n) $one and $two $kind lived $home.} {^$his best friend was $F.|Everybody "
            "knew $him.|}",
            slots,
        )
    return expand(
        rng,
        "{$H was a(n) $one $child.|Once there was a(n) $one $child called $H.|$H lived $home.|A(n) $one $child named "
        "$H lived $home.|There was once a $child called $H, who was $one and $two.} {^$his best friend was called "
        "$F.|^$he lived with $E.|}",
        slots,
    )


def story(rng: Random, *, kind: str | None = None, name: str | None = None) -> Story:
    """One story, about an animal of `kind` or a person called `name` where one is given."""
    plots = [plot for plot in ALL_PLOTS if kind is None or plot.who != "person"]
    plot = pick(rng, plots)
    slots, hero, is_animal = _cast(rng, plot, kind, name)
    parts = [_opening(rng, slots, hero, is_animal)]
    parts += [expand(rng, beat, slots) for beat in plot.beats]
    text = tidy(" ".join(parts))
    about = say(rng, pick(rng, plot.about), slots)
    return Story(text, hero, about[0].lower() + about[1:], is_animal)
