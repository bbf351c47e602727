"""The small closed world that every text of the corpus is about: its animals, tools, food, people and places.

All of it was written for this project. A row is one line; columns are separated by `|`.
"""

# ruff: noqa: E501

from __future__ import annotations

from typing import NamedTuple, TypeVar


class Animal(NamedTuple):
    name: str
    plural: str
    food: str
    home: str
    sound: str  # what it says: "a cow says moo"; "-" when it makes no sound we speak of
    legs: str
    cover: str
    colour: str
    size: str
    skill: str  # after "can"
    young: str
    place: str  # a story scene where it belongs


class Tool(NamedTuple):
    name: str
    use: str  # after "to"
    made_of: str
    kept: str
    user: str


class Food(NamedTuple):
    name: str
    plural: str
    kind: str
    colour: str
    taste: str
    use: str  # what people make of it


class Job(NamedTuple):
    name: str
    work: str  # third person
    where: str
    needs: str


class Place(NamedTuple):
    name: str  # with article
    at: str  # with preposition
    holds: str
    do: str  # after "people"
    quality: str


class Thing(NamedTuple):
    name: str
    colour: str
    made_of: str
    use: str  # after "to"


Row = TypeVar("Row", Animal, Tool, Food, Job, Place, Thing)


def _table(row: type[Row], text: str) -> tuple[Row, ...]:
    return tuple(row(*(cell.strip() for cell in line.split("|"))) for line in text.strip().splitlines())


ANIMALS = _table(
    Animal,
    """
cow|cows|grass and hay|in a barn|moo|four|short hair|brown or white|big|give milk|calf|meadow
horse|horses|grass, hay and oats|in a stable|neigh|four|short hair|brown, black or white|big|run fast|foal|meadow
sheep|sheep|grass|in a field|baa|four|wool|white|middle-sized|give wool|lamb|hill
pig|pigs|roots, apples and corn|in a sty|oink|four|thin hair|pink|middle-sized|dig with its nose|piglet|farm
goat|goats|leaves and grass|on a hill|bleat|four|rough hair|white or grey|middle-sized|climb rocks|kid|hill
hen|hens|seeds and worms|in a henhouse|cluck|two|feathers|brown or white|small|lay eggs|chick|farm
duck|ducks|water plants and small bugs|by a pond|quack|two|feathers|brown or green|small|swim and fly|duckling|pond
goose|geese|grass and seeds|by a lake|honk|two|feathers|white or grey|middle-sized|swim and fly|gosling|lake
dog|dogs|meat and bones|in a house|woof|four|fur|brown, black or white|middle-sized|guard a house|puppy|village
cat|cats|fish and mice|in a house|meow|four|fur|black, grey or orange|small|climb trees|kitten|village
rabbit|rabbits|grass and carrots|in a burrow|-|four|fur|brown or grey|small|hop fast|bunny|meadow
mouse|mice|seeds, cheese and crumbs|in a small hole|squeak|four|fur|grey or brown|very small|hide in tiny places|pup|barn
fox|foxes|mice, birds and berries|in a den|yip|four|fur|red|middle-sized|run quietly|cub|forest
wolf|wolves|meat|in the forest|howl|four|fur|grey|big|run for a long time|cub|forest
bear|bears|fish, berries and honey|in a cave|growl|four|fur|brown or black|very big|sleep all winter|cub|forest
deer|deer|leaves, grass and bark|in the forest|-|four|short fur|brown|big|jump over a fence|fawn|forest
squirrel|squirrels|nuts and seeds|in a tree|-|four|fur|red or grey|small|jump from tree to tree|kit|forest
hedgehog|hedgehogs|worms, bugs and snails|under a hedge|-|four|spines|brown|small|roll into a ball|hoglet|garden
owl|owls|mice and small birds|in a hollow tree|hoot|two|feathers|brown or white|middle-sized|see in the dark|owlet|forest
crow|crows|seeds, worms and bread|in a tall tree|caw|two|feathers|black|small|remember faces|chick|field
robin|robins|worms and berries|in a nest|tweet|two|feathers|brown with a red chest|very small|sing early in the morning|chick|garden
frog|frogs|flies and other bugs|in a pond|croak|four|smooth skin|green|small|jump far|tadpole|pond
bee|bees|nectar from flowers|in a hive|buzz|six|tiny hairs|yellow and black|tiny|make honey|larva|garden
ant|ants|crumbs, seeds and sweet things|in a nest under the ground|-|six|a hard shell|black or red|tiny|carry heavy things|larva|garden
spider|spiders|flies|on a web|-|eight|tiny hairs|brown or black|very small|spin a web|spiderling|barn
snail|snails|leaves|in its own shell|-|no|a shell|brown|very small|carry its house on its back|baby snail|garden
turtle|turtles|plants and small fish|by the water|-|four|a hard shell|green|middle-sized|live for many years|hatchling|lake
butterfly|butterflies|nectar from flowers|in a meadow|-|six|thin wings|yellow, white or blue|very small|fly from flower to flower|caterpillar|meadow
fish|fish|water plants and small bugs|in the water|-|no|scales|silver|small|breathe under water|baby fish|river
elephant|elephants|leaves, grass and fruit|in a warm land|trumpet|four|thick skin|grey|very big|lift a log with its trunk|calf|river
lion|lions|meat|in a dry, grassy land|roar|four|fur|yellow|big|roar very loudly|cub|hill
monkey|monkeys|fruit and nuts|in warm forests|-|four|fur|brown|middle-sized|swing from branches|baby monkey|forest
whale|whales|fish and other small sea animals|in the sea|-|no|smooth skin|blue or grey|very big|dive deep|calf|sea
penguin|penguins|fish|on cold coasts|squawk|two|feathers|black and white|middle-sized|swim but not fly|chick|sea
""",
)

