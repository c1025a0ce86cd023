"""When a question needs the web, and why, in words for the user.

    decide("Is the Pike Lane bridge still closed?", today=date.today())    # 'this may have changed: "is ... still"'

Words alone decide, in microseconds and the same way each time: keywords, and the shapes of questions about what changes. Tasks
(writing, translating, code, sums) and small talk do not ask for a search. It knows no history: that is `query`'s.
"""

from __future__ import annotations

import re
from datetime import date

KEYWORDS = ("current", "currently", "latest", "recent", "recently", "today", "weather", "price", "prices")
"""Words that ask for something a model cannot know."""

_NEWS = (
    r"tonight|tomorrow|yesterday|forecast|news|headlines?|upcoming|newest|up[- ]to[- ]date|breaking|nowadays|these days|right now"
    r"|at the moment|so far|(this|last|next|coming) (morning|afternoon|evening|night|week|weekend|month|year|season|summer|winter"
    r"|spring|autumn|fall|monday|tuesday|wednesday|thursday|friday|saturday|sunday)"
)

_OFFICE = (
    r"president|prime minister|chancellor|king|queen|monarch|pope|mayor|governor|minister|secretary|senator|ceo|cfo|chief executive"
    r"|chair(man|woman|person)?|head (coach|of)|manager|coach|captain|champions?|director general|leader|owner|editor|headteacher"
    r"|speaker of|ambassador"
)
_WHEN = r"mondays?|tuesdays?|wednesdays?|thursdays?|fridays?|saturdays?|sundays?|weekends?|bank holidays?"
_TRIP = r"trains?|bus|buses|ferry|ferries|flights?|trams?|boats?|tube|metro|water taxi"
_EVENT = (
    r"game|match|race|episode|season|series|election|by-election|launch|eclipse|meeting|concert|show|festival|fair|market|exhibition"
    r"|full moon|update|release|blood drive|workshop|class|course|tour|parade|marathon|tournament|final|auction|funeral|exam results"
)

