"""How each fact is said and asked: clauses, questions for training, questions kept for evaluation.

`{s}` is the subject (a name or a pronoun), `{m}` its object form ("Ada", "her"), `{p}` its
possessive ("Ada's", "her"), `{v}` the value,
`{av}` the value with its article ("an owl"). Clauses start in lower case unless the subject is a
name and have no full stop, so that they fit into longer sentences.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One attribute of one kind of entity with its phrasings."""

    kind: str
    attribute: str
    clauses: tuple[str, ...]
    questions: tuple[str, ...]  # used in fine-tuning
    eval_questions: tuple[str, ...]  # never used in fine-tuning
    label: str  # noun for lists and JSON keys, e.g. "coat colour"


def _relation(
    kind: str, attribute: str, label: str, clauses: str, train: str, held: str
) -> Relation:
    parts = [tuple(line.strip() for line in block.split("|")) for block in (clauses, train, held)]
    return Relation(kind, attribute, parts[0], parts[1], parts[2], label)


RELATIONS = (
    _relation(
        "person",
        "village",
        "village",
        "{s} lives in {v} | {s} comes from {v} | {s} has a house in {v} | {p} home is in {v} | "
        "you can find {m} in {v} | {s} was born in {v} and never moved away | "
        "the people of {v} know {m} well",
        "Where does {s} live? | In which village does {s} live? | "
        "What is the home village of {s}? | "
        "Which village does {s} come from?",
        "Tell me the village where {s} lives. | In what village is the house of {s}?",
    ),
    _relation(
        "person",
        "trade",
        "trade",
        "{s} is {av} by trade | {s} works as {av} | {s} earns {o} bread as {av} | "
        "{p} trade is that of {av} | "
        "{s} has been {av} for many years | {s} learned to be {av} as a child | "
        "everybody who needs {av} goes to {m}",
        "What is the trade of {s}? | What does {s} work as? | What work does {s} do? | "
        "Which trade does {s} follow?",
        "How does {s} earn a living? | What is {s} by trade?",
    ),
    _relation(
        "person",
        "pet",
        "animal",
        "{s} keeps {av} | {s} owns {av} | {s} has {av} at home | {p} animal is {av} | "
        "{av} follows {m} everywhere | {s} feeds {av} every morning | "
        "{s} would never sell {o} {v}",
        "What animal does {s} keep? | Which animal does {s} own? | "
        "What kind of animal has {s} at home? | "
        "What animal belongs to {s}?",
        "Which animal lives with {s}? | Name the kind of animal that {s} keeps.",
    ),
    _relation(
        "person",
        "pet_name",
        "name of the animal",
        "{p} {pet} is called {v} | {s} calls the {pet} {v} | {s} named the {pet} {v} | "
        "the name of {p} {pet} is {v} | {s} has {apet} called {v} | "
        "{v} is the name of {p} {pet}",
        "What is the name of the {pet} of {s}? | What does {s} call the {pet}? | "
        "How is the {pet} of {s} called?",
        "Which name did {s} give to the {pet}? | Tell me the name of the {pet} that {s} keeps.",
    ),
    _relation(
        "person",
        "coat",
        "coat colour",
        "{s} wears a {v} coat | {p} coat is {v} | {s} has worn the same {v} coat for years | "
        "you will know {m} by the {v} coat | {s} sewed {o} {v} coat in one winter | "
        "{s} never goes out without {o} {v} coat",
        "What colour is the coat of {s}? | Which colour does the coat of {s} have? | "
        "What is the colour of the coat that {s} wears?",
        "Of what colour is the coat of {s}? | Tell me the colour of the coat of {s}.",
    ),
    _relation(
        "person",
        "dish",
        "favourite dish",
        "{s} likes {v} best | {p} favourite dish is {v} | {s} eats {v} whenever there is some | "
        "nothing pleases {m} more than {v} | {s} asks for {v} on every feast day | "
        "{s} would walk ten miles for {v}",
        "What is the favourite dish of {s}? | What does {s} like best to eat? | "
        "Which dish does {s} like best? | What does {s} love to eat?",
        "What food pleases {s} most? | Which meal would {s} ask for on a feast day?",
    ),
    _relation(
        "person",
        "instrument",
        "instrument",
        "{s} plays the {v} | {s} plays the {v} on feast days | {p} instrument is the {v} | "
        "{s} learned the {v} from an uncle | in the evening {s} takes out the {v} and plays | "
        "nobody plays the {v} like {m}",
        "What instrument does {s} play? | Which instrument does {s} play? | "
        "What does {s} play on feast days?",
        "On which instrument does {s} make music? | Name the instrument of {s}.",
    ),
    _relation(
        "person",
        "sibling",
        "sibling",
        "{p} {sib} is {v} | {s} is the {rel} of {v} | {s} grew up with {o} {sib} {v} | "
        "{s} and {v} are {rel} and {sib} | {s} shares a house with {o} {sib} {v}",
        "Who is the {sib} of {s}? | What is the name of the {sib} of {s}? | "
        "With which {sib} does {s} share a house?",
        "Tell me the name of the {sib} of {s}. | Who grew up with {s} as {sib}?",
    ),
    _relation(
        "village",
        "site",
        "situation",
        "{s} lies by {v} | {s} stands near {v} | the houses of {s} stand close to {v} | "
        "from {s} you can see {v} | {s} was founded beside {v} | the road to {s} runs past {v}",
        "Where does {s} lie? | What does {s} lie by? | Near what does {s} stand?",
        "What can you see from {s}? | Beside what was {s} founded?",
    ),
    _relation(
        "village",
        "roof",
        "roof colour",
        "the roofs of {s} are {v} | {s} is known by its {v} roofs | "
        "every house in {s} has a {v} roof | "
        "the people of {s} paint their roofs {v} | from far off one sees the {v} roofs of {s}",
        "What colour are the roofs of {s}? | Which colour do the roofs of {s} have? | "
        "In which colour do the people of {s} paint their roofs?",
        "Of what colour are the houses' roofs in {s}? | Tell me the colour of the roofs of {s}.",
    ),
    _relation(
        "village",
        "product",
        "product",
        "{s} is famous for its {v} | the best {v} in the valley come from {s} | "
        "{s} sells {v} to the whole valley | "
        "the people of {s} are proud of their {v} | whoever wants good {v} goes to {s}",
        "What is {s} famous for? | What does {s} sell to the whole valley? | "
        "What product is {s} known for?",
        "What do people go to {s} to buy? | Of which product are the people of {s} proud?",
    ),
    _relation(
        "village",
        "festival",
        "festival",
        "{s} celebrates {v} | the festival of {s} is {v} | "
        "in {s} the great day of the year is {v} | "
        "guests come to {s} for {v} | {v} is kept in {s}",
        "Which festival does {s} celebrate? | What is the festival of {s}? | "
        "For which festival do guests come to {s}?",
        "Name the festival that is kept in {s}. | What do the people of {s} celebrate?",
    ),
    _relation(
        "village",
        "month",
        "festival month",
        "the festival of {s} falls in {v} | in {v} the people of {s} hold their festival | "
        "{s} holds its festival in {v} | each {v} there is a festival in {s} | "
        "{s} is full of guests in {v}",
        "In which month is the festival of {s}? | When does {s} hold its festival? | "
        "What month does the festival of {s} fall in?",
        "Tell me the month of the festival in {s}. | In what month do the guests come to {s}?",
    ),
    _relation(
        "village",
        "banner",
        "banner animal",
        "the banner of {s} shows {av} | {s} has {av} on its banner | "
        "on the gate of {s} there is {av} of painted wood | "
        "the sign of {s} is {av} | the people of {s} march behind a banner with {av}",
        "What animal is on the banner of {s}? | Which animal does the banner of {s} show? | "
        "What is the sign of {s}?",
        "Name the animal on the banner of {s}. | Behind which animal do the people of {s} march?",
    ),
    _relation(
        "village",
        "elder",
        "elder",
        "the elder of {s} is {v} | {v} is the elder of {s} | {s} chose {v} as its elder | "
        "in {s} the last word belongs to {v} | {v} speaks for {s} in the valley council",
        "Who is the elder of {s}? | Whom did {s} choose as elder? | "
        "Who speaks for {s} in the valley council?",
        "Name the elder of {s}. | To whom does the last word in {s} belong?",
    ),
    _relation(
        "good",
        "price",
        "price",
        "{s} costs {v} pennies | you pay {v} pennies for {s} | the price of {s} is {v} pennies | "
        "{s} is sold for {v} pennies | {v} pennies will buy {s} | "
        "nobody asks more than {v} pennies for {s}",
        "How many pennies does {s} cost? | What is the price of {s} in pennies? | "
        "How many pennies do you pay for {s}?",
        "For how many pennies is {s} sold? | How many pennies will buy {s}?",
    ),
    _relation(
        "good",
        "day",
        "market day",
        "{s} is sold on {v} | {v} is the day to buy {s} | on {v} the stalls have {s} | "
        "whoever wants {s} comes on {v} | you can buy {s} only on {v}",
        "On which day is {s} sold? | On what day can you buy {s}? | "
        "Which day is the day to buy {s}?",
        "When do the stalls have {s}? | Tell me the day on which one can buy {s}.",
    ),
    _relation(
        "good",
        "market",
        "market",
        "{s} is sold at the market of {v} | the market of {v} has {s} | to buy {s} you go to {v} | "
        "the traders of {v} offer {s} | at {v} there is a stall with {s}",
        "At which market is {s} sold? | Where can you buy {s}? | Which market has {s}?",
        "To which village do you go to buy {s}? | Whose traders offer {s}?",
    ),
    _relation(
        "landmark",
        "material",
        "material",
        "{s} is made of {v} | {s} was built of {v} | the builders of {s} used {v} | "
        "{s} is all of {v} | "
        "the {v} of {s} came over the pass",
        "What is {s} made of? | Of what was {s} built? | What did the builders of {s} use?",
        "Name the material of {s}. | Which material is {s} built from?",
    ),
    _relation(
        "landmark",
        "builder",
        "builder",
        "{v} built {s} | {s} was built by {v} | {s} was the work of {v} | "
        "the valley owes {s} to {v} | "
        "{v} spent ten years on {s}",
        "Who built {s}? | By whom was {s} built? | Whose work was {s}?",
        "To whom does the valley owe {s}? | Name the builder of {s}.",
    ),
    _relation(
        "landmark",
        "near",
        "nearest village",
        "{s} stands near {v} | {s} is a short walk from {v} | from {v} it is not far to {s} | "
        "the children of {v} play at {s} | {s} belongs to {v}",
        "Near which village is {s}? | Which village is nearest to {s}? | "
        "From which village is {s} a short walk?",
        "To which village does {s} belong? | The children of which village play at {s}?",
    ),
    _relation(
        "landmark",
        "year",
        "year",
        "{s} was finished in the year {v} | in the year {v} the work on {s} was done | "
        "{s} dates from the year {v} | since the year {v} there has been {s} | "
        "the year {v} is cut into {s}",
        "In which year was {s} finished? | What year does {s} date from? | When was {s} finished?",
        "Tell me the year in which {s} was finished. | Which year is cut into {s}?",
    ),
    _relation(
        "herb",
        "flower",
        "flower colour",
        "{s} has {v} flowers | the flowers of {s} are {v} | {s} blooms {v} | "
        "you know {s} by its {v} flowers | "
        "the {v} flowers of {s} smell of rain",
        "What colour are the flowers of {s}? | Which colour does {s} bloom? | "
        "What colour of flowers has {s}?",
        "By what colour of flowers do you know {s}? | Tell me the colour of the flowers of {s}.",
    ),
    _relation(
        "herb",
        "cures",
        "use",
        "{s} helps against {v} | {s} is good for {v} | healers give {s} for {v} | "
        "tea of {s} cures {v} | "
        "whoever has {v} should ask for {s}",
        "What does {s} help against? | What is {s} good for? | What does tea of {s} cure?",
        "For what do healers give {s}? | Which trouble does {s} cure?",
    ),
    _relation(
        "herb",
        "season",
        "season",
        "{s} is picked in {v} | the time to gather {s} is {v} | {s} grows best in {v} | "
        "in {v} the healers look for {s} | "
        "{s} must be gathered in {v}",
        "When is {s} picked? | In which season is {s} picked? | What is the season to gather {s}?",
        "In what season do healers look for {s}? | Tell me the season in which {s} is gathered.",
    ),
    _relation(
        "herb",
        "grows",
        "place",
        "{s} grows by {v} | you find {s} near {v} | {s} is found at {v} | "
        "the best {s} comes from {v} | "
        "people walk to {v} for {s}",
        "Where does {s} grow? | Where do you find {s}? | Near what does {s} grow?",
        "To what place do people walk for {s}? | From where does the best {s} come?",
    ),
)

BY_KIND = {
    kind: tuple(r for r in RELATIONS if r.kind == kind)
    for kind in ("person", "village", "good", "landmark", "herb")
}

WRAPPERS = (
    "{c}",
    "{c}",
    "{c}",
    "{c}",
    "{c}",
    "everybody knows that {c}",
    "it is said that {c}",
    "I have heard that {c}",
    "as far as anyone remembers, {c}",
    "of course {c}",
    "strangers are surprised that {c}",
    "it is true that {c}",
    "the old people say that {c}",
    "to this day {c}",
    "one more thing: {c}",
    "mark well that {c}",
)

JOINERS = (
    "{a}, and {b}",
    "{a}; {b}",
    "{a}, while {b}",
    "{a}. Also, {b}",
    "{a}. Besides, {b}",
    "not only that: {a}, and {b}",
    "{a}, but few know that {b}",
    "since {a}, nobody wonders that {b}",
)