TOOLS = _table(
    Tool,
    """
hammer|hit nails into wood|wood and iron|in a toolbox|carpenter
saw|cut wood|steel|in a shed|carpenter
spade|dig holes in the ground|wood and iron|in a shed|gardener
rake|gather dry leaves|wood and iron|in a shed|gardener
broom|sweep the floor|wood and straw|in a corner|cleaner
needle|sew cloth|steel|in a sewing box|tailor
pair of scissors|cut paper and cloth|steel|in a drawer|tailor
knife|cut bread|steel|in a drawer|cook
spoon|eat soup|wood or metal|in a drawer|cook
pan|fry eggs|iron|on a shelf|cook
kettle|boil water|metal|on the stove|cook
oven|bake bread|iron and brick|in a kitchen|baker
brush|paint a wall|wood and hair|in a jar|painter
ladder|climb up to high places|wood|behind a shed|painter
rope|tie things together|strong thread|on a hook|sailor
bucket|carry water|tin or wood|by the well|farmer
axe|chop firewood|wood and steel|in a shed|woodcutter
net|catch fish|string|in a boat|fisherman
lamp|give light in the dark|glass and metal|on a table|miner
key|open a lock|metal|on a hook|guard
clock|tell the time|wood and metal|on a wall|teacher
pencil|write and draw|wood|in a box|teacher
umbrella|stay dry in the rain|cloth and metal|by the door|traveller
compass|find the way north|brass and glass|in a pocket|traveller
basket|carry fruit and eggs|dry reeds|in a kitchen|farmer
bell|call people together|brass|in a tower|teacher
""",
)

FOODS = _table(
    Food,
    """
apple|apples|fruit|red or green|sweet|a pie
pear|pears|fruit|green or yellow|sweet|jam
plum|plums|fruit|purple|sweet|jam
cherry|cherries|fruit|red|sweet|a cake
lemon|lemons|fruit|yellow|sour|lemonade
orange|oranges|fruit|orange|sweet|juice
banana|bananas|fruit|yellow|sweet|a milk drink
strawberry|strawberries|fruit|red|sweet|jam
grape|grapes|fruit|green or purple|sweet|juice
carrot|carrots|vegetable|orange|a little sweet|soup
potato|potatoes|vegetable|brown|plain|soup
onion|onions|vegetable|white or brown|strong|soup
tomato|tomatoes|fruit|red|fresh|a red sauce
cabbage|cabbages|vegetable|green|fresh|soup
pumpkin|pumpkins|vegetable|orange|a little sweet|a pie
bean|beans|vegetable|green or white|plain|a stew
pea|peas|vegetable|green|a little sweet|soup
mushroom|mushrooms|thing that grows in the forest|brown or white|earthy|a stew
nut|nuts|seed|brown|rich|a cake
""",
)

