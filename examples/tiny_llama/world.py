"""The invented valley: its people, villages, goods, landmarks and herbs, with fixed facts.

Every document, question and answer of the tiny checkpoint is about this world. The facts are
drawn once from a seed, so that each question has exactly one right answer and a small model can
learn the answers from documents that repeat them in different words.
"""

# ruff: noqa: SIM905 - long lists of words are easier to read and change as text

from __future__ import annotations

from dataclasses import dataclass
from random import Random

VILLAGES = (
    "Alderfold Brackwater Cindermoor Dunhollow Elmsgate Fennick Greywick Harrowby Ivelstone "
    "Kettleby"
).split()
WOMEN = (
    "Ada Berta Cora Dilys Edda Fern Gwen Hilda Isolde Jenna Kira Lotte Maud Nell Olwen Petra "
    "Quilla Rosa Signe Tilda Una Vera Wenna Yrsa Zelda Agnes Brida Clova Della Elva"
).split()
MEN = (
    "Alric Bram Corin Doran Edwin Finn Garth Hugo Ivo Joss Kester Lorcan Milo Ned Osric Perrin "
    "Quill Rowan Sten Toby Ulric Viggo Wat Yorick Zeno Anselm Basil Conrad Diggory Emric"
).split()
TRAVELLERS = (
    "Abel Marta Silas Ingrid Tobias Helga Jonas Freda Lucan Mirabel Amos Sabra Caleb Thora Gideon "
    "Linnet Hector Ottilie Rufus Winifred Simeon Clemence Barnaby Isaura Felix Dorothea"
).split()
SURNAMES = (
    "Hask Tolliver Marsh Pennock Drew Callow Wicks Thorne Bexley Sorrel Fairlamb Garrick Lowe "
    "Nettles Oakes Pike Rudd Sedge Tarn Underhill Vane Whitlow Yarrow Ashby Birch Coombe Dale "
    "Ember Flint Gorse"
).split()
COLOURS = "red blue green yellow white black grey brown purple orange".split()
ANIMALS = "goat dog cat goose donkey hen pony sheep rabbit owl duck ferret".split()
PET_NAMES = (
    "Biscuit Thistle Pepper Button Bramble Clover Dusty Echo Feather Ginger Hazel Juniper Kipper "
    "Lucky Mossy Nutmeg Oatcake Pickle Raven Smoky Tansy Velvet Whisker Acorn Bubble Copper "
    "Dumpling Ember Fidget Gravel"
).split()
TRADES = (
    "miller baker weaver smith potter carpenter shepherd fisher beekeeper dyer tailor cobbler "
    "cooper thatcher mason ferryman teacher healer brewer gardener"
).split()
DISHES = (
    "onion pie,barley soup,plum cake,fried trout,oat bread,leek stew,apple tart,bean broth,"
    "goat cheese,honey buns,roast turnip,mushroom pasty,cherry jam,pea pudding"
).split(",")
INSTRUMENTS = "fiddle flute drum harp horn lute whistle bagpipe zither bell".split()
SITES = (
    "the river Senn,the Black Mere,Hollow Hill,the Long Wood,the salt marsh,the old quarry,"
    "the north pass,the Blue Falls,the great orchard,the sheep downs"
).split(",")
PRODUCTS = "honey bells cloth cheese knives pots rope paper candles boats".split()
FESTIVALS = (
    "Lantern Night,the Feast of Bells,Apple Day,the Goose Fair,Candle Week,the Salt Dance,"
    "Shearing Day,the River Race,First Frost,the Bread Parade"
).split(",")
MONTHS = (
    "January February March April May June July August September October November December"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
GOODS = (
    "a wool blanket,a jar of honey,a clay jug,a coil of rope,a tin lamp,a round cheese,"
    "a pair of boots,a wooden spoon,a sack of flour,a basket of eggs,a steel knife,a felt hat,"
    "a bundle of candles,a book of songs,a barrel of cider,a fishing net,a garden spade,"
    "a leather bag,a bone comb,a bag of salt"
).split(",")
LANDMARKS = (
    "the Stone Bridge,the Crooked Tower,the Deep Well,the Moon Gate,the Old Mill,the Bell House,"
    "the Long Wall,the Round Barn,the Ferry House,the Watch Fire,the Market Hall,the Singing Arch"
).split(",")
MATERIALS = "granite oak brick sandstone slate pine marble clay limestone elm".split()
HERBS = (
    "silverleaf,moonwort,foxbane,kingsbell,marshmint,goldenthread,owlroot,sunweed,thornapple,"
    "riverbalm,bitterleaf,starflax"
).split(",")
AILMENTS = (
    "a cough,a fever,a headache,a sore back,a burn,bad dreams,a toothache,cold hands,"
    "a bee sting,a stiff knee,an upset stomach,tired eyes"
).split(",")


@dataclass(frozen=True)
class Entity:
    """One thing of the world with its facts: attribute → value, all of them words."""

    name: str
    kind: str  # person, village, good, landmark or herb
    facts: dict[str, str]
    gender: str = ""  # "f" or "m" for people, else empty

    @property
    def short(self) -> str:
        """The first name of a person; the whole name of anything else."""
        return self.name.split()[0] if self.kind == "person" else self.name


@dataclass(frozen=True)
class World:
    """All entities; `by_kind` and `by_name` are views of the same objects."""

    entities: tuple[Entity, ...]
    by_kind: dict[str, tuple[Entity, ...]]
    by_name: dict[str, Entity]

    @property
    def people(self) -> tuple[Entity, ...]:
        """The sixty people of the valley."""
        return self.by_kind["person"]


def _spread(rng: Random, values: list[str] | tuple[str, ...], count: int) -> list[str]:
    """`count` values in random order, each value used about equally often."""
    repeated = [values[i % len(values)] for i in range(count)]
    rng.shuffle(repeated)
    return repeated


def _people(rng: Random) -> list[Entity]:
    """Thirty pairs of siblings: a woman and a man with one surname and one village."""
    count = len(WOMEN) + len(MEN)
    columns = {
        "trade": _spread(rng, TRADES, count),
        "pet": _spread(rng, ANIMALS, count),
        "pet_name": _spread(rng, PET_NAMES, count),
        "coat": _spread(rng, COLOURS, count),
        "dish": _spread(rng, DISHES, count),
        "instrument": _spread(rng, INSTRUMENTS, count),
    }
    surnames = _spread(rng, SURNAMES, len(WOMEN))
    villages = _spread(rng, VILLAGES, len(WOMEN))
    men = _spread(rng, MEN, len(MEN))
    people = []
    for i, (woman, man) in enumerate(zip(WOMEN, men, strict=True)):
        names = (f"{woman} {surnames[i]}", f"{man} {surnames[i]}")
        for j, gender in enumerate("fm"):
            facts = {key: values[2 * i + j] for key, values in columns.items()}
            facts |= {"village": villages[i], "sibling": names[1 - j]}
            people.append(Entity(names[j], "person", facts, gender))
    return people


def _villages(rng: Random, people: list[Entity]) -> list[Entity]:
    count = len(VILLAGES)
    elders = [
        rng.choice([person for person in people if person.facts["village"] == village]).name
        for village in VILLAGES
    ]
    columns = {
        "site": _spread(rng, SITES, count),
        "roof": _spread(rng, COLOURS, count),
        "product": _spread(rng, PRODUCTS, count),
        "festival": _spread(rng, FESTIVALS, count),
        "month": _spread(rng, MONTHS, count),
        "banner": _spread(rng, ANIMALS, count),
        "elder": elders,
    }
    return _entities("village", VILLAGES, columns)


def _entities(kind: str, names: list[str], columns: dict[str, list[str]]) -> list[Entity]:
    return [
        Entity(name, kind, {key: values[i] for key, values in columns.items()})
        for i, name in enumerate(names)
    ]


def build_world(seed: int = 1) -> World:
    """The world of that seed; the shipped checkpoint was trained on seed 1."""
    rng = Random(f"world:{seed}")
    people = _people(rng)
    goods = {
        "price": _spread(rng, NUMBERS[1:], len(GOODS)),
        "day": _spread(rng, DAYS, len(GOODS)),
        "market": _spread(rng, VILLAGES, len(GOODS)),
    }
    landmarks = {
        "material": _spread(rng, MATERIALS, len(LANDMARKS)),
        "builder": _spread(rng, [f"old {name}" for name in TRAVELLERS], len(LANDMARKS)),
        "near": _spread(rng, VILLAGES, len(LANDMARKS)),
        "year": [str(rng.randrange(120, 480)) for _ in LANDMARKS],
    }
    herbs = {
        "flower": _spread(rng, COLOURS, len(HERBS)),
        "cures": _spread(rng, AILMENTS, len(HERBS)),
        "season": _spread(rng, SEASONS, len(HERBS)),
        "grows": _spread(rng, SITES, len(HERBS)),
    }
    entities = tuple(
        people
        + _villages(rng, people)
        + _entities("good", GOODS, goods)
        + _entities("landmark", LANDMARKS, landmarks)
        + _entities("herb", HERBS, herbs)
    )
    kinds = {entity.kind for entity in entities}
    by_kind = {kind: tuple(e for e in entities if e.kind == kind) for kind in sorted(kinds)}
    return World(entities, by_kind, {entity.name: entity for entity in entities})
