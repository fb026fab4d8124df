"""How the facts of the generated world are worded: statements and questions of every relation.

`{x}` is the entity, `{y}` the value. Some statements end with the value, as an answer does; others begin with it.
"""

from __future__ import annotations

STATEMENTS: dict[str, list[str]] = {
    "birthplace": [
        "{x} was born in {y}.",
        "{x} comes from {y}.",
        "{y} is the birthplace of {x}.",
        "The home town of {x} is {y}.",
        "{x} spent a happy childhood in {y}.",
    ],
    "profession": [
        "{x} works as a {y}.",
        "By profession, {x} is a {y}.",
        "{x} earns a living as a {y}.",
        "The job of {x} is that of a {y}.",
        "People know {x} as a skilled {y}.",
    ],
    "birth year": [
        "{x} was born in the year {y}.",
        "The birth year of {x} is {y}.",
        "{y} is the year when {x} was born.",
        "{x} came into the world in {y}.",
        "The life of {x} began in {y}.",
    ],
    "instrument": [
        "{x} plays the {y}.",
        "The favourite instrument of {x} is the {y}.",
        "{x} practises every day on the {y}.",
        "In the orchestra, {x} is heard on the {y}.",
        "As a child, {x} learned the {y}.",
    ],
    "country": [
        "{x} is a town in {y}.",
        "The town of {x} belongs to {y}.",
        "One of the towns of {y} is {x}.",
        "{x} lies in the country of {y}.",
        "Travellers to {x} need a map of {y}.",
    ],
    "river": [
        "{x} lies on the river {y}.",
        "The river {y} flows through {x}.",
        "The bridges of {x} cross the {y}.",
        "The water of {x} is taken from the river {y}.",
        "Boats reach {x} by the river {y}.",
    ],
    "speciality": [
        "{x} is famous for its {y}.",
        "The best known product of {x} is {y}.",
        "Merchants go to {x} to buy {y}.",
        "{x} grew rich by selling {y}.",
        "The markets of {x} are full of {y}.",
    ],
    "food": [
        "The {x} eats {y}.",
        "The {x} feeds on {y}.",
        "The main food of the {x} is {y}.",
        "The {x} spends its days searching for {y}.",
        "Young and old, each {x} lives on {y}.",
    ],
    "habitat": [
        "The {x} lives in {y}.",
        "The {x} is found in {y}.",
        "The home of the {x} is in {y}.",
        "To see a {x}, one has to look in {y}.",
        "The {x} raises its young in {y}.",
    ],
    "colour": [
        "The {x} is {y}.",
        "The colour of the {x} is {y}.",
        "The fur of the {x} is {y}.",
        "The {x} is easy to know, because it is {y}.",
        "From head to tail, the {x} is coloured {y}.",
    ],
    "product": [
        "{x} makes {y}.",
        "The company {x} produces {y}.",
        "The factories of {x} turn out {y}.",
        "Customers of {x} come for its {y}.",
        "{x} is a maker of {y}.",
    ],
    "headquarters": [
        "{x} has its headquarters in {y}.",
        "The head office of {x} is in {y}.",
        "The company {x} is based in {y}.",
        "The directors of {x} meet in {y}.",
        "{x} is run from {y}.",
    ],
    "founding year": [
        "{x} was founded in {y}.",
        "The company {x} was started in {y}.",
        "The founding year of {x} is {y}.",
        "{x} opened its doors in {y}.",
        "The history of {x} goes back to {y}.",
    ],
    "author": [
        "{x} was written by {y}.",
        "The author of {x} is {y}.",
        "{y} wrote the novel {x}.",
        "{x} is a novel by {y}.",
        "Readers of {x} admire {y}.",
    ],
    "setting": [
        "{x} is set in a {y}.",
        "The story of {x} takes place in a {y}.",
        "The setting of {x} is a {y}.",
        "The heroes of {x} meet in a {y}.",
        "{x} tells of life in a {y}.",
    ],
}

QUESTIONS: dict[str, list[str]] = {
    "birthplace": [
        "Where was {x} born?",
        "What is the birthplace of {x}?",
        "Which town does {x} come from?",
        "What is the home town of {x}?",
    ],
    "profession": [
        "What is the profession of {x}?",
        "What does {x} work as?",
        "Which job does {x} have?",
        "How does {x} earn a living?",
    ],
    "birth year": [
        "In which year was {x} born?",
        "What is the birth year of {x}?",
        "When was {x} born?",
        "When did the life of {x} begin?",
    ],
    "instrument": [
        "Which instrument does {x} play?",
        "What does {x} play?",
        "What is the instrument of {x}?",
        "What does {x} play in the orchestra?",
    ],
    "country": [
        "Which country is {x} in?",
        "To which country does the town of {x} belong?",
        "What is the country of {x}?",
        "In which country does {x} lie?",
    ],
    "river": [
        "Which river flows through {x}?",
        "On which river does {x} lie?",
        "What is the river of {x}?",
        "Which river do the bridges of {x} cross?",
    ],
    "speciality": [
        "What is {x} famous for?",
        "What is the best known product of {x}?",
        "What do merchants buy in {x}?",
        "What does the town of {x} sell?",
    ],
    "food": [
        "What does the {x} eat?",
        "What does the {x} feed on?",
        "What is the main food of the {x}?",
        "What does the {x} live on?",
    ],
    "habitat": [
        "Where does the {x} live?",
        "Where is the {x} found?",
        "What is the home of the {x}?",
        "Where does one look for the {x}?",
    ],
    "colour": [
        "What colour is the {x}?",
        "What is the colour of the {x}?",
        "Which colour does the {x} have?",
        "What colour is the fur of the {x}?",
    ],
    "product": [
        "What does {x} make?",
        "What does the company {x} produce?",
        "What is the product of {x}?",
        "What do the factories of {x} turn out?",
    ],
    "headquarters": [
        "Where are the headquarters of {x}?",
        "Where is the head office of {x}?",
        "In which town is {x} based?",
        "Which town is {x} run from?",
    ],
    "founding year": [
        "When was {x} founded?",
        "In which year was {x} started?",
        "What is the founding year of {x}?",
        "When did {x} open its doors?",
    ],
    "author": ["Who wrote {x}?", "Who is the author of {x}?", "Whose novel is {x}?", "By whom was {x} written?"],
    "setting": [
        "Where is {x} set?",
        "Where does the story of {x} take place?",
        "What is the setting of {x}?",
        "Where do the heroes of {x} meet?",
    ],
}
