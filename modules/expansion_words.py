"""The word lists of the prompt expansion: cue words, and phrases by subject, medium, mood and aspect."""

from collections.abc import Mapping


def _words(text: str) -> frozenset[str]:
    """The words of a text, each once."""
    return frozenset(text.split())


Phrases = Mapping[str, tuple[str, ...]]
"""Aspect of a picture → phrases about it."""

ASPECTS: tuple[str, ...] = ("light", "composition", "finish", "colour", "mood", "depth")
"""The order in which a description gets its phrases."""

NEUTRAL_MEDIUM = "any"

SMALL_WORDS = _words("a an and are as at by for from in into is it its of off on or over the to under up with without")

SUBJECT_CUES: Mapping[str, frozenset[str]] = {
    "person": _words(
        """
        portrait face woman man girl boy child kid lady gentleman queen king princess prince bride groom
        model actor actress dancer singer musician soldier warrior samurai ninja knight nurse doctor
        chef farmer sailor pirate monk witch wizard elf vampire baby teenager grandmother grandfather
        mother father person people couple crowd athlete girlfriend boyfriend male female hero heroine
        mage smile headshot selfie
        """
    ),
    "animal": _words(
        """
        animal cat kitten dog puppy wolf fox bear lion tiger leopard cheetah elephant horse pony cow
        sheep goat pig rabbit bunny hare mouse rat squirrel hedgehog deer moose bird owl eagle hawk
        parrot penguin duck swan crow raven rooster chicken fish shark whale dolphin seal turtle
        tortoise frog toad snake lizard chameleon crocodile insect butterfly moth bee beetle spider
        dragonfly snail octopus jellyfish crab panda koala kangaroo monkey gorilla ape otter beaver
        raccoon giraffe zebra rhino hippo camel llama alpaca dinosaur
        """
    ),
    "fantasy": _words(
        """
        dragon unicorn griffin phoenix fairy goblin orc troll demon angel ghost monster golem castle
        wyvern kraken mermaid sorcery spell magic magical enchanted fantasy mythical dungeon rune wraith
        dwarf centaur
        """
    ),
    "space": _words(
        """
        space galaxy nebula planet star spaceship spacecraft rocket astronaut alien ufo moon asteroid
        comet cosmos cosmic universe orbit satellite mars saturn jupiter robot android cyborg mecha
        cyberpunk futuristic
        """
    ),
    "food": _words(
        """
        food cake bread pizza burger hamburger sandwich soup salad pasta noodle ramen sushi rice steak
        meat cheese egg breakfast lunch dinner dessert pie cookie doughnut donut croissant chocolate
        candy fruit apple banana orange strawberry cherry grape watermelon lemon peach pear vegetable
        tomato coffee tea wine beer cocktail juice pancake waffle meal dish plate honey
        """
    ),
    "vehicle": _words(
        """
        car automobile truck bus van motorcycle motorbike bicycle bike train locomotive tram airplane
        plane aircraft helicopter jet boat ship sailboat yacht submarine tank tractor racecar
        convertible roadster balloon
        """
    ),
    "interior": _words(
        """
        interior room bedroom kitchen bathroom library office studio hallway corridor sofa couch
        armchair fireplace living cafe restaurant shop attic loft lobby workshop desk
        """
    ),
    "city": _words(
        """
        city street town village building skyscraper tower house cottage cabin church cathedral temple
        mosque palace bridge alley market square skyline architecture architectural facade ruin station
        harbour harbor port urban downtown rooftop
        """
    ),
    "flower": _words(
        """
        flower rose tulip sunflower orchid lily daisy poppy peony bouquet blossom garden plant fern moss
        cactus succulent leaf bonsai mushroom ivy lavender lotus
        """
    ),
    "landscape": _words(
        """
        landscape mountain hill valley forest wood tree jungle desert dune beach coast sea ocean lake
        river waterfall canyon cliff island field meadow prairie sky cloud sunset sunrise dawn storm
        snow glacier volcano cave swamp countryside horizon nature path road vineyard lighthouse
        """
    ),
    "object": _words(
        """
        watch clock ring necklace jewel jewelry crown vase bottle cup mug glass lamp book key sword
        shield armor armour guitar violin piano toy doll statue sculpture shoe sneaker bag hat perfume
        phone camera computer chair table box gift umbrella bulb coin gem crystal teapot bowl figurine
        logo icon product
        """
    ),
    "abstract": _words(
        """
        abstract pattern geometric fractal shape texture swirl mandala minimalism kaleidoscope
        background wallpaper gradient mosaic ornament
        """
    ),
}

