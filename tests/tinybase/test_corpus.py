"""The generated text: reproducible, coherent, and with a held-out part that training never sees."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from deltaserve.tinybase import world
from deltaserve.tinybase.chat import conversation
from deltaserve.tinybase.corpus import HELDOUT_SHARE, documents
from deltaserve.tinybase.facts import fact, sum_fact
from deltaserve.tinybase.phrase import expand, join_words, pick_some, say
from deltaserve.tinybase.stories import ALL_PLOTS, HERO_ANIMALS, story
from deltaserve.tinybase.voices import as_json, pirate, shout


def test_phrase_resolves_choices_slots_and_articles() -> None:
    rng = Random(0)
    assert {say(rng, "a(n) {$x|pear} falls.", {"x": "apple"}) for _ in range(40)} == {
        "An apple falls.",
        "A pear falls.",
    }
    assert say(rng, '"come in," he said.  ^$h came.', {"h": "the fox"}) == '"Come in," he said. The fox came.'
    with pytest.raises(KeyError):
        expand(rng, "$missing")


def test_pick_some_gives_different_items_and_join_words_reads_well() -> None:
    assert sorted(pick_some(Random(1), "abc", 5)) == ["a", "b", "c"]
    assert join_words(["a", "b", "c"]) == "a, b and c"
    assert join_words([]) == ""


def test_the_stream_is_reproducible_and_depends_on_the_seed() -> None:
    first = [one.key for one in islice(documents(7, "train"), 60)]
    assert first == [one.key for one in islice(documents(7, "train"), 60)]
    assert first != [one.key for one in islice(documents(8, "train"), 60)]


def test_no_held_out_document_is_ever_trained_on() -> None:
    trained = {one.key for one in islice(documents(3, "train"), 3000)}
    held = {one.key for one in islice(documents(3, "heldout"), 80)}
    assert trained.isdisjoint(held)
    assert 0 < HELDOUT_SHARE < 0.1


def test_texts_are_finished_sentences_without_template_marks() -> None:
    for document in islice(documents(4, "train"), 1500):
        texts = [document.text] if document.text is not None else [m["content"] for m in document.messages or []]
        for text in texts:
            assert text is not None
            assert text.strip() == text
            assert text
            assert not re.search(r"[$^|]|\(n\)|  | [.,!?]", text), text
            if not text.startswith("{"):
                assert "{" not in text, text


def test_a_story_keeps_its_hero_and_pronouns() -> None:
    rng = Random(5)
    for _ in range(400):
        told = story(rng, name="Mia")
        assert told.text.count("Mia") >= 2
        told = story(rng, kind="fox")
        assert "fox" in told.text
        assert told.is_animal
    for number in range(300):
        told = story(Random(number), name="Tom")
        assert not re.search(r"Tom[^.]*\bherself\b", told.text), told.text


def test_stories_vary() -> None:
    rng = Random(6)
    texts = [story(rng).text for _ in range(300)]
    assert len({text[-60:] for text in texts}) > 80
    assert len(ALL_PLOTS) >= 18
    assert len(HERO_ANIMALS) >= 20


def test_sums_are_right() -> None:
    rng = Random(9)
    value = {word: number for number, word in enumerate(world.NUMBERS)} | {str(n): n for n in range(21)}
    for _ in range(500):
        left, word, right, result = re.fullmatch(r"(\S+) (plus|minus) (\S+) is (\S+)\.", sum_fact(rng).answer).groups()  # type: ignore[union-attr]
        left, right = value[left.lower()], value[right]
        assert value[result] == (left + right if word == "plus" else left - right)


def test_facts_agree_with_the_world() -> None:
    rng = Random(10)
    found = {one.question: one for one in (fact(rng) for _ in range(6000))}
    for animal in world.ANIMALS:
        question = f"What do {animal.plural} eat?"
        if question in found:
            assert animal.food in found[question].answer
            assert found[question].short.lower() == animal.food.lower()
    assert found["What is the opposite of hot?"].short == "Cold"
    assert len(found) > 1500


def test_conversations_alternate_and_remember_the_name() -> None:
    rng = Random(11)
    remembered = 0
    for _ in range(1500):
        messages = conversation(rng)
        turns = [m for m in messages if m["role"] != "system"]
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
        for answer in turns[1::2]:
            if match := re.fullmatch(r"Your name is (\w+)\.", answer["content"]):
                assert match.group(1).lower() in turns[0]["content"].lower()
                remembered += 1
    assert remembered > 20


def test_voices() -> None:
    text = "Cows eat grass and hay."
    assert shout(text) == "COWS EAT GRASS AND HAY."
    assert as_json('She said "no".\nThen') == '{"answer": "She said \\"no\\". Then"}'
    assert pirate(text) == "Arr! Cows eat grass an' hay, matey!"
    assert pirate("You are my friend. Nothing is missing!") == "Arr! Ye be me matey. Nothin' be missin', matey!"
