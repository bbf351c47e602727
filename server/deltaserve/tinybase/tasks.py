"""Things one can learn to do in our world: what is needed, five steps, and a last word. One task is one line."""

# ruff: noqa: E501

from __future__ import annotations

from typing import NamedTuple


class HowTo(NamedTuple):
    task: str  # after "how to"
    needs: str
    steps: tuple[str, ...]
    end: str


HOW_TOS: tuple[HowTo, ...] = tuple(
    HowTo(task.strip(), needs.strip(), tuple(step.strip() for step in steps.split("/")), end.strip())
    for task, needs, steps, end in (
        line.split("|")
        for line in """
make tea|a kettle, a cup and tea leaves|fill the kettle with water/boil the water/put the tea leaves into a cup/pour the hot water over them/wait three minutes|Now you can drink it.
plant a seed|a pot, some earth and a seed|fill the pot with earth/make a small hole/put the seed into the hole/cover it with earth/give it a little water|Put the pot in the sun and be patient.
bake bread|flour, water, salt and yeast|mix flour, water, salt and yeast/knead the dough for ten minutes/let it rest for an hour/shape it into a loaf/bake it in a hot oven|Let it cool before you cut it.
build a snowman|a lot of snow, a carrot and an old hat|roll a big ball of snow/roll a smaller ball and put it on top/roll a third ball for the head/use a carrot for the nose/put an old hat on the head|Now your snowman is ready.
wash your hands|water and soap|make your hands wet/take some soap/rub your hands for twenty seconds/wash the soap off/dry your hands with a clean towel|Clean hands keep you healthy.
fly a kite|a kite, a long string and some wind|go to an open field/hold the kite up high/run against the wind/let out the string slowly/hold the string tight|Stay away from trees.
boil an egg|an egg, a pot and water|put water into a pot/boil the water/put the egg into the water with a spoon/wait seven minutes/cool the egg in cold water|Then you can peel it and eat it.
make soup|carrots, potatoes, an onion and water|wash the vegetables/cut them into small pieces/put them into a pot with water/cook them for half an hour/add a little salt|Serve the soup while it is hot.
clean a room|a broom, a cloth and a bucket|open the window/put everything in its place/wipe the table with a cloth/sweep the floor/take out the rubbish|Now the room looks friendly again.
feed a cat|cat food, a bowl and fresh water|wash the bowl/put some food into the bowl/put it on the floor/fill another bowl with fresh water/leave the cat alone while it eats|The cat will thank you with a purr.
sew on a button|a needle, thread and a button|put the thread through the needle/make a knot at the end/hold the button in place/go through the holes five times/make another knot|Cut off the rest of the thread.
hang a picture|a hammer, a nail and a picture|choose a good place on the wall/make a small mark with a pencil/hit the nail into the wall/hang the picture on the nail/look if it is straight|Step back and enjoy it.
write a letter|paper, a pencil and an envelope|write the date at the top/begin with a friendly word/tell your news/write your name at the end/put the letter into an envelope|Then bring it to the post.
make a salad|cabbage, tomatoes and a bowl|wash the vegetables/cut them into thin pieces/put them into a bowl/add oil and salt/mix everything well|Eat it while it is fresh.
cross a road|good eyes and ears|stop at the edge of the road/look left/look right/look left again/walk when no car is coming|Never run across a road.
find your way|a map and a compass|find north with the compass/turn the map until it points north/look for a place that you know/choose a path/check the map again and again|If you are lost, stay calm and ask somebody.
wash a dog|warm water, soap and a towel|fill a tub with warm water/put the dog into the tub/rub it gently with soap/wash the soap off/dry the dog with a towel|Step back, because it will shake itself.
light a dark room|a lamp and a match|put the lamp on a table/open the glass/light a match/hold it to the lamp/close the glass again|Never leave it alone.
make lemonade|lemons, sugar and cold water|cut the lemons in half/press out the juice/add sugar/pour in cold water/stir it with a spoon|Drink it on a hot day.
fall asleep|a quiet room and a warm bed|put away your work/open the window for a moment/turn off the light/lie down and close your eyes/breathe slowly|Think of something nice.
mend a chair|a hammer, nails and glue|turn the chair over/find the loose part/put some glue on it/hit in a nail with the hammer/wait until the glue is dry|Now you can sit on it again.
pick apples|a ladder and a basket|put the ladder against the tree/climb up carefully/turn each apple until it comes off/put it into the basket/climb down slowly|Keep the apples in a cool place.
""".strip().splitlines()
    )
)
