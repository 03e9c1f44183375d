"""The wording of the demo's captions: a handful of templates per group, a small vocabulary.

Each group asks for something else, as the groups of the paper's analysis do:

* "vision": what is seen alone. Several clips show the same, so it is rarely unique.
* "sound": the sound, nothing that is seen. About nine clips of the test split share it.
* "speech": the topic, nothing that is seen. Two or three clips share it.
* "sound+speech": the sound and the topic, which together are unique.
"""

GROUPS = ("vision", "sound", "speech", "sound+speech")

# A motion's name is also the key of what goes with it (sounds.FAMILIES).
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "slide": ("slides from side to side", "moves left and right", "is sliding left and right"),
    "bounce": ("bounces up and down", "jumps up and down", "is bouncing"),
    "spin": ("spins around", "turns round and round", "is spinning"),
    "pulse": ("grows and shrinks", "gets bigger and smaller", "is pulsing"),
}

SOUND_PHRASES: dict[str, tuple[str, ...]] = {
    "siren": ("a siren", "a wailing siren", "the siren of an ambulance"),
    "whistle": ("a whistle", "someone whistling", "a slide whistle"),
    "birds": ("birds", "chirping birds", "birds in a tree"),
    "drum": ("a drum", "a drum beat", "someone playing the drums"),
    "clock": ("a clock", "a ticking clock", "the tick of a clock"),
    "dog": ("a dog", "a barking dog", "the barks of a dog"),
    "engine": ("an engine", "a running engine", "the hum of an engine"),
    "saw": ("a saw", "someone sawing wood", "the strokes of a saw"),
    "rain": ("rain", "falling rain", "the noise of heavy rain"),
    "bell": ("a bell", "a church bell", "the bell of a tower"),
    "phone": ("a phone", "a ringing phone", "the ring of a phone"),
    "piano": ("a piano", "piano music", "someone playing the piano"),
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "vision": (
        "a {colour} {shape} {motion}",
        "the {shape} is {colour} and {motion}",
        "here a {colour} {shape} {motion}",
        "a {shape} that is {colour} {motion}",
    ),
    "sound": (
        "we hear {sound}",
        "{sound} in the background",
        "a clip with the sound of {sound}",
        "the sound of {sound} is heard",
    ),
    "speech": (
        "someone talks about {topic}",
        "a voice speaks of {topic}",
        "a person explains {topic}",
        "a speaker on {topic}",
    ),
    "sound+speech": (
        "someone talks about {topic} with {sound} in the background",
        "a voice speaks of {topic} over the sound of {sound}",
        "a person explains {topic} and we hear {sound}",
        "we hear {sound} and a speaker on {topic}",
    ),
}