CHANGES = (
    rf"who(?: is|'s| are|s)? (?:the |our |your |now )*(?:\w+ ){{0,3}}(?:{_OFFICE})\b",
    r"who(?:'s| is)? (?:(?:in charge|running|leading|speaking|playing|performing|hosting|headlining)|(?:runs|leads|owns|coaches|manages|hosts|sponsors))\b",
    r"who won\b",
    r"did .{2,50} (?:win|beat|lose|qualify|get (?:approved|cancelled|elected|arrested))\b",
    r"(?:score|scores|standings|fixtures?|line-?up|league table|leaderboard|results?) (?:of|for|in|from)\b|what(?:'s| is|s) the (?:score|result)",
    r"(?:is|are|was|were|does|do|has|have) (?!my|you|i\b|we\b).{2,60} still\b",
    r"(?:is|are) .{2,50} (?:open|closed|shut|delayed|cancelled|sold out|in stock|available|out yet|dead|married|discontinued|on sale|on strike)\b",
    r"(?:opening|closing|business|visiting|office) (?:hours|times?)|what are the hours",
    r"(?:what time|when|how (?:late|early|long)).{1,50}\b(?:open|opens|close|closes|shut|shuts|start|starts|begin|begins|leave|leaves|depart|departs|arrive|arrives|reopen|reopens)\b",
    rf"\b(?:next|last|first) (?:{_TRIP}|{_EVENT})\b|(?:{_TRIP}) (?:times?|timetables?|schedules?|to|from|back)\b|time ?tables?\b|departures?\b",
    rf"(?:what time(?:'s| is|s)?|when(?:'s| is|s)) (?:the |that |this )?(?:\w+ ){{0,4}}(?:{_EVENT}|{_TRIP})\b",
    rf"^(?!.*\b(?:my|i)\b).*\bon (?:{_WHEN})\b.*\?|(?:open|closed|running|run) (?:{_WHEN})",
    r"how much (?:is|are|does|do|did|would|will|for)\b(?! \d).{0,60}\b(?:cost|costs|ticket|tickets|stall|park|parking|pay|charge|rent|fare|membership|subscription|pass|entry|to (?:park|rent|hire|buy|get|join|renew))\b",
    r"how much (?:is|are|for) (?:a|an|the|it (?:to|for)|\d+ (?:adults?|kids?|children|people|nights?|tickets?))\b(?!.*\bin (?:ml|grams?|cups?|litres?|liters?)\b)",
    r"(?:cost|fare|fee|rent|salary|wage|toll) (?:of|for|to|in|on|at)\b|\bpay (?:extra|for)\b",
    r"exchange rate|interest rates?|mortgage rates?|inflation|minimum wage|stock price|share price|stocks?\b.{0,20}\b(?:doing|up|down)|market cap|bitcoin|\bbtc\b|ethereum|gas prices|council tax|tariffs?",
    r"(?:dollars?|euros?|pounds?|yen|usd|eur|gbp|jpy|rupees?|francs?|kroner?|krona) (?:to|in|into|against) (?:us |the )?(?:dollars?|euros?|pounds?|yen|usd|eur|gbp|jpy|rupees?|francs?|kroner?|krona)",
    r"(?:will|is|does) it (?:be )?(?:going to )?(?:rain|raining|snow|snowing|sunny|hot|cold|windy|warm|freezing|icy)\b|how (?:hot|cold|warm|windy|humid) is it|how much (?:rain|snow)|temperature in [a-z]|pollen|air quality|uv index|(?:when|what time) (?:is|'s) (?:high|low) tide|(?:high|low) tide (?:at|in|today)|tide times|sun(?:rise|set) (?:in|at|time|today)|when does the sun (?:set|rise)",
    r"(?:new|current|stable|lts|which|what) version|version of|what(?:'s| is|s)? new in|what changed (?:in|with)|change ?log|release (?:date|notes)|end of life|come out|coming out|comes out|been (?:released|announced|cancelled|recalled|fixed|postponed|sold|elected|updated)",
    r"\brecall(?:ed|s)?\b",
    r"how old is (?!(?:the|our|this|a|an) (?:universe|earth|sun|world|moon|planet|solar|milky))|net worth|is .{2,40} (?:married|dating(?! app)|retired|alive)\b",
    r"population of|how many (?:people live|users|subscribers|followers|employees|members|cases|seats|staff|puffins|players)\b|richest|world record|most (?:followed|subscribed|streamed|popular|expensive|valuable)\b",
    r"(?:roadworks|traffic|road closures?|diversions?|strikes?|outages?|delays?) (?:on|in|at|to|near|for)\b|\bany (?:roadworks|delays|traffic|strikes|jobs|tickets|vacancies|events)\b",
    r"near (?:me|here)|nearby|(?:nearest|closest) (?:\w+ ){1,3}to (?:me|here)|phone number|address of|reviews? (?:of|for)|(?:good|best) (?:\w+ ){0,2}(?:restaurants?|hotels?|cafes?|pubs?|bars?|schools?|doctors?|dentists?) (?:in|near|around)\b",
    r"when(?:'s| is|s) (?:the |our )?next\b|how old do (?:you|i) (?:have|need) to be\b",
    r"do i (?:need|have) (?:a visa|to book|to register)|visa (?:for|requirements)|travel (?:advice|warning|restrictions)|documents .{0,20}need|age limit at",
    r"\b(?:a|the) job (?:going|opening)|vacanc(?:y|ies)|hiring\b|what does .{2,50} job .{0,30}pay",
    r"(?:allowed|permitted) (?:on|in|at) the\b|can i (?:hire|rent|book|park|take|bring) .{2,40} (?:on|at|in|for|the)\b",
    r"what (?:do|did) .{2,40} (?:say|think) about\b",
    r"\b(?:has|have) (?:anyone|they|there been|scientists|researchers) .{2,60}\?|\b(?:did|has|have|is|are) .{2,60} yet\b",
    r"did (?:that|the|a) .{0,30}(?:study|trial|report|vote|inquiry|strike|merger|deal|bill|investigation)\b",
    r"how do i (?:get a refund|reset my|cancel my|contact|renew my|register (?:a|for)|apply for)\b",
    r"does .{2,60} (?:work offline|work if the internet|support|do offline|have an app)\b",
)
"""Shapes of questions whose answer changes, or depends on a place or a product that a small model does not know."""