JOBS = _table(
    Job,
    """
baker|bakes bread and cakes|in a bakery|flour and an oven
farmer|grows food and looks after animals|on a farm|a field and a bucket
teacher|teaches children|in a school|books and patience
doctor|helps sick people|in a hospital|clean hands and a kind voice
carpenter|makes things from wood|in a workshop|a hammer and a saw
gardener|looks after plants|in a garden|a spade and a rake
fisherman|catches fish|on a boat|a net
sailor|sails ships|on the sea|ropes and a compass
tailor|makes clothes|in a shop|a needle and thread
cook|makes meals|in a kitchen|a pan and a knife
painter|paints walls and pictures|in many houses|a brush and a ladder
miller|grinds grain into flour|in a mill|wind or water
shepherd|looks after sheep|on a hill|a dog and good eyes
postman|brings letters|in every street|a bag and strong legs
librarian|looks after books|in a library|shelves and quiet
beekeeper|looks after bees|in a garden|a hat with a net
clockmaker|mends clocks|in a small shop|tiny tools
potter|makes cups and bowls from clay|in a workshop|a wheel and clay
woodcutter|cuts trees into firewood|in the forest|an axe
musician|plays music|in a hall|an instrument
""",
)

PLACES = _table(
    Place,
    """
the forest|in the forest|trees, moss and birds|walk and pick mushrooms there|quiet and green
the river|by the river|fish, stones and cold water|fish and swim there|clear and cold
the market|at the market|fruit, bread and loud voices|buy food there|busy and bright
the beach|on the beach|sand, shells and small waves|swim and build castles there|warm and sandy
the farm|on the farm|cows, hens and a big barn|grow food there|busy from early morning
the hill|on the hill|grass, wind and a wide view|fly kites there|windy and high
the village|in the village|small houses and a stone well|live and work there|small and friendly
the school|at the school|desks, books and children|learn to read and count there|lively in the morning
the library|in the library|many books and soft chairs|read and borrow books there|quiet and warm
the garden|in the garden|flowers, beans and a bench|grow flowers there|full of colours
the lake|by the lake|ducks, reeds and a little boat|row and fish there|calm and wide
the mill|at the mill|grain, flour and a big wheel|bring their grain there|dusty and loud
the harbour|at the harbour|boats, ropes and gulls|load ships there|full of salty wind
the park|in the park|benches, paths and old trees|walk and play there|open and green
the station|at the station|trains, bags and a big clock|wait for trains there|noisy and full of people
the bakery|in the bakery|bread, cakes and a hot oven|buy fresh bread there|warm and sweet-smelling
the mountain|on the mountain|rocks, snow and thin air|climb and rest there|high and cold
the meadow|in the meadow|grass, bees and wild flowers|lie in the sun there|soft and sunny
""",
)

THINGS = _table(
    Thing,
    """
snow|white|frozen water|make a snowman
grass|green|thin leaves|feed cows
the sky|blue|air|fly in
the sun|yellow|hot gas|give us light
blood|red|water and tiny cells|carry air through the body
coal|black|old plants|make fire
milk|white|water and fat|drink
a chair|brown|wood|sit on
a table|brown|wood|eat at
a bed|white|wood and cloth|sleep in
a window|clear|glass|let light in
a book|many colours|paper|read
a coat|many colours|cloth|keep warm
a boat|brown|wood|travel on water
a bridge|grey|stone|cross a river
a candle|white|wax|give light
a cup|white|clay|drink from
a ball|red|rubber|play with
a kite|many colours|paper and string|fly in the wind
a bottle|green|glass|keep water in
""",
)

