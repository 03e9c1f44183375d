"""The topics of the demo's speakers, and the words for them.

A topic is named in two vocabularies that share no content word. `captions` are what a viewer would
write about the clip ("baking bread"); a script, which is what is spoken and transcribed, is one of
`openers` followed by one of `closers` ("knead the dough well, then heat the oven"). That the two
mean the same can only be learnt from clips that have both, which a model that reads transcripts
must do. The parts of one topic's scripts share a few words among themselves, so that
about ten training clips are enough; any opener goes with any closer, so that every test script is
new while its words are not. No topic needs a word that names a shape, a colour, a motion or a sound
of the demo.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """One topic: three phrases for captions, and four openers and four closers of scripts."""

    captions: tuple[str, str, str]
    openers: tuple[str, str, str, str]
    closers: tuple[str, str, str, str]


TOPICS: dict[str, Topic] = {
    "bread": Topic(
        ("baking bread", "making a fresh loaf", "bread and baking"),
        ("knead the dough well", "mix flour with yeast", "let the dough rest", "weigh the flour"),
        (
            "then heat the oven",
            "until the yeast rises",
            "and dust it with flour",
            "before the oven gets hot",
        ),
    ),
    "football": Topic(
        ("a football match", "playing football", "the football team"),
        (
            "the striker kicks the ball",
            "the goalkeeper dives",
            "a penalty for our goalkeeper",
            "the referee stopped us",
        ),
        (
            "and the goalkeeper saves it",
            "after a late penalty",
            "and the ball went in",
            "and the referee agreed",
        ),
    ),
    "chess": Topic(
        ("playing chess", "a game of chess", "learning chess"),
        (
            "move your knight forward",
            "the bishop takes a pawn",
            "protect your queen early",
            "my rook and queen retreat",
        ),
        (
            "and threaten the queen",
            "before the knight attacks",
            "and give up a pawn",
            "and your rook gives checkmate",
        ),
    ),
    "space": Topic(
        ("travelling in space", "a trip into space", "space travel"),
        (
            "the rocket leaves the launchpad",
            "the astronauts are floating",
            "the capsule orbits the moon",
            "astronauts enter the capsule",
        ),
        (
            "and the rocket reaches orbit",
            "far above planet earth",
            "while astronauts look at earth",
            "and the capsule lands",
        ),
    ),
    "garden": Topic(
        ("working in the garden", "garden tips", "looking after a garden"),
        (
            "plant the seeds in soil",
            "remove the weeds early",
            "dig the soil deep",
            "trim the hedge and shrubs",
        ),
        (
            "and water the seedlings",
            "and throw the weeds out",
            "and spread some compost",
            "then rake the compost in",
        ),
    ),
    "fishing": Topic(
        ("going fishing", "a fishing trip", "fishing for fun"),
        (
            "put bait on the hook",
            "cast the rod far out",
            "the trout ate the bait",
            "bring the net closer",
        ),
        (
            "and reel the trout in",
            "then hold the rod still",
            "before the hook slips",
            "and lift the net",
        ),
    ),
    "money": Topic(
        ("saving money", "advice on money", "managing money"),
        (
            "the bank charges interest",
            "check your bank account",
            "the budget is tight",
            "pay back the loan",
        ),
        (
            "and save on interest",
            "before the loan is due",
            "so the bank is happy",
            "and plan a budget",
        ),
    ),
    "dentist": Topic(
        ("a visit to the dentist", "seeing the dentist", "the dentist appointment"),
        (
            "open your mouth wide",
            "brush your teeth twice daily",
            "this tooth has a cavity",
            "your gums and teeth ache",
        ),
        (
            "and floss between the teeth",
            "so your tooth needs filling",
            "then rinse your mouth",
            "or you get a cavity",
        ),
    ),
    "school": Topic(
        ("going to school", "a day at school", "school life"),
        (
            "the teacher hands out homework",
            "students sit in the classroom",
            "the exam is on Monday",
            "the lesson was about grammar",
        ),
        (
            "and the teacher smiles",
            "so finish your homework",
            "and the students take notes",
            "before the exam begins",
        ),
    ),
    "wedding": Topic(
        ("a wedding day", "planning a wedding", "a wedding party"),
        (
            "the bride wears a veil",
            "the groom was nervous",
            "the bridesmaids carry a bouquet",
            "she married the groom",
        ),
        (
            "and the guests throw rice",
            "then the guests applaud",
            "and she throws the bouquet",
            "before he kisses the bride",
        ),
    ),
    "camping": Topic(
        ("camping outdoors", "a camping holiday", "camping with friends"),
        (
            "pitch the tent here",
            "bring a lantern and firewood",
            "collect wood for a fire",
            "zip the tent shut",
        ),
        (
            "and light the fire",
            "and roast marshmallows over fire",
            "before the tent gets wet",
            "and pack a lantern",
        ),
    ),
    "swimming": Topic(
        ("swimming lessons", "learning to swim", "a swimming class"),
        (
            "jump into the pool",
            "put on your goggles",
            "move your legs underwater",
            "the lifeguard watches the pool",
        ),
        (
            "and hold your breath underwater",
            "and swap goggles again",
            "and clean your goggles",
            "near the lifeguard",
        ),
    ),
    "photography": Topic(
        ("taking photographs", "photography for beginners", "better photographs"),
        (
            "focus the camera lens",
            "try another lens",
            "set up the tripod",
            "press the shutter gently",
        ),
        (
            "and keep the camera steady",
            "then click the shutter",
            "and wipe the lens",
            "on a sturdy tripod",
        ),
    ),
    "volcano": Topic(
        ("a volcano", "how a volcano works", "living near a volcano"),
        (
            "hot lava runs downhill",
            "the crater filled with magma",
            "ash covered the village",
            "an eruption began overnight",
        ),
        (
            "and lava burned the trees",
            "while ash rose high",
            "after the eruption ended",
            "near the smoking crater",
        ),
    ),
    "election": Topic(
        ("an election", "news of the election", "the election result"),
        (
            "the candidate gave a speech",
            "voters stood in line",
            "count every ballot twice",
            "the mayor lost his seat",
        ),
        (
            "and voters cheered",
            "after the last ballot",
            "so the candidate won",
            "and the mayor resigned",
        ),
    ),
    "airport": Topic(
        ("catching a plane", "time at the airport", "an airport delay"),
        (
            "the flight was cancelled",
            "bring your passport along",
            "the pilot welcomes the passengers",
            "your luggage is too heavy",
        ),
        (
            "and board the flight",
            "then collect your luggage",
            "while the passengers wait",
            "and show your passport",
        ),
    ),
    "train": Topic(
        ("a ride on the train", "taking the train", "a train journey"),
        (
            "the railway platform is crowded",
            "the conductor wants your ticket",
            "this carriage is full",
            "wait behind the platform edge",
        ),
        (
            "and find your carriage",
            "along the platform",
            "before the conductor comes",
            "along the old railway",
        ),
    ),
    "coffee": Topic(
        ("making coffee", "a cup of coffee", "good coffee"),
        (
            "grind the beans finely",
            "order an espresso",
            "steam milk for a latte",
            "roasted beans smell lovely",
        ),
        (
            "and froth the milk",
            "then sip the espresso",
            "until the beans are ground",
            "and serve the latte",
        ),
    ),
    "knitting": Topic(
        ("knitting at home", "a knitting project", "how to knit"),
        (
            "buy a ball of wool",
            "count every stitch",
            "hold both needles loosely",
            "use a thick yarn",
        ),
        (
            "and start a yarn scarf",
            "then drop one stitch",
            "with longer needles",
            "until the yarn runs out",
        ),
    ),
    "cheese": Topic(
        ("making cheese", "how cheese is made", "tasting cheese"),
        (
            "curdle the goat milk",
            "press the curds firmly",
            "keep cheddar in the cellar",
            "drain all the whey",
        ),
        (
            "and salt the curds",
            "then slice some cheddar",
            "and drain the whey",
            "inside a cool cellar",
        ),
    ),
    "skiing": Topic(
        ("a skiing holiday", "skiing with family", "learning to ski"),
        (
            "snow fell on the slope",
            "ride the chairlift upward",
            "bend your knees in snow",
            "wear gloves in the snow",
        ),
        (
            "and race down the slope",
            "on the snowy mountain",
            "before the chairlift closes",
            "through deep powder snow",
        ),
    ),
    "horses": Topic(
        ("riding horses", "looking after horses", "a love of horses"),
        (
            "put the saddle on",
            "wash the pony gently",
            "the pony eats hay",
            "gallop back to the stable",
        ),
        (
            "and clean the stable",
            "then tighten the saddle",
            "while the pony drinks",
            "and feed her hay",
        ),
    ),
    "bees": Topic(
        ("keeping bees", "the life of bees", "beekeeping"),
        (
            "the hive is full",
            "honey drips from the comb",
            "a swarm entered the hive",
            "workers gather nectar",
        ),
        (
            "and taste the honey",
            "while nectar turns sweet",
            "and cover the hive",
            "before the swarm returns",
        ),
    ),
    "surfing": Topic(
        ("surfing lessons", "a surfing contest", "going surfing"),
        (
            "paddle out past the reef",
            "huge waves hit the beach",
            "stand up on the board",
            "wax your board first",
        ),
        (
            "and catch big waves",
            "while waves break",
            "near the sandy beach",
            "above the sharp reef",
        ),
    ),
    "egypt": Topic(
        ("ancient Egypt", "the history of Egypt", "visiting Egypt"),
        (
            "a pharaoh built the pyramid",
            "a mummy in the tomb",
            "hieroglyphs cover the pyramid",
            "they opened the tomb",
        ),
        (
            "beside the river Nile",
            "inside the great pyramid",
            "and buried the pharaoh",
            "under the desert sand",
        ),
    ),
    "dinosaurs": Topic(
        ("dinosaurs", "a book about dinosaurs", "facts about dinosaurs"),
        (
            "fossil bones were found",
            "a giant reptile lived here",
            "the reptile has claws",
            "these reptiles became extinct",
        ),
        (
            "and the reptile vanished",
            "when they went extinct",
            "with sharp claws and scales",
            "like this fossil skull",
        ),
    ),
    "glasses": Topic(
        ("buying glasses", "new glasses", "wearing glasses"),
        (
            "the optician tested my eyes",
            "my eyesight is blurry",
            "try a plastic frame",
            "read the smallest letters",
        ),
        (
            "so my eyesight improved",
            "and thank the optician",
            "with a lighter frame",
            "and test both eyes",
        ),
    ),
    "baby": Topic(
        ("raising a baby", "a newborn baby", "baby care"),
        (
            "change the diaper quickly",
            "warm the milk bottle",
            "the infant cannot crawl yet",
            "rock the cradle softly",
        ),
        (
            "and burp the infant",
            "then wash the bottle",
            "inside the wooden cradle",
            "before the next diaper",
        ),
    ),
    "moving": Topic(
        ("moving house", "a house move", "moving to a new flat"),
        (
            "tape the cardboard boxes",
            "load the sofa first",
            "the van is parked outside",
            "wrap the furniture in blankets",
        ),
        (
            "and label the boxes",
            "then unload the van",
            "so no furniture breaks",
            "and carry the sofa upstairs",
        ),
    ),
    "bicycle": Topic(
        ("repairing a bicycle", "fixing a bicycle", "bicycle repairs"),
        (
            "put air in both tyres",
            "oil the rusty chain",
            "adjust the handlebars",
            "the pedal is bent",
        ),
        (
            "and straighten the handlebars",
            "then tighten the pedal",
            "before the chain snaps",
            "and patch the tyres",
        ),
    ),
    "cinema": Topic(
        ("watching films", "a film review", "a night at the cinema"),
        (
            "the actor forgot his lines",
            "the actor was brilliant",
            "grab popcorn before the trailer",
            "the director shouted action",
        ),
        (
            "and the actor bowed",
            "so pass the popcorn",
            "and the trailer lied",
            "and the director won again",
        ),
    ),
    "magic": Topic(
        ("magic tricks", "a magic show", "learning magic"),
        (
            "take any card you like",
            "the rabbit hides again",
            "watch the wand closely",
            "hold the wand and hat",
        ),
        (
            "and shuffle the card deck",
            "then the rabbit disappears",
            "under the velvet hat",
            "and wave your wand",
        ),
    ),
    "crime": Topic(
        ("a crime story", "solving a crime", "crime news"),
        (
            "the detective found a clue",
            "a thief robbed the museum",
            "the thief escaped at midnight",
            "the suspect told a lie",
        ),
        (
            "and arrested the thief",
            "without a single clue",
            "so the suspect confessed",
            "and the detective knew",
        ),
    ),
    "hospital": Topic(
        ("a stay in hospital", "hospital work", "life in a hospital"),
        (
            "the surgeon washed his hands",
            "the nurse took my temperature",
            "give the patient medicine",
            "the patient has a fever",
        ),
        (
            "and the nurse helped",
            "before the surgeon operates",
            "so take your medicine",
            "and the patient recovered",
        ),
    ),
    "laundry": Topic(
        ("doing the laundry", "laundry day", "laundry advice"),
        (
            "sort the dirty socks",
            "add detergent and softener",
            "iron this wrinkled shirt",
            "remove the stain quickly",
        ),
        (
            "and hang up the shirt",
            "then fold the socks",
            "with plenty of detergent",
            "so the stain fades",
        ),
    ),
    "programming": Topic(
        ("computer programming", "writing programs", "a programming course"),
        (
            "look at the code",
            "this function has an error",
            "type it on your keyboard",
            "the loop never ends",
        ),
        (
            "and debug the function",
            "and fix the error",
            "so rewrite the code",
            "inside the inner loop",
        ),
    ),
    "farming": Topic(
        ("work on a farm", "farming today", "a family farm"),
        (
            "milk the cows at dawn",
            "the tractor ploughs the field",
            "harvest the wheat soon",
            "feed the pigs and cows",
        ),
        (
            "and park the tractor",
            "behind the cows",
            "when the wheat is ripe",
            "then fence the field",
        ),
    ),
    "books": Topic(
        ("reading books", "a favourite book", "a book club"),
        (
            "the novel has ten chapters",
            "borrow it from the library",
            "the author signed my copy",
            "turn the page slowly",
        ),
        (
            "and finish the chapters",
            "from a famous author",
            "at the village library",
            "on the first page",
        ),
    ),
    "dancing": Topic(
        ("learning to dance", "a dance class", "an evening of dancing"),
        (
            "start with a waltz",
            "stay close to your partner",
            "the ballerina wears slippers",
            "tango has a fast rhythm",
        ),
        (
            "and twirl your partner",
            "just like a ballerina",
            "to the rhythm of tango",
            "and repeat the waltz",
        ),
    ),
    "sailing": Topic(
        ("sailing a boat", "a boat trip", "going sailing"),
        (
            "lift anchor and hoist flags",
            "the captain drops anchor",
            "the harbour is calm today",
            "steer the ship carefully",
        ),
        (
            "and leave the harbour",
            "before the anchor drags",
            "said the old captain",
            "and tie up the ship",
        ),
    ),
}
