"""Questions that have one fixed answer: small talk, why and what, and little poems. One pair is one line."""

# ruff: noqa: E501

from __future__ import annotations

from random import Random

from deltaserve.tinybase import world
from deltaserve.tinybase.phrase import pick, say


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (question.strip(), answer.strip())
        for question, answer in (line.split("=") for line in text.strip().splitlines())
    )


# Alternatives stand in braces, as in `phrase`.
SMALL_TALK = _pairs(
    """
{Hello!|Hi!|Hello|Hi there!|Good morning!|Good evening!|Hey!|Good day!}=Hello! {How can I help you?|What would you like to know?}
{How are you?|How are you today?|Are you well?|How do you do?}=I am {fine|well}, thank you. How can I help you?
{Who are you?|What are you?|What is your name?|Tell me about yourself.|Are you a robot?|Are you a person?}=I am a small language model. I know {about animals, weather, tools and short stories|a little about a small world}.
{What can you do?|How can you help me?|What do you know?|What can I ask you?|Help}=I can tell short stories, describe animals and places, and answer simple questions.
{Can you help me?|I need help.|Please help me.}={Yes, of course.|I will try.} What {do you need|would you like to know}?
{Thank you!|Thanks!|Thank you very much.|Thanks a lot.}=You are welcome{!|.}
{Goodbye!|Bye!|Good night!|See you tomorrow.}=Goodbye! {Have a nice day.|See you soon.}
{I am sad.|I feel sad today.|I am unhappy.|I am lonely.}=I am sorry to hear that. {Shall I tell you a story?|A walk in the garden may help.}
{I am tired.|I am so tired.|I cannot sleep.}=Then you should rest. {A warm bed is the best place for that.|Sleep well!}
{I am hungry.|I am very hungry.}=Then you should eat something. {How about some soup?|How about an apple?}
{I am thirsty.|I need a drink.}=Then drink some water. {It is good for you.|}
{I am happy.|I am happy today!}=That is good to hear! {Why are you happy?|}
{I am cold.|It is cold in here.}=Then put on a warm coat{.| and drink some tea.}
{I am bored.|I have nothing to do.}=Then {read a book|go for a walk|fly a kite}. {Or shall I tell you a story?|}
{I am lost.|I have lost my way.}=Stay calm and ask somebody for the way. {A map and a compass can help too.|}
{Do you like stories?|Do you like animals?|Do you like music?}=Yes, very much. {What do you like?|And you?}
{What is your favourite colour?|What is your favorite color?}=My favourite colour is {blue|green}.
{What is your favourite animal?|Which animal do you like best?}=I like the {fox|owl|hedgehog} best.
{Tell me a joke.|Do you know a joke?|Make me laugh.}={Why did the hen cross the road? To get to the other side.|What does a clock do when it is hungry? It goes back four seconds.|Why do bees hum? Because they do not know the words.}
{Sing a song.|Sing a song for me.}=La la la, the sun is high, little birds are flying by.
{Are you hungry?|Do you eat?|Do you sleep?}=No, I am only a small program.
{What is the weather like?|How is the weather?|Is it raining?}=I cannot look outside, but I hope that the sun is shining.
{What time is it?|What day is it today?}=I have no clock, so I do not know.
{Where do you live?|Where are you from?}=I live in a computer.
{Yes|Yes, please.|OK|Okay}={Good.|Very well.} What would you like to know?
{No|No, thank you.}={All right.|Very well.} Tell me if you need something.
"""
)