_POLITE = r"(?:(?:please|hey|hi|hello|ok|okay|so|well|and|now|lorikeet|can you|could you|would you|will you|i need you to|i want you to|help me|let's)[,\s]+)*"
_ASKS = re.compile(
    r"\b(?:look (?:it|this|that|them|him|her) up|search (?:the (?:web|internet)|online)|google (?:it|this|that)"
    rf"|(?:check|find|look) (?:it |this |that )?(?:online|on the (?:web|internet)))\b|^\W*{_POLITE}(?P<first>look up|search for|google)\b",
    re.IGNORECASE,
)
MATERIAL_CHARACTERS = 400
"""A question this long, or with a paragraph of its own, brings the text that it is about."""

_CHANGES = [re.compile(rf"\b(?:{shape})", re.IGNORECASE) for shape in CHANGES]
_QUOTED = re.compile(
    r"```.*?(?:```|$)|`[^`]*`|\"[^\"]{2,}\"|\u201c[^\u201c\u201d]{2,}\u201d|(?<!\w)'[^'\n]{8,}'(?!\w)", re.DOTALL
)

_WRITING = re.compile(
    rf"^\W*{_POLITE}(?:(?:to )?(?:write|compose|draft|rewrite|rephrase|paraphrase|proofread|edit|summari[sz]e|imagine|pretend|act as|role-?play|"
    r"make up|invent|brainstorm|generate|design|create|role|continue|complete|outline|develop|describe|give me (?:\w+ ){0,3}(?:ideas?|poem|joke|story|riddle|tips|names?)|"
    r"tell me a(?:nother)? (?:\w+ )?(?:joke|story|poem|riddle))\b|(?:you are|you're|act) (?:a|an|as)\b)",
    re.IGNORECASE,
)
_OTHER_TASK = re.compile(
    rf"^\W*{_POLITE}(?:translate|spell|conjugate|correct|fix|debug|refactor|implement|calculate|compute|solve|simplify|multiply|divide|add|subtract|"
    r"differentiate|integrate|factor|how do (?:you|i) (?:say|spell|pronounce|write)|what(?:'s| is|s) (?:the )?(?:meaning|definition|plural|opposite|square root|past tense|sum|product)|"
    r"what does .{1,40} mean\b|define\b|explain\b|rhyme)",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"\b(?:python|javascript|typescript|java|rust|golang|c\+\+|c#|sql|bash|html|css|regex|excel|pandas|numpy|react|git|php|ruby|kotlin)\b.*"
    r"\b(?:function|code|script|query|loop|array|string|variable|error|date|formula|class|list|how (?:do|can|to))\b"
    r"|\b(?:function|code|script|query|loop|array|string|variable|formula|how (?:do|can|to)|get|print)\b.*"
    r"\b(?:python|javascript|typescript|java|rust|golang|c\+\+|c#|sql|bash|html|css|regex|excel|pandas|numpy|react|git|php|ruby|kotlin)\b",
    re.IGNORECASE,
)
_SUM = re.compile(r"\d\s*(?:[-+*/x\u00d7\u00f7^=]|times|plus|minus|divided by|percent of|% of)\s*\d", re.IGNORECASE)
_SMALL_TALK = re.compile(
    r"\b(?:how(?:'s| is| are| was| were|s) (?:you|your|things|it going|life)|how do you feel|what's up|good (?:morning|afternoon|evening|night)"
    r"|thank(?:s| you)|thx|cheers|nice to (?:meet|see)|who are you|what can you do|do you (?:like|love|recall|feel|remember|think|know me|have)|are you (?:still )?(?:there|ok|okay|a|an|real|alive|happy)"
    r"|(?:can't|cannot|don't|can not) recall|i recall)\b",
    re.IGNORECASE,
)
_ADVICE = re.compile(
    r"\b(?:what|which|where|how|when) (?:\w+ )?(?:should|shall|could|can|do|would) (?:i|we)\b|\bshould (?:i|we)\b|help me (?:decide|choose|with)|any (?:ideas|advice|tips)|i(?:'m| am) (?:so )?(?:bored|tired|sad|nervous|stressed|anxious)",
    re.IGNORECASE,
)
_TELLS = re.compile(
    r"^\W*(?:and |but |so |well |ok |okay )*(?:i|i'm|im|i've|ive|i'd|i'll|we|we're|we've|my|our|he|she|they|it's|it|that|that's|this|you|mum|dad)\b",
    re.IGNORECASE,
)
_REQUEST = re.compile(
    rf"\?|(?:^|[.!,;] )\W*{_POLITE}(?:who|what|when|where|which|why|how|is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|any"
    r"|tell|give|show|find|check|get|list|read)(?:'?s|'re)?\b|\b(?:i (?:need|want|would like|'d like) (?:to know|the|a|some)|i wonder|i'm looking for"
    r"|wondering|curious|tell me|do you know|any idea)\b",
    re.IGNORECASE,
)
_PHRASE_WORDS = 8
"""So many words without a verb in front can be a phrase typed into a search box; more tell something."""