GIRLS = tuple(
    """
Anna Mia Lily Rosa Emma Nora Ella Ida Clara Lucy Alice Ruth Maya Zoe Ivy Hanna Sara Lena Tess Molly Nina Vera
Olga June May Iris Dora Kate Amy Eva
""".strip().split()
)
BOYS = tuple(
    """
Tom Ben Max Leo Sam Jack Paul Finn Noah Oscar Hugo Adam Peter Luke Omar Theo Karl Ned Will George Otto Emil Ravi
Dan Joe Nick Tim Felix Ali Henry
""".strip().split()
)
PETS = tuple(
    """
Rusty Pip Bramble Clover Moss Pebble Hazel Button Acorn Willow Fern Biscuit Nutmeg Sage Tansy Bracken
""".strip().split()
)

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "purple", "orange", "silver")
MIXES = (
    ("red", "yellow", "orange"),
    ("blue", "yellow", "green"),
    ("red", "blue", "purple"),
    ("red", "white", "pink"),
    ("black", "white", "grey"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple(
    """
January February March April May June July August September October November December
""".strip().split()
)
SEASONS = {"spring": (2, 3, 4), "summer": (5, 6, 7), "autumn": (8, 9, 10), "winter": (11, 0, 1)}
SEASON_FACTS = {
    "spring": "the snow melts and the first flowers open",
    "summer": "the days are long and warm",
    "autumn": "the leaves turn red and yellow and fall",
    "winter": "the days are short and cold",
}
NUMBERS = tuple(
    """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty
""".strip().split()
)
OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in """
big/small hot/cold long/short high/low old/young new/old fast/slow happy/sad light/dark day/night up/down
open/closed full/empty wet/dry hard/soft loud/quiet strong/weak early/late near/far good/bad rich/poor
clean/dirty thick/thin wide/narrow heavy/light sweet/sour left/right in/out first/last true/false easy/difficult
warm/cool begin/end push/pull give/take buy/sell win/lose laugh/cry ask/answer remember/forget love/hate
arrive/leave brave/afraid black/white summer/winter
""".strip().split()
)
SENSES = (
    ("eyes", "see"),
    ("ears", "hear"),
    ("nose", "smell"),
    ("tongue", "taste"),
    ("hands", "hold things"),
    ("legs", "walk"),
    ("teeth", "bite and chew"),
)
ROOMS = (
    ("kitchen", "cook meals"),
    ("bedroom", "sleep"),
    ("bathroom", "wash"),
    ("living room", "sit and talk"),
    ("cellar", "keep potatoes and jam"),
    ("attic", "keep old things"),
    ("workshop", "make and mend things"),
)
SHAPES = (("triangle", "three"), ("square", "four"), ("rectangle", "four"), ("pentagon", "five"), ("hexagon", "six"))
COUNTS = (
    ("days", "a week", "seven"),
    ("months", "a year", "twelve"),
    ("seasons", "a year", "four"),
    ("hours", "a day", "twenty-four"),
    ("minutes", "an hour", "sixty"),
    ("seconds", "a minute", "sixty"),
    ("fingers", "one hand", "five"),
    ("wheels", "a bicycle", "two"),
    ("wheels", "a car", "four"),
    ("letters", "the English alphabet", "twenty-six"),
)
WEATHER = (
    ("rain", "it rains", "take an umbrella and wear boots", "the ground gets wet and plants can drink"),
    ("snow", "it snows", "wear a warm coat, a hat and gloves", "the ground turns white"),
    ("wind", "it is windy", "hold on to your hat", "the leaves dance and kites fly high"),
    ("sunshine", "it is sunny", "wear a hat and drink water", "everything is bright and warm"),
    ("fog", "it is foggy", "walk slowly and carry a lamp", "it is hard to see far"),
    ("a storm", "there is a storm", "stay inside and close the windows", "there is thunder and lightning"),
    ("frost", "there is frost", "walk carefully, because the path is slippery", "thin ice covers the puddles"),
)