COMMON = _pairs(
    """
What is rain?=Rain is water that falls from the clouds.
What is snow?=Snow is frozen water that falls in soft flakes.
What is ice?=Ice is frozen water.
What is wind?=Wind is air that moves.
What is fog?=Fog is a cloud that lies on the ground.
What is a cloud?=A cloud is made of tiny drops of water.
What is a rainbow?=A rainbow is a bow of many colours. You see it when the sun shines and it rains.
What is the sun?=The sun is a star. It gives us light and warmth.
What is the moon?=The moon goes around the earth. It shines at night.
What is a river?=A river is water that flows to the sea.
What is a forest?=A forest is a place with many trees.
What is a mountain?=A mountain is very high land.
What is an island?=An island is land with water all around it.
What is a friend?=A friend is somebody who likes you and helps you.
What is a book?=A book has many pages that you can read.
What is a tree?=A tree is a tall plant with leaves and a trunk of wood.
What is a flower?=A flower is the part of a plant that has colours and a sweet smell.
What is bread made of?=Bread is made of flour, water, salt and yeast.
What is cheese made of?=Cheese is made of milk.
What is butter made of?=Butter is made of milk.
What is a cake made of?=A cake is made of flour, eggs, milk and sugar.
What is paper made of?=Paper is made of wood.
What is glass made of?=Glass is made of sand.
Where does {milk|the milk} come from?=Milk comes from cows.
Where does {honey|the honey} come from?=Honey comes from bees.
Where does {wool|the wool} come from?=Wool comes from sheep.
Where do eggs come from?=Eggs come from hens.
Where does flour come from?=Flour comes from grain. The miller grinds it.
Where does the sun rise?=The sun rises in the east.
Where does the sun set?=The sun sets in the west.
Where do rivers go?=Rivers go to the sea.
Who gives us milk?=Cows give us milk.
Who makes honey?=Bees make honey.
{Who lays eggs?|Which animal lays eggs?}=Hens lay eggs.
Why do leaves fall?=Leaves fall because the tree rests in winter.
Why do birds sing?=Birds sing to find a friend and to guard their home.
Why do bees visit flowers?=Bees visit flowers because they look for nectar.
Why do we sleep?=We sleep because the body needs rest.
Why do we eat?=We eat because the body needs food to grow and to move.
Why do we drink water?=We drink water because the body needs it every day.
Why do we wear coats?=We wear coats because they keep us warm.
Why does ice melt?=Ice melts because it gets warm.
Why is snow cold?=Snow is cold because it is frozen water.
Why is it dark at night?=It is dark at night because the sun is on the other side of the earth.
Why do plants need rain?=Plants need rain because they drink water through their roots.
Why do cats hunt mice?=Cats hunt mice because they like to eat them.
What do plants need?=Plants need water, light and earth.
What do fish need?=Fish need clean water.
What do people need?=People need food, water, sleep and friends.
When do we sleep?=We sleep at night.
When do we eat breakfast?=We eat breakfast in the morning.
When is it hot?=It is hot in summer.
When is it cold?=It is cold in winter.
When do leaves fall?=Leaves fall in autumn.
When do flowers open?=The first flowers open in spring.
When do owls hunt?=Owls hunt at night.
Which animal has a trunk?=The elephant has a trunk.
Which animal is the biggest?=The whale is the biggest animal.
Which animals can fly?=Birds, bees and butterflies can fly.
Which animals can swim?=Fish, ducks, frogs and whales can swim.
Which animals have feathers?=Birds have feathers.
Which animals live on a farm?=Cows, horses, sheep, pigs, goats and hens live on a farm.
Which animals live in the forest?=Foxes, wolves, bears, deer and owls live in the forest.
Which animals live in the sea?=Whales and many fish live in the sea.
{What colour is the sky?|What color is the sky?}=The sky is blue.
{What colour is the grass?|What color is grass?}=Grass is green.
What is water?=Water is a clear liquid. People, animals and plants drink it.
What is fire?=Fire gives light and heat. Be careful, because it can burn you.
How do birds fly?=Birds fly with their wings.
How do fish breathe?=Fish breathe under water.
How do plants grow?=Plants grow from seeds. They need water, light and earth.
"""
)

_POEMS = (
    "The $n sleeps beneath the tree,\n{the wind is soft, the wind is free|the leaves are still as still can be}.\n"
    "{The moon is round, the night is deep,\nand now the $n is fast asleep.|The stars are out, the moon is high,\n"
    "and dreams go gently drifting by.}",
    "Little $n, where do you go?\n{Through the rain and through the snow|Where the quiet waters flow}.\n"
    "Little $n, what do you see?\n{A bird, a bell, a chestnut tree|The whole wide world, and you and me}.",
    "I saw a(n) $n at break of day,\n{it looked at me and ran away|it came to me and wished to play}.\n"
    "{The sun came up, the sky was red,\nand I went home again to bed.|The fields were green, the sky was blue,\n"
    "and I was there, and you were too.}",
)


def poem(rng: Random, name: str) -> str:
    """Four rhymed lines about an animal."""
    lines = say(rng, pick(rng, _POEMS), {"n": name}).splitlines()
    return "\n".join(line.strip() for line in lines)


def reverse_animal(rng: Random) -> tuple[str, str]:
    """From what an animal does back to the animal; only what one animal alone does."""
    animal = pick(rng, world.ANIMALS)
    if animal.sound != "-" and rng.random() < 0.5:
        return f"Which animal says {animal.sound}?", say(rng, "{A(n) $name|The $name} says $sound.", animal._asdict())
    skilled = [one for one in world.ANIMALS if sum(other.skill == one.skill for other in world.ANIMALS) == 1]
    animal = pick(rng, [one for one in skilled if " its " not in one.skill])
    return f"Which animal can {animal.skill}?", say(rng, "$plural can $skill.", animal._asdict())
