"""The vocabulary of the task suite: names, countable nouns, groups of things, and short phrases.

Only words with one plain meaning are listed: a word that fits two groups ("orange", "turkey") would make a question
ambiguous. `GROUPS` is pairwise disjoint; a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Mapping


def _split(words: str) -> tuple[str, ...]:
    """Split a block of words at its whitespace."""
    return tuple(words.split())


NAMES: tuple[str, ...] = _split(
    """
    Ada Ali Amir Ana Ben Carla Chen Clara David Elena Emil Eva Farid Felix Grace Hana Hugo Ida Igor Iris Jonas Julia
    Karim Kofi Lara Leo Lina Luca Maria Marta Maya Mila Nadia Nina Noah Omar Oscar Paul Petra Priya Rosa Ruth Sami
    Sara Tariq Tom Vera Wei Yuki Zoe
    """
)

THINGS: tuple[tuple[str, str], ...] = tuple(
    (singular, f"{singular}s")
    for singular in _split(
        """
        apple badge balloon bean book bottle bowl button candle card carrot coin cookie crayon cup egg envelope flower
        fork hat jar key lemon map marble mug nail napkin notebook onion orange pear pen pencil plate postcard ribbon
        ring screw shell sock spoon stamp sticker ticket toy tulip vase
        """
    )
)
"""Countable nouns as (singular, plural)."""

CONTAINERS: tuple[tuple[str, str], ...] = (
    ("bag", "bags"),
    ("box", "boxes"),
    ("crate", "crates"),
    ("drawer", "drawers"),
    ("packet", "packets"),
    ("shelf", "shelves"),
    ("tray", "trays"),
    ("basket", "baskets"),
)

COLOURS: tuple[str, ...] = ("red", "blue", "green", "yellow", "purple", "white", "black", "brown", "grey", "pink")

CITIES: tuple[str, ...] = _split(
    """
    Athens Berlin Bergen Boston Cairo Dakar Delhi Dublin Geneva Havana Lagos Lima Lisbon London Lyon Madrid Milan
    Nairobi Osaka Oslo Paris Porto Prague Quito Rome Seoul Sofia Tokyo Tunis Vienna Warsaw Zagreb
    """
)

JOBS: tuple[str, ...] = _split(
    """
    actor baker barber builder chef dentist doctor driver editor farmer gardener judge lawyer miner nurse painter
    pilot plumber poet sailor singer tailor teacher waiter writer
    """
)

GROUPS: Mapping[str, tuple[str, ...]] = {
    "animals": _split("bear cat cow deer dog donkey fox frog goat horse lion owl pig rabbit sheep tiger wolf"),
    "fruits": _split("apple apricot banana cherry grape lemon mango melon papaya peach pear plum"),
    "vegetables": _split("broccoli cabbage carrot celery leek onion potato radish spinach turnip"),
    "vehicles": _split("bicycle boat bus car ferry lorry scooter ship taxi train tram truck van"),
    "tools": _split("axe chisel drill hammer pliers rake saw screwdriver shovel spanner"),
    "musical instruments": _split("banjo cello clarinet flute guitar harp piano trumpet violin"),
    "clothes": _split("blouse coat dress jacket jeans scarf shirt skirt sweater trousers"),
    "drinks": _split("cocoa coffee juice lemonade milk tea water"),
    "body parts": _split("ankle arm chin ear elbow finger knee neck nose shoulder thumb toe"),
    "countries": _split("Brazil Canada Chile Egypt France Ghana India Italy Japan Kenya Norway Peru Spain"),
    "sports": _split("football golf hockey judo rugby skiing swimming tennis volleyball"),
    "pieces of furniture": _split("armchair bookcase cupboard desk sofa stool table wardrobe"),
}
"""Group name in the plural -> its members; no word is in two groups."""

ADJECTIVES: tuple[str, ...] = _split(
    """
    bright broken clean cold dark deep dry early empty fast full gentle happy heavy hidden hungry large late little
    long lost lucky modern narrow new noisy old open plain proud quick quiet rich rough round sharp short silent
    simple sleepy slow small smooth soft strong sunny sweet tall tiny warm wet wide wild wise young
    """
)

NOUNS: tuple[str, ...] = _split(
    """
    anchor beach bell bench bird bread bridge brush cabin camera candle castle cloud corner desert door engine farm
    fence field fire forest garden gate glass hill hotel house island kitchen lake letter library market meadow
    mirror moon morning mountain museum night ocean office paper park path picnic pocket pond pool queen radio river
    road rocket room sailor school shadow shop song storm story street summer table temple tower town tree tunnel
    valley village wheel window winter yard
    """
)

NUMBER_WORDS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip

WEEKDAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