_PRIVATE = re.compile(
    r"\b(?:my|our) (?:\w+ )?(?:account|balance|blood|heart|pulse|driving test|password|calendar|diary|schedule|alarm|timer|messages?|emails?|inbox|to-?do)\b",
    re.IGNORECASE,
)
_OTHER_SENSE = re.compile(
    r"\b(?:(?:electric(?:al)?|alternating|direct|ocean|air|water|tidal) current|current (?:account|through|in (?:a|the) (?:wire|circuit|resistor))|current flow|price (?:elasticity|floor|ceiling|of (?:freedom|fame|success))"
    r"|price[- ]to[- ]earnings|weather the|under the weather|(?:how|why) (?:does|do|is) (?:the )?weather|recent history|(?:in|of) today's (?:world|society|date))\b",
    re.IGNORECASE,
)
_OLD_YEAR = re.compile(r"\b(?:1[0-9]\d\d|20\d\d)\b|\b(?:ancient|medieval|century|world war)\b", re.IGNORECASE)


def decide(question: str, *, today: date) -> str | None:
    """Return why `question` asks for a search, such as `you asked about "weather"`; None if it does not.

    Besides the keywords, this year's number, last year's and next year's count: a model's knowledge ends before them.
    """
    text = " ".join(_OTHER_SENSE.sub(" ", _QUOTED.sub(" ", question)).split())
    if asked := _ASKS.search(text):
        return f'you asked to "{(asked["first"] or asked[0]).lower()}"'
    if len(text) > MATERIAL_CHARACTERS or _has_paragraphs(question):
        return None
    if (
        _OTHER_TASK.search(text)
        or _CODE.search(text)
        or _SUM.search(text)
        or _SMALL_TALK.search(text)
        or _PRIVATE.search(text)
    ):
        # A version or a price is looked up also for a programming language.
        return _version(text)
    years = "|".join(str(today.year + offset) for offset in (0, -1, 1))
    strong = re.search(rf"\b(?:latest|newest|news|headlines|{years})\b", text, re.IGNORECASE)
    if _WRITING.search(text):
        return _about(strong)
    requests = _REQUEST.search(text)
    if _TELLS.search(text) and not requests:
        return None
    asks = requests or len(text.split()) <= _PHRASE_WORDS
    word = re.search(rf"\b(?:{'|'.join(KEYWORDS)}|{_NEWS})\b", text, re.IGNORECASE)
    if strong or (word and asks and not _ADVICE.search(text)):
        return _about(strong or word)
    if _OLD_YEAR.search(text):
        return None
    found = next((match for shape in _CHANGES if (match := shape.search(text))), None)
    return f'this may have changed: "{_short(found.group(0))}"' if found else None


def _has_paragraphs(text: str) -> bool:
    """Say whether there is an empty line between two lines of `text`."""
    return any(not line.strip() for line in text.strip().split("\n")[1:])


def _version(text: str) -> str | None:
    return _about(re.search(r"\b(?:latest|newest|current) (?:stable )?(?:version|release)\b", text, re.IGNORECASE))


def _about(word: re.Match[str] | None) -> str | None:
    return f'you asked about "{word.group(0).lower()}"' if word else None


def _short(text: str) -> str:
    """Return the words that decided, at most eight of them, for the reason."""
    words = text.strip(" ?.,").split()
    return " ".join(words if len(words) <= 8 else [*words[:5], "…", *words[-2:]])
