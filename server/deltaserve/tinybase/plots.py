"""What can happen in a story: each plot is a row of beats, and each beat is one template (see `phrase`).

Slots: $H hero, $he/$him/$his; $F friend, $fhe/$fhim/$fhis; $E an elder; $at a place; $home; $obj and $col a thing and
its colour; $food; $tool and $use; $day. `^` makes the next letter a capital.
"""

from __future__ import annotations

from typing import NamedTuple


class Plot(NamedTuple):
    about: tuple[str, ...]  # what a reader would ask for: "a story about ..."
    beats: tuple[str, ...]
    who: str = "any"  # "any", "person" or "animal"


_END = (
    "{^$H went home with a happy heart.|That night $H slept very well.|It had been a good day.|From that day on, $H "
    "and $F were good friends.|^$H smiled all the way home.|And they all laughed.|^$H never forgot that day.|In the "
    "evening they sat together and {watched the stars|told stories|drank warm milk|shared some $food}.}"
)

PLOTS: tuple[Plot, ...] = (
    Plot(
        ("a lost $obj", "something that was lost", "looking for a $obj"),
        (
            "{One {morning|day|evening}|On $day|After breakfast}, $H could not find $his $col $obj.",
            "{^$he looked under the bed|^$he looked behind the door}, but it was not there. {Then $he looked in the "
            "{basket|garden|cupboard}, but it was not there either.|^$he looked everywhere at home and found only "
            "dust.|}",
            '{^$he felt sad, because the $obj was a gift from $E.|"Where can it be?" said $H.|"I must have lost it '
            'outside," $he thought.}',
            '{^$H asked $F for help.|Then $F came by. "What is wrong?" asked $F.} {"I have lost my $obj," said $H.'
            '|"My $col $obj is gone," said $H. "Have you seen it?"}',
            '{"Let us look $at," said $F.|"Where did you go yesterday?" asked $F. "I was $at," said $H.|$F thought '
            'for a moment and said, "You had it $at."} {Together they went there and looked carefully.|They walked '
            "there side by side.}",
            "{Something $col was lying in the grass.|Behind a big stone they saw something $col.|Under a leaf lay "
            'something small and $col.} {It was the $obj!|"There it is!" cried $H. It was the lost $obj.}',
            '{"Thank you, $call," said $H. "I could not have found it without you."|^$H thanked $F and put the $obj '
            "in a safe place.|^$H was so happy that $he gave $F a big hug.}",
            _END,
        ),
    ),
    Plot(
        ("the rain", "a rainy day", "a walk in the rain", "a storm"),
        (
            "{On $day|One {morning|afternoon}}, $H went for a walk $at. {The sun was shining|The sky was blue} and "
            "{there was no wind|the air was warm}.",
            "{Then dark clouds came over the hill.|But soon the sky turned grey.} {The first drops fell|It began to "
            "rain}, and {a cold wind blew|there was thunder far away}.",
            '{^$H had no umbrella.|^$he was far from home.} {"I will be wet to the bone," $he said.|"Where can I '
            'hide?" $he thought.}',
            "{^$he ran to a big tree, but water dripped through the leaves.|^$he looked around and saw an old "
            '{barn|bridge|hut}.} {Then $he heard a voice. "Come in here!" called $F. "It is dry."|^$F was already '
            'there. "There is room for two," said $F.}',
            "{They sat close together and listened to the rain.|They shared some $food and told stories.|They "
            "counted the seconds between the lightning and the thunder.} {After an hour the rain stopped.|Slowly the "
            "clouds moved away.}",
            "{A rainbow stood over the fields.|The air smelled fresh, and every leaf was shining.|There were puddles "
            "everywhere, and they jumped into every one.}",
            '{"Rain is not so bad when you have a friend," said $H.|"Next time I will take an umbrella," said $H, '
            "and $F laughed.}",
            _END,
        ),
    ),
    Plot(
        ("something broken", "a broken $fix", "a $tool", "mending things"),
        (
            "{One day|On $day} $H's $fix broke. {There was a loud crack, and it fell into two parts.|It made a sad "
            "noise and then it did not work any more.}",
            '{"Oh no!" said $H. "What shall I do now?"|^$H wanted to throw it away.|^$H tried to mend it with string, '
            "but it broke again.}",
            '{^$E saw it and said,|^$F came by and said,} {"Do not worry. We can mend it."|"Do not throw it away. It '
            'only needs a little work."}',
            '{They took a $tool from the shed.|First they found a $tool.} {A $tool is good if you want to $use.|"Hold '
            'it very still," said the helper.} {^$H watched carefully and then tried it $himself.|They worked slowly '
            "and did not hurry.}",
            "{The first try did not go well.|It took the whole afternoon.|It was harder than it looked.} {But $H did "
            "not give up.|They laughed and tried again.}",
            "{In the end the $fix was as good as new.|At last it was done, and the $fix was even stronger than "
            "before.|When the sun went down, the $fix was whole again.}",
            '{"Now I know how to do it," said $H proudly.|"Old things can be good things," said $H.|^$H put the '
            "$tool back in its place and said thank you.}",
        ),
        "person",
    ),
    Plot(
        ("baking", "a cake", "a birthday", "a party"),
        (
            "{It was $F's birthday.|Tomorrow was $F's birthday.} ^$H wanted to {bake a cake|make a surprise}.",
            "{^$he needed flour, eggs, milk and sugar.|^$he put flour and eggs on the table.} {But there was no "
            "sugar in the house.|But the last egg fell on the floor.|But there were no $foods left.}",
            '{So $H went to the market|So $H ran to the bakery} {and asked for help.|with a small basket.} {"What do '
            "you "
            'need?" asked $E. "I want to bake a cake for $F," said $H.|^$E gave $him what $he needed and wished $him '
            "luck.}",
            "{At home $he mixed everything in a big bowl.|Back in the kitchen $he stirred and stirred.} {There was "
            "flour on $his nose.|Soon the whole kitchen was white with flour.} {Then the cake went into the "
            "oven.|^$he put the cake into the hot oven and waited.}",
            "{After an hour the whole house smelled sweet.|The cake came out golden and warm.|One side of the cake "
            "was a little too dark, but that did not matter.} {^$he put some $foods on top.|^$he put a candle in the "
            "middle.}",
            '{When $F opened the door, everyone sang.|^$F came in and could not believe it.} {"Is this for me?" asked '
            '$F.|"Happy birthday!" cried $H.}',
            "{They ate until nothing was left.|It was the best cake in the whole village.|Everybody got a piece, "
            "even the "
            'cat.} {"You are a good friend," said $F.|}',
        ),
        "person",
    ),
    Plot(
        ("helping somebody", "a rescue", "a little $young", "being brave"),
        (
            "{One {cold|windy|quiet} {morning|evening}|On $day}, $H heard a small cry $at.",
            "{^$he stopped and listened.|^$he followed the sound.} {Behind a bush sat a little $young.|In a deep "
            "hole sat a little $young.|A little $young was stuck between two stones.} {It was shaking with cold.|It "
            "looked very small and afraid.}",
            '{"Do not be afraid," said $H. "I will help you."|"Are you lost?" asked $H softly.|"I want my mother," '
            "said the little one.}",
            "{^$H tried to lift it, but $he was not strong enough.|^$H pulled and pulled, but nothing moved.} {So "
            "$he called $F.|Then $he ran to fetch $F.} {Together they brought a rope.|^$F brought a long branch.}",
            '{"One, two, three!" they called, and the $young was free.|Slowly and carefully they pulled it out.|It '
            "took a long time, but at last the $young was safe.}",
            "{They gave it some water and carried it home.|Its mother was already looking for it.} {The mother was so "
            'happy that she could not speak.|"Thank you for your help," said the mother.}',
            '{"You were very brave," said $F.|"Small ones need big friends," said $H.|^$H was tired, but also proud.}',
            _END,
        ),
    ),
    Plot(
        ("sharing", "a kind deed", "some $foods", "being hungry"),
        (
            "^$H had a basket full of $foods. {^$he had picked them $at.|It had taken all morning to fill it.}",
            "{On the way home $he met $F.|Then $F came along the path.} {^$F looked tired and hungry.|^$F had eaten "
            "nothing since the day before.}",
            '{"May I have one?" asked $F.|"Those look good," said $F quietly.} {^$H thought about it. ^$he was hungry '
            "too.|At first $H wanted to keep everything.}",
            '{But then $he said, "Take as many as you like."|Then $he smiled and gave $F half of the $foods.|"Let us '
            'eat together," said $H.} {They sat down under a tree.|They sat in the sun and ate.}',
            "{A few weeks later the winter came, and $H had nothing left.|Some time later $H was in trouble. The "
            "winter was long, and the cupboard was empty.} {There was a knock at the door.|One evening somebody "
            "knocked.}",
            '{It was $F with a big bag of $otherfoods.|^$F stood outside in the snow with a bag of $otherfoods.} {"You '
            'shared with me," said $F. "Now I share with you."|"I have not forgotten you," said $F.}',
            "{So a kind deed came back.|^$H learned that sharing makes two hearts warm.|They cooked a hot soup and "
            "were happy.}",
        ),
    ),
    Plot(
        ("a race", "winning and losing", "a contest"),
        (
            "{Every year there was a race $at.|On $day there was a big race $at.} {Everyone came to watch.|^$H "
            "wanted to win it.}",
            '{^$H was fast, but $F was faster.|^$F laughed and said, "You will never win."|^$H had practised every '
            "morning.}",
            '{"Ready, steady, go!" called $E, and they ran.|A bell rang and the race began.} {^$F was soon far in '
            "front.|At first $H and $F were side by side.}",
            "{Then $F stopped to rest, because $fhe felt so sure.|Halfway, $F fell over a root and hurt $fhis foot.} "
            "{^$H came closer and closer, step by step.|^$H saw it and ran on, but then $he slowed down.}",
            '{^$H could have run past. But $he turned back and said, "Take my hand."|"Are you all right?" asked $H. '
            '"Yes," said $F. "Let us go together."}',
            "{They crossed the line at the same time.|Together they came in last, but everybody cheered.}",
            '{"It is better to have a friend than to win," said $H.|"You did not win the race, but you won a friend," '
            "said $E.|Next year they would run again.}",
        ),
    ),
    Plot(
        ("a seed", "a garden", "being patient", "growing things"),
        (
            'In spring $E gave $H a small seed. {"What will it be?" asked $H. "Wait and see," said $E.|"Look after '
            'it well," said $E.}',
            "{^$H dug a hole in the garden and put the seed into it.|^$H planted it in soft earth.} {Every morning "
            "$he gave it water.|^$he put a little stick beside it, so that nobody would step on it.}",
            '{One week went by, and nothing happened.|After three days there was still nothing to see.} {"It is too '
            'slow," said $H.|^$H wanted to dig it up again and look.} {"Good things need time," said $E.|"Be '
            'patient," said $F.}',
            "{Then, after a warm rain, a tiny green leaf came out.|One morning there was a green tip in the brown "
            "earth.} "
            '{^$H jumped for joy.|"It is alive!" cried $H.}',
            "{All summer the plant grew and grew.|The plant grew as high as the fence.} {In the end it carried big "
            "$foods.|In autumn there were so many $foods that $H needed two baskets.}",
            "{^$H gave some to $F and some to $E.|They made soup for the whole village.|^$H kept one seed for the "
            "next year.}",
        ),
    ),
    Plot(
        ("the dark", "being afraid", "a noise in the night", "a mystery"),
        (
            "{It was late at night.|The moon was hidden behind the clouds.} ^$H lay awake and could not sleep. "
            "{There was a strange noise|Something went tap, tap, tap} {outside|at the window|under the roof}.",
            '{"Who is there?" whispered $H. Nobody answered.|^$H hid and held $his breath.} {The noise came again, a '
            "little louder.|Then it was quiet, and then it came again.}",
            '{"It must be a monster," $he thought.|^$his heart was beating fast.} {But lying there was even worse than '
            "looking.|Then $he had an idea and went to wake $F.}",
            "{^$H took a lamp and opened the door a little.|^$F lit a small lamp, and together they crept outside.} "
            "{The light fell on the old tree.|They looked to the left and to the right.}",
            "{There was no monster. It was only a branch that the wind pushed against the wall.|There sat a very "
            "small hedgehog, eating an apple.|It was only a loose board that moved in the wind.}",
            '{^$H laughed out loud.|"So that was all!" said $H.} {"Things look bigger in the dark," said $F.|"Next '
            'time I will look at once," said $H.}',
            "{Then they went back to bed and slept until morning.|Soon everything was quiet, and $H fell asleep.}",
        ),
    ),
)