SUBJECT_PHRASES: Mapping[str, Phrases] = {
    "person": {
        "light": (
            "soft window light", "gentle rim light", "flattering key light", "warm light across the cheek",
            "light falling from one side", "catchlights in the eyes",
        ),
        "composition": (
            "head and shoulders framing", "close three-quarter view", "calm uncluttered background",
            "eye-level viewpoint", "off-centre placement",
        ),
        "finish": (
            "natural skin texture", "expressive eyes", "believable hands", "individual strands of hair",
            "carefully drawn fabric folds",
        ),
        "colour": ("harmonious skin tones", "muted earthy palette", "one quiet accent hue"),
        "mood": ("quiet confidence", "thoughtful expression", "relaxed natural pose", "a hint of a story"),
        "depth": ("softly blurred surroundings", "subject clearly apart from the backdrop"),
    },
    "animal": {
        "light": ("low morning sun", "backlit outline", "soft overcast daylight", "dappled shade"),
        "composition": (
            "eye-level with the creature", "tight framing", "off-centre framing", "low viewpoint",
        ),
        "finish": (
            "every hair and feather readable", "alert glossy eyes", "accurate anatomy", "lively posture",
        ),
        "colour": ("natural earthy hues", "warm coat against cool greens", "subtle tonal variety"),
        "mood": ("curious and alive", "a quiet wild moment", "full of character"),
        "depth": ("creamy background blur", "soft blurred foreground"),
    },
    "fantasy": {
        "light": ("shafts of light through mist", "glowing embers", "cold moonbeams", "ethereal backlight"),
        "composition": (
            "monumental scale", "sweeping diagonal movement", "wide epic framing", "low heroic viewpoint",
        ),
        "finish": (
            "weathered surfaces", "ornate carved details", "layers of worn leather and metal",
            "intricate silhouettes",
        ),
        "colour": ("deep teal and amber", "jewel-like accents", "twilight violets"),
        "mood": ("sense of legend", "mysterious and solemn", "air of ancient wonder"),
        "depth": ("drifting haze between the planes", "towering backdrop fading away"),
    },
    "space": {
        "light": (
            "hard single-source sunlight", "luminous rim glow", "cool instrument glow",
            "starlight on metal",
        ),
        "composition": (
            "vast empty surroundings", "dramatic scale contrast", "clean sweeping curve",
            "wide panoramic frame",
        ),
        "finish": (
            "plausible engineering", "panel lines and small markings", "brushed alloy surfaces",
            "fine dust and scratches",
        ),
        "colour": ("indigo and copper", "electric cyan accents", "restrained cool palette"),
        "mood": ("silence and awe", "sense of discovery", "lonely grandeur"),
        "depth": ("layers of glowing dust", "infinite dark distance"),
    },
    "food": {
        "light": (
            "soft side light from a window", "gentle backlight on the steam", "bright diffused daylight",
        ),
        "composition": (
            "three-quarter angle from above", "close appetising crop", "generous negative space",
            "simple ceramic and linen props",
        ),
        "finish": (
            "glistening surface", "crumbs and tiny droplets", "freshly made look", "tempting texture",
        ),
        "colour": ("fresh saturated hues", "warm golden browns", "clean neutral backdrop"),
        "mood": ("rustic and inviting", "homely comfort", "refined presentation"),
        "depth": ("razor-thin focus plane", "background melting away"),
    },
    "vehicle": {
        "light": (
            "long reflections along the body", "low golden sun", "wet asphalt reflections",
            "crisp studio strip light",
        ),
        "composition": (
            "front three-quarter view", "low wide stance", "sweeping leading lines", "panning motion",
        ),
        "finish": (
            "polished paint and chrome", "precise shut lines", "true mechanical proportions",
            "tactile rubber and glass",
        ),
        "colour": ("deep lacquered color", "cool greys with one warm accent", "dusty sun-bleached tones"),
        "mood": ("restrained power", "wanderlust", "poised stillness"),
        "depth": ("streaked backdrop", "distance dissolving in haze"),
    },
    "interior": {
        "light": (
            "daylight pouring through tall windows", "warm lamp pools", "soft bounced illumination",
            "late afternoon rays",
        ),
        "composition": (
            "straight verticals", "balanced one-point perspective", "inviting sightline",
            "wide but natural view",
        ),
        "finish": (
            "tactile wood and fabric", "lived-in little objects", "accurate joinery",
            "fine weave and grain",
        ),
        "colour": ("warm neutrals", "sage and oak tones", "creamy whites with a dark accent"),
        "mood": ("calm and welcoming", "peaceful morning", "quiet luxury"),
        "depth": ("glimpse of the next room", "foreground furniture framing the scene"),
    },
    "city": {
        "light": ("golden hour glow", "reflections on wet stone", "lamplight at dusk", "slanting late sun"),
        "composition": (
            "strong leading lines", "converging perspective", "layered rooftops",
            "symmetrical frontal view",
        ),
        "finish": (
            "weathered masonry", "crisp window rhythm", "convincing materials", "countless small details",
        ),
        "colour": ("honey-toned stone against blue shade", "slate and brick hues", "faded pastel walls"),
        "mood": ("bustling life", "the hush after rain", "sense of history"),
        "depth": ("hazy distance", "streets receding to the horizon"),
    },
    "flower": {
        "light": ("translucent petals against the sun", "soft greenhouse light", "early sunlight with dew"),
        "composition": (
            "graceful asymmetry", "single bloom in focus", "elegant curved stem",
            "dense natural arrangement",
        ),
        "finish": ("fine veins and pollen", "velvety petals", "botanical accuracy", "drops of dew"),
        "colour": (
            "fresh greens with a vivid accent", "tender pastel gradation", "rich complementary hues",
        ),
        "mood": ("delicate stillness", "early summer freshness", "quiet elegance"),
        "depth": ("dissolving leafy backdrop", "very shallow focus"),
    },
    "landscape": {
        "light": (
            "first rays over the ridge", "broken sunlight through clouds", "golden hour glow",
            "soft blue twilight",
        ),
        "composition": (
            "layered foreground and far distance", "winding leading line", "low horizon and large sky",
            "wide panoramic frame",
        ),
        "finish": (
            "fine rock and foliage texture", "mirror-like water", "crisp far ridges", "wind-swept grass",
        ),
        "colour": ("cool shadows and warm highlights", "autumnal ochres", "layered greens and blues"),
        "mood": ("vast and serene", "untouched solitude", "freshness after rain"),
        "depth": ("aerial perspective", "mist resting in the hollows"),
    },
    "object": {
        "light": (
            "broad soft reflection", "gentle gradient light", "crisp rim from behind",
            "sparkling highlights",
        ),
        "composition": (
            "centred on a plain surface", "generous empty margin", "slight top-down angle",
            "clear readable silhouette",
        ),
        "finish": (
            "exquisite craftsmanship", "true-to-life materials", "clean precise edges",
            "subtle signs of use",
        ),
        "colour": ("restrained two-tone palette", "deep neutral backdrop", "one saturated accent"),
        "mood": ("understated elegance", "museum-like calm", "precious and timeless"),
        "depth": ("soft contact shadow", "backdrop falling off to darkness"),
    },
    "abstract": {
        "light": ("inner glow", "soft gradients of luminance", "strong light and dark contrast"),
        "composition": (
            "dynamic balance", "clear focal point", "rhythmic repetition",
            "tension between large and small forms",
        ),
        "finish": ("layered translucent forms", "crisp contours", "tactile surface", "flowing transitions"),
        "colour": ("bold complementary hues", "limited harmonious palette", "vibrant but controlled"),
        "mood": ("meditative", "energetic movement", "playful mystery"),
        "depth": ("overlapping planes", "sense of endless space"),
    },
    "anything": {
        "light": ("soft directional light", "warm late sunlight", "gentle shadows", "luminous highlights"),
        "composition": (
            "balanced composition", "clear focal point", "uncluttered background", "strong silhouette",
            "pleasing negative space",
        ),
        "finish": ("refined details", "convincing texture", "crisp edges", "carefully finished"),
        "colour": (
            "harmonious colors", "rich tonal range", "restrained palette", "warm and cool contrast",
        ),
        "mood": ("evocative atmosphere", "timeless feeling", "quiet drama"),
        "depth": ("gentle depth of field", "distinct foreground and distance"),
    },
}  # fmt: skip

