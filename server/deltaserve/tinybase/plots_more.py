"""More plots for `stories`: the slots are those of `plots`."""

from __future__ import annotations

from deltaserve.tinybase.plots import Plot

MORE_PLOTS: tuple[Plot, ...] = (
    Plot(
        ("a new friend", "making friends", "being lonely"),
        (
            "^$H was new $at and did not know anybody. {^$he felt a little lonely.|All the others were playing, but "
            "nobody asked $him.}",
            "{On $day $he sat alone on a stone.|^$he sat down and looked at the ground.} {Then $he saw somebody else "
            "who was alone too.|Not far away sat somebody else, all alone.} It was $F.",
            '{"Hello," said $H. "May I sit here?" {"Yes, please," said $F and moved over.|"Of course," said $F with a '
            'smile.}|"I am $H," said $H. "Who are you?" {"I am $F," was the shy answer.|^$F looked up and smiled. "I '
            'am $F," $fhe said.}}',
            "{They found out that they both liked $foods.|^$H had a $col $obj, and $F wanted to see it.|They talked "
            "about the weather, and then about everything else.} {Soon they were laughing.|Soon the time flew by.}",
            "{The next day they met again.|They built a little house of sticks and leaves.|They played until the sun "
            "went down.} {Others came and asked if they could play too.|Nobody was lonely any more.}",
            '{"I am glad that you said hello," said $F.|"Sometimes one word is enough," thought $H.}',
        ),
    ),
    Plot(
        ("building something", "a boat", "a house", "a kite"),
        (
            '^$H wanted to build {a boat|a small house|a kite|a bridge}. {"That is too hard for you," said $F.|^$he '
            "made "
            'a drawing first.|"I will help you," said $F.}',
            "{^$he looked for wood and string $at.|They gathered wood, string and an old cloth.} {The wood was "
            "heavy, but $H carried it piece by piece.|It took the whole morning to bring everything together.}",
            "{The first one broke after a minute.|The first one fell over when the wind blew.} {^$H was sad, but not "
            "for "
            'long.|"Now I know what was wrong," said $H.}',
            "{The second one was better.|^$E showed $him how to tie a strong knot.} {The third one held.|This time "
            "it was strong.}",
            '{Everyone came to look.|^$F was the first to try it.} {"It works!" cried $F.|"I did not think that you '
            'could do it," said $F.}',
            '{"I did not think so either," said $H and laughed.|^$H was proud, because $he had not given up.|They '
            "played with it until it was dark.}",
        ),
    ),
    Plot(
        ("being greedy", "a trick", "a lesson"),
        (
            "^$H loved $foods more than anything. {One day $he found a whole bag of them $at.|There was a big tree "
            "full of them $at.}",
            '{"These are all mine," said $H.|"I will not tell anybody," thought $H.} {^$F asked for one, but $H said '
            "no.|When $F came by, $H hid them behind $his back.}",
            "{So $H ate and ate.|^$he ate one, and another one, and then ten more.} {Soon $his stomach hurt.|Then "
            "$he could not move any more.}",
            '{"Help!" called $H.|^$he lay on the ground and cried.} {^$F heard it and came at once.|The only one who '
            "came was $F.}",
            '{^$F brought water and sat with $him until it was better.|"Drink this tea," said $F. "It will help."} '
            '{^$H felt ashamed. "I am sorry," $he '
            'said.|"Why do you help me?" asked $H. "I gave you nothing." "Because you are my friend," said $F.}',
            '{"That is what friends do," said $F.|"One is enough, and two are for friends," said $F.} {Since '
            "then $H always shares.|The next day $H gave $F the biggest of all the $foods.}",
        ),
    ),
    Plot(
        ("the snow", "a winter day", "a snowman"),
        (
            "{When $H woke up, the whole world was white.|In the night it had snowed.} {Snow lay on every roof and "
            "every branch.|Everything was very quiet.}",
            '{^$H ran outside and called $F.|"Come out, $call!" called $H.} {The snow was deep and soft.|The cold '
            "air made little clouds when they spoke.}",
            "{They rolled a big ball, and then a smaller one.|They decided to build a snowman.} {For the nose they "
            "took a carrot.|Two black stones became the eyes.}",
            '{But a hat was missing.|"He looks cold," said $F.} {So $H gave him the scarf of $E.|^$E brought an '
            "old hat and put it on his head.}",
            "{Then they threw snowballs until their hands were cold.|They slid down the hill again and again.} "
            "{Inside, there was hot soup.|^$E made warm milk with honey for everyone.}",
            "{A week later the sun came back, and the snowman grew smaller every day.|In the evening the moon shone "
            "on the "
            'snowman.} {"He will come back next winter," said $H.|"Good night, snowman," said $H.}',
        ),
    ),
    Plot(
        ("a letter", "an errand", "a long way"),
        (
            '{^$E gave $H a letter.|One morning $E had a letter that was very important.} {"Please bring it to $F," '
            "said "
            '$E. "And do not lose it."|It was for $F, who lived on the other side of the hill.}',
            "{^$H put it in $his bag and set off.|^$H promised to be careful and went.} {The way was long and led "
            "past the mill.|First $he crossed the river, and then the meadow.}",
            "{On the bridge a strong wind came.|Suddenly there was a gust of wind.} {It took the letter and carried it "
            'away.|The letter flew up like a bird.} {"Stop!" cried $H and ran after it.|}',
            "{It flew over the fence and into the field.|It landed in a tree, high above the ground.} {A crow picked "
            "it up "
            'and looked at it.|^$H could not reach it.} {"Please give it back," said $H. "I will give you some '
            'bread."|So $he climbed up slowly, branch by branch.}',
            "{At last the letter was safe again.|A little later $he held the letter in $his hand.} {It was a bit "
            "dirty, but nobody could mind that.|}",
            '{^$F opened the door and read it.|When $F read the letter, $fhe began to smile.} {"Come to my party '
            'tomorrow," it said.|It said, "I miss you. Please come and visit me."} {"You came at the right time," said '
            '$F. "I have just made tea."|"Thank you for bringing it all this way," said $F.}',
        ),
        "person",
    ),
    Plot(
        ("learning something new", "learning to swim", "trying again"),
        (
            "^$H wanted to learn {how to swim|how to whistle|how to climb|how to dance}. {All the others could do "
            "it.|^$F could do it very well.}",
            "{On the first day it went wrong.|The first time was terrible.} {^$F laughed a little.|^$H wanted to "
            "give up.} "
            '{"I will never learn it," said $H.|}',
            '{"Nobody can do it on the first day," said $E.|"I needed a whole summer," said $F.} {"Try a little '
            'every day."|"Shall I show you once more?"}',
            "{So $H practised $at every morning.|Every day after lunch $he tried again.} {On $day it went a little "
            "better.|After a week it was not so hard any more.}",
            '{Then, one day, it worked!|And suddenly $he could do it.} {^$H could hardly believe it.|"Look!" cried $H. '
            '"Look at me!"}',
            '{^$F clapped and cheered.|"I knew it," said $E.} {Now $H teaches the little ones, and $he never laughs at '
            "them.|That evening $H was tired and very happy.}",
        ),
    ),
    Plot(
        ("the market", "shopping", "forgetting something"),
        (
            'On $day $E sent $H to the market. {"Bring me six eggs, some $foods and a loaf of bread," said '
            '$E.|"Please buy '
            'bread, milk and some $foods," said $E.}',
            "{On the way $H said the words again and again.|^$H did not write it down.} {Then $he met $F, and they "
            "talked for a while.|Then a band with drums came down the street.}",
            "{When $he arrived, $he had forgotten everything.|At the market $he stood still. What was it again?} "
            '{"Was it '
            'fish? Was it cheese?" $he wondered.|^$he remembered the bread, but nothing else.}',
            '{^$H closed $his eyes and thought of the kitchen.|"What does $E cook today?" asked $F.} {"$foods!" $he '
            'cried. "We need $foods!"|Then $he smelled the $foods and remembered everything.}',
            "{^$he bought everything and carried the heavy bag home.|^$F helped $him to carry the bag.} {One egg "
            "broke, but the rest was fine.|Nothing was missing.}",
            '{"Well done," said $E.|^$E laughed when $he told the story.} {"Next time I will write it down," said '
            "$H.|And from then on $H always took a pencil.}",
        ),
        "person",
    ),
    Plot(
        ("the moon", "the stars", "a dream", "a wish"),
        (
            "{One clear night $H sat $at and looked at the moon.|^$H could not sleep and looked out at the stars.} "
            "{It was round and white like a plate.|They looked like tiny lamps.}",
            '{"I want to touch it," said $H.|"Can I have one?" asked $H.} {^$he climbed on a stone, but it was too '
            "far.|^$he climbed the highest hill, but it was still too far.}",
            '{Then $he saw something in the water.|Then $F called, "Come here and look at the lake."} {There was the '
            "moon, right in front of $him.|All the stars were lying in the lake.}",
            "{^$H put a hand into the water, and the light broke into a hundred pieces.|When $H touched it, it "
            "danced and "
            'laughed.} {"Wait," said $F. "It comes back."|And when the water was still, it came back.}',
            '{"Nobody can keep it," said $F, "but everybody can look at it."|"It belongs to all of us," said $H '
            "softly.}",
            "{They sat there for a long time and said nothing.|Then they went home through the silver grass.} {That "
            "night $H dreamed of flying.|^$H fell asleep with a smile.}",
        ),
    ),
    Plot(
        ("the sea", "a pirate", "a ship", "a treasure"),
        (
            "{^$H lived near the sea and loved ships.|^$H found an old map in a bottle on the beach.} {One day an "
            "old pirate "
            'came into the harbour.|"This is a treasure map!" said $H.}',
            '{An old pirate looked at $him and said, "Arr! What do ye want, matey?"|"Ahoy, matey!" called the pirate. '
            '"Do ye want to see me ship?"}',
            '{"I want to find the treasure," said $H.|"May I sail with you?" asked $H.} {"Arr, then come aboard!" '
            'said the pirate.|"Aye, there be room for one more," said the pirate.}',
            "{They sailed for two days, and the wind was good.|The waves were high, but the ship was strong.} {On a "
            "small island they began to dig.|Then they saw an island with one tall tree.}",
            "{There was a chest, but it was not full of gold.|At last the spade hit something hard. It was a box.} "
            "{It was full of old books.|Inside they found a hundred $foods, and they were still good.}",
            '{"Shiver me timbers!" said the pirate and laughed.|"Arr, that be the best treasure of all," said the '
            "pirate.} {They sailed home and told everyone about it.|^$H took one as a gift for $F and sailed home.}",
        ),
    ),
)
