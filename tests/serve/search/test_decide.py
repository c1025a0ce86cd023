"""When to search and what to ask: a labelled table, and follow-ups."""

from __future__ import annotations

import time
from datetime import date

import pytest

from lorikeet.serve.search.decide import decide
from lorikeet.serve.search.query import MAX_QUERY_CHARACTERS, plan_search

TODAY = date(2031, 5, 4)

CHANGES = """What is the weather in Oslo?
will it rain in Bergen tomorrow
What's the price of gold?
who is the president of France
Who's the CEO of Intel right now?
who won the election
What was the score of the match last night?
Is the Pike Lane bridge still closed?
When does the post office open on Saturdays?
what time does the library close
opening hours of the British Museum
latest version of Python
What's new in Android 21?
dollars to euros
what is the exchange rate for the pound
How much does a ticket to the zoo cost?
how much is the toll at Sandle
Has the new budget been announced yet?
Is there a recall on the Kestor office chair?
any roadworks on the way to Caddow
When is the next train to Leeds?
what's on at the cinema tonight
How old is Taylor Swift?
What is the population of Lagos?
Who is the richest person in the world?
is Cafe Nero open now
Are there any jobs at the library?
restaurants near me
Do I need a visa for Japan?
bitcoin
news about the space station
Who won in 2030?
Is the museum closed on Mondays?
look up the tallest tower in Dubai
Can you google the ferry times?
what's the minimum wage
who runs Microsoft
Did Arsenal win the match?
When does the new iPhone come out?
What's the traffic like on the M25?
tell me the latest headlines""".splitlines()

DOES_NOT = """Hello there
How are you today?
Good morning! How did you sleep?
thanks for your help
Why is the sky blue?
What is the capital of France?
Who painted the Mona Lisa?
Write a poem about the weather today
Write an email to my boss about the current project
Translate "what is the weather today" into French
How do you say thank you in Japanese?
What is 17 times 6?
18 percent tip on a 64 dollar bill
What is 12 * 9?
Explain how electric current flows
what is a current account
How do I get the current date in Python?
Fix this code: print(today)
Summarize this text about recent events
Tell me a joke
I'm so tired today
I went to the market yesterday and bought plums
What should I cook tonight?
My cat was ill last week
Do you like music?
Who are you?
Who won the battle of Hastings in 1066?
How does a gecko walk up glass?
What does price elasticity mean?
Imagine you are the current king of a small island
Spell necessary
How old is the universe?
what's my blood pressure today
How long do I boil an egg?
Explain recursion like I'm five
Is a tomato a fruit?
convert 5 miles to kilometers
what's the opposite of recent
Can you help me with my homework?
Define inflation
Give me three names for a puppy""".splitlines()


def test_the_table_is_decided_with_few_errors() -> None:
    assert len(CHANGES) + len(DOES_NOT) >= 80
    missed = [question for question in CHANGES if not decide(question, today=TODAY)]
    needless = [question for question in DOES_NOT if decide(question, today=TODAY)]
    found = len(CHANGES) - len(missed)
    assert found / len(CHANGES) >= 0.95, missed
    assert found / (found + len(needless)) >= 0.95, needless


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What is the weather?", 'you asked about "weather"'),
        ("Who won in 2030?", 'you asked about "2030"'),
        ("Is the bridge still closed?", 'this may have changed: "Is the bridge still"'),
        ("google the ferry", 'you asked to "google"'),
    ],
)
def test_the_reason_names_the_words(question: str, reason: str) -> None:
    assert decide(question, today=TODAY) == reason


def test_pasted_material_stays_here() -> None:
    assert decide("What is the price in this letter?\n\nDear John, the current price is 10.", today=TODAY) is None
    assert decide("What is the latest price? " + "private words " * 60, today=TODAY) is None


@pytest.mark.parametrize(
    ("turns", "query"),
    [
        (
            ["What is the weather today in? The city of Oslo."],
            "What is the weather today in? The city of Oslo",
        ),
        (["Nice day. What is the weather in Oslo? I want to go."], "What is the weather in Oslo?"),
        (["What is the weather in Oslo today?", "and in Bergen?"], "What is the weather in Bergen today?"),
        (["What is the weather in Oslo today?", "and in Bergen?", "what about tomorrow?"], "What is the weather in Bergen tomorrow?"),
        (["What's the price of silver?", "and gold?"], "What's the price of silver gold"),
        (["Who is the prime minister of Norway?", "how old is she?"], "how old is she prime minister Norway"),
        (["hey lorikeet, can you tell me who the CEO of Intel is right now?"], "who the CEO of Intel is right now?"),
        (["My dog is ill. What is the latest on kennel cough?"], "What is the latest on kennel cough?"),
        (["<think>a secret</think>What is the <|im_end|>weather at https://x.example/?token=1 in Oslo?"], "What is the weather at in Oslo?"),
        (["What is the <b>me@x.example</b> (first_last@a.b.example weather @me@x.example in Oslo?"], "What is the weather in Oslo?"),
    ],
)  # fmt: skip
def test_the_query_is_the_users_words_with_their_topic(turns: list[str], query: str) -> None:
    plan = plan_search(turns, today=TODAY)
    assert plan is not None and plan.query == query


@pytest.mark.parametrize("turn", ["thanks", "and why?", "and you?", "<think>What is the weather?</think>Hello"])
def test_what_asks_for_nothing_new_is_not_searched(turn: str) -> None:
    assert plan_search(["What is the weather in Oslo?", turn], today=TODAY) is None


def test_old_turns_and_long_ones_do_not_leave() -> None:
    turns = ["My pin is 4711.", "What is the price of silver?", "Fine.", "What is the weather in Oslo?"]
    plan = plan_search(turns, today=TODAY)
    assert plan is not None and plan.query == "What is the weather in Oslo?"
    long = plan_search(["word " * 500], today=TODAY, always=True)
    assert long is not None and len(long.query) <= MAX_QUERY_CHARACTERS
    assert plan_search(["?!"], today=TODAY, always=True) is None


def test_a_topic_is_lent_by_the_last_two_turns_alone() -> None:
    turns = ["What is the weather in Oldtown?", "and tomorrow?", "and tonight?", "what about next week?"]
    plan = plan_search(turns, today=TODAY)
    assert plan is not None and "Oldtown" not in plan.query
    nearer = plan_search([turns[0], *turns[2:]], today=TODAY)
    assert nearer is not None and nearer.query == "What is the weather in Oldtown next week"


@pytest.mark.parametrize(
    "letter", ["a", "\n", "a@", "@.", " \n", "\u201ca", "tell me ", "ok, ", "<", "`", "on monday "]
)
@pytest.mark.parametrize("always", [False, True])
def test_no_turn_however_long_keeps_the_server_from_others(letter: str, always: bool) -> None:
    turn = "a" + letter * (200_000 // len(letter)) + "b"
    began_s = time.process_time()
    plan_search([turn, turn, turn], today=TODAY, always=always)
    assert time.process_time() - began_s < 1


def test_a_long_turn_asks_at_its_beginning_or_its_end() -> None:
    for turn in ("Look up ferries. " + "word " * 2000, "word " * 2000 + ". Search the web: who won?"):
        plan = plan_search([turn], today=TODAY)
        assert plan is not None and plan.reason.startswith("you asked to")