MEDIUM_CUES: Mapping[str, frozenset[str]] = {
    "photo": _words("photo photograph photography photographic photorealistic dslr film polaroid snapshot 35mm"),
    "paint": _words("painting painted oil acrylic watercolor watercolour gouache fresco impressionist canvas tempera"),
    "drawing": _words("drawing sketch pencil charcoal ink lineart engraving etching pen chalk pastel doodle"),
    "illustration": _words("anime manga cartoon comic illustration vector flat sticker emoji poster chibi"),
    "render": _words("render rendering 3d cgi octane blender isometric lowpoly voxel unreal clay plastic"),
    "pixel": _words("pixel 8bit 16bit sprite"),
}

MEDIUM_PHRASES: Mapping[str, Phrases] = {
    NEUTRAL_MEDIUM: {"finish": ("finely detailed", "masterful execution", "high quality", "sharp focus")},
    "photo": {
        "finish": (
            "sharp focus on the subject", "subtle grain", "true-to-life exposure", "85mm lens",
            "fine micro contrast",
        ),
        "depth": ("shallow depth of field", "smooth bokeh"),
    },
    "paint": {
        "finish": (
            "confident brushwork", "visible pigment texture", "lost and found edges", "layered glazes",
        ),
        "colour": ("thoughtfully mixed palette",),
    },
    "drawing": {
        "finish": (
            "sure expressive strokes", "varied line weight", "careful hatching",
            "paper tooth showing through",
        ),
        "composition": ("well placed blank space",),
    },
    "illustration": {
        "finish": ("clean confident outlines", "polished shading", "appealing shapes", "crisp cel edges"),
        "colour": ("well chosen flat tones",),
    },
    "render": {
        "finish": (
            "physically plausible materials", "smooth bevelled edges", "clean topology",
            "subtle surface imperfections",
        ),
        "light": ("soft global illumination", "accurate ambient occlusion"),
    },
    "pixel": {
        "finish": ("deliberate pixel clusters", "neat dithering", "readable at small size"),
        "colour": ("tight limited palette",),
    },
}  # fmt: skip

MOOD_CUES: Mapping[str, frozenset[str]] = {
    "dark": _words(
        """
        dark night midnight horror gothic gloomy noir grim haunted eerie scary sinister storm thunder
        rain rainy fog foggy moody melancholy sad macabre dystopian shadow shadowy abandoned moonlit
        moonlight death skull
        """
    ),
    "bright": _words(
        """
        sunny bright cheerful happy cute kawaii joyful playful festive summer spring smiling laughing
        adorable funny party rainbow birthday sunshine whimsical
        """
    ),
}

MOOD_PHRASES: Mapping[str, Phrases] = {
    "even": {},
    "dark": {
        "light": (
            "a single distant light source", "deep velvety blacks", "faint cold glow",
            "low-key illumination", "pale light catching the edges",
        ),
        "mood": ("brooding tension", "uneasy silence", "heavy atmosphere", "haunting stillness"),
    },
    "bright": {
        "light": (
            "airy high-key illumination", "clear midday radiance", "soft wraparound light",
            "sparkling highlights",
        ),
        "mood": ("light-hearted charm", "carefree warmth", "friendly and lively"),
    },
}  # fmt: skip
